// What the search knows of a model. Rule: a state is bytes and a key is words, whatever the
// specification. So the search is compiled once (checker.cpp), and of a model its own types,
// actions and predicates alone, each once: that takes less than half of the time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

namespace tokenspeed::checker {

// The specification asked for a value that does not exist; `where` is file:line:column: why.
struct Undefined {
  const char* where;
};
// A value outside its assumed bounds: which bound, and the value.
struct Overflow {
  const char* bound;
  long value;
};

[[noreturn, gnu::noinline, gnu::cold]] inline void undefined(const char* where) {
  throw Undefined{where};
}
[[noreturn, gnu::noinline, gnu::cold]] inline void overflow(const char* bound, long value) {
  throw Overflow{bound, value};
}

// Refers to a function that outlives it.
template <class Signature>
class Ref;
template <class R, class... Args>
class Ref<R(Args...)> {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, Ref>)
  Ref(F&& f)
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(args...);
        }) {}
  R operator()(Args... args) const { return call_(object_, args...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

using Word = std::uint64_t;
using StatePtr = const void*;                   // to `Facts::state_bytes` that may be copied
using Label = Ref<void(std::string&)>;          // appends an action's arguments
using Visit = Ref<void(int, StatePtr, Label)>;  // an action by number, the state after it
using Reach = Ref<void(StatePtr)>;
using Names = std::span<const char* const>;

// Of the states that are the same but for a renaming, the key of the one that stands for all.
// It has room to work in: each thread has its own.
class Keyer {
 public:
  virtual ~Keyer() = default;
  virtual void operator()(StatePtr state, Word* key) = 0;
};

struct Facts {
  std::size_t state_bytes, words;  // of a state, and of its key
  Names actions, invariants, initially, steps, liveness;
  std::span<const bool> from_start;  // of each liveness property: is it owed from the start only?
  std::span<const bool> strong;      // of each fairness condition
  bool check_deadlock;
  bool reduced;  // states that differ by a renaming are one
};

class AnyModel {
 public:
  const Facts facts;

  explicit AnyModel(const Facts& of) : facts(of) {}
  virtual ~AnyModel() = default;
  virtual Keyer* keyer() const = 0;  // the caller's; <memory> takes as long to read as all the rest
  virtual void pack(StatePtr s, Word* key) const = 0;
  virtual void unpack(const Word* key, void* state) const = 0;
  virtual void show(std::string& out, StatePtr s) const = 0;
  virtual void initial(Reach out) const = 0;
  virtual void next(StatePtr s, Visit out) const = 0;
  // The number of what does not hold, or -1.
  virtual int violated(StatePtr s) const = 0;
  virtual int violated_initially(StatePtr s) const = 0;
  virtual int broken_step(StatePtr s, StatePtr t) const = 0;
  virtual bool inside(StatePtr s) const = 0;
  virtual bool step_inside(StatePtr s, StatePtr t) const = 0;
  // The steps of fairness condition k; what liveness property k says of a state.
  virtual void fair(int k, StatePtr s, Reach out) const = 0;
  virtual bool starts(int k, StatePtr s) const = 0;
  virtual bool owing(int k, StatePtr s) const = 0;
  virtual bool visited(int k, StatePtr s) const = 0;
};

// The command line of a model's program (main.hpp).
int run(const AnyModel& model, int argc, char** argv);

}  // namespace tokenspeed::checker
