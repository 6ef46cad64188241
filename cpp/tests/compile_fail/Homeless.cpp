// A request that waits has no pages to look at.
// expect: no matching function for call to
// expect clang++: no matching member function for call to 'pages'
#include "world.hpp"

#ifdef LEGAL
constexpr State kFrom = State::Prefilling;
#else
constexpr State kFrom = State::Waiting;
#endif

void look(In<kFrom>& request) {
  static_cast<void>(request.pages());
}
