// A printed model as the search knows it. Rule: the one place where types become bytes and words.
#pragma once

#include <cstring>

#include "model.hpp"
#include "packing.hpp"

namespace tokenspeed::checker {

// Without symmetry every state stands for itself.
template <class Model>
class Plain final : public Keyer {
 public:
  void operator()(StatePtr state, Word* key) override {
    const auto packed = Model::pack(*static_cast<const typename Model::State*>(state));
    std::memcpy(key, packed.w.data(), sizeof packed);
  }
};

template <class Model>
class Erased final : public AnyModel {
 public:
  Erased()
      : AnyModel({sizeof(State), sizeof(Key) / sizeof(Word), Model::kActionNames,
                  Model::kInvariants, Model::kInitially, Model::kStepNames, Model::kLivenessNames,
                  Model::kFromStart, Model::kStrong, Model::kCheckDeadlock, Model::kReduced}) {}

  Keyer* keyer() const override { return Model::keyer(); }
  void pack(StatePtr s, Word* key) const override { Plain<Model>()(s, key); }
  void unpack(const Word* key, void* state) const override {
    Key packed;
    std::memcpy(packed.w.data(), key, sizeof packed);
    const State s = Model::unpack(packed);
    std::memcpy(state, &s, sizeof s);
  }
  void show(std::string& out, StatePtr s) const override { Model::show(out, as(s)); }
  void initial(Reach out) const override { Model::initial(out); }
  void next(StatePtr s, Visit out) const override { Model::next(as(s), out); }
  int violated(StatePtr s) const override { return Model::violated(as(s)); }
  int violated_initially(StatePtr s) const override { return Model::violated_initially(as(s)); }
  int broken_step(StatePtr s, StatePtr t) const override {
    return Model::broken_step(as(s), as(t));
  }
  bool inside(StatePtr s) const override { return Model::inside(as(s)); }
  bool step_inside(StatePtr s, StatePtr t) const override {
    return Model::step_inside(as(s), as(t));
  }
  void fair(int k, StatePtr s, Reach out) const override { Model::fair(k, as(s), out); }
  bool starts(int k, StatePtr s) const override { return Model::starts(k, as(s)); }
  bool owing(int k, StatePtr s) const override { return Model::owing(k, as(s)); }
  bool visited(int k, StatePtr s) const override { return Model::visited(k, as(s)); }

 private:
  using State = typename Model::State;
  using Key = typename Model::Key;
  static_assert(std::is_trivially_copyable_v<State>);
  static_assert(alignof(State) <= alignof(std::max_align_t));

  static const State& as(StatePtr s) { return *static_cast<const State*>(s); }
};

}  // namespace tokenspeed::checker
