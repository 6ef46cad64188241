// An action with guards wants their answer.
// expect: no matching function for call to 'Release
#include "world.hpp"

void move(Always& world, In<State::Finishing>&& request) {
#ifdef LEGAL
  static_cast<void>(Release(world, std::move(request), permit_Release(world, request).take()));
#else
  static_cast<void>(Release(world, std::move(request)));
#endif
}
