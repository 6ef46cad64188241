// A request that has pages is not given more by admitting it again.
// expect: Admit is not legal in Decoding. Legal here: Acquire, Schedule, Complete, Publish,
// Preempt, Abort. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Waiting;
#else
constexpr State kFrom = State::Decoding;
#endif

void move(Always& world, In<kFrom>&& request, Permit<Action::Admit>&& permit) {
  auto moved = [&] {
    return Admit(world, std::move(request), std::move(permit), Always::Slot{}, Always::Pages{});
  };
  static_cast<void>(moved);
}
