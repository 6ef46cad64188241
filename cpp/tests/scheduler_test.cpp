// The scheduler under random schedules, built with asserts and sanitizers: a page that is dropped,
// a request that is used after it moved, or a count that is off ends this program.
#include "scheduler.hpp"

#include <algorithm>
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

// What somebody knows of the prefix index who only hears of it.
void follow(const KvEvent& event, std::map<PageId, Prefix>& told, unsigned seed) {
  if (event.action == "Clear") {
    REQUIRE(told.empty());
  } else if (event.action == "Evict") {
    REQUIRE(told.erase(event.page) == 1);
  } else {
    REQUIRE(!told.contains(event.page));
    Prefix prefix = event.parent < 0 ? Prefix{event.salt, {}} : told.at(event.parent);
    prefix.tokens.insert(prefix.tokens.end(), event.tokens.begin(), event.tokens.end());
    told[event.page] = std::move(prefix);
  }
}

// Submits, plans, completes, aborts and clears at random; then lets everything end.
void run(unsigned seed) {
  std::mt19937 random(seed);
  const auto upto = [&](int n) {
    return static_cast<std::int32_t>(random() % static_cast<unsigned>(n));
  };
  SchedulerConfig config;
  config.page_size = 1 + upto(4);
  config.pages = 8 + upto(16);
  config.slots = 1 + upto(4);
  config.step_tokens = std::max(config.slots, config.page_size) + upto(8);
  config.context_max = config.pages * config.page_size;
  config.overlap = upto(3);
  config.prefix_cache = upto(4) > 0;
  config.itl_budget_us = upto(2) * upto(1000);
  config.host_pages = config.prefix_cache ? upto(3) * upto(12) : 0;
  config.draft_tokens = upto(2) * upto(5);
  REQUIRE(Scheduler::invalid(config).empty());
  Scheduler scheduler(config);
  scheduler.set_recording_kv(true);
  std::deque<PlanPointer> launched;
  std::vector<std::int64_t> copies;  // tickets of copies under way
  std::int64_t number = 0;

  // What is told of the prefix index, in order, is what is in it.
  std::map<PageId, Prefix> told;
  const auto check = [&] {
    REQUIRE(scheduler.check().empty());
    for (const KvEvent& event : scheduler.take_kv_events()) follow(event, told, seed);
    REQUIRE(told == scheduler.prefixes());
  };

  const auto launch = [&] {
    auto plan = scheduler.plan();
    if (!plan) return false;
    for (const auto* rows : {&plan->stores, &plan->loads}) {
      for (std::size_t at = 0; at < rows->size(); at += 3) copies.push_back((*rows)[at]);
    }
    if (!plan->slots.empty()) launched.push_back(std::move(plan));
    return true;
  };

  // Some of the copies end, in any order; one may fail.
  const auto acknowledge = [&](std::size_t most) {
    std::shuffle(copies.begin(), copies.end(), random);
    const std::size_t count = std::min(most, copies.size());
    std::vector<std::uint8_t> good;
    for (std::size_t at = 0; at < count; ++at) good.push_back(upto(6) > 0 ? 1 : 0);
    const std::span ended(copies.data() + copies.size() - count, count);
    REQUIRE(scheduler.acknowledge(ended, good).taken == std::ssize(ended));
    REQUIRE(scheduler.acknowledge(ended, good).taken == 0);
    copies.resize(copies.size() - count);
    check();
  };

  const auto complete = [&] {
    const auto plan = std::move(launched.front());
    launched.pop_front();
    std::vector<std::int32_t> tokens;
    std::vector<std::uint8_t> stop;
    for (std::size_t row = 0; row < plan->slots.size(); ++row) {
      // Some of the drafts are right, and then comes any token.
      const auto end = static_cast<std::size_t>(plan->query_start[row + 1]);
      const auto drafts = static_cast<std::size_t>(plan->drafts[row]);
      const auto right = static_cast<std::size_t>(upto(plan->drafts[row] + 1));
      for (std::size_t at = 0; at < right; ++at)
        tokens.push_back(plan->token_ids[end - drafts + at]);
      tokens.push_back(upto(3));
      tokens.resize(tokens.size() + drafts - right, -1);
      stop.push_back(upto(12) == 0 ? 1 : 0);
    }
    REQUIRE(!scheduler.commit(plan->step + 1, tokens, stop)->error.empty());
    REQUIRE(scheduler.commit(plan->step, tokens, stop, upto(1000))->error.empty());
    check();
  };

  for (int turn = 0; turn < 300; ++turn) {
    switch (upto(9)) {
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
      case 4:
        if (upto(4) > 0) break;
        REQUIRE(scheduler.stats().pages_cached >= scheduler.clear_cache().evicted);
        REQUIRE(scheduler.stats().pages_cached == 0 || !copies.empty());
        REQUIRE(scheduler.clear_cache().held == std::ssize(scheduler.prefixes()));
        break;
      case 5:
        acknowledge(static_cast<std::size_t>(upto(5)));
        break;
      case 6:
        for (std::int64_t each = 0; each < number; ++each) {
          const std::vector<Token> draft(static_cast<std::size_t>(upto(5)), upto(2));
          REQUIRE(scheduler.propose(each, draft) <= config.draft_tokens);
        }
        break;
      default:
        launch();
    }
    check();
  }
  if (upto(8) == 0) return;  // torn down with work in flight
  for (int turn = 0; !scheduler.idle(); ++turn) {
    REQUIRE(turn < 100000);
    while (launch()) {
    }
    REQUIRE(!launched.empty() || !copies.empty() || scheduler.idle());
    if (launched.empty() || upto(2) == 0) acknowledge(copies.size());
    if (!launched.empty()) complete();
  }
  const Stats stats = scheduler.stats();
  REQUIRE(stats.drafts_accepted <= stats.drafts);
  REQUIRE(stats.pages_free + stats.pages_cached == stats.pages_total);
  REQUIRE(stats.host_pages_free + stats.host_pages_cached == stats.host_pages_total);
  const Cleared cleared = scheduler.clear_cache();
  REQUIRE(cleared.evicted == stats.pages_cached && cleared.held == 0);
  REQUIRE(scheduler.stats().pages_free == stats.pages_total);
  REQUIRE(scheduler.stats().host_pages_free == stats.host_pages_total);
  check();
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned runs = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 300;
  for (unsigned seed = 0; seed < runs; ++seed) run(seed);
  std::printf("%u schedules, every page back\n", runs);
}
