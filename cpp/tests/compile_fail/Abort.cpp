// What has ended cannot be aborted.
// expect: Abort is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Decoding;
#else
constexpr State kFrom = State::Finished;
#endif

void move(Always& world, In<kFrom>&& request) {
  auto moved = [&] { return Abort(world, std::move(request)); };
  static_cast<void>(moved);
}
