// Breadth-first search over the states of a generated model. Rule: exact states, a fixed order; the
// counts and the counterexample are the same for any number of workers.
//
// The frontier is cut into chunks. Workers expand a chunk against the table as it was before the
// block (read only), drop what is known, and judge the rest; one thread then enters the survivors
// in order. So a state is new exactly if a serial search would have found it new.
#pragma once

#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "symmetry.hpp"

namespace tokenspeed::checker {

using Index = std::uint32_t;
inline constexpr Index kNone = 0xffffffffu;

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

// Every state that was reached, by number, and how.
template <class Model>
class Store {
 public:
  using Key = typename Model::Key;

  Store() { slots_.assign(1 << 12, kEmpty); }

  std::size_t size() const { return keys_.size(); }
  const Key& operator[](Index at) const { return keys_[at]; }
  Index parent(Index at) const { return parents_[at]; }
  std::size_t bytes() const {
    return keys_.capacity() * sizeof(Key) + parents_.capacity() * 4 + slots_.capacity() * 8;
  }
  // What the next doubling would need.
  std::size_t bytes_next() const { return 2 * keys_.size() * sizeof(Key) + slots_.size() * 16; }

  void prefetch(std::uint64_t hash) const {
    __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]);
  }
  Index find(const Key& key, std::uint64_t hash) const {
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t at = hash & mask;; at = (at + 1) & mask) {
      const std::uint64_t slot = slots_[at];
      if (slot == kEmpty) return kNone;
      if (static_cast<Index>(slot >> 32) == static_cast<Index>(hash >> 32) &&
          keys_[static_cast<Index>(slot)] == key) {
        return static_cast<Index>(slot);
      }
    }
  }
  Index find(const Key& key) const { return find(key, key.hash()); }

  // True if it was not there.
  bool enter(const Key& key, std::uint64_t hash, Index parent) {
    if (find(key, hash) != kNone) return false;
    if (2 * (keys_.size() + 1) > slots_.size()) grow();
    place(hash, static_cast<Index>(keys_.size()));
    keys_.push_back(key);
    parents_.push_back(parent);
    return true;
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};

  void place(std::uint64_t hash, Index index) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = hash & mask;
    while (slots_[at] != kEmpty) at = (at + 1) & mask;
    slots_[at] = (hash >> 32 << 32) | index;
  }
  void grow() {
    std::vector<std::uint64_t>(slots_.size() * 2, kEmpty).swap(slots_);
    for (Index i = 0; i < keys_.size(); ++i) place(keys_[i].hash(), i);
  }

  std::vector<Key> keys_;
  std::vector<Index> parents_;
  std::vector<std::uint64_t> slots_;
};

template <class Model>
class Search {
 public:
  using State = typename Model::State;
  using Key = typename Model::Key;
  static constexpr std::size_t kActions = Model::kActions;

  explicit Search(const Limits& limits)
      : limits_(limits), workers_(static_cast<std::size_t>(limits.workers)) {}

  const Store<Model>& store() const { return store_; }
  std::uint64_t generated() const { return generated_; }
  std::size_t distinct() const { return store_.size(); }
  int depth() const { return depth_; }
  Index initial() const { return initial_; }
  const std::array<std::uint64_t, kActions>& actions() const { return actions_; }

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

  static Key key(const State& state, Canonical<Model>& canonical) {
    if constexpr (Model::kGroups > 0) {
      return canonical(state);
    } else {
      return Model::pack(state);
    }
  }

 private:
  static constexpr Index kChunk = 256;
  static constexpr std::size_t kBlock = 32;  // chunks entered together
  enum class Kind : std::uint8_t { New, Bad, Deadlock, Step, Error };
  struct Found {
    Key key;
    std::uint64_t hash;
    std::uint64_t order;  // successors generated before it in its chunk, itself included
    Index parent;
    std::uint16_t action;
    std::int16_t property;
    std::int32_t successor;
    Kind kind;
  };
  struct Chunk {
    std::vector<Found> found;
    std::uint64_t generated = 0;
    std::array<std::uint64_t, kActions> actions{};
    std::string error;
    void clear() {
      found.clear();
      generated = 0;
      actions = {};
      error.clear();
    }
  };

  Outcome start() {
    Canonical<Model> canonical;
    Outcome out;
    Index place = 0;
    try {
      Model::initial([&](const State& state) {
        if (limits_.initial != kNone && place++ != limits_.initial) return;
        ++generated_;
        if (out.verdict != Verdict::Ok) return;
        const bool inside = Model::inside(state);
        const Key k = key(state, canonical);
        if (store_.find(k) != kNone) return;
        const int bad = Model::violated(state);
        const int wrong = bad >= 0 ? -1 : Model::violated_initially(state);
        if (!inside && bad < 0 && wrong < 0) return;
        store_.enter(k, k.hash(), kNone);
        const Index at = static_cast<Index>(store_.size() - 1);
        if (bad >= 0) out = {Verdict::Invariant, Model::kInvariants[bad], at, {}, {}, {}};
        if (wrong >= 0) out = {Verdict::Invariant, Model::kInitially[wrong], at, {}, {}, {}};
      });
    } catch (const Undefined& what) {
      out = {Verdict::Error, what.where, kNone, {}, {}, {}};
    }
    initial_ = static_cast<Index>(store_.size());
    return out;
  }

  Outcome block(Index from, Index to) {
    const std::size_t chunks = (to - from + kChunk - 1) / kChunk;
    chunks_.resize(kBlock);
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

  struct Worker {
    Canonical<Model> canonical;
    std::vector<Found> batch;
    std::vector<State> states;
  };

  void expand(Index from, Index to, Chunk& chunk, Worker& worker) {
    chunk.clear();
    for (Index at = from; at < to; ++at) {
      const State state = Model::unpack(store_[at]);
      worker.batch.clear();
      worker.states.clear();
      std::int32_t count = 0;
      const char* error = nullptr;
      try {
        Model::next(state, [&](int action, const State& after, auto&&) {
          ++chunk.generated;
          ++chunk.actions[static_cast<std::size_t>(action)];
          const Key k = key(after, worker.canonical);
          const std::uint64_t hash = k.hash();
          store_.prefetch(hash);
          worker.batch.push_back({k, hash, chunk.generated, at, static_cast<std::uint16_t>(action),
                                  -1, count++, Kind::New});
          worker.states.push_back(after);
        });
      } catch (const Undefined& what) {
        error = what.where;  // the successors before it are judged all the same
      }
      if (!judge(state, chunk, worker)) return;
      if (error) {
        chunk.error = error;
        chunk.found.push_back({{}, 0, chunk.generated, at, 0, 0, count, Kind::Error});
        return;
      }
      if (count == 0 && Model::kCheckDeadlock) {
        chunk.found.push_back({{}, 0, chunk.generated, at, 0, 0, 0, Kind::Deadlock});
      }
    }
  }

  // False if a property has no value for one of the successors.
  bool judge(const State& state, Chunk& chunk, Worker& worker) {
    for (std::size_t i = 0; i < worker.batch.size(); ++i) {
      Found& found = worker.batch[i];
      try {
        if (judged(state, worker.states[i], found)) chunk.found.push_back(found);
      } catch (const Undefined& what) {
        chunk.error = what.where;
        found.kind = Kind::Error;
        chunk.found.push_back(found);
        return false;
      }
    }
    return true;
  }

  // What is to be said of a successor, if anything.
  bool judged(const State& state, const State& after, Found& found) const {
    if constexpr (Model::kSteps > 0) {
      if (const int bad = Model::broken_step(state, after); bad >= 0) {
        found.kind = Kind::Step;
        found.property = static_cast<std::int16_t>(bad);
        return true;
      }
    }
    if (store_.find(found.key, found.hash) != kNone) return false;
    const bool inside = Model::inside(after) && Model::step_inside(state, after);
    const int bad = Model::violated(after);
    found.property = static_cast<std::int16_t>(bad);
    found.kind = bad >= 0 ? Kind::Bad : Kind::New;
    return inside || bad >= 0;
  }

  Outcome enter(const Chunk& chunk) {
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
          return stop(Verdict::Step, Model::kStepNames[found.property]);
        case Kind::Bad:
          if (store_.find(found.key, found.hash) != kNone) break;
          store_.enter(found.key, found.hash, found.parent);
          return stop(Verdict::Invariant, Model::kInvariants[found.property]);
        default:
          if (store_.find(found.key, found.hash) != kNone) break;
          if (store_.size() >= limits_.states_max) {
            return stop(Verdict::Error, "the limit of states was reached");
          }
          if ((store_.size() & 0xffff) == 0 && over_memory()) {
            return stop(Verdict::Error, "the memory limit was reached");
          }
          store_.enter(found.key, found.hash, found.parent);
      }
    }
    generated_ += chunk.generated;
    for (std::size_t i = 0; i < kActions; ++i) actions_[i] += chunk.actions[i];
    return {};
  }

  bool over_memory() const {
    return store_.bytes() + store_.bytes_next() > limits_.memory_mb * (std::size_t{1} << 20);
  }

  Limits limits_;
  Store<Model> store_;
  std::vector<Worker> workers_;
  std::vector<Chunk> chunks_;
  std::uint64_t generated_ = 0;
  int depth_ = 0;
  Index initial_ = 0;
  std::array<std::uint64_t, kActions> actions_{};
};

}  // namespace tokenspeed::checker
