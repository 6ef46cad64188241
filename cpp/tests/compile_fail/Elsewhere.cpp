// A request that decodes does not go back to its prompt.
// expect: Complete leads from Decoding only to Decoding, Finishing. See specs/Lifecycle.tla
#include "world.hpp"

#ifdef LEGAL
constexpr State kTo = State::Finishing;
#else
constexpr State kTo = State::Prefilling;
#endif

void move(Always& world, In<State::Decoding>&& request) {
  auto moved = [&] { return Complete<kTo>(world, std::move(request)); };
  static_cast<void>(moved);
}
