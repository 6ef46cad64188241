// The cost model on machines that are what it assumes, with noise and outliers: it learns them,
// never predicts less for more work, and what it allows beside decoding rows keeps to the budget.
#include "cost_model.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
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

struct Machine {
  double fixed_us, row_us, read_us, token_us, pair_us, noise;

  double us(const Work& work) const {
    return fixed_us + row_us * work.decode_rows +
           read_us * static_cast<double>(work.decode_context) + token_us * work.prefill_tokens +
           pair_us * static_cast<double>(work.prefill_pairs);
  }
};

class Draw {
 public:
  explicit Draw(unsigned seed) : random_(seed) {}
  double between(double low, double high) {  // evenly in the logarithm
    return low * std::pow(high / low, uniform_(random_));
  }
  std::int32_t upto(std::int32_t n) { return static_cast<std::int32_t>(uniform_(random_) * n); }
  double noisy(const Machine& machine, const Work& work, double outlier) {
    const double off = 1.0 + machine.noise * normal_(random_);
    return machine.us(work) * std::max(off, 0.2) * (upto(100) == 0 ? outlier : 1.0);
  }
  Work work() {
    Work work;
    for (std::int32_t row = upto(64); row > 0; --row) work.add(1, 2000 + upto(4000));
    if (upto(2) == 0) work.add(16 + upto(1000), upto(50000));
    return work;
  }
  // From a small model on a CPU to a large one on a GPU.
  Machine machine() {
    const double size = between(0.1, 30.0);
    return {size * between(500, 5000), size * between(1, 30),      size * between(1e-3, 1e-2),
            size * between(2, 40),     size * between(1e-5, 1e-3), upto(5) * 0.01};
  }

 private:
  std::mt19937 random_;
  std::uniform_real_distribution<double> uniform_{0.0, 1.0};
  std::normal_distribution<double> normal_{0.0, 1.0};
};

void learns(unsigned seed) {
  Draw draw(seed);
  const Machine machine = draw.machine();
  CostModel model;
  for (int step = 0; step < 400; ++step) {
    const Work work = draw.work();
    model.observe(work, draw.noisy(machine, work, 8.0));
    REQUIRE(model.predict_us({}) >= 0.0);
    Work more = work;
    more.add(2 + draw.upto(500), draw.upto(50000));
    REQUIRE(model.predict_us(more) >= model.predict_us(work));
  }
  double off = 0.0;
  for (int trial = 0; trial < 100; ++trial) {
    const Work work = draw.work();
    off += std::abs(model.predict_us(work) / machine.us(work) - 1.0) / 100;
  }
  REQUIRE(off < 0.05 + 2 * machine.noise);
}

// The same work for long says nothing about other work, and does not spoil what was known of it.
void remembers(unsigned seed) {
  Draw draw(seed);
  const Machine machine = draw.machine();
  CostModel model;
  for (int step = 0; step < 400; ++step) {
    const Work work = draw.work();
    model.observe(work, draw.noisy(machine, work, 1.0));
  }
  const double before_us = model.prefill_us(512, 20000);
  Work same;
  for (int row = 0; row < 32; ++row) same.add(1, 3000);
  for (int step = 0; step < 5000; ++step) model.observe(same, draw.noisy(machine, same, 1.0));
  REQUIRE(std::abs(model.predict_us(same) / machine.us(same) - 1.0) < 0.02 + machine.noise);
  REQUIRE(std::abs(model.prefill_us(512, 20000) / before_us - 1.0) < 0.1 + machine.noise);
}

// Rows decode, a long prompt is prefilled by what the budget leaves: the largest chunk that fits.
void keeps(unsigned seed) {
  Draw draw(seed);
  const Machine machine = draw.machine();
  Work decode;
  for (int row = 0; row < 32; ++row) decode.add(1, 3000);
  const double budget_us = machine.us(decode) * draw.between(1.2, 10.0);
  CostModel model;
  int over = 0;
  int granted = 0;
  int used = 0;
  std::int32_t context = 0;
  for (int step = 0; step < 1000; ++step) {
    Allowance left(8192, model, budget_us / model.margin() - model.predict_us(decode));
    const std::int32_t tokens = left.grant(50000, context);
    REQUIRE(tokens >= Allowance::kProgressTokens && left.empty() == (tokens < 50000));
    left.spend(tokens, context);
    Work work = decode;
    work.add(tokens, context);
    const double took_us = machine.us(work);
    if (step >= 200 && tokens > Allowance::kProgressTokens) {
      over += took_us > budget_us ? 1 : 0;
      ++granted;
      used += tokens == 8192 || took_us > budget_us * (0.85 - 4 * machine.noise) ? 1 : 0;
    }
    model.observe(work, draw.noisy(machine, work, 1.0));
    context = (context + tokens) % 50000;
  }
  REQUIRE(over <= 10);
  REQUIRE(used >= granted * 8 / 10);
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 200; ++seed) {
    learns(seed);
    remembers(seed);
    keeps(seed);
  }
  std::printf("learned 200 machines\n");
}
