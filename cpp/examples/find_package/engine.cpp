// The life of a request: a move takes the request away and gives it back in the state it leads to.
#include <cstdio>
#include <tokenspeed/lifecycle.hpp>
using namespace tokenspeed::lifecycle;
struct Engine : Unguarded {
  using Slot = int;
  using Pages = int;
  void moved(Action, auto, State, State to) noexcept { std::puts(name(to).data()); }
};
int main() {
  Engine engine;
  auto fresh = create<Engine>({17, 0});
  auto waiting = Submit(engine, std::move(fresh), permit_Submit(engine, fresh).take());
  auto running = Admit(engine, std::move(waiting), permit_Admit(engine, waiting).take(), 3, 8);
  auto planned = Schedule(engine, std::move(running), permit_Schedule(engine, running).take());
  auto decoding = Complete<State::Decoding>(engine, std::move(planned));
  auto finishing = Complete<State::Finishing>(engine, std::move(decoding));
  auto finished = Release(engine, std::move(finishing), permit_Release(engine, finishing).take());
}
