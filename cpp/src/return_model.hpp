// When what was left in the cache is asked for again. Rule: learned online, from the past alone; an
// event costs O(1) and the memory is fixed.
//
// Things are told apart by their class. For each class the model counts how many came back at which
// age, which gives the hazard: the share of those that have waited so long and come back now. From
// it follows the hit density of a page at an age: expected hits for each second that it stays, over
// the horizon that is best for it. A cache that lets the lowest density go first wastes the least
// room (Beckmann, Chen, Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI
// 2018; the best horizon is Gittins' index).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenspeed {

using Microseconds = std::int64_t;

class ReturnModel final {
 public:
  explicit ReturnModel(std::size_t classes) : classes_(classes) {}

  // Something of a class is left, comes back at an age, or is lost sight of at an age.
  void left(std::size_t of) noexcept;
  void returned(std::size_t of, Microseconds age) noexcept;
  void lost(std::size_t of, Microseconds age) noexcept;

  // Expected hits a second of a page of this class and age.
  double density(std::size_t of, Microseconds age) const noexcept {
    return classes_[of].density[bin(age)];
  }

 private:
  static constexpr std::size_t kAges = 36;  // two to a doubling: half a second to 18 hours
  static constexpr Microseconds kUnit = 500'000;
  static constexpr int kFresh = 32;           // events until a class is looked at again
  static constexpr double kForget = 4096;     // of so many things left, half the weight goes
  static constexpr double kPriorWeight = 8;   // things, as many as it takes to change our mind
  static constexpr double kPriorShare = 0.1;  // of these come back at each age: what makes an LRU

  struct Class {
    double left = 0;
    std::array<double, kAges> returned{};
    std::array<double, kAges> lost{};
    std::array<double, kAges> density{};
    int events = 0;
    Class() noexcept { refresh(); }
    void refresh() noexcept;
    void count() noexcept {
      if (++events >= kFresh) refresh();
    }
  };
  static std::size_t bin(Microseconds age) noexcept;
  static double width_s(std::size_t bin) noexcept;

  std::vector<Class> classes_;
};

}  // namespace tokenspeed
