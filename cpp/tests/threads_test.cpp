// One thread drives the scheduler while others submit, abort and look, and while plans are let go
// on a thread of their own, as Python's threads do. For the thread sanitizer; without it, the
// counts.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "locked.hpp"
#include "scheduler.hpp"

namespace {

using namespace tokenspeed;

constexpr std::int64_t kRequests = 400;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "threads_test: %s\n", what);
  std::abort();
}

SchedulerConfig small() {
  SchedulerConfig config;
  config.page_size = 4;
  config.pages = 24;
  config.slots = 4;
  config.waiting_max = static_cast<std::int32_t>(kRequests);
  config.step_tokens = 16;
  config.context_max = 64;
  config.overlap = 1;
  return config;
}

struct Shared {
  Locked<Scheduler> scheduler{small()};
  Locked<std::deque<PlanPointer>> dropped;
  std::atomic<bool> submitted = false;
  std::atomic<bool> driven = false;
};

void submit(Shared& shared) {
  for (std::int64_t number = 0; number < kRequests; ++number) {
    const std::vector<Token> prompt(1 + static_cast<std::size_t>(number % 20), 1);
    const auto refusal =
        shared.scheduler.run([&](Scheduler& s) { return s.submit(number, prompt, 8, ""); });
    require(!refusal.refused(), "a request was refused");
    if (number % 5 == 0) shared.scheduler.run([&](Scheduler& s) { return s.abort(number); });
  }
  shared.submitted = true;
}

// Plans are read without the lock, and let go by somebody else, late.
void drive(Shared& shared) {
  std::deque<PlanPointer> launched;
  while (true) {
    const bool last = shared.submitted;
    auto plan = shared.scheduler.run([](Scheduler& s) { return s.plan(); });
    const bool made = static_cast<bool>(plan);
    if (made) launched.push_back(std::move(plan));
    if (made && launched.size() < 2) continue;  // one step ahead
    if (launched.empty() && last) break;
    if (launched.empty()) continue;
    const std::vector<Token> tokens(launched.front()->slots.size(), 7);
    const std::vector<std::uint8_t> stop(tokens.size(), 0);
    const auto done = shared.scheduler.run(
        [&](Scheduler& s) { return s.commit(launched.front()->step, tokens, stop); });
    require(done->error.empty(), "a step was refused");
    shared.dropped.run([&](auto& plans) { plans.push_back(std::move(launched.front())); });
    launched.pop_front();
  }
  shared.driven = true;
}

void drop(Shared& shared) {
  while (!shared.driven) {
    shared.dropped.run([](auto& plans) { return std::exchange(plans, {}); });
    std::this_thread::yield();
  }
}

void look(Shared& shared) {
  while (!shared.driven) {
    const Stats stats = shared.scheduler.run([](const Scheduler& s) { return s.stats(); });
    require(stats.pages_free + stats.pages_cached <= stats.pages_total, "pages were made up");
    shared.scheduler.run([](const Scheduler& s) { return s.idle(); });
    std::this_thread::yield();
  }
}

}  // namespace

int main() {
  Shared shared;
  std::thread threads[] = {
      std::thread(submit, std::ref(shared)), std::thread(drive, std::ref(shared)),
      std::thread(drop, std::ref(shared)), std::thread(look, std::ref(shared))};
  for (std::thread& thread : threads) thread.join();
  shared.scheduler.run([](const Scheduler& s) {
    const Stats stats = s.stats();
    require(s.idle() && s.check().empty(), "something is left");
    require(stats.pages_free + stats.pages_cached == stats.pages_total, "a page is missing");
    return 0;
  });
  std::printf("%lld requests, four threads, every page back\n", static_cast<long long>(kRequests));
}
