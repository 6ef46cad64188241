// A request is in one place.
// expect: use of deleted function
// expect clang++: call to deleted constructor of
#include "world.hpp"

void move(In<State::Decoding>& request) {
#ifdef LEGAL
  In<State::Decoding> other = std::move(request);
#else
  In<State::Decoding> other = request;
#endif
  other.abandon();
}
