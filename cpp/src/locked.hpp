// A value that several threads use. Rule: it is reached under its lock alone, and only for as long
// as a call takes.
#pragma once

#include <mutex>
#include <utility>

namespace tokenspeed {

template <class T>
class Locked final {
 public:
  template <class... Arguments>
  explicit Locked(Arguments&&... arguments) : value_(std::forward<Arguments>(arguments)...) {}

  // What `f` makes of the value; not a way to keep it.
  template <class F>
  auto run(F&& f) {
    const std::lock_guard lock(mutex_);
    return std::forward<F>(f)(value_);
  }

 private:
  std::mutex mutex_;
  T value_;
};

}  // namespace tokenspeed
