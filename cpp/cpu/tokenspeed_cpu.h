/* CPU kernels behind a plain C ABI: no torch, no Python, no OpenMP.
 *
 * Rule: a function says its shapes here and checks nothing; whoever calls it has. dtype: 0 float32,
 * 1 bfloat16; kv_dtype, of pages, is the same or 2 for float8_e4m3fn. Strides are in elements.
 * threads: that may take part, the caller's included. What a token gets does not depend on the
 * tokens beside it.
 */
#ifndef TOKENSPEED_CPU_H
#define TOKENSPEED_CPU_H

#include <stdint.h>

#if defined(__GNUC__)
#define TS_CPU_API __attribute__((visibility("default")))
#else
#define TS_CPU_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The instruction set that the kernels below run on: "amx", "avx512-vnni", "avx2" or
 * "portable". */
TS_CPU_API const char* ts_cpu_isa(void);

/* out[tokens, rows] = x[tokens, cols] @ weight.T + bias, weight packed to 4 or 8 bits as
 * src/tokenspeed/kernels/packing.py lays it out; x is rounded to 8 bits, with a scale for each
 * group of 32. bias may be null. cols is a multiple of 32. */
TS_CPU_API void ts_cpu_linear(int dtype, const void* x, int64_t x_stride, int64_t tokens,
                              int64_t cols, const uint8_t* packed, int64_t rows, int bits,
                              const void* bias, void* out, int threads);

/* out[tokens, rows] = x[tokens, cols] weight[rows, cols]^T + bias, all of one dtype; sums in
 * float32. Tokens of x lie x_stride elements apart, bias may be null. It is meant for as many
 * tokens as ts_cpu_product_tokens says; with more, other libraries are the faster ones. */
TS_CPU_API int64_t ts_cpu_product_tokens(int dtype);
TS_CPU_API void ts_cpu_product(int dtype, const void* x, int64_t x_stride, int64_t tokens,
                               int64_t cols, const void* weight, int64_t rows, const void* bias,
                               void* out, int threads);

/* total = x + residual (x alone where residual is null); out = total / rms(total) * weight. total
 * may be null: nobody wants it. */
TS_CPU_API void ts_cpu_rms_norm(int dtype, const void* x, const void* residual, const void* weight,
                                int64_t tokens, int64_t dim, float eps, void* out, void* total,
                                int threads);

/* out[tokens, width] = silu(x[:, :width]) * x[:, width:]. */
TS_CPU_API void ts_cpu_silu_mul(int dtype, const void* x, int64_t tokens, int64_t width, void* out,
                                int threads);

/* Of each row of x[rows, width]: the first index of its largest element (no element is a NaN); 1 if
 * all are finite, else 0. */
TS_CPU_API void ts_cpu_argmax(int dtype, const void* x, int64_t rows, int64_t width, int64_t* out,
                              int threads);
TS_CPU_API void ts_cpu_finite(int dtype, const void* x, int64_t rows, int64_t width, uint8_t* out,
                              int threads);

/* Halves (a, b) of each head, or neighbours where `interleaved` is not 0, become (a cos - b sin, b
 * cos + a sin); cos_sin float32[context, dim]; out[tokens, heads, dim]. */
TS_CPU_API void ts_cpu_rope(int dtype, const void* x, int64_t token_stride, int64_t head_stride,
                            int64_t tokens, int64_t heads, int64_t dim, const int64_t* positions,
                            const float* cos_sin, void* out, int interleaved);

/* pages[locations[t]] = x[t], rows of `width` elements; into 8 bits to the nearest, ties to even,
 * at most 448. */
TS_CPU_API void ts_cpu_kv_write(int dtype, const void* x, int64_t token_stride, int64_t tokens,
                                int64_t width, const int64_t* locations, void* pages, int kv_dtype);

/* Causal attention of q[tokens, heads, dim] to pages[pages, page_size, kv_heads, dim]. Query j of
 * n of a row sees positions up to context + j, the last `window` of them where it is positive. Rows
 * of more than queries_max queries are left out, unless ts_cpu_attends_long says that such rows
 * have a kernel of their own; dim is 256 at most. */
TS_CPU_API int ts_cpu_attends_long(int dtype, int kv_dtype, int64_t dim);
TS_CPU_API void ts_cpu_attention(int dtype, const void* q, const void* k_pages, const void* v_pages,
                                 int64_t rows, const int32_t* query_start,
                                 const int32_t* context_lens, const int32_t* page_table,
                                 int64_t table_stride, int64_t page_size, int64_t heads,
                                 int64_t kv_heads, int64_t dim, int64_t window, int64_t queries_max,
                                 void* out, int kv_dtype, int threads);

/* out[i] = x[ids[i]], rows of `width` elements of x[rows, width]. For an id that is no row there
 * are NaNs. */
TS_CPU_API void ts_cpu_take(int dtype, const void* x, int64_t rows, int64_t width,
                            const int64_t* ids, int64_t count, void* out);

/* Calls that are written down to be made again, in their order: TS_CPU_CALL_WORDS words each, the
 * number of the function, then its arguments: integers and pointers as they are, a float by its
 * bits. A function's number is that of its name without ts_cpu_; -1: it cannot be written down. */
#define TS_CPU_CALL_WORDS 19
TS_CPU_API int ts_cpu_number(const char* name);
TS_CPU_API void ts_cpu_replay(const int64_t* calls, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
