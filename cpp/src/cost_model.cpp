#include "cost_model.hpp"

#include <cmath>

namespace tokenspeed {

namespace {

// What makes the features alike in size, so that the estimate may start equally unsure of each.
constexpr double kRows = 64.0;
constexpr double kContext = 64.0 * 4096.0;
constexpr double kTokens = 256.0;
constexpr double kPairs = 256.0 * 4096.0;

constexpr std::size_t kTokensAt = 3;
constexpr std::size_t kPairsAt = 4;

template <class V>
double dot(const V& a, const V& b) noexcept {
  double sum = 0.0;
  for (std::size_t at = 0; at < a.size(); ++at) sum += a[at] * b[at];
  return sum;
}

// The largest x with a x^2 / 2 + b x <= left, for a, b >= 0.
double root(double a, double b, double left) noexcept {
  const double rest = b + std::sqrt(b * b + 2.0 * a * left);
  return rest > 0.0 ? 2.0 * left / rest : HUGE_VAL;
}

// As many of `tokens` as x allows.
std::int32_t floored(double x, std::int32_t tokens) noexcept {
  return x < static_cast<double>(tokens) ? static_cast<std::int32_t>(x) : tokens;
}

}  // namespace

CostModel::CostModel() noexcept {
  for (std::size_t at = 0; at < kSize; ++at) information_[at][at] = kFloor;
}

CostModel::Vector CostModel::features(const Work& work) noexcept {
  return {1.0, work.decode_rows / kRows, static_cast<double>(work.decode_context) / kContext,
          work.prefill_tokens / kTokens, static_cast<double>(work.prefill_pairs) / kPairs};
}

double CostModel::predict_us(const Work& work) const noexcept {
  return unit_us_ * dot(theta_, features(work));
}

double CostModel::prefill_us(std::int32_t tokens, std::int32_t context) const noexcept {
  const auto pairs = static_cast<double>(Work::pairs(tokens, context));
  return unit_us_ * (theta_[kTokensAt] * tokens / kTokens + theta_[kPairsAt] * pairs / kPairs);
}

std::int32_t CostModel::tokens_within(double left_us, std::int32_t context,
                                      std::int32_t tokens) const noexcept {
  if (left_us <= 0.0) return 0;
  const double pair_us = unit_us_ * theta_[kPairsAt] / kPairs;
  const double token_us = unit_us_ * theta_[kTokensAt] / kTokens;
  return floored(root(pair_us, token_us + pair_us * context, left_us), tokens);
}

void CostModel::observe(const Work& work, double duration_us) noexcept {
  tokens_seen_ = std::max(tokens_seen_, work.prefill_tokens);
  pairs_seen_ = std::max(pairs_seen_, work.prefill_pairs);
  if (unit_us_ == 0.0) unit_us_ = duration_us;
  Vector phi = features(work);
  const double took = duration_us / unit_us_;
  const double predicted = dot(theta_, phi);
  const double error = (took - predicted) / took;
  const double most = kHuber * deviation_;
  const double weight = std::abs(error) > most ? most / std::abs(error) : 1.0;
  smooth_ = std::max(smooth_ / (1.0 + smooth_), kSmooth);  // at first, that of a plain mean
  deviation_ += smooth_ * (std::min(std::abs(error), most) - deviation_);
  deviation_ = std::max(deviation_, kSteady);
  for (double& value : phi) value /= took;
  for (std::size_t row = 0; row < kSize; ++row) {
    for (std::size_t at = 0; at < kSize; ++at) {
      information_[row][at] = kMemory * information_[row][at] + weight * phi[row] * phi[at];
    }
    information_[row][row] += (1.0 - kMemory) * kFloor;
    evidence_[row] = kMemory * evidence_[row] + weight * phi[row];
    evidence_[row] += (1.0 - kMemory) * kFloor * theta_[row];
  }
  estimate();
}

// Goes on from the estimate before, which is near: coordinate by coordinate, each to its best value
// that is not negative.
void CostModel::estimate() noexcept {
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (std::size_t at = 0; at < kSize; ++at) {
      const double slope = evidence_[at] - dot(information_[at], theta_);
      theta_[at] = std::max(theta_[at] + slope / information_[at][at], 0.0);
    }
  }
}

std::int32_t Allowance::grant(std::int32_t wants, std::int32_t context) noexcept {
  if (empty()) return 0;
  std::int32_t most = std::min(wants, tokens_);
  if (model_ != nullptr) {
    const auto pairs = static_cast<double>(std::max<std::int64_t>(seen_pairs_, 0));
    const std::int32_t trusted =
        std::min(floored(static_cast<double>(std::max<std::int64_t>(seen_tokens_, 0)), most),
                 floored(root(1.0, context, pairs), most));
    const std::int32_t fits = std::min(trusted, model_->tokens_within(left_us_, context, most));
    most = std::min(most, std::max({fits, sure_, 1}));
  }
  cut_ = most < wants;
  return most;
}

void Allowance::spend(std::int32_t tokens, std::int32_t context) noexcept {
  tokens_ -= tokens;
  if (model_ == nullptr) return;
  sure_ = std::max(sure_ - tokens, 0);
  left_us_ -= model_->prefill_us(tokens, context);
  seen_tokens_ -= tokens;
  seen_pairs_ -= Work::pairs(tokens, context);
}

}  // namespace tokenspeed
