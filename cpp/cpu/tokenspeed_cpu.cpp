#include "tokenspeed_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(TOKENSPEED_CPU_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenspeed::cpu {
namespace {

#if defined(__x86_64__)
// A feature by its place in what cpuid says, for names that not all compilers know.
enum Register { kA, kB, kC, kD };
bool has(unsigned leaf, unsigned part, Register where, int bit) {
  unsigned found[4] = {};
  return __get_cpuid_count(leaf, part, &found[kA], &found[kB], &found[kC], &found[kD]) &&
         (found[where] >> bit & 1) != 0;
}
#endif

#if defined(TOKENSPEED_CPU_AMX)
// Tiles are 8 KB that the system saves for a thread, so a process must ask before it uses them (the
// kernel's Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
  const bool bf16 = has(7, 1, kA, 5) && has(7, 0, kD, 22), tiles = has(7, 0, kD, 24);
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return bf16 && tiles && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}
#endif

// The sets that this machine has, the best one first.
std::vector<const Kernels*> sets() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(TOKENSPEED_CPU_AMX)
  if (avx512 && may_use_tiles()) found.push_back(&kAmx);
#endif
  if (avx512) found.push_back(&kAvx512Vnni);
  const bool f16c = has(1, 0, kC, 29);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) {
    found.push_back(&kAvx2);
  }
#endif
  found.push_back(&kPortable);
  return found;
}

// TOKENSPEED_CPU_ISA names a lesser set: for tests. Of one that the machine has not, the last.
const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const char* name = std::getenv("TOKENSPEED_CPU_ISA");
    const std::vector<const Kernels*> found = sets();
    if (name == nullptr) return found.front();
    for (const Kernels* one : found) {
      if (std::strcmp(name, one->isa) == 0) return one;
    }
    return found.back();
  }();
  return *chosen;
}

// Room that a thread keeps from call to call.
Rounded room(std::int64_t tokens, std::int64_t cols) {
  thread_local std::vector<std::int8_t> numbers;
  thread_local std::vector<float> scales;
  const auto groups = static_cast<std::size_t>(tokens * (cols / kGroup));
  numbers.resize(std::max(numbers.size(), static_cast<std::size_t>(tokens * cols)));
  scales.resize(std::max(scales.size(), 2 * groups));
  return {numbers.data(), scales.data(), scales.data() + groups};
}

// The same, for x as the tiles want it; null for no bytes.
void* paired_room(std::int64_t bytes) {
  struct alignas(64) Line {
    char bytes[64];
  };
  thread_local std::vector<Line> lines;
  if (bytes == 0) return nullptr;
  lines.resize(std::max(lines.size(), (static_cast<std::size_t>(bytes) + 63) / 64));
  return lines.data();
}

std::int64_t size_of(int dtype) {
  return dtype == 0 ? 4 : 2;
}

// What is not worth a second thread, some microseconds: elements, and products.
constexpr std::int64_t kSmall = 16384;
constexpr std::int64_t kSmallProduct = 1 << 17;

std::int64_t piece_of(std::int64_t items, std::int64_t item, std::int64_t small, int threads) {
  const std::int64_t enough = small / std::max(std::int64_t{1}, item);
  return std::max({std::int64_t{1}, enough, items / (8 * std::int64_t{threads})});
}

// Shares a loop over rows of `width` elements.
template <class Function>
void over_rows(std::int64_t rows, std::int64_t width, std::int64_t small, int threads,
               Function&& work) {
  share(rows, piece_of(rows, width, small, threads), threads, work);
}

// An argument from the word that it was written down as.
template <class T>
T from_word(std::int64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(static_cast<std::uintptr_t>(word));
  } else if constexpr (std::is_same_v<T, float>) {
    const auto bits = static_cast<std::uint32_t>(word);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  } else {
    return static_cast<T>(word);
  }
}

template <class... Arguments, std::size_t... At>
void call(void (*function)(Arguments...), const std::int64_t* words, std::index_sequence<At...>) {
  static_assert(sizeof...(Arguments) < TS_CPU_CALL_WORDS);
  function(from_word<Arguments>(words[At])...);
}

template <class... Arguments>
void call(void (*function)(Arguments...), const std::int64_t* words) {
  call(function, words, std::index_sequence_for<Arguments...>{});
}

struct Replayable {
  const char* name;
  void (*run)(const std::int64_t* words);
};

#define REPLAYABLE(name)                                                 \
  Replayable {                                                           \
    #name, [](const std::int64_t* words) { call(ts_cpu_##name, words); } \
  }
const Replayable kReplayable[] = {
    REPLAYABLE(linear), REPLAYABLE(rms_norm), REPLAYABLE(silu_mul), REPLAYABLE(rope),
    REPLAYABLE(argmax), REPLAYABLE(finite),   REPLAYABLE(kv_write), REPLAYABLE(attention),
    REPLAYABLE(take),   REPLAYABLE(product),
};
#undef REPLAYABLE

}  // namespace
}  // namespace tokenspeed::cpu

using namespace tokenspeed::cpu;

const char* ts_cpu_isa(void) {
  return kernels().isa;
}

void ts_cpu_linear(int dtype, const void* x, int64_t x_stride, int64_t tokens, int64_t cols,
                   const uint8_t* packed, int64_t rows, int bits, const void* bias, void* out,
                   int threads) {
  const Kernels& run = kernels();
  const Rounded rounded = room(tokens, cols);
  auto round = [&](int64_t begin, int64_t end) {
    run.round_to_8(x, x_stride, cols, begin, end, rounded, dtype);
  };
  share(tokens, piece_of(tokens, cols, kSmall, threads), threads, round);
  const Linear call{packed, rounded, tokens, cols, rows, bias, out};
  auto multiply = [&](int64_t begin, int64_t end) { run.linear(call, bits, dtype, begin, end); };
  const auto blocks = row_blocks(rows);
  share(blocks, piece_of(blocks, kLanes * cols * tokens, kSmallProduct, threads), threads,
        multiply);
}

int64_t ts_cpu_product_tokens(int dtype) {
  return kernels().tokens_max[dtype];
}

void ts_cpu_product(int dtype, const void* x, int64_t x_stride, int64_t tokens, int64_t cols,
                    const void* weight, int64_t rows, const void* bias, void* out, int threads) {
  if (tokens == 0) return;
  const Kernels& run = kernels();
  void* paired = paired_room(run.paired_bytes(tokens, cols, dtype));
  const Product call{x, x_stride, tokens, cols, weight, rows, bias, out, paired};
  if (paired != nullptr) {
    auto pair = [&](int64_t begin, int64_t end) { run.pair(call, begin, end); };
    const int64_t lots = row_blocks(tokens);
    share(lots, piece_of(lots, kLanes * cols, kSmall, threads), threads, pair);
  }
  const int64_t together = run.rows_together[dtype];
  const int64_t tiles = (rows + together - 1) / together;
  auto multiply = [&](int64_t begin, int64_t end) {
    run.product(call, dtype, begin * together, std::min(end * together, rows));
  };
  share(tiles, piece_of(tiles, together * cols * tokens, kSmallProduct, threads), threads,
        multiply);
}

void ts_cpu_rms_norm(int dtype, const void* x, const void* residual, const void* weight,
                     int64_t tokens, int64_t dim, float eps, void* out, void* total, int threads) {
  over_rows(tokens, dim, kSmall, threads, [&](int64_t begin, int64_t end) {
    kernels().rms_norm(x, residual, weight, dim, eps, out, total, dtype, begin, end);
  });
}

void ts_cpu_silu_mul(int dtype, const void* x, int64_t tokens, int64_t width, void* out,
                     int threads) {
  over_rows(tokens, width, kSmall, threads, [&](int64_t begin, int64_t end) {
    kernels().silu_mul(x, width, out, dtype, begin, end);
  });
}

void ts_cpu_argmax(int dtype, const void* x, int64_t rows, int64_t width, int64_t* out,
                   int threads) {
  over_rows(rows, width, kSmallProduct, threads, [&](int64_t begin, int64_t end) {
    kernels().argmax(x, width, out, dtype, begin, end);
  });
}

void ts_cpu_finite(int dtype, const void* x, int64_t rows, int64_t width, uint8_t* out,
                   int threads) {
  over_rows(rows, width, kSmallProduct, threads, [&](int64_t begin, int64_t end) {
    kernels().finite(x, width, out, dtype, begin, end);
  });
}

void ts_cpu_take(int dtype, const void* x, int64_t rows, int64_t width, const int64_t* ids,
                 int64_t count, void* out) {
  const int64_t bytes = width * size_of(dtype);
  for (int64_t i = 0; i < count; ++i) {
    char* to = static_cast<char*>(out) + i * bytes;
    if (ids[i] >= 0 && ids[i] < rows) {
      std::memcpy(to, static_cast<const char*>(x) + ids[i] * bytes,
                  static_cast<std::size_t>(bytes));
    } else {
      std::memset(to, 0xff, static_cast<std::size_t>(bytes));
    }
  }
}

void ts_cpu_rope(int dtype, const void* x, int64_t token_stride, int64_t head_stride,
                 int64_t tokens, int64_t heads, int64_t dim, const int64_t* positions,
                 const float* cos_sin, void* out, int interleaved) {
  kernels().rope(x, token_stride, head_stride, heads, dim, positions, cos_sin, out,
                 interleaved != 0, dtype, tokens);
}

void ts_cpu_kv_write(int dtype, const void* x, int64_t token_stride, int64_t tokens, int64_t width,
                     const int64_t* locations, void* pages, int kv_dtype) {
  kernels().kv_write(x, token_stride, tokens, width, locations, pages, dtype, kv_dtype);
}

int ts_cpu_attends_long(int dtype, int kv_dtype, int64_t dim) {
  return kernels().attend_long != nullptr && dtype == 1 && kv_dtype > 0 && dim % kGroup == 0;
}

void ts_cpu_attention(int dtype, const void* q, const void* k_pages, const void* v_pages,
                      int64_t rows, const int32_t* query_start, const int32_t* context_lens,
                      const int32_t* page_table, int64_t table_stride, int64_t page_size,
                      int64_t heads, int64_t kv_heads, int64_t dim, int64_t window,
                      int64_t queries_max, void* out, int kv_dtype, int threads) {
  const Attention call{q,          k_pages, v_pages,      query_start, context_lens,
                       page_table, rows,    table_stride, page_size,   heads,
                       kv_heads,   dim,     window,       queries_max, out};
  auto work = [&](int64_t begin, int64_t end) {
    kernels().attention(call, dtype, kv_dtype, begin, end);
  };
  share(query_start[rows] * kv_heads, 1, threads, work);
  if (!ts_cpu_attends_long(dtype, kv_dtype, dim)) return;
  for (int64_t row = 0; row < rows; ++row) {
    if (query_start[row + 1] - query_start[row] <= queries_max) continue;
    auto part = [&](int64_t begin, int64_t end) {
      kernels().attend_long(call, row, kv_dtype, begin, end);
    };
    share(kernels().long_items(call, row), 1, threads, part);
  }
}

int ts_cpu_number(const char* name) {
  int number = 0;
  for (const Replayable& one : kReplayable) {
    if (std::strcmp(one.name, name) == 0) return number;
    ++number;
  }
  return -1;
}

void ts_cpu_replay(const int64_t* calls, int64_t count) {
  for (int64_t at = 0; at < count; ++at, calls += TS_CPU_CALL_WORDS) {
    kReplayable[calls[0]].run(calls + 1);
  }
}
