// What types cannot say is a guard: the engine answers it, and a refusal names the guard.
#include <cstdio>
#include <tokenspeed/lifecycle.hpp>
using namespace tokenspeed::lifecycle;
struct Engine : Unguarded {
  using Slot = int;
  using Pages = int;
  bool SlotFree() const noexcept { return false; }
};
int main() {
  Engine engine;
  auto fresh = create<Engine>({17, 0});
  auto waiting = Submit(engine, std::move(fresh), permit_Submit(engine, fresh).take());
  const auto verdict = permit_Admit(engine, waiting);
  std::printf("Admit is %s %s\n", verdict ? "allowed" : "refused by", verdict.refused().data());
  auto aborted = Abort(engine, std::move(waiting));
}
