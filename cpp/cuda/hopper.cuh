// What Hopper adds, as PTX: barriers that count bytes, copies of boxes, products of warpgroups.
// Rule: one instruction a function, named for what it does here; shapes and layouts beside it.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

__device__ inline uint32_t address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- Barriers in shared memory
// --------------------------------------------------------------------

__device__ inline void make_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals));
}

__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ inline void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ inline void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}

// Among `threads` threads that name the same id.
__device__ inline void sync_group(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same, and whether it is true of any of them.
__device__ inline bool sync_any(int id, int threads, bool mine) {
  int any;
  asm volatile(
      "{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %1, 0;\n"
      "barrier.cta.red.or.pred any, %2, %3, mine;\nselp.b32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(int(mine)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

// What ordinary stores wrote to shared memory, tensor cores and copies see after this and a
// barrier.
__device__ inline void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// To L2, whatever is there by then.
__device__ inline void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// 16 bytes to shared memory, there after wait_for_copies of this thread.
__device__ inline void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from)
               : "memory");
}

__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// --- One launch after the other
// -------------------------------------------------------------------

// The next launch of the stream may begin, up to its own wait_for_launches.
__device__ inline void let_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the launch before is over, and what it wrote is there.
__device__ inline void wait_for_launches() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// --- Copies of boxes
// ------------------------------------------------------------------------------

__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline uint64_t evict_normal() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What lies outside the tensor arrives as zeros, and counts as bytes.
__device__ inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier,
                                uint64_t policy, int y, int columns, int z) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(address(to)),
      "l"(map), "r"(0), "r"(y), "r"(columns), "r"(z), "r"(address(barrier)), "l"(policy)
      : "memory");
}

// [z, sets, rows, columns] in global memory; sizes and strides, in values, of the first three from
// the third on. Columns are 128 bytes, or 64.
struct Tensor {
  const void* base;
  int64_t sizes[3], strides[3];
  int columns = 64, bytes = 2;  // of bfloat16, or of 1 for anything of 8 bits
};

// Boxes of `count` times `rows` rows of a tensor. The 16 bytes of a row are swizzled: by the row's
// number where there are eight, by half of it where there are four.
inline int make_map(CUtensorMap* map, const Tensor& of, int rows, int count) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  if (encode == nullptr) return int(cudaErrorSymbolNotFound);
  cuuint64_t extents[4] = {cuuint64_t(of.columns)}, bytes[3];
  for (int i = 0; i < 3; ++i) {
    extents[i + 1] = cuuint64_t(of.sizes[i]);
    bytes[i] = cuuint64_t(of.strides[i]) * of.bytes;
  }
  const cuuint32_t box[4] = {cuuint32_t(of.columns), cuuint32_t(rows), cuuint32_t(count), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      map, of.bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      const_cast<void*>(of.base), extents, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      of.columns * of.bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}

// --- Products of a warpgroup
// ----------------------------------------------------------------------

template <int Registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Operands in shared memory are named by 32 bits that add up: `operand + bytes_on(n)` lies n bytes
// further on. What they share, eight rows 1024 bytes apart and the swizzle, is the upper half of a
// descriptor. The same for all threads of a warp, and the compiler has to know: what it does not it
// moves to the uniform registers before each product, which then waits for that and not for data.
constexpr uint32_t kOperand = 0x40000040;

__device__ constexpr uint32_t bytes_on(int bytes) {
  return uint32_t(bytes) >> 4;
}

// For eight rows that lie so many bytes from the next; rows of 64 bytes if narrow.
__device__ constexpr uint32_t operand_apart(int bytes, bool narrow = false) {
  return (narrow ? 0x80000000u : kOperand & ~0xffffu) | bytes_on(bytes);
}

// An address has a block's place in its cluster in its upper bits.
__device__ inline uint32_t operand(const uint8_t* at, int next) {
  return __shfl_sync(~0u, (address(at) & 0x3ffff) >> 4 | uint32_t(next) >> 4 << 16, 0);
}

// Whose rows of 64 columns run along the sum.
__device__ inline uint32_t rows_of(const uint8_t* at) {
  return operand(at, 16);
}

// Whose rows are what is summed over: `next` bytes on lie the next 64 columns.
__device__ inline uint32_t columns_of(const uint8_t* at, int next) {
  return operand(at, next);
}

__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most so many of the groups committed last are under way.
template <int Groups>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

// Registers that a product reads or writes stay what they are up to here.
template <int Count>
__device__ inline void keep(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d[64, 64] = a[64, 16] b[64, 16]^T (+ d); eight rows of a lie `Apart` bytes from the next.
template <int Apart>
__device__ inline void wgmma_64x64(float (&d)[32], uint32_t a, uint32_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %34, 0;\n"
      "mov.b64 a, {%32, %36};\nmov.b64 b, {%33, %35};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31"
      "}, a, b, add, 1, 1, 0, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a), "r"(b), "r"(add), "n"(kOperand), "n"(operand_apart(Apart)));
}

// Four matrices of 8 x 8 of bfloat16, of rows whose 16 bytes each lane points to.
__device__ inline void load_matrices(uint32_t (&to)[4], const uint8_t* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address(at))
               : "memory");
}

__device__ inline void store_matrices(uint8_t* at, const uint32_t (&from)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(at)),
      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
      : "memory");
}

// The same of the transposes, and of 8-bit values by pairs that belong to one row.
__device__ inline void load_transposed(uint32_t (&to)[4], const uint8_t* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address(at))
               : "memory");
}

__device__ inline void store_transposed(uint8_t* at, const uint32_t (&from)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(at)),
      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
      : "memory");
}

// Four values of e4m3 as two pairs in half precision, which has them all.
__device__ inline void widen(uint32_t& low, uint32_t& high, uint32_t four) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(low), "=r"(high)
      : "r"(four));
}

// Two numbers as e4m3, the first one in the low byte, and back.
__device__ inline uint32_t narrow(__half2 two) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;"
      : "=h"(pair)
      : "r"(reinterpret_cast<const uint32_t&>(two)));
  return pair;
}

__device__ inline __half2 widened(uint32_t pair) {
  uint32_t two;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"(uint16_t(pair)));
  return reinterpret_cast<const __half2&>(two);
}

// d[64, 128] = a[64, 16] b[16, 128] (+ d), a in registers, d from register `At` on.
template <int At, int Count>
__device__ inline void wgmma_64x128(float (&d)[Count], const uint32_t (&a)[4], uint32_t b,
                                    int add) {
  static_assert(At + 64 <= Count);
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %69, 0;\nmov.b64 b, {%68, %70};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, b, add, 1, 1, 1;\n}"
      : "+f"(d[At + 0]), "+f"(d[At + 1]), "+f"(d[At + 2]), "+f"(d[At + 3]), "+f"(d[At + 4]),
        "+f"(d[At + 5]), "+f"(d[At + 6]), "+f"(d[At + 7]), "+f"(d[At + 8]), "+f"(d[At + 9]),
        "+f"(d[At + 10]), "+f"(d[At + 11]), "+f"(d[At + 12]), "+f"(d[At + 13]), "+f"(d[At + 14]),
        "+f"(d[At + 15]), "+f"(d[At + 16]), "+f"(d[At + 17]), "+f"(d[At + 18]), "+f"(d[At + 19]),
        "+f"(d[At + 20]), "+f"(d[At + 21]), "+f"(d[At + 22]), "+f"(d[At + 23]), "+f"(d[At + 24]),
        "+f"(d[At + 25]), "+f"(d[At + 26]), "+f"(d[At + 27]), "+f"(d[At + 28]), "+f"(d[At + 29]),
        "+f"(d[At + 30]), "+f"(d[At + 31]), "+f"(d[At + 32]), "+f"(d[At + 33]), "+f"(d[At + 34]),
        "+f"(d[At + 35]), "+f"(d[At + 36]), "+f"(d[At + 37]), "+f"(d[At + 38]), "+f"(d[At + 39]),
        "+f"(d[At + 40]), "+f"(d[At + 41]), "+f"(d[At + 42]), "+f"(d[At + 43]), "+f"(d[At + 44]),
        "+f"(d[At + 45]), "+f"(d[At + 46]), "+f"(d[At + 47]), "+f"(d[At + 48]), "+f"(d[At + 49]),
        "+f"(d[At + 50]), "+f"(d[At + 51]), "+f"(d[At + 52]), "+f"(d[At + 53]), "+f"(d[At + 54]),
        "+f"(d[At + 55]), "+f"(d[At + 56]), "+f"(d[At + 57]), "+f"(d[At + 58]), "+f"(d[At + 59]),
        "+f"(d[At + 60]), "+f"(d[At + 61]), "+f"(d[At + 62]), "+f"(d[At + 63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(kOperand));
}

// d[64, 16 or 32 or 64] = a[64, 16] b[16 or 32 or 64, 16]^T + d in half precision, a in
// registers; eight rows of b lie 1024 bytes from the next.
__device__ inline void wgmma_half(float (&d)[8], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 b;\nsetp.eq.u32 add, 0, 0;\nmov.b64 b, {%12, %13};\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, {%8, %9, %10, %11}, b, add, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand));
}

__device__ inline void wgmma_half(float (&d)[16], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 b;\nsetp.eq.u32 add, 0, 0;\nmov.b64 b, {%20, %21};\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, b, add, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand));
}

__device__ inline void wgmma_half(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 b;\nsetp.eq.u32 add, 0, 0;\nmov.b64 b, {%36, %37};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, b, add, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand));
}

// d[64, 16 or 32 or 64] = a[64, 32] b[16 or 32 or 64, 32]^T (+ d) of numbers of e4m3, whose rows
// are 128 bytes, or 64 if narrow.
template <int Apart, bool Narrow>
__device__ inline void wgmma_eight(float (&d)[8], uint32_t a, uint32_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %10, 0;\n"
      "mov.b64 a, {%8, %11};\nmov.b64 b, {%9, %12};\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, a, b, add, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "r"(a), "r"(b), "r"(add), "n"(operand_apart(Narrow ? 512 : 1024, Narrow)),
        "n"(operand_apart(Apart, Narrow)));
}

template <int Apart, bool Narrow>
__device__ inline void wgmma_eight(float (&d)[16], uint32_t a, uint32_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %18, 0;\n"
      "mov.b64 a, {%16, %19};\nmov.b64 b, {%17, %20};\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15"
      "}, a, b, add, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a), "r"(b), "r"(add), "n"(operand_apart(Narrow ? 512 : 1024, Narrow)),
        "n"(operand_apart(Apart, Narrow)));
}

template <int Apart, bool Narrow>
__device__ inline void wgmma_eight(float (&d)[32], uint32_t a, uint32_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %34, 0;\n"
      "mov.b64 a, {%32, %35};\nmov.b64 b, {%33, %36};\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31"
      "}, a, b, add, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a), "r"(b), "r"(add), "n"(operand_apart(Narrow ? 512 : 1024, Narrow)),
        "n"(operand_apart(Apart, Narrow)));
}

}  // namespace
