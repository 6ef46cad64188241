// A permit comes from the guards, never from the caller.
// expect: is private within this context
// expect clang++: calling a private constructor of class
#include "world.hpp"

void move(Always& world, In<State::Finishing>&& request) {
#ifdef LEGAL
  auto verdict = permit_Release(world, request);
  if (!verdict) return;
  static_cast<void>(Release(world, std::move(request), std::move(verdict).take()));
#else
  static_cast<void>(Release(world, std::move(request), Permit<Action::Release>(request.id())));
#endif
}
