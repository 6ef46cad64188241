// A request is submitted once.
// expect: Submit is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::New;
#else
constexpr State kFrom = State::Waiting;
#endif

void move(Always& world, In<kFrom>&& request, Permit<Action::Submit>&& permit) {
  auto moved = [&] { return Submit(world, std::move(request), std::move(permit)); };
  static_cast<void>(moved);
}
