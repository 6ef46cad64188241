// One action's permit does not serve another.
// expect: no matching function for call to 'Preempt
#include "world.hpp"

#ifdef LEGAL
constexpr Action kAsked = Action::Preempt;
#else
constexpr Action kAsked = Action::Schedule;
#endif

void move(Always& world, In<State::Decoding>&& request, Permit<kAsked>&& permit) {
  static_cast<void>(Preempt(world, std::move(request), std::move(permit)));
}
