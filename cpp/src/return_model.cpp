#include "return_model.hpp"

#include <algorithm>
#include <bit>

namespace tokenspeed {

void ReturnModel::left(std::size_t of) noexcept {
  Class& found = classes_[of];
  found.left += 1;
  if (found.left < kForget) return;
  found.left /= 2;
  for (double& count : found.returned) count /= 2;
  for (double& count : found.lost) count /= 2;
}

void ReturnModel::returned(std::size_t of, Microseconds age) noexcept {
  classes_[of].returned[bin(age)] += 1;
  classes_[of].count();
}

void ReturnModel::lost(std::size_t of, Microseconds age) noexcept {
  classes_[of].lost[bin(age)] += 1;
  classes_[of].count();
}

// Half a second, then two bins to each doubling: 0.5 s, 0.5 s, 0.5 s, 1 s, 1 s, 2 s, 2 s ...
std::size_t ReturnModel::bin(Microseconds age) noexcept {
  const auto units = static_cast<std::uint64_t>(std::max<Microseconds>(age, 0) / kUnit) + 1;
  if (units == 1) return 0;
  const auto width = static_cast<int>(std::bit_width(units));
  const auto second_half = static_cast<std::size_t>(units >> (width - 2)) & 1;
  return std::min(2 * static_cast<std::size_t>(width - 1) + second_half - 1, kAges - 1);
}

double ReturnModel::width_s(std::size_t bin) noexcept {
  const std::size_t doublings = bin == 0 ? 0 : (bin + 1) / 2 - 1;
  return static_cast<double>(std::uint64_t{1} << doublings) * (kUnit / 1e6);
}

// Those that are still out count as having waited through every age: among many, few are young.
void ReturnModel::Class::refresh() noexcept {
  events = 0;
  std::array<double, kAges> share;
  double waiting = left;
  for (std::size_t age = 0; age < kAges; ++age) {
    const double came = returned[age] + kPriorWeight * kPriorShare;
    share[age] = std::min(1.0, came / (std::max(waiting, returned[age]) + kPriorWeight));
    waiting -= returned[age] + lost[age];
  }
  for (std::size_t from = 0; from < kAges; ++from) {
    double out = 1, hits = 0, seconds = 0;
    density[from] = 0;
    for (std::size_t age = from; age < kAges; ++age) {
      seconds += out * (1 - share[age] / 2) * width_s(age);
      hits += out * share[age];
      out *= 1 - share[age];
      density[from] = std::max(density[from], hits / seconds);
    }
  }
}

}  // namespace tokenspeed
