// A request that runs keeps its pages.
// expect: Release is not legal in Decoding. Legal here: Acquire, Schedule, Complete, Publish,
// Preempt, Abort. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Aborting;
#else
constexpr State kFrom = State::Decoding;
#endif

void move(Always& world, In<kFrom>&& request, Permit<Action::Release>&& permit) {
  auto moved = [&] { return Release(world, std::move(request), std::move(permit)); };
  static_cast<void>(moved);
}
