// Breadth-first search over the states of a model. Rule: exact states, a fixed order; the
// counts and the counterexample are the same for any number of workers.
//
// The frontier is cut into chunks. Workers expand a chunk against the table as it was before the
// block (read only), drop what is known, and judge the rest; one thread then enters the survivors
// in order. So a state is new exactly if a serial search would have found it new.
#pragma once

#include <algorithm>
#include <atomic>
#include <csignal>
#include <exception>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "store.hpp"

namespace tokenspeed::checker {

struct Limits {
  int workers = 1;
  std::size_t memory_mb = 4096;
  Index states_max = kNone;
  Index initial = kNone;  // begin with this state of Init alone, by its place
};

// Set by SIGINT: whoever searches stops soon, and keeps what was found.
inline volatile std::sig_atomic_t interrupted = 0;
struct Interrupted {};

enum class Verdict { Ok, Invariant, Deadlock, Step, Liveness, Error };

struct Outcome {
  Verdict verdict = Verdict::Ok;
  std::string violated;         // the property, or what went wrong
  Index at = kNone;             // the last state that was entered before the violation
  std::vector<Index> cycle;     // liveness: the loop, from `at` back to it; empty if it stutters
  std::vector<Index> approach;  // liveness: from where the property is owed to `at`
  std::optional<int> beyond;  // the number of the successor of `at` that is bad but was not entered
};

class Search {
 public:
  using Counts = std::vector<std::uint64_t>;

  Search(const AnyModel& model, const Limits& limits)
      : model_(model), limits_(limits), store_(model), actions_(model.facts.actions.size()) {
    for (int i = 0; i < limits.workers; ++i) workers_.emplace_back(model);
    chunks_.resize(kBlock);
  }

  const Store& store() const { return store_; }
  std::uint64_t generated() const { return generated_; }
  std::size_t distinct() const { return store_.size(); }
  int depth() const { return depth_; }
  Index initial() const { return initial_; }
  const Counts& actions() const { return actions_; }

  template <class Report>
  Outcome run(Report&& report) {
    Outcome out = start();
    Index from = 0;
    while (out.verdict == Verdict::Ok && from < store_.size()) {
      ++depth_;
      const Index until = static_cast<Index>(store_.size());
      while (out.verdict == Verdict::Ok && from < until) {
        const Index to = std::min(until, from + kChunk * static_cast<Index>(kBlock));
        out = block(from, to);
        from = to;
        if (interrupted) throw Interrupted{};
        report(*this, until - from);
      }
    }
    return out;
  }

 private:
  static constexpr Index kChunk = 256;
  static constexpr std::size_t kBlock = 32;  // chunks entered together
  enum class Kind : std::uint8_t { New, Bad, Deadlock, Step, Error };
  struct Found {
    std::uint64_t hash;
    std::uint64_t order;  // successors generated before it in its chunk, itself included
    Index parent;
    std::int32_t successor;
    std::int16_t property;
    Kind kind;
  };
  struct Chunk {
    std::vector<Found> found;
    std::vector<Word> keys;  // of those found that are Kind::New or Kind::Bad, in order
    std::uint64_t generated = 0;
    Counts actions;
    std::string error;
    void clear(std::size_t kinds) {
      found.clear();
      keys.clear();
      generated = 0;
      actions.assign(kinds, 0);
      error.clear();
    }
  };
  struct Worker {
    std::unique_ptr<Keyer> keyer;
    Held state;
    std::vector<Found> batch;  // the successors of `state`,
    std::vector<Word> keys;    // their keys,
    States states;             // and they themselves
    explicit Worker(const AnyModel& model) : keyer(model.keyer()), state(model), states(model) {}
  };

  Outcome start() {
    const std::unique_ptr<Keyer> keyer(model_.keyer());
    std::vector<Word> key(store_.words());
    Outcome out;
    Index place = 0;
    try {
      model_.initial([&](StatePtr state) {
        if (limits_.initial != kNone && place++ != limits_.initial) return;
        ++generated_;
        if (out.verdict != Verdict::Ok) return;
        const bool inside = model_.inside(state);
        (*keyer)(state, key.data());
        if (store_.find(key.data()) != kNone) return;
        const int bad = model_.violated(state);
        const int wrong = bad >= 0 ? -1 : model_.violated_initially(state);
        if (!inside && bad < 0 && wrong < 0) return;
        store_.enter(key.data(), store_.hash(key.data()), kNone);
        const Index at = static_cast<Index>(store_.size() - 1);
        const auto fails = [&](Names names, int which) {
          out = {Verdict::Invariant, names[static_cast<std::size_t>(which)], at, {}, {}, {}};
        };
        if (bad >= 0) fails(model_.facts.invariants, bad);
        if (wrong >= 0) fails(model_.facts.initially, wrong);
      });
    } catch (const Undefined& what) {
      out = {Verdict::Error, what.where, kNone, {}, {}, {}};
    }
    initial_ = static_cast<Index>(store_.size());
    return out;
  }

  Outcome block(Index from, Index to) {
    const std::size_t chunks = (to - from + kChunk - 1) / kChunk;
    std::atomic<std::size_t> next{0};
    const auto work = [&](std::size_t worker) {
      for (std::size_t at; (at = next.fetch_add(1)) < chunks;) {
        const Index first = from + static_cast<Index>(at) * kChunk;
        expand(first, std::min(to, first + kChunk), chunks_[at], workers_[worker]);
      }
    };
    if (workers_.size() == 1 || chunks == 1) {
      work(0);
    } else {
      std::vector<std::exception_ptr> errors(workers_.size());
      std::vector<std::thread> threads;
      for (std::size_t w = 0; w < workers_.size(); ++w) {
        threads.emplace_back([&, w] {
          try {
            work(w);
          } catch (...) {
            errors[w] = std::current_exception();
          }
        });
      }
      for (auto& thread : threads) thread.join();
      for (auto& error : errors) {
        if (error) std::rethrow_exception(error);
      }
    }
    for (std::size_t at = 0; at < chunks; ++at) {
      Outcome out = enter(chunks_[at]);
      if (out.verdict != Verdict::Ok) return out;
    }
    return {};
  }

  void expand(Index from, Index to, Chunk& chunk, Worker& worker) {
    chunk.clear(actions_.size());
    for (Index at = from; at < to; ++at) {
      model_.unpack(store_[at], worker.state.data());
      const char* error = successors(at, chunk, worker);
      if (!judge(chunk, worker)) return;
      const std::int32_t count = static_cast<std::int32_t>(worker.batch.size());
      const auto ends = [&](Kind kind) {
        chunk.found.push_back({0, chunk.generated, at, count, 0, kind});
      };
      if (error) {
        chunk.error = error;
        ends(Kind::Error);
        return;
      }
      if (count == 0 && model_.facts.check_deadlock) ends(Kind::Deadlock);
    }
  }

  // Collects the successors of the worker's state. Where one has no value: why; those before it are
  // judged all the same.
  const char* successors(Index at, Chunk& chunk, Worker& worker) {
    worker.batch.clear();
    worker.keys.clear();
    worker.states.clear();
    std::int32_t count = 0;
    try {
      model_.next(worker.state, [&](int action, StatePtr after, Label) {
        ++chunk.generated;
        ++chunk.actions[static_cast<std::size_t>(action)];
        worker.keys.resize(worker.keys.size() + store_.words());
        Word* key = worker.keys.data() + worker.keys.size() - store_.words();
        (*worker.keyer)(after, key);
        const std::uint64_t hash = store_.hash(key);
        store_.prefetch(hash);
        worker.batch.push_back({hash, chunk.generated, at, count++, -1, Kind::New});
        worker.states.push(after);
      });
    } catch (const Undefined& what) {
      return what.where;
    }
    return nullptr;
  }

  // False if a property has no value for one of the successors.
  bool judge(Chunk& chunk, Worker& worker) {
    for (std::size_t i = 0; i < worker.batch.size(); ++i) {
      Found& found = worker.batch[i];
      const Word* key = worker.keys.data() + i * store_.words();
      try {
        if (!judged(worker.state, worker.states[i], key, found)) continue;
      } catch (const Undefined& what) {
        chunk.error = what.where;
        found.kind = Kind::Error;
      }
      chunk.found.push_back(found);
      if (found.kind == Kind::Error) return false;
      if (found.kind != Kind::Step) chunk.keys.insert(chunk.keys.end(), key, key + store_.words());
    }
    return true;
  }

  // What is to be said of a successor, if anything.
  bool judged(StatePtr state, StatePtr after, const Word* key, Found& found) const {
    if (!model_.facts.steps.empty()) {
      if (const int bad = model_.broken_step(state, after); bad >= 0) {
        found.kind = Kind::Step;
        found.property = static_cast<std::int16_t>(bad);
        return true;
      }
    }
    if (store_.find(key, found.hash) != kNone) return false;
    const bool inside = model_.inside(after) && model_.step_inside(state, after);
    const int bad = model_.violated(after);
    found.property = static_cast<std::int16_t>(bad);
    found.kind = bad >= 0 ? Kind::Bad : Kind::New;
    return inside || bad >= 0;
  }

  Outcome enter(const Chunk& chunk) {
    const Word* key = chunk.keys.data();
    for (const Found& found : chunk.found) {
      const auto stop = [&](Verdict verdict, std::string name) -> Outcome {
        generated_ += found.order;
        return {verdict, std::move(name), found.parent, {}, {}, found.successor};
      };
      switch (found.kind) {
        case Kind::Deadlock: {
          Outcome out = stop(Verdict::Deadlock, "deadlock");
          out.beyond.reset();
          return out;
        }
        case Kind::Error: {
          Outcome out = stop(Verdict::Error, chunk.error);
          out.beyond.reset();
          return out;
        }
        case Kind::Step:
          return stop(Verdict::Step, model_.facts.steps[static_cast<std::size_t>(found.property)]);
        default:
          break;
      }
      const Word* const this_key = key;
      key += store_.words();
      if (store_.find(this_key, found.hash) != kNone) continue;
      if (found.kind == Kind::Bad) {
        store_.enter(this_key, found.hash, found.parent);
        return stop(Verdict::Invariant,
                    model_.facts.invariants[static_cast<std::size_t>(found.property)]);
      }
      if (store_.size() >= limits_.states_max) {
        return stop(Verdict::Error, "the limit of states was reached");
      }
      if ((store_.size() & 0xffff) == 0 && over_memory()) {
        return stop(Verdict::Error, "the memory limit was reached");
      }
      store_.enter(this_key, found.hash, found.parent);
    }
    generated_ += chunk.generated;
    for (std::size_t i = 0; i < actions_.size(); ++i) actions_[i] += chunk.actions[i];
    return {};
  }

  bool over_memory() const {
    return store_.bytes() + store_.bytes_next() > limits_.memory_mb * (std::size_t{1} << 20);
  }

  const AnyModel& model_;
  Limits limits_;
  Store store_;
  std::vector<Worker> workers_;
  std::vector<Chunk> chunks_;
  std::uint64_t generated_ = 0;
  int depth_ = 0;
  Index initial_ = 0;
  Counts actions_;
};

}  // namespace tokenspeed::checker
