// The command line of a compiled model. Rule: one JSON object on stdout, progress on stderr as a
// line of JSON each; what they mean is for the front end (`tokenspeed check`) to say.
#pragma once

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <string_view>

#include "liveness.hpp"

namespace tokenspeed::checker {

inline double cpu_seconds() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  return static_cast<double>(use.ru_utime.tv_sec + use.ru_stime.tv_sec) +
         static_cast<double>(use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6;
}

inline void quote(std::string& out, std::string_view text) {
  out += '"';
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  out += '"';
}

struct Options {
  Limits limits;
  std::string graph;  // write the state graph here
  long walks = 0;     // simulate: how many random behaviours
  int walk_depth = 100;
  std::uint64_t seed = 1;
};

template <class Model>
class Program {
 public:
  using State = typename Model::State;

  static int main(int argc, char** argv) {
    const Options options = parse(argc, argv);
    std::signal(SIGINT, [](int) { interrupted = 1; });
    Program program(options);
    return options.walks > 0 ? program.simulate() : program.check();
  }

 private:
  explicit Program(const Options& options) : options_(options), search_(options.limits) {}

  static Options parse(int argc, char** argv) {
    Options out;
    for (int i = 1; i + 1 < argc; i += 2) {
      const std::string_view name = argv[i];
      const char* value = argv[i + 1];
      if (name == "--workers")
        out.limits.workers = std::atoi(value);
      else if (name == "--memory-mb")
        out.limits.memory_mb = std::strtoull(value, nullptr, 10);
      else if (name == "--states-max")
        out.limits.states_max = static_cast<Index>(std::strtoul(value, nullptr, 10));
      else if (name == "--initial")
        out.limits.initial = static_cast<Index>(std::strtoul(value, nullptr, 10));
      else if (name == "--graph")
        out.graph = value;
      else if (name == "--walks")
        out.walks = std::atol(value);
      else if (name == "--walk-depth")
        out.walk_depth = std::atoi(value);
      else if (name == "--seed")
        out.seed = std::strtoull(value, nullptr, 10);
      else {
        std::fprintf(stderr, "%s: unknown option\n", argv[i]);
        std::exit(2);
      }
    }
    return out;
  }

  int check() {
    const double cpu = cpu_seconds();
    const auto begin = Clock::now();
    Outcome out;
    try {
      out = search_.run(
          [&](const Search<Model>& search, std::size_t left) { progress(search, left); });
      if constexpr (Model::kLiveness > 0) {
        if (out.verdict == Verdict::Ok) out = Liveness<Model>(search_).run();
      }
    } catch (const Overflow& what) {
      return too_narrow(what);
    } catch (const Undefined& what) {
      out = failed(what.where);
    } catch (const Interrupted&) {
      out = failed("interrupted");
    } catch (const std::bad_alloc&) {
      out = failed("out of memory");
    } catch (const std::exception& what) {
      out = failed(what.what());
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    std::string json = "{\"result\": ";
    quote(json, result(out.verdict));
    number(json, "generated", search_.generated());
    number(json, "distinct", search_.distinct());
    number(json, "depth", static_cast<std::uint64_t>(search_.depth()));
    json += ", \"seconds\": " + std::to_string(seconds);
    json += ", \"cpu_seconds\": " + std::to_string(cpu_seconds() - cpu);
    number(json, "state_bytes", sizeof(typename Model::Key));
    counts(json, search_.actions());
    json += ", \"violated\": ";
    if (out.verdict == Verdict::Ok)
      json += "null";
    else
      quote(json, out.violated);
    trace(json, out);
    json += "}\n";
    if (!options_.graph.empty() && !graph(json)) return 2;
    std::fwrite(json.data(), 1, json.size(), stdout);
    return 0;
  }

  static Outcome failed(const char* why) { return {Verdict::Error, why, kNone, {}, {}, {}}; }
  static int too_narrow(const Overflow& what) {
    std::printf("{\"overflow\": \"%s\", \"value\": %ld}\n", what.bound, what.value);
    return 3;
  }
  static const char* result(Verdict verdict) {
    switch (verdict) {
      case Verdict::Ok:
        return "ok";
      case Verdict::Deadlock:
        return "deadlock";
      case Verdict::Liveness:
        return "liveness";
      case Verdict::Error:
        return "error";
      default:
        return "invariant";
    }
  }
  static void number(std::string& json, const char* name, std::uint64_t value) {
    json += ", \"" + std::string(name) + "\": " + std::to_string(value);
  }
  static void counts(std::string& json, const std::array<std::uint64_t, Model::kActions>& actions) {
    json += ", \"actions\": {";
    for (std::size_t i = 0; i < actions.size(); ++i) {
      if (i) json += ", ";
      quote(json, Model::kActionNames[i]);
      json += ": " + std::to_string(actions[i]);
    }
    json += "}";
  }

  void progress(const Search<Model>& search, std::size_t left) {
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(250)) return;
    last_ = now;
    std::fprintf(stderr,
                 "{\"generated\": %llu, \"distinct\": %zu, \"depth\": %d, \"queue\": %zu}\n",
                 static_cast<unsigned long long>(search.generated()), search.distinct(),
                 search.depth(), left);
  }

  // Every type of visitor puts a copy of each action into the program, and these copies are most of
  // what it takes to compile one. So the search has a type of its own, and all the rest this one.
  using Label = std::function<void(std::string&)>;
  using Visitor = std::function<void(int action, const State& after, const Label& label)>;

  static void successors(const State& state, const Visitor& visit) {
    Model::next(state, [&](int action, const State& after, auto&& label) {
      visit(action, after, std::ref(label));
    });
  }

  // --- traces ---

  static void step(std::string& json, std::string_view action, const std::string& args,
                   const State& state) {
    json += json.back() == '[' ? "{\"action\": " : ", {\"action\": ";
    quote(json, action);
    json += ", \"args\": [" + args + "], \"state\": ";
    Model::show(json, state);
    json += "}";
  }

  // Finds the step from `state` to the state that stands at `to`, says it, and goes there.
  void follow(std::string& json, State& state, Index to) {
    bool found = false;
    State reached = state;
    std::string args;
    int action = 0;
    successors(state, [&](int which, const State& after, const Label& label) {
      if (found || !(Search<Model>::key(after, canonical_) == search_.store()[to])) return;
      found = true;
      reached = after;
      action = which;
      label(args);
    });
    state = reached;
    step(json, found ? Model::kActionNames[action] : "stutter", args, state);
  }

  void trace(std::string& json, const Outcome& out) {
    json += ", \"trace\": [";
    std::vector<Index> path;
    const Index until = out.approach.empty() ? out.at : out.approach.front();
    for (Index at = until; at != kNone; at = search_.store().parent(at)) path.push_back(at);
    if (out.verdict != Verdict::Ok && !path.empty()) {
      State state = first(path.back());
      step(json, "", "", state);
      for (std::size_t i = path.size() - 1; i-- > 0;) follow(json, state, path[i]);
      for (std::size_t i = 1; i < out.approach.size(); ++i) follow(json, state, out.approach[i]);
      if (out.beyond) last_step(json, state, *out.beyond);
      for (Index at : out.cycle) follow(json, state, at);
    }
    json += "]";
    if (out.verdict == Verdict::Liveness) {
      number(json, "loop", path.size() + out.approach.size() - 2);
    }
  }

  State first(Index at) {
    State out = Model::unpack(search_.store()[at]);
    bool found = false;
    Model::initial([&](const State& state) {
      if (found || !(Search<Model>::key(state, canonical_) == search_.store()[at])) return;
      found = true;
      out = state;
    });
    return out;
  }

  void last_step(std::string& json, const State& state, int which) {
    // Under symmetry the concrete state may order its successors otherwise; then any bad one will
    // do.
    const State from = state;
    int at = 0;
    bool told = false;
    const auto say = [&](int action, const State& after, const Label& label) {
      std::string args;
      label(args);
      step(json, Model::kActionNames[action], args, after);
      told = true;
    };
    successors(from, [&](int action, const State& after, const Label& label) {
      const bool bad = Model::violated(after) >= 0 || Model::broken_step(from, after) >= 0;
      if (!told && bad && (Model::kGroups > 0 || at == which)) say(action, after, label);
      ++at;
    });
  }

  // --- the graph ---

  bool graph(const std::string&) {
    std::ofstream file(options_.graph);
    std::string line;
    for (Index at = 0; at < search_.store().size(); ++at) {
      const State state = Model::unpack(search_.store()[at]);
      line = "{\"state\": ";
      Model::show(line, state);
      line += ", \"steps\": [";
      bool comma = false;
      try {
        successors(state, [&](int action, const State& after, const Label& label) {
          const Index to = search_.store().find(Search<Model>::key(after, canonical_));
          if (to == kNone || !Model::step_inside(state, after)) return;
          line += comma ? ", [" : "[";
          comma = true;
          quote(line, Model::kActionNames[action]);
          line += ", [";
          label(line);
          line += "], " + std::to_string(to) + "]";
        });
      } catch (const Undefined&) {
        // It is the state where the check ended; the verdict says so.
      }
      line += "]}\n";
      file << line;
    }
    file.flush();
    if (!file) std::fprintf(stderr, "%s: cannot write the state graph\n", options_.graph.c_str());
    return static_cast<bool>(file);
  }

  // --- random behaviours ---

  struct Walker {
    std::uint64_t seed;
    std::uint64_t next() {
      seed += 0x9e3779b97f4a7c15ull;
      return mix(seed);
    }
  };

  int simulate() {
    const auto begin = Clock::now();
    Walker random{options_.seed};
    std::array<std::uint64_t, Model::kActions> actions{};
    std::uint64_t generated = 0;
    long walks = 0;
    std::vector<State> starts;
    std::string violated, result = "ok";
    std::vector<int> choices;
    std::vector<std::pair<int, State>> following;
    State start{};
    try {
      Model::initial([&](const State& state) {
        if (Model::inside(state)) starts.push_back(state);
      });
      while (walks < options_.walks && violated.empty() && !starts.empty() && !interrupted) {
        ++walks;
        choices.clear();
        State state = start = starts[random.next() % starts.size()];
        if (const int bad = Model::violated(state); bad >= 0) violated = Model::kInvariants[bad];
        if (const int bad = Model::violated_initially(state); bad >= 0)
          violated = Model::kInitially[bad];
        for (int depth = 0; depth < options_.walk_depth && violated.empty(); ++depth) {
          const std::uint64_t pick = random.next();
          following.clear();
          successors(state, [&](int action, const State& after, const Label&) {
            following.emplace_back(action, after);
          });
          if (following.empty()) {
            if (Model::kCheckDeadlock) violated = result = "deadlock";
            break;
          }
          const std::size_t chosen = pick % following.size();
          choices.push_back(static_cast<int>(chosen));
          const State before = state;
          const int action = following[chosen].first;
          state = following[chosen].second;
          ++generated;
          ++actions[static_cast<std::size_t>(action)];
          // A state of a behaviour must be one that the search could hold: bounds are checked here.
          static_cast<void>(Model::pack(state));
          if (const int bad = Model::violated(state); bad >= 0) violated = Model::kInvariants[bad];
          if (const int bad = Model::broken_step(before, state); bad >= 0)
            violated = Model::kStepNames[bad];
          if (!Model::inside(state) || !Model::step_inside(before, state)) break;
        }
        simulated(walks, generated);
      }
    } catch (const Overflow& what) {
      return too_narrow(what);
    } catch (const Undefined& what) {
      violated = what.where;
      result = "error";
    }
    if (interrupted && violated.empty()) violated = "interrupted", result = "error";
    if (!violated.empty() && result == "ok") result = "invariant";
    std::string json = "{\"result\": ";
    quote(json, result);
    number(json, "generated", generated);
    number(json, "walks", static_cast<std::uint64_t>(walks));
    json += ", \"seconds\": " +
            std::to_string(std::chrono::duration<double>(Clock::now() - begin).count());
    counts(json, actions);
    json += ", \"violated\": ";
    if (violated.empty())
      json += "null";
    else
      quote(json, violated);
    json += ", \"trace\": [";
    if (!violated.empty()) retell(json, start, choices);
    json += "]}\n";
    std::fwrite(json.data(), 1, json.size(), stdout);
    return 0;
  }

  static int advance(State& state, int chosen, std::string& args) {
    int at = 0, action = 0;
    const State from = state;
    successors(from, [&](int which, const State& after, const Label& label) {
      if (at++ != chosen) return;
      state = after;
      action = which;
      label(args);
    });
    return action;
  }
  static void retell(std::string& json, State state, const std::vector<int>& choices) {
    step(json, "", "", state);
    for (int chosen : choices) {
      std::string args;
      const int action = advance(state, chosen, args);
      step(json, Model::kActionNames[action], args, state);
    }
  }
  void simulated(long walks, std::uint64_t generated) {
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(250)) return;
    last_ = now;
    std::fprintf(stderr, "{\"generated\": %llu, \"walks\": %ld}\n",
                 static_cast<unsigned long long>(generated), walks);
  }

  using Clock = std::chrono::steady_clock;
  Options options_;
  Search<Model> search_;
  Canonical<Model> canonical_;
  Clock::time_point last_ = Clock::now();
};

}  // namespace tokenspeed::checker
