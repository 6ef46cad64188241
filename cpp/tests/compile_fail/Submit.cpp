// A request is submitted once.
// expect: Submit is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::New;
#else
constexpr State kFrom = State::Waiting;
#endif

void move(Always& world, In<kFrom>&& request) {
  auto moved = [&] { return Submit(world, std::move(request)); };
  static_cast<void>(moved);
}
