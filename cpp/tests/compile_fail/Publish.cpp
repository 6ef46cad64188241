// What an aborted request computed is not shared.
// expect: Publish is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Finishing;
#else
constexpr State kFrom = State::Aborting;
#endif

void move(Always& world, In<kFrom>&& request) {
  auto moved = [&] { return Publish(world, std::move(request)); };
  static_cast<void>(moved);
}
