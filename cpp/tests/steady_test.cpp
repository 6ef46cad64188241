// A decode step allocates nothing. Rule: every allocation of this program is counted, and the count
// stands still over steps that cross pages, publish them, store them on the host, and evict others
// for them, there and here.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "scheduler.hpp"

namespace {

std::atomic<long> allocations{0};

void* counted(std::size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(bytes > 0 ? bytes : 1)) return memory;
  std::abort();
}

void* counted(std::size_t bytes, std::align_val_t alignment) {
  const auto align = static_cast<std::size_t>(alignment);
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::aligned_alloc(align, (bytes + align - 1) / align * align)) return memory;
  std::abort();
}

}  // namespace

void* operator new(std::size_t bytes) {
  return counted(bytes);
}
void* operator new[](std::size_t bytes) {
  return counted(bytes);
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, alignment);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

namespace {

using namespace tokenspeed;

constexpr std::int32_t kPage = 8;
constexpr std::int32_t kRows = 24;
constexpr std::int32_t kPrompt = 40;
constexpr std::int32_t kSteps = 200;

[[noreturn]] void fail(const char* what, std::int32_t overlap) {
  std::fprintf(stderr, "%s, at overlap %d\n", what, overlap);
  std::abort();
}

// Results for the steps that are in flight, in memory that was there before.
class Driver {
 public:
  Driver(std::int32_t overlap, std::int32_t host_pages, std::int32_t drafts, std::int32_t window,
         std::int32_t full)
      : overlap_(overlap),
        scheduler_(config(overlap, host_pages, drafts, window, full)),
        draft_(static_cast<std::size_t>(drafts), 1) {
    tickets_.reserve(4096);
    good_.resize(4096, 1);
    stop_.resize(kRows, 0);
    tokens_.reserve(kRows * (draft_.size() + 1));
    plans_.resize(static_cast<std::size_t>(overlap) + 1);
  }

  Scheduler& scheduler() noexcept { return scheduler_; }

  // Fills the pipeline and completes a step; how many rows it had.
  std::size_t turn() {
    while (launched_ < plans_.size()) {
      PlanPointer plan = scheduler_.plan();
      if (!plan) break;
      for (const auto* rows : {&plan->stores, &plan->loads}) {
        for (std::size_t at = 0; at < rows->size(); at += 3) tickets_.push_back((*rows)[at]);
      }
      if (plan->slots.empty()) continue;
      plans_[launched_++] = std::move(plan);
    }
    scheduler_.acknowledge(tickets_, std::span(good_).first(tickets_.size()));
    tickets_.clear();
    if (launched_ == 0) return 0;
    const PlanPointer plan = std::move(plans_.front());
    std::move(plans_.begin() + 1, plans_.end(), plans_.begin());
    --launched_;
    const std::size_t rows = plan->slots.size();
    tokens_.clear();
    for (std::size_t row = 0; row < rows; ++row) {  // every other draft is right
      for (std::int32_t at = 0; at <= plan->drafts[row]; ++at) {
        tokens_.push_back(at <= static_cast<std::int32_t>(row) % 3 ? 1 : -1);
      }
    }
    const auto done = scheduler_.commit(plan->step, tokens_, std::span(stop_).first(rows),
                                        500 + 10 * std::int64_t{kRows});
    if (!draft_.empty()) {
      for (const std::int64_t number : plan->numbers) scheduler_.propose(number, draft_);
    }
    if (!done->error.empty()) fail(done->error.c_str(), overlap_);
    return rows;
  }

 private:
  static SchedulerConfig config(std::int32_t overlap, std::int32_t host_pages, std::int32_t drafts,
                                std::int32_t window, std::int32_t full) {
    SchedulerConfig config;
    config.page_size = kPage;
    config.pages = kRows * pages_for(kPrompt + kSteps + 40, kPage) * (full + 1);
    config.slots = kRows;
    config.step_tokens = 4 * kRows;
    config.context_max = kPrompt + kSteps + 40;
    config.overlap = overlap;
    config.itl_budget_us = 1000;
    config.host_pages = host_pages;
    config.draft_tokens = drafts;
    config.window = window;
    config.full_groups = full;
    return config;
  }

  std::int32_t overlap_;
  Scheduler scheduler_;
  std::vector<Token> draft_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::uint8_t> stop_;
  std::vector<std::int64_t> tickets_;
  std::vector<std::uint8_t> good_;
  std::vector<PlanPointer> plans_;
  std::size_t launched_ = 0;
};

void submit(Scheduler& scheduler, std::int64_t number, std::int32_t output) {
  std::vector<Token> prompt(kPrompt, static_cast<Token>(number));
  prompt.back() = 0;
  const std::string salt = number % 3 == 0 ? "a salt that no string holds inside itself" : "";
  if (scheduler.submit(number, prompt, output, salt).refused()) fail("a request was refused", -1);
}

void run(std::int32_t overlap, std::int32_t host_pages, std::int32_t drafts, std::int32_t window,
         std::int32_t full = 0) {
  Driver driver(overlap, host_pages, drafts, window, full);
  Scheduler& scheduler = driver.scheduler();
  std::int64_t number = 0;
  while (number < 2 * kRows) submit(scheduler, number++, kSteps);  // they fill the cache and go
  while (driver.turn() > 0) {
  }
  if (scheduler.stats().pages_free > kRows * (full + 1))
    fail("the cache should be almost full", overlap);
  while (number < 3 * kRows) submit(scheduler, number++, kSteps + 40);
  while (scheduler.stats().waiting > 0 || driver.turn() < kRows) {
    driver.turn();
  }
  for (int turn = 0; turn < 8; ++turn) driver.turn();
  const Stats before = scheduler.stats();
  const long counted = allocations.load();
  const std::int32_t steps = kSteps / 2 / (drafts + 1);
  for (std::int32_t turn = 0; turn < steps; ++turn) {
    if (driver.turn() != kRows) fail("not everybody was in a step", overlap);
  }
  if (allocations.load() != counted) {
    std::fprintf(stderr, "%ld allocations\n", allocations.load() - counted);
    fail("a steady step allocates", overlap);
  }
  if (scheduler.stats().evictions == before.evictions) fail("no page was evicted", overlap);
  const Stats after = scheduler.stats();
  if (host_pages > 0 && after.stores == before.stores) fail("no page was stored", overlap);
  if (drafts > 0 && after.drafts_accepted == before.drafts_accepted) {
    fail("no draft was accepted", overlap);
  }
  if (!scheduler.check().empty()) fail(scheduler.check().front().c_str(), overlap);
}

}  // namespace

int main() {
  for (std::int32_t overlap = 0; overlap < 3; ++overlap) {
    for (const std::int32_t host_pages : {0, 64}) run(overlap, host_pages, 0, 0);
  }
  for (const std::int32_t overlap : {0, 1, 2}) run(overlap, 0, 0, 50);
  for (const std::int32_t overlap : {0, 1}) run(overlap, 0, 0, 50, 1);
  for (const std::int32_t host_pages : {0, 64}) run(0, host_pages, 2, 0);
  std::printf("no allocation in a steady step\n");
}
