#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenspeed::cpu {
namespace {

constexpr int kSpins = 1000;  // of a pause each: some tens of microseconds
constexpr int kWorkersMax = 255;

// A worker whom the system puts aside in the middle of a piece keeps the caller waiting for a slice
// of time, longer than most calls take. Where that happens the processors are wanted elsewhere too:
// the next calls are made alone, more of them each time.
using Clock = std::chrono::steady_clock;
constexpr auto kStall = std::chrono::microseconds(100);  // and four pieces of the caller's own
constexpr int kAloneMin = 32, kAloneMax = 1024;
constexpr int kGood = 256;  // calls in a row without a stall that halve the number

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// A call is open while `generation` is odd. A worker counts itself in before it looks a second
// time, and the caller closes before it looks who is inside: so nobody touches a call that has
// returned.
class Pool {
 public:
  void run(Work work, void* of, std::int64_t items, std::int64_t piece, int threads) {
    grow(std::min({threads - 1, kWorkersMax, static_cast<int>((items - 1) / piece)}));
    work_ = work;
    of_ = of;
    items_ = items;
    piece_ = piece;
    helpers_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) generation_.notify_all();
    const auto begin = Clock::now();
    const auto pieces = take();
    const auto done = Clock::now();
    generation_.fetch_add(1, std::memory_order_seq_cst);
    // Whoever is inside may have been put aside by the system: then he needs the processor.
    int spins = 0;
    for (; inside_.load(std::memory_order_seq_cst) != 0; ++spins) {
      spins < kSpins ? relax() : std::this_thread::yield();
    }
    const bool late = spins > 0 && Clock::now() - done > kStall + 4 * (done - begin) / (pieces + 1);
    note(late);
  }

  // Whether this call had better be made alone.
  bool alone() { return alone_ > 0 && alone_-- > 0; }

  std::mutex busy;

 private:
  void note(bool late) {
    if (late) {
      alone_ = next_alone_;
      next_alone_ = std::min(2 * next_alone_, kAloneMax);
      good_ = 0;
    } else if (++good_ == kGood) {
      next_alone_ = std::max(next_alone_ / 2, kAloneMin);
      good_ = 0;
    }
  }

  void grow(int workers) {
    for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
  }

  // Pieces that this thread has done.
  int take() {
    for (int pieces = 0;; ++pieces) {
      const auto begin = next_.fetch_add(piece_, std::memory_order_relaxed);
      if (begin >= items_) return pieces;
      work_(of_, begin, std::min(begin + piece_, items_));
    }
  }

  [[noreturn]] void serve() {
    std::uint32_t seen = 0;
    for (;;) {
      seen = await(seen);
      const int before = inside_.fetch_add(1, std::memory_order_seq_cst);
      if (generation_.load(std::memory_order_seq_cst) == seen && before < helpers_) take();
      inside_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  // The next open generation after `seen`.
  std::uint32_t await(std::uint32_t seen) {
    for (int spins = 0;; ++spins) {
      const auto now = generation_.load(std::memory_order_seq_cst);
      if (now % 2 == 1 && now != seen) return now;
      if (spins < kSpins) {
        relax();
      } else {
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        generation_.wait(now, std::memory_order_seq_cst);
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
        spins = 0;
      }
    }
  }

  std::atomic<std::uint32_t> generation_{0};
  std::atomic<int> inside_{0};
  std::atomic<int> asleep_{0};
  std::atomic<std::int64_t> next_{0};
  Work work_ = nullptr;
  void* of_ = nullptr;
  std::int64_t items_ = 0;
  std::int64_t piece_ = 1;
  int helpers_ = 0;
  int workers_ = 0;
  int alone_ = 0;  // this and what follows: of whoever holds `busy`
  int next_alone_ = kAloneMin;
  int good_ = 0;
};

// Never destroyed: its threads outlive static destruction.
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

}  // namespace

void share(Work work, void* of, std::int64_t items, std::int64_t piece, int threads) {
  if (items <= 0) return;
  if (threads > 1 && items > piece) {
    if (std::unique_lock only(pool().busy, std::try_to_lock); only && !pool().alone()) {
      pool().run(work, of, items, piece, threads);
      return;
    }
  }
  work(of, 0, items);
}

}  // namespace tokenspeed::cpu
