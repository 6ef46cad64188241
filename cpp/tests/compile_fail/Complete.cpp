// A request without pages has no step to complete.
// expect: Complete is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Decoding;
#else
constexpr State kFrom = State::Waiting;
#endif

void move(Always& world, In<kFrom>&& request) {
  auto moved = [&] { return Complete<State::Decoding>(world, std::move(request)); };
  static_cast<void>(moved);
}
