// The smallest World there can be: what the files beside this one call the lifecycle with.
// Rule: each of them compiles with -DLEGAL and does not without, for the reason after `expect:`
// (or, where a compiler has its own words, `expect clang++:`).
#pragma once

#include <utility>
#include <vector>

#include "tokenspeed/lifecycle.hpp"

using tokenspeed::RequestId;
using namespace tokenspeed::lifecycle;

struct Always {
  struct Slot {
    int index = 0;
  };
  using Pages = std::vector<int>;

  void moved(Action, RequestId, State, State) noexcept {}
  bool Starved() const { return true; }
  bool SlotFree() const { return true; }
  bool NoneEvictable() const { return true; }
  bool FirstQueued(RequestId) const { return true; }
  bool Wants(RequestId) const { return true; }
  bool Lacks(RequestId) const { return true; }
  bool NoneLacks() const { return true; }
  bool Fits(RequestId) const { return true; }
  bool LastRunning(RequestId) const { return true; }
  bool Alone(RequestId) const { return false; }
  bool Pinned(RequestId) const { return false; }
};

template <State S>
using In = Request<S, Always>;
