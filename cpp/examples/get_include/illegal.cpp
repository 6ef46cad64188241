// An illegal move does not compile: with -DILLEGAL the compiler says which move, and what is legal.
#include <cstdio>
#include <tokenspeed/lifecycle.hpp>
using namespace tokenspeed::lifecycle;
struct Engine : Unguarded {
  using Slot = int;
  using Pages = int;
};
int main() {
  Engine engine;
  auto fresh = create<Engine>({17, 0});
  auto waiting = Submit(engine, std::move(fresh), permit_Submit(engine, fresh).take());
#ifdef ILLEGAL
  Complete<State::Finishing>(engine, std::move(waiting));
#else
  auto aborted = Abort(engine, std::move(waiting));
  std::puts(name(aborted.kState).data());
#endif
}
