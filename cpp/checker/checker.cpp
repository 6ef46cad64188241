// The search, compiled once for all models (see model.hpp).
#include "main.hpp"

namespace tokenspeed::checker {

int run(const AnyModel& model, int argc, char** argv) {
  return Program::main(model, argc, argv);
}

}  // namespace tokenspeed::checker
