// A request that is ending needs no further page.
// expect: Acquire is not legal in Finishing. Legal here: Complete, Publish, Release. See
// specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Decoding;
#else
constexpr State kFrom = State::Finishing;
#endif

void move(Always& world, In<kFrom>&& request, Permit<Action::Acquire>&& permit) {
  auto moved = [&] { return Acquire(world, std::move(request), std::move(permit)); };
  static_cast<void>(moved);
}
