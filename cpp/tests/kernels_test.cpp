// The CPU kernels read and write nothing beside what they are given, by each instruction set that
// this machine has: every buffer ends where a page that nobody may touch begins, then begins where
// such a page ends. For the sanitizers, which do not see what tiles and masked lanes touch; without
// them, the pages do. That results are right is for tests/property/test_kernels.py; here, that they
// are whole, and depend neither on where buffers lie nor on how many threads share the work.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/tokenspeed_cpu.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr int kFloat32 = 0, kBfloat16 = 1, kFloat8 = 2;
constexpr int kDtypes[] = {kFloat32, kBfloat16};
constexpr std::int64_t kQueriesMax = 8;

// What is being done; of a process that a fault ended, its parent still reads it.
constexpr std::size_t kDoing = 256;
char* doing = nullptr;

void now_doing(const std::string& what) {
  std::snprintf(doing, kDoing, "%s", what.c_str());
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "kernels_test: %s, %s: %s\n", ts_cpu_isa(), doing, what);
  std::abort();
}

std::int64_t size_of(int dtype) {
  return dtype == kFloat32 ? 4 : dtype == kBfloat16 ? 2 : 1;
}

// Buffers between pages that nobody may touch, with the same contents in each room.
class Room {
 public:
  Room(bool at_end, int threads) : at_end_(at_end), threads_(threads) {}
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() {
    for (const auto& [start, size] : mapped_) munmap(start, size);
  }

  int threads() const { return threads_; }

  // All bits set: NaN in every dtype, -1 as an integer.
  std::uint8_t* unwritten(std::int64_t bytes) {
    const std::int64_t page = sysconf(_SC_PAGESIZE);
    const std::int64_t inner = (bytes + page - 1) / page * page;
    const auto size = static_cast<std::size_t>(inner + 2 * page);
    void* start = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(start != MAP_FAILED, "no memory");
    mapped_.emplace_back(start, size);
    auto* const first = static_cast<std::uint8_t*>(start) + page;
    if (inner > 0) {
      const int done = mprotect(first, static_cast<std::size_t>(inner), PROT_READ | PROT_WRITE);
      require(done == 0, "no memory");
    }
    std::uint8_t* const made = at_end_ ? first + (inner - bytes) : first;
    if (bytes > 0) std::memset(made, 0xff, static_cast<std::size_t>(bytes));
    return made;
  }

  // Numbers between -1 and 1.
  void* numbers(std::int64_t count, int dtype) {
    std::uint8_t* const made = unwritten(count * size_of(dtype));
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(below(2001)) / 1000.0F - 1.0F;
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const std::uint32_t upper = bits >> 16, eighth = (bits >> 24 & 0x80) | below(0x39);
      if (dtype == kFloat32) std::memcpy(made + 4 * i, &bits, 4);
      if (dtype == kBfloat16) std::memcpy(made + 2 * i, &upper, 2);
      if (dtype == kFloat8) std::memcpy(made + i, &eighth, 1);
    }
    return made;
  }

  // Words of 16 bits that are small numbers as float16 too.
  std::uint8_t* packed(std::int64_t bytes) {
    std::uint8_t* const made = unwritten(bytes);
    for (std::int64_t i = 0; i < bytes; i += 2) {
      const std::uint32_t word = 0x2000 + below(0x1c00);
      std::memcpy(made + i, &word, 2);
    }
    return made;
  }

  template <class T>
  T* integers(const std::vector<T>& values) {
    const std::size_t bytes = values.size() * sizeof(T);
    std::uint8_t* const made = unwritten(static_cast<std::int64_t>(bytes));
    if (bytes > 0) std::memcpy(made, values.data(), bytes);
    return reinterpret_cast<T*>(made);
  }

 private:
  std::uint32_t below(std::uint32_t end) {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;  // Knuth's
    return static_cast<std::uint32_t>(state_ >> 33) % end;
  }

  bool at_end_;
  int threads_;
  std::uint64_t state_ = 1;
  std::vector<std::pair<void*, std::size_t>> mapped_;
};

Bytes copied(const void* from, std::int64_t bytes) {
  const auto* const start = static_cast<const std::uint8_t*>(from);
  return {start, start + bytes};
}

// A result of so many numbers, each of which was written.
Bytes whole(const void* out, std::int64_t count, int dtype) {
  Bytes made = copied(out, count * size_of(dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, made.data() + i * size_of(dtype), static_cast<std::size_t>(size_of(dtype)));
    if (dtype == kBfloat16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    require(std::isfinite(value), "a number was not written, or is none");
  }
  return made;
}

// `what` with its sizes, wherever buffers lie and whoever takes part.
void everywhere(const char* what, const std::vector<std::int64_t>& sizes,
                const std::function<Bytes(Room&)>& run) {
  std::string told = what;
  for (const std::int64_t size : sizes) told.append(" ").append(std::to_string(size));
  now_doing(told);
  Bytes first;
  for (const auto& [at_end, threads] : {std::pair{true, 1}, {false, 1}, {true, 3}}) {
    Room room(at_end, threads);
    const Bytes made = run(room);
    if (first.empty()) first = made;
    require(made == first, "another result in another place, or of other threads");
  }
}

// --- products ----------------------------------------------------------------------------------

void linear(int dtype, int bits, std::int64_t tokens, std::int64_t cols, std::int64_t rows) {
  const std::int64_t stride = cols + tokens % 2 * 3, groups = (rows + 15) / 16 * (cols / 32);
  everywhere("linear", {dtype, bits, tokens, cols, rows}, [&](Room& room) {
    const void* x = room.numbers(tokens > 0 ? (tokens - 1) * stride + cols : 0, dtype);
    const std::uint8_t* weight = room.packed(groups * (16 * 32 * bits / 8 + 64));
    const void* bias = rows % 2 > 0 ? room.numbers(rows, dtype) : nullptr;
    void* out = room.unwritten(tokens * rows * size_of(dtype));
    ts_cpu_linear(dtype, x, stride, tokens, cols, weight, rows, bits, bias, out, room.threads());
    return whole(out, tokens * rows, dtype);
  });
}

void product(int dtype, std::int64_t tokens, std::int64_t cols, std::int64_t rows) {
  const std::int64_t stride = cols + tokens % 2 * 3;
  everywhere("product", {dtype, tokens, cols, rows}, [&](Room& room) {
    const void* x = room.numbers(tokens > 0 ? (tokens - 1) * stride + cols : 0, dtype);
    const void* weight = room.numbers(rows * cols, dtype);
    const void* bias = rows % 2 > 0 ? room.numbers(rows, dtype) : nullptr;
    void* out = room.unwritten(tokens * rows * size_of(dtype));
    ts_cpu_product(dtype, x, stride, tokens, cols, weight, rows, bias, out, room.threads());
    return whole(out, tokens * rows, dtype);
  });
}

void products() {
  for (const int dtype : kDtypes) {
    for (const std::int64_t tokens : {0, 1, 2, 7, 17}) {
      for (const std::int64_t rows : {1, 16, 17, 50}) {
        for (const int bits : {4, 8}) {
          for (const std::int64_t cols : {32, 160}) linear(dtype, bits, tokens, cols, rows);
        }
      }
    }
    const std::int64_t most = ts_cpu_product_tokens(dtype);
    for (const std::int64_t tokens : {0, 1, 3, 4, 8, 16, 17, 33, 70}) {
      if (tokens > most) continue;
      for (const std::int64_t cols : {1, 7, 32, 33, 100}) {
        for (const std::int64_t rows : {1, 5, 16, 17, 50}) product(dtype, tokens, cols, rows);
      }
    }
  }
}

// --- ops of rows -------------------------------------------------------------------------------

void norm(int dtype, std::int64_t tokens, std::int64_t dim, bool adds, bool sums) {
  everywhere("rms_norm", {dtype, tokens, dim, adds, sums}, [&](Room& room) {
    const std::int64_t count = tokens * dim;
    const void* x = room.numbers(count, dtype);
    const void* residual = adds ? room.numbers(count, dtype) : nullptr;
    const void* weight = room.numbers(dim, dtype);
    void* out = room.unwritten(count * size_of(dtype));
    void* total = sums ? room.unwritten(count * size_of(dtype)) : nullptr;
    ts_cpu_rms_norm(dtype, x, residual, weight, tokens, dim, 1e-5F, out, total, room.threads());
    if (sums) whole(total, count, dtype);
    return whole(out, count, dtype);
  });
}

void silu(int dtype, std::int64_t tokens, std::int64_t width) {
  everywhere("silu_mul", {dtype, tokens, width}, [&](Room& room) {
    const void* x = room.numbers(tokens * 2 * width, dtype);
    void* out = room.unwritten(tokens * width * size_of(dtype));
    ts_cpu_silu_mul(dtype, x, tokens, width, out, room.threads());
    return whole(out, tokens * width, dtype);
  });
}

void argmax(int dtype, std::int64_t rows, std::int64_t width) {
  everywhere("argmax", {dtype, rows, width}, [&](Room& room) {
    const void* x = room.numbers(rows * width, dtype);
    auto* out = room.integers(std::vector<std::int64_t>(static_cast<std::size_t>(rows), -1));
    ts_cpu_argmax(dtype, x, rows, width, out, room.threads());
    for (std::int64_t row = 0; row < rows; ++row) {
      require(out[row] >= 0 && out[row] < width, "an index that is none");
    }
    return copied(out, rows * 8);
  });
}

void finite(int dtype, std::int64_t rows, std::int64_t width) {
  everywhere("finite", {dtype, rows, width}, [&](Room& room) {
    const void* x = room.numbers(rows * width, dtype);
    std::uint8_t* out = room.unwritten(rows);
    ts_cpu_finite(dtype, x, rows, width, out, room.threads());
    for (std::int64_t row = 0; row < rows; ++row) require(out[row] == 1, "all are finite");
    return copied(out, rows);
  });
}

void take(int dtype, std::int64_t width) {
  everywhere("take", {dtype, width}, [&](Room& room) {
    const void* x = room.numbers(5 * width, dtype);
    const std::vector<std::int64_t> ids = {4, 0, 4, 2};
    void* out = room.unwritten(4 * width * size_of(dtype));
    ts_cpu_take(dtype, x, 5, width, room.integers(ids), 4, out);
    return whole(out, 4 * width, dtype);
  });
}

void rope(int dtype, std::int64_t tokens, std::int64_t heads, std::int64_t dim, int interleaved) {
  const std::int64_t head = dim + 1, token = heads * head + 2;
  everywhere("rope", {dtype, tokens, heads, dim, interleaved}, [&](Room& room) {
    const std::int64_t last = (tokens - 1) * token + (heads - 1) * head + dim;
    const void* x = room.numbers(tokens > 0 ? last : 0, dtype);
    const auto* table = static_cast<const float*>(room.numbers(9 * dim, kFloat32));
    std::vector<std::int64_t> positions;
    for (std::int64_t at = 0; at < tokens; ++at) positions.push_back(8 - at % 9);
    void* out = room.unwritten(tokens * heads * dim * size_of(dtype));
    ts_cpu_rope(dtype, x, token, head, tokens, heads, dim, room.integers(positions), table, out,
                interleaved);
    return whole(out, tokens * heads * dim, dtype);
  });
}

void ops_of_rows() {
  for (const int dtype : kDtypes) {
    for (const std::int64_t rows : {0, 1, 3}) {
      for (const std::int64_t width : {1, 7, 16, 33, 100, 6000}) {
        for (const int which : {0, 1, 2, 3}) norm(dtype, rows, width, which % 2 > 0, which > 1);
        silu(dtype, rows, width);
        argmax(dtype, rows, width);
        finite(dtype, rows, width);
      }
      for (const std::int64_t dim : {2, 6, 34, 64, 128}) {
        for (const int interleaved : {0, 1}) rope(dtype, rows, 3, dim, interleaved);
      }
    }
    for (const std::int64_t width : {1, 7, 64}) take(dtype, width);
  }
}

// --- pages -------------------------------------------------------------------------------------

void kv_write(int dtype, int kv_dtype, std::int64_t width) {
  everywhere("kv_write", {dtype, kv_dtype, width}, [&](Room& room) {
    const std::int64_t stride = width + 3;
    const void* x = room.numbers(2 * stride + width, dtype);
    const std::vector<std::int64_t> locations = {5, 0, 3};
    void* pages = room.unwritten(6 * width * size_of(kv_dtype));
    ts_cpu_kv_write(dtype, x, stride, 3, width, room.integers(locations), pages, kv_dtype);
    return copied(pages, 6 * width * size_of(kv_dtype));
  });
}

struct Shape {
  int dtype, kv_dtype;
  std::int64_t page_size, heads, kv_heads, dim, window;
};

// Rows of some queries behind some cached tokens; the pages of the last one end the pool.
void attention(const Shape& shape, const std::vector<std::int32_t>& contexts,
               const std::vector<std::int32_t>& queries) {
  std::vector<std::int32_t> starts = {0};
  std::int64_t wide = 0, last = 0;
  for (std::size_t row = 0; row < queries.size(); ++row) {
    starts.push_back(starts.back() + queries[row]);
    last = (contexts[row] + queries[row] + shape.page_size - 1) / shape.page_size;
    wide = std::max(wide, last);
  }
  const auto rows = static_cast<std::int64_t>(queries.size());
  std::vector<std::int32_t> table;
  for (std::int64_t at = 0; at < (rows - 1) * wide + last; ++at) {
    table.push_back(static_cast<std::int32_t>(at));
  }
  const auto pages = static_cast<std::int64_t>(table.size());
  const std::int64_t held = pages * shape.page_size * shape.kv_heads * shape.dim;
  const std::int64_t tokens = starts.back(), each = shape.heads * shape.dim;
  const bool all = ts_cpu_attends_long(shape.dtype, shape.kv_dtype, shape.dim) != 0;
  everywhere(
      "attention",
      {shape.dtype, shape.kv_dtype, shape.page_size, shape.heads, shape.kv_heads, shape.dim,
       shape.window, tokens},
      [&](Room& room) {
        const void* q = room.numbers(tokens * each, shape.dtype);
        const void* k = room.numbers(held, shape.kv_dtype);
        const void* v = room.numbers(held, shape.kv_dtype);
        std::uint8_t* out = room.unwritten(tokens * each * size_of(shape.dtype));
        ts_cpu_attention(shape.dtype, q, k, v, rows, room.integers(starts), room.integers(contexts),
                         room.integers(table), wide, shape.page_size, shape.heads, shape.kv_heads,
                         shape.dim, shape.window, kQueriesMax, out, shape.kv_dtype, room.threads());
        for (std::size_t row = 0; row < queries.size(); ++row) {
          if (queries[row] > kQueriesMax && !all) continue;  // left to others
          whole(out + starts[row] * each * size_of(shape.dtype), queries[row] * each, shape.dtype);
        }
        return copied(out, tokens * each * size_of(shape.dtype));
      });
}

void ops_of_pages() {
  for (const int dtype : kDtypes) {
    for (const int kv_dtype : {dtype, kFloat8}) {
      for (const std::int64_t width : {1, 9, 40}) kv_write(dtype, kv_dtype, width);
      for (const std::int64_t dim : {1, 8, 33, 64, 96, 256}) {
        for (const std::int64_t window : {0, 5}) {
          for (const std::int64_t page_size : {1, 3, 16}) {
            const Shape shape{dtype, kv_dtype, page_size, 6, 2, dim, window};
            attention(shape, {0, 40, 7}, {1, 1, 1});
            attention(shape, {21, 3, 0, 2}, {kQueriesMax, 0, 11, 1});
          }
        }
      }
      attention({dtype, kv_dtype, 16, 3, 1, 64, 0}, {70, 0, 125}, {33, 40, 19});
      attention({dtype, kv_dtype, 16, 1, 1, 32, 9}, {70, 0, 125}, {33, 40, 19});
    }
  }
}

// --- what is written down ----------------------------------------------------------------------

void replayed() {
  now_doing("replay");
  require(ts_cpu_number("nothing") == -1, "a number for what cannot be written down");
  constexpr std::int64_t kTokens = 3, kWidth = 5;
  Room room(true, 1);
  const void* x = room.numbers(kTokens * 2 * kWidth, kFloat32);
  void* direct = room.unwritten(kTokens * kWidth * 4);
  ts_cpu_silu_mul(kFloat32, x, kTokens, kWidth, direct, 1);
  void* again = room.unwritten(kTokens * kWidth * 4);
  const auto word = [](const void* at) {
    return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(at));
  };
  std::vector<std::int64_t> calls = {
      ts_cpu_number("silu_mul"), kFloat32, word(x), kTokens, kWidth, word(again), 1};
  calls.resize(TS_CPU_CALL_WORDS);
  ts_cpu_replay(room.integers(calls), 1);
  const Bytes made = whole(again, kTokens * kWidth, kFloat32);
  require(made == copied(direct, kTokens * kWidth * 4), "another result");
}

// In a process of its own: a set is chosen once.
int by(const char* isa) {
  const pid_t child = fork();
  if (child == 0) {
    setenv("TOKENSPEED_CPU_ISA", isa, 1);
    if (std::strcmp(ts_cpu_isa(), isa) == 0) {
      products();
      ops_of_rows();
      ops_of_pages();
      replayed();
      std::printf("kernels_test: %s done\n", isa);
    }
    std::exit(0);
  }
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status == 0) return status;
  std::fprintf(stderr, "kernels_test: %s ended with status %d at %s\n", isa, status, doing);
  return 1;
}

}  // namespace

int main() {
  doing = static_cast<char*>(
      mmap(nullptr, kDoing, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (doing == MAP_FAILED) return 1;
  int failed = 0;
  for (const char* isa : {"amx", "avx512-vnni", "avx2", "portable"}) failed |= by(isa);
  return failed;
}
