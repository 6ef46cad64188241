// Every item of a call is done once, by the time the call returns, whoever else calls beside it.
// For the thread sanitizer; without it, the counts.
#include "../cpu/pool.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "pool_test: %s\n", what);
  std::abort();
}

// Not atomic: the calls must hand the counts over properly.
void call_often(int calls) {
  std::vector<int> counts;
  for (int call = 0; call < calls; ++call) {
    const std::int64_t items = call % 100;
    counts.assign(static_cast<std::size_t>(items), 0);
    auto count = [&](std::int64_t begin, std::int64_t end) {
      for (auto i = begin; i < end; ++i) ++counts[static_cast<std::size_t>(i)];
    };
    tokenspeed::cpu::share(items, 1 + call % 7, 1 + call % 5, count);
    for (int times : counts) require(times == 1, "an item was not done once");
  }
}

}  // namespace

int main() {
  call_often(2000);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(call_often, 1000);
  for (auto& caller : callers) caller.join();
  std::puts("pool_test: done");
}
