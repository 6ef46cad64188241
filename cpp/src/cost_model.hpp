// How long a step takes, learned from the steps that were. Rule: fed by events alone, so that the
// same events give the same predictions; no clock, no allocation, the same few operations a step.
//
// A step costs a constant, something for each decoding row and for what such rows read of the KV
// cache, and something for each prefilled token and each pair of tokens that prefill attends to.
// The five coefficients are the non-negative least squares of all steps, each forgotten with time;
// what the latest steps say nothing about keeps its estimate (exponential forgetting and resetting:
// Salgado, Goodwin, Middleton, Int. J. Control 47, 1988; non-negative by sequential coordinates:
// Franc, Hlavac, Navara, CAIP 2005). Errors are relative to the duration, and large ones count
// less, by the weight of Huber (Robust statistics, 1981).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace tokenspeed {

// What there is to do in a step. A row of one token reads what a decoding row reads, and is one.
struct Work {
  std::int32_t decode_rows = 0;
  std::int64_t decode_context = 0;  // tokens in the KV that these rows read
  std::int32_t prefill_tokens = 0;
  std::int64_t prefill_pairs = 0;  // of a prefilled token and one before it

  static constexpr std::int64_t pairs(std::int64_t tokens, std::int64_t context) noexcept {
    return tokens * context + tokens * tokens / 2;
  }
  void add(std::int32_t tokens, std::int32_t context) noexcept {
    if (tokens == 1) {
      ++decode_rows;
      decode_context += context;
    } else {
      prefill_tokens += tokens;
      prefill_pairs += pairs(tokens, context);
    }
  }
};

class CostModel final {
 public:
  CostModel() noexcept;

  // A step of this work took so long.
  void observe(const Work& work, double duration_us) noexcept;
  double predict_us(const Work& work) const noexcept;

  // A duration that most steps predicted to take one microsecond stay below, in microseconds.
  double margin() const noexcept { return 1.0 + kMargin * deviation_; }
  // Prefill of as many of `tokens` after `context` as `left_us` are predicted to suffice for.
  std::int32_t tokens_within(double left_us, std::int32_t context,
                             std::int32_t tokens) const noexcept;
  double prefill_us(std::int32_t tokens, std::int32_t context) const noexcept;

  // The most prefill of a step so far. A prediction far beyond it would be a guess.
  std::int32_t tokens_seen() const noexcept { return tokens_seen_; }
  std::int64_t pairs_seen() const noexcept { return pairs_seen_; }

 private:
  static constexpr std::size_t kSize = 5;
  using Vector = std::array<double, kSize>;

  static Vector features(const Work& work) noexcept;
  void estimate() noexcept;

  static constexpr double kMemory = 0.99;   // of an observation, a step later
  static constexpr double kFloor = 1e-4;    // of the information that is never forgotten
  static constexpr double kHuber = 3.0;     // deviations from which on an error counts less
  static constexpr double kMargin = 2.0;    // deviations: about the 95th percentile
  static constexpr double kSmooth = 0.03;   // of a new error in the deviation, once there are many
  static constexpr double kSteady = 0.005;  // the least deviation
  static constexpr int kSweeps = 8;         // of the coordinates, an observation

  double unit_us_ = 0.0;  // the first duration: an estimate of that size is unsure
  std::array<Vector, kSize> information_{};  // sum of the products of features
  Vector evidence_{};                        // sum of features, times 1: the relative duration
  Vector theta_{};                           // in units, a scaled feature
  double deviation_ = 0.5;                   // mean of the relative error's size
  double smooth_ = 0.5;
  std::int32_t tokens_seen_ = 0;
  std::int64_t pairs_seen_ = 0;
};

// The prefill that a step may still take. Whoever asks first gets first; once somebody got less
// than it wants, nobody else gets any.
class Allowance final {
 public:
  // Prefill that is never refused beside decoding rows, so that it goes on under any budget.
  static constexpr std::int32_t kProgressTokens = 16;

  explicit Allowance(std::int32_t tokens) noexcept : tokens_(tokens) {}
  // Beside decoding rows, with so long left for prefill by the model's prediction.
  Allowance(std::int32_t tokens, const CostModel& model, double left_us) noexcept
      : tokens_(tokens),
        sure_(kProgressTokens),
        model_(&model),
        left_us_(left_us),
        seen_tokens_(2 * std::int64_t{model.tokens_seen()}),
        seen_pairs_(2 * model.pairs_seen()) {}

  bool empty() const noexcept { return tokens_ < 1 || cut_; }
  // Of the tokens that a request wants computed after its context; 0 only if it is empty.
  std::int32_t grant(std::int32_t wants, std::int32_t context) noexcept;
  void spend(std::int32_t tokens, std::int32_t context) noexcept;

 private:
  std::int32_t tokens_;
  std::int32_t sure_ = 0;
  const CostModel* model_ = nullptr;
  double left_us_ = 0.0;
  std::int64_t seen_tokens_ = 0;  // as far as the model is trusted: twice what it has seen
  std::int64_t seen_pairs_ = 0;
  bool cut_ = false;
};

}  // namespace tokenspeed
