// An action takes the request away from who calls it.
// expect: no matching function for call to 'Abort
#include "world.hpp"

void move(Always& world, In<State::Decoding>& request) {
#ifdef LEGAL
  Abort(world, std::move(request)).abandon();
#else
  Abort(world, request).abandon();
#endif
}
