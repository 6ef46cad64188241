// Liveness: is there a fair behaviour that never does what it should? Rule: the whole graph,
// without symmetry; a behaviour may stutter for ever wherever fairness lets it. With a CONSTRAINT,
// the behaviours that keep to it: a step that leaves them is still enabled, and never taken.
//
// A property is refuted by a path to a state where it starts to be owed, from there within states
// that do not pay, into a strongly connected component that is fair (Tarjan 1972; strong fairness
// as in Emerson & Lei 1987, by removing the states where the neglected action is enabled).
#pragma once

#include <algorithm>
#include <vector>

#include "search.hpp"

namespace tokenspeed::checker {

class Liveness {
 public:
  Liveness(const AnyModel& model, const Search& search)
      : model_(model),
        search_(search),
        store_(search.store()),
        state_(model),
        key_(store_.words()) {
    edges_from_.reserve(store_.size() + 1);
    for (Index at = 0; at < store_.size(); ++at) {
      edges_from_.push_back(edges_.size());
      const std::size_t first = edges_.size();
      model_.next(state(at), [&](int, StatePtr after, Label) {
        const Index to = number(after);
        if (to != kNone && model_.step_inside(state_, after)) edges_.push_back(to);
      });
      if (interrupted) throw Interrupted{};
      const auto begin = edges_.begin() + static_cast<std::ptrdiff_t>(first);
      std::sort(begin, edges_.end());
      edges_.erase(std::unique(begin, edges_.end()), edges_.end());
    }
    edges_from_.push_back(edges_.size());
    fair_known_.assign(store_.size(), 0);
    fair_enabled_.assign(store_.size(), 0);
  }

  Outcome run() {
    for (std::size_t property = 0; property < model_.facts.liveness.size(); ++property) {
      if (interrupted) throw Interrupted{};
      Outcome out = refute(property);
      if (out.verdict != Verdict::Ok) return out;
    }
    return {};
  }

 private:
  using Numbers = std::vector<Index>;

  Outcome refute(std::size_t property) {
    const std::size_t n = store_.size();
    std::vector<std::uint8_t> stay(n), region(n, 0), visit(n);
    Numbers queue;
    std::vector<Index> from(n, kNone);
    for (Index at = 0; at < n; ++at) {
      const int k = static_cast<int>(property);
      state(at);
      stay[at] = model_.owing(k, state_);
      visit[at] = model_.visited(k, state_);
      const bool starts = model_.starts(k, state_) &&
                          (!model_.facts.from_start[property] || at < search_.initial());
      if (stay[at] && starts) {
        region[at] = 1;
        queue.push_back(at);
      }
    }
    for (std::size_t i = 0; i < queue.size(); ++i) {
      each(queue[i], [&](Index to) {
        if (!stay[to] || region[to]) return;
        region[to] = 1;
        from[to] = queue[i];
        queue.push_back(to);
      });
    }
    std::sort(queue.begin(), queue.end());
    Numbers component = fair_component(queue, visit);
    if (component.empty()) return {};
    return witness(property, component, visit, from);
  }

  int conditions() const { return static_cast<int>(model_.facts.strong.size()); }
  bool strong(int k) const { return model_.facts.strong[static_cast<std::size_t>(k)]; }
  StatePtr state(Index at) {
    model_.unpack(store_[at], state_.data());
    return state_;
  }
  Index number(StatePtr state) {
    model_.pack(state, key_.data());
    return store_.find(key_.data());
  }

  template <class F>
  void each(Index at, F&& f) const {
    for (std::size_t i = edges_from_[at]; i < edges_from_[at + 1]; ++i) f(edges_[i]);
  }

  // Which fairness conditions are enabled in a state: a step of theirs changes something.
  std::uint64_t enabled(Index at) {
    if (!fair_known_[at]) {
      fair_known_[at] = 1;
      state(at);
      for (int k = 0; k < conditions(); ++k) {
        bool found = false;
        model_.fair(k, state_, [&](StatePtr) { found = true; });
        if (found) fair_enabled_[at] |= std::uint64_t{1} << k;
      }
    }
    return fair_enabled_[at];
  }

  // Where the steps of condition k lead from a state, within the graph.
  Numbers fair_steps(int k, Index at) {
    Numbers out;
    model_.fair(k, state(at), [&](StatePtr after) {
      const Index to = number(after);
      const auto first = edges_.begin() + static_cast<std::ptrdiff_t>(edges_from_[at]);
      const auto last = edges_.begin() + static_cast<std::ptrdiff_t>(edges_from_[at + 1]);
      if (to != kNone && std::binary_search(first, last, to)) out.push_back(to);
    });
    return out;
  }

  Numbers fair_component(const Numbers& states, const std::vector<std::uint8_t>& visit) {
    std::vector<Index> label(store_.size(), kNone);
    std::vector<Numbers> work = components(states);
    Index mark = 0;
    while (!work.empty()) {
      Numbers component = std::move(work.back());
      work.pop_back();
      for (Index at : component) label[at] = mark;
      const std::optional<Numbers> rest = judge(component, label, mark, visit);
      ++mark;
      if (!rest) return component;
      if (rest->empty()) continue;
      for (auto& smaller : components(*rest)) work.push_back(std::move(smaller));
    }
    return {};
  }

  // Nothing if a fair behaviour can stay in the component for ever; else where one might still.
  std::optional<Numbers> judge(const Numbers& component, const std::vector<Index>& label,
                               Index mark, const std::vector<std::uint8_t>& visit) {
    if (std::none_of(component.begin(), component.end(), [&](Index at) { return visit[at]; })) {
      return Numbers{};
    }
    for (int k = 0; k < conditions(); ++k) {
      const std::uint64_t bit = std::uint64_t{1} << k;
      bool always = true, ever = false, taken = false;
      for (Index at : component) {
        const bool on = enabled(at) & bit;
        always = always && on;
        ever = ever || on;
      }
      if (!(strong(k) ? ever : always)) continue;
      for (Index at : component) {
        if (!(enabled(at) & bit)) continue;
        for (Index to : fair_steps(k, at)) taken = taken || label[to] == mark;
        if (taken) break;
      }
      if (taken) continue;
      if (!strong(k)) return Numbers{};
      Numbers rest;
      for (Index at : component) {
        if (!(enabled(at) & bit)) rest.push_back(at);
      }
      return rest;
    }
    return std::nullopt;
  }

  // Tarjan, iteratively, within `states`.
  std::vector<Numbers> components(const Numbers& states) const {
    std::vector<Numbers> out;
    std::vector<Index> number(store_.size(), 0), low(store_.size(), 0);
    std::vector<std::uint8_t> inside(store_.size(), 0), open(store_.size(), 0);
    for (Index at : states) inside[at] = 1;
    Index count = 0;
    Numbers stack;
    struct Frame {
      Index at;
      std::size_t edge;
    };
    std::vector<Frame> frames;
    for (Index root : states) {
      if (number[root]) continue;
      const auto enter = [&](Index at) {
        number[at] = low[at] = ++count;
        open[at] = 1;
        stack.push_back(at);
        frames.push_back({at, edges_from_[at]});
      };
      enter(root);
      while (!frames.empty()) {
        const Index at = frames.back().at;
        if (frames.back().edge < edges_from_[at + 1]) {
          const Index to = edges_[frames.back().edge++];
          if (!inside[to]) continue;
          if (!number[to]) {
            enter(to);
          } else if (open[to]) {
            low[at] = std::min(low[at], number[to]);
          }
          continue;
        }
        frames.pop_back();
        if (!frames.empty()) low[frames.back().at] = std::min(low[frames.back().at], low[at]);
        if (low[at] != number[at]) continue;
        Numbers component;
        Index member;
        do {
          member = stack.back();
          stack.pop_back();
          open[member] = 0;
          component.push_back(member);
        } while (member != at);
        std::sort(component.begin(), component.end());
        out.push_back(std::move(component));
      }
    }
    return out;
  }

  // A shortest way within `inside` from `at` to a state that `wanted` accepts (perhaps `at`
  // itself).
  template <class Wanted>
  Numbers way(Index at, const std::vector<std::uint8_t>& inside, Wanted&& wanted) const {
    std::vector<Index> back(store_.size(), kNone);
    Numbers queue{at};
    std::vector<std::uint8_t> seen(store_.size(), 0);
    seen[at] = 1;
    for (std::size_t i = 0; i < queue.size(); ++i) {
      if (wanted(queue[i])) {
        Numbers out;
        for (Index s = queue[i]; s != at; s = back[s]) out.push_back(s);
        std::reverse(out.begin(), out.end());
        return out;
      }
      each(queue[i], [&](Index to) {
        if (!inside[to] || seen[to]) return;
        seen[to] = 1;
        back[to] = queue[i];
        queue.push_back(to);
      });
    }
    return {};
  }

  // A path into the component and a loop in it that meets every condition.
  Outcome witness(std::size_t property, const Numbers& component,
                  const std::vector<std::uint8_t>& visit, const std::vector<Index>& from) {
    std::vector<std::uint8_t> inside(store_.size(), 0);
    for (Index at : component) inside[at] = 1;
    Outcome out{Verdict::Liveness, model_.facts.liveness[property], component.front(), {}, {}, {}};
    for (Index at = component.front(); at != kNone; at = from[at]) out.approach.push_back(at);
    std::reverse(out.approach.begin(), out.approach.end());
    Index here = component.front();
    const auto walk = [&](auto&& wanted) {
      for (Index at : way(here, inside, wanted)) {
        out.cycle.push_back(at);
        here = at;
      }
    };
    walk([&](Index at) { return visit[at] != 0; });
    for (int k = 0; k < conditions(); ++k) {
      const std::uint64_t bit = std::uint64_t{1} << k;
      const auto off = [&](Index at) { return !(enabled(at) & bit); };
      const bool rests = strong(k) ? std::all_of(component.begin(), component.end(), off)
                                   : std::any_of(component.begin(), component.end(), off);
      if (rests) {
        walk(off);
        continue;
      }
      Index target = kNone;
      walk([&](Index at) {
        for (Index to : fair_steps(k, at)) {
          if (inside[to]) target = to;
        }
        return target != kNone;
      });
      out.cycle.push_back(here = target);
    }
    walk([&](Index at) { return at == component.front(); });
    return out;
  }

  const AnyModel& model_;
  const Search& search_;
  const Store& store_;
  Held state_;  // the one that is looked at
  std::vector<Word> key_;
  std::vector<std::size_t> edges_from_;
  std::vector<Index> edges_;
  std::vector<std::uint8_t> fair_known_;
  std::vector<std::uint64_t> fair_enabled_;
};

}  // namespace tokenspeed::checker
