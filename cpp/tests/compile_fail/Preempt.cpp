// A request that is ending gives its pages back, not up.
// expect: Preempt is not legal in Finishing. Legal here: Complete, Publish, Release. See
// specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Decoding;
#else
constexpr State kFrom = State::Finishing;
#endif

void move(Always& world, In<kFrom>&& request, Permit<Action::Preempt>&& permit) {
  auto moved = [&] { return Preempt(world, std::move(request), std::move(permit)); };
  static_cast<void>(moved);
}
