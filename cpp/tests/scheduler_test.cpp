// The scheduler under random schedules, built with asserts and sanitizers: a page that is dropped,
// a request that is used after it moved, or a count that is off ends this program.
#include "scheduler.hpp"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>

namespace {

using namespace tokenspeed;

#define REQUIRE(condition)                                                                 \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      std::fprintf(stderr, "%s:%d: %s (seed %u)\n", __FILE__, __LINE__, #condition, seed); \
      std::abort();                                                                        \
    }                                                                                      \
  } while (false)

// Submits, plans, completes and aborts at random; then lets everything end.
void run(unsigned seed) {
  std::mt19937 random(seed);
  const auto upto = [&](int n) {
    return static_cast<std::int32_t>(random() % static_cast<unsigned>(n));
  };
  SchedulerConfig config;
  config.page_size = 1 + upto(4);
  config.pages = 8 + upto(16);
  config.slots = 1 + upto(4);
  config.step_tokens = config.slots + upto(8);
  config.context_max = config.pages * config.page_size;
  config.overlap = upto(3);
  config.prefix_cache = upto(4) > 0;
  REQUIRE(Scheduler::invalid(config).empty());
  Scheduler scheduler(config);
  std::deque<PlanPointer> launched;
  std::int64_t number = 0;

  const auto complete = [&] {
    const auto plan = std::move(launched.front());
    launched.pop_front();
    std::vector<std::int32_t> tokens;
    std::vector<std::uint8_t> stop;
    for (std::size_t row = 0; row < plan->slots.size(); ++row) {
      tokens.push_back(upto(3));
      stop.push_back(upto(12) == 0 ? 1 : 0);
    }
    REQUIRE(!scheduler.commit(plan->step + 1, tokens, stop)->error.empty());
    REQUIRE(scheduler.commit(plan->step, tokens, stop)->error.empty());
    REQUIRE(scheduler.check().empty());
  };

  for (int turn = 0; turn < 300; ++turn) {
    switch (upto(6)) {
      case 0:
      case 1: {
        std::vector<Token> prompt(static_cast<std::size_t>(1 + upto(20)), upto(2));
        const Refusal refusal =
            scheduler.submit(number, prompt, 1 + upto(12), upto(4) ? "" : "salt");
        if (!refusal.refused()) ++number;
        break;
      }
      case 2:
        if (number > 0) scheduler.abort(upto(static_cast<int>(number)));
        break;
      case 3:
        if (!launched.empty()) complete();
        break;
      default:
        if (auto plan = scheduler.plan()) launched.push_back(std::move(plan));
    }
    REQUIRE(scheduler.check().empty());
  }
  if (upto(8) == 0) return;  // torn down with work in flight
  for (int turn = 0; !scheduler.idle(); ++turn) {
    REQUIRE(turn < 100000);
    while (auto plan = scheduler.plan()) launched.push_back(std::move(plan));
    REQUIRE(!launched.empty());
    complete();
  }
  const Stats stats = scheduler.stats();
  REQUIRE(stats.pages_free + stats.pages_cached == stats.pages_total);
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned runs = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 300;
  for (unsigned seed = 0; seed < runs; ++seed) run(seed);
  std::printf("%u schedules, every page back\n", runs);
}
