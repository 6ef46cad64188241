// The command line of a compiled model. Rule: one JSON object on stdout, progress on stderr as a
// line of JSON each; what they mean is for the front end (`tokenspeed check`) to say.
#pragma once

#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
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

class Program {
 public:
  static int main(const AnyModel& model, int argc, char** argv) {
    const Options options = parse(argc, argv);
    std::signal(SIGINT, [](int) { interrupted = 1; });
    Program program(model, options);
    return options.walks > 0 ? program.simulate() : program.check();
  }

 private:
  Program(const AnyModel& model, const Options& options)
      : model_(model),
        options_(options),
        search_(model, options.limits),
        keyer_(model.keyer()),
        key_(model.facts.words) {}

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
      out = search_.run([&](const Search& search, std::size_t left) { progress(search, left); });
      if (out.verdict == Verdict::Ok && !model_.facts.liveness.empty()) {
        out = Liveness(model_, search_).run();
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
    number(json, "state_bytes", sizeof(Word) * model_.facts.words);
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
  void counts(std::string& json, const Search::Counts& actions) const {
    json += ", \"actions\": {";
    for (std::size_t i = 0; i < actions.size(); ++i) {
      if (i) json += ", ";
      quote(json, model_.facts.actions[i]);
      json += ": " + std::to_string(actions[i]);
    }
    json += "}";
  }

  void progress(const Search& search, std::size_t left) {
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(250)) return;
    last_ = now;
    std::fprintf(stderr,
                 "{\"generated\": %llu, \"distinct\": %zu, \"depth\": %d, \"queue\": %zu}\n",
                 static_cast<unsigned long long>(search.generated()), search.distinct(),
                 search.depth(), left);
  }

  const char* action(int number) const {
    return model_.facts.actions[static_cast<std::size_t>(number)];
  }
  Held state(Index at) const {
    Held out(model_);
    model_.unpack(search_.store()[at], out.data());
    return out;
  }
  // The number under which a state, or the one that stands for it, was entered.
  Index number(StatePtr state) {
    (*keyer_)(state, key_.data());
    return search_.store().find(key_.data());
  }

  // --- traces ---

  void step(std::string& json, std::string_view action, const std::string& args,
            StatePtr state) const {
    json += json.back() == '[' ? "{\"action\": " : ", {\"action\": ";
    quote(json, action);
    json += ", \"args\": [" + args + "], \"state\": ";
    model_.show(json, state);
    json += "}";
  }

  // Finds the step from `state` to the state that stands at `to`, says it, and goes there.
  void follow(std::string& json, Held& state, Index to) {
    bool found = false;
    Held reached = state;
    std::string args;
    int taken = 0;
    model_.next(state, [&](int which, StatePtr after, Label label) {
      if (found || number(after) != to) return;
      found = true;
      reached = after;
      taken = which;
      label(args);
    });
    state = reached;
    step(json, found ? action(taken) : "stutter", args, state);
  }

  void trace(std::string& json, const Outcome& out) {
    json += ", \"trace\": [";
    std::vector<Index> path;
    const Index until = out.approach.empty() ? out.at : out.approach.front();
    for (Index at = until; at != kNone; at = search_.store().parent(at)) path.push_back(at);
    if (out.verdict != Verdict::Ok && !path.empty()) {
      Held state = first(path.back());
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

  Held first(Index at) {
    Held out = state(at);
    bool found = false;
    model_.initial([&](StatePtr state) {
      if (found || number(state) != at) return;
      found = true;
      out = state;
    });
    return out;
  }

  void last_step(std::string& json, const Held& from, int which) const {
    // Under symmetry the concrete state may order its successors otherwise; then any bad one will
    // do.
    int at = 0;
    bool told = false;
    model_.next(from, [&](int taken, StatePtr after, Label label) {
      const bool bad = model_.violated(after) >= 0 || model_.broken_step(from, after) >= 0;
      if (!told && bad && (model_.facts.reduced || at == which)) {
        std::string args;
        label(args);
        step(json, action(taken), args, after);
        told = true;
      }
      ++at;
    });
  }

  // --- the graph ---

  bool graph(const std::string&) {
    std::ofstream file(options_.graph);
    std::string line;
    for (Index at = 0; at < search_.store().size(); ++at) {
      const Held from = state(at);
      line = "{\"state\": ";
      model_.show(line, from);
      line += ", \"steps\": [";
      bool comma = false;
      try {
        model_.next(from, [&](int taken, StatePtr after, Label label) {
          const Index to = number(after);
          if (to == kNone || !model_.step_inside(from, after)) return;
          line += comma ? ", [" : "[";
          comma = true;
          quote(line, action(taken));
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
    Search::Counts actions(model_.facts.actions.size());
    std::uint64_t generated = 0;
    long walks = 0;
    States starts(model_), following(model_);
    std::string violated, result = "ok";
    std::vector<int> choices, taken;
    Held state(model_), before(model_);
    std::optional<Held> start;
    try {
      model_.initial([&](StatePtr first) {
        if (model_.inside(first)) starts.push(first);
      });
      while (walks < options_.walks && violated.empty() && !starts.empty() && !interrupted) {
        ++walks;
        choices.clear();
        state = starts[random.next() % starts.size()];
        start = state;
        broken(violated, model_.facts.invariants, model_.violated(state));
        broken(violated, model_.facts.initially, model_.violated_initially(state));
        for (int depth = 0; depth < options_.walk_depth && violated.empty(); ++depth) {
          const std::uint64_t pick = random.next();
          following.clear();
          taken.clear();
          model_.next(state, [&](int action, StatePtr after, Label) {
            following.push(after);
            taken.push_back(action);
          });
          if (following.empty()) {
            if (model_.facts.check_deadlock) violated = result = "deadlock";
            break;
          }
          const std::size_t chosen = pick % following.size();
          choices.push_back(static_cast<int>(chosen));
          before = state;
          state = following[chosen];
          ++generated;
          ++actions[static_cast<std::size_t>(taken[chosen])];
          // A state of a behaviour must be one that the search could hold: bounds are checked here.
          model_.pack(state, key_.data());
          broken(violated, model_.facts.invariants, model_.violated(state));
          broken(violated, model_.facts.steps, model_.broken_step(before, state));
          if (!model_.inside(state) || !model_.step_inside(before, state)) break;
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
    if (!violated.empty() && start) retell(json, *start, choices);
    json += "]}\n";
    std::fwrite(json.data(), 1, json.size(), stdout);
    return 0;
  }

  static void broken(std::string& violated, Names names, int which) {
    if (which >= 0) violated = names[static_cast<std::size_t>(which)];
  }

  const char* advance(Held& state, int chosen, std::string& args) const {
    const Held from = state;
    int at = 0;
    const char* taken = "";
    model_.next(from, [&](int which, StatePtr after, Label label) {
      if (at++ != chosen) return;
      state = after;
      taken = action(which);
      label(args);
    });
    return taken;
  }
  void retell(std::string& json, Held state, const std::vector<int>& choices) const {
    step(json, "", "", state);
    for (int chosen : choices) {
      std::string args;
      const char* taken = advance(state, chosen, args);
      step(json, taken, args, state);
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
  const AnyModel& model_;
  Options options_;
  Search search_;
  std::unique_ptr<Keyer> keyer_;
  std::vector<Word> key_;
  Clock::time_point last_ = Clock::now();
};

}  // namespace tokenspeed::checker
