// What an instruction set offers: one table, filled by kernels.inc, once for each set.
#pragma once

#include <cstdint>

namespace tokenspeed::cpu {

constexpr int kGroup = 32;  // columns that share a scale
constexpr int kLanes = 16;  // rows that lie together

// Rows as whole lanes.
inline std::int64_t row_blocks(std::int64_t rows) {
  return (rows + kLanes - 1) / kLanes;
}
// Activations rounded to 8 bits: numbers[tokens, cols], and of each group its scale and the sum of
// what the numbers stand for.
struct Rounded {
  std::int8_t* numbers;
  float* scales;
  float* sums;
};

struct Linear {
  const std::uint8_t* packed;
  Rounded x;
  std::int64_t tokens, cols, rows;
  const void* bias;
  void* out;
};

struct Product {
  const void* x;
  std::int64_t x_stride, tokens, cols;
  const void* weight;
  std::int64_t rows;
  const void* bias;
  void* out;
  void* paired;  // x as `pair` leaves it, where a set wants it so
};

struct Attention {
  const void *q, *k_pages, *v_pages;
  const std::int32_t *query_start, *context_lens, *page_table;
  std::int64_t rows, table_stride, page_size, heads, kv_heads, dim, window, queries_max;
  void* out;
};

// [0] for float32, [1] for bfloat16.
struct Kernels {
  const char* isa;
  void (*round_to_8)(const void* x, std::int64_t stride, std::int64_t cols, std::int64_t begin,
                     std::int64_t end, const Rounded& out, int dtype);
  void (*linear)(const Linear& call, int bits, int dtype, std::int64_t begin, std::int64_t end);
  // Of `product`: how many rows it takes together; for how many tokens it is worth calling; bytes
  // that it wants x laid out in first, 0 of most; and what does that, for tiles [begin, end) of
  // kLanes tokens.
  int rows_together[2];
  std::int64_t tokens_max[2];
  std::int64_t (*paired_bytes)(std::int64_t tokens, std::int64_t cols, int dtype);
  void (*pair)(const Product& call, std::int64_t begin, std::int64_t end);
  // Of rows [begin, end), begin a multiple of rows_together.
  void (*product)(const Product& call, int dtype, std::int64_t begin, std::int64_t end);
  void (*rms_norm)(const void* x, const void* residual, const void* weight, std::int64_t dim,
                   float eps, void* out, void* total, int dtype, std::int64_t begin,
                   std::int64_t end);
  void (*silu_mul)(const void* x, std::int64_t width, void* out, int dtype, std::int64_t begin,
                   std::int64_t end);
  void (*rope)(const void* x, std::int64_t token_stride, std::int64_t head_stride,
               std::int64_t heads, std::int64_t dim, const std::int64_t* positions,
               const float* cos_sin, void* out, bool interleaved, int dtype, std::int64_t tokens);
  void (*argmax)(const void* x, std::int64_t width, std::int64_t* out, int dtype,
                 std::int64_t begin, std::int64_t end);
  void (*finite)(const void* x, std::int64_t width, std::uint8_t* out, int dtype,
                 std::int64_t begin, std::int64_t end);
  void (*kv_write)(const void* x, std::int64_t token_stride, std::int64_t tokens,
                   std::int64_t width, const std::int64_t* locations, void* pages, int dtype,
                   int kv_dtype);
  // Items are (token, KV head), tokens outermost.
  void (*attention)(const Attention& call, int dtype, int kv_dtype, std::int64_t begin,
                    std::int64_t end);
  // A row that it leaves out, in bfloat16, by items of another kind; null where a set has no way.
  std::int64_t (*long_items)(const Attention& call, std::int64_t row);
  void (*attend_long)(const Attention& call, std::int64_t row, int kv_dtype, std::int64_t begin,
                      std::int64_t end);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#if defined(TOKENSPEED_CPU_AMX)
extern const Kernels kAmx;
#endif
#endif

}  // namespace tokenspeed::cpu
