// GENERATED from specs/Lifecycle.tla by `tokenspeed codegen`. Do not edit: change the spec.
//
// Rule: a request does only what the spec's `Edges` has, and holds exactly what its `Owns` says. A
// call of an action in a state that is outside the table does not compile, and says why; what types
// cannot say is a guard, and the guards' "yes" is a Permit that the action uses up.
#pragma once

#include <array>
#include <cassert>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "tokenspeed/ownership.hpp"

namespace tokenspeed::lifecycle {

inline constexpr std::string_view kSpec = "specs/Lifecycle.tla";
inline constexpr std::string_view kSpecHash =
    "26ab8f68eb7683c2e7500ac4e48bb5d9f3a508b6035e7f4a67cae58eb1ab6155";
inline constexpr std::string_view kSpecVersion = "2.0.1";

enum class State : std::uint8_t {
  New,
  Waiting,
  Prefilling,
  Decoding,
  Preempted,
  Finishing,
  Aborting,
  Finished,
  Aborted,
};
inline constexpr std::array<std::string_view, 9> kStateNames{
    "New",       "Waiting",  "Prefilling", "Decoding", "Preempted",
    "Finishing", "Aborting", "Finished",   "Aborted",
};
constexpr std::string_view name(State value) noexcept {
  return kStateNames[static_cast<std::size_t>(value)];
}

enum class Action : std::uint8_t {
  Submit,
  Admit,
  Acquire,
  Schedule,
  Complete,
  Publish,
  Preempt,
  Abort,
  Release,
};
inline constexpr std::array<std::string_view, 9> kActionNames{
    "Submit", "Admit", "Acquire", "Schedule", "Complete", "Publish", "Preempt", "Abort", "Release",
};
constexpr std::string_view name(Action value) noexcept {
  return kActionNames[static_cast<std::size_t>(value)];
}

enum class PageKind : std::uint8_t {
  Free,
  Exclusive,
  Shared,
};
inline constexpr std::array<std::string_view, 3> kPageKindNames{
    "Free",
    "Exclusive",
    "Shared",
};
constexpr std::string_view name(PageKind value) noexcept {
  return kPageKindNames[static_cast<std::size_t>(value)];
}

// The spec's `Edges`.
constexpr bool edge(Action action, State from, State to) noexcept {
  switch (action) {
    case Action::Submit:
      return (from == State::New && to == State::Waiting);
    case Action::Admit:
      return (from == State::Waiting && to == State::Prefilling) ||
             (from == State::Preempted && to == State::Prefilling);
    case Action::Acquire:
      return (from == State::Prefilling && to == State::Prefilling) ||
             (from == State::Decoding && to == State::Decoding);
    case Action::Schedule:
      return (from == State::Prefilling && to == State::Prefilling) ||
             (from == State::Decoding && to == State::Decoding);
    case Action::Complete:
      return (from == State::Prefilling && to == State::Prefilling) ||
             (from == State::Prefilling && to == State::Decoding) ||
             (from == State::Prefilling && to == State::Finishing) ||
             (from == State::Decoding && to == State::Decoding) ||
             (from == State::Decoding && to == State::Finishing) ||
             (from == State::Finishing && to == State::Finishing) ||
             (from == State::Aborting && to == State::Aborting);
    case Action::Publish:
      return (from == State::Prefilling && to == State::Prefilling) ||
             (from == State::Decoding && to == State::Decoding) ||
             (from == State::Finishing && to == State::Finishing);
    case Action::Preempt:
      return (from == State::Prefilling && to == State::Preempted) ||
             (from == State::Decoding && to == State::Preempted);
    case Action::Abort:
      return (from == State::Waiting && to == State::Aborted) ||
             (from == State::Prefilling && to == State::Aborting) ||
             (from == State::Decoding && to == State::Aborting) ||
             (from == State::Preempted && to == State::Aborted);
    case Action::Release:
      return (from == State::Finishing && to == State::Finished) ||
             (from == State::Aborting && to == State::Aborted);
  }
  return false;
}

// Is there any move of this action out of this state?
constexpr bool can(Action action, State from) noexcept {
  for (std::size_t to = 0; to < kStateNames.size(); ++to) {
    if (edge(action, from, static_cast<State>(to))) return true;
  }
  return false;
}

// Does nothing lead out of this state?
constexpr bool ended(State state) noexcept {
  for (std::size_t action = 0; action < kActionNames.size(); ++action) {
    if (can(static_cast<Action>(action), state)) return false;
  }
  return true;
}

// The spec's `Owns`.
constexpr bool owns_slot(State state) noexcept {
  return state == State::Prefilling || state == State::Decoding || state == State::Finishing ||
         state == State::Aborting;
}
constexpr bool owns_pages(State state) noexcept {
  return state == State::Prefilling || state == State::Decoding || state == State::Finishing ||
         state == State::Aborting;
}

// Every pair outside the table is refuted, every pair inside it confirmed.
static_assert(can(Action::Submit, State::New));
static_assert(!can(Action::Submit, State::Waiting),
              "Submit is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Submit, State::Prefilling),
              "Submit is not legal in Prefilling. Legal here: Acquire, Schedule, Complete, "
              "Publish, Preempt, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Submit, State::Decoding),
              "Submit is not legal in Decoding. Legal here: Acquire, Schedule, Complete, Publish, "
              "Preempt, Abort. See specs/Lifecycle.tla");
static_assert(
    !can(Action::Submit, State::Preempted),
    "Submit is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Submit, State::Finishing),
              "Submit is not legal in Finishing. Legal here: Complete, Publish, Release. See "
              "specs/Lifecycle.tla");
static_assert(
    !can(Action::Submit, State::Aborting),
    "Submit is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
static_assert(!can(Action::Submit, State::Finished),
              "Submit is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Submit, State::Aborted),
              "Submit is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Admit, State::New),
              "Admit is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(can(Action::Admit, State::Waiting));
static_assert(!can(Action::Admit, State::Prefilling),
              "Admit is not legal in Prefilling. Legal here: Acquire, Schedule, Complete, Publish, "
              "Preempt, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Admit, State::Decoding),
              "Admit is not legal in Decoding. Legal here: Acquire, Schedule, Complete, Publish, "
              "Preempt, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Admit, State::Preempted));
static_assert(!can(Action::Admit, State::Finishing),
              "Admit is not legal in Finishing. Legal here: Complete, Publish, Release. See "
              "specs/Lifecycle.tla");
static_assert(
    !can(Action::Admit, State::Aborting),
    "Admit is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
static_assert(!can(Action::Admit, State::Finished),
              "Admit is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Admit, State::Aborted),
              "Admit is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Acquire, State::New),
              "Acquire is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(!can(Action::Acquire, State::Waiting),
              "Acquire is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Acquire, State::Prefilling));
static_assert(can(Action::Acquire, State::Decoding));
static_assert(
    !can(Action::Acquire, State::Preempted),
    "Acquire is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Acquire, State::Finishing),
              "Acquire is not legal in Finishing. Legal here: Complete, Publish, Release. See "
              "specs/Lifecycle.tla");
static_assert(
    !can(Action::Acquire, State::Aborting),
    "Acquire is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
static_assert(!can(Action::Acquire, State::Finished),
              "Acquire is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Acquire, State::Aborted),
              "Acquire is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Schedule, State::New),
              "Schedule is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(
    !can(Action::Schedule, State::Waiting),
    "Schedule is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Schedule, State::Prefilling));
static_assert(can(Action::Schedule, State::Decoding));
static_assert(
    !can(Action::Schedule, State::Preempted),
    "Schedule is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Schedule, State::Finishing),
              "Schedule is not legal in Finishing. Legal here: Complete, Publish, Release. See "
              "specs/Lifecycle.tla");
static_assert(
    !can(Action::Schedule, State::Aborting),
    "Schedule is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
static_assert(!can(Action::Schedule, State::Finished),
              "Schedule is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Schedule, State::Aborted),
              "Schedule is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Complete, State::New),
              "Complete is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(
    !can(Action::Complete, State::Waiting),
    "Complete is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Complete, State::Prefilling));
static_assert(can(Action::Complete, State::Decoding));
static_assert(
    !can(Action::Complete, State::Preempted),
    "Complete is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Complete, State::Finishing));
static_assert(can(Action::Complete, State::Aborting));
static_assert(!can(Action::Complete, State::Finished),
              "Complete is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Complete, State::Aborted),
              "Complete is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Publish, State::New),
              "Publish is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(!can(Action::Publish, State::Waiting),
              "Publish is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Publish, State::Prefilling));
static_assert(can(Action::Publish, State::Decoding));
static_assert(
    !can(Action::Publish, State::Preempted),
    "Publish is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Publish, State::Finishing));
static_assert(
    !can(Action::Publish, State::Aborting),
    "Publish is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
static_assert(!can(Action::Publish, State::Finished),
              "Publish is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Publish, State::Aborted),
              "Publish is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Preempt, State::New),
              "Preempt is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(!can(Action::Preempt, State::Waiting),
              "Preempt is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Preempt, State::Prefilling));
static_assert(can(Action::Preempt, State::Decoding));
static_assert(
    !can(Action::Preempt, State::Preempted),
    "Preempt is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Preempt, State::Finishing),
              "Preempt is not legal in Finishing. Legal here: Complete, Publish, Release. See "
              "specs/Lifecycle.tla");
static_assert(
    !can(Action::Preempt, State::Aborting),
    "Preempt is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
static_assert(!can(Action::Preempt, State::Finished),
              "Preempt is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Preempt, State::Aborted),
              "Preempt is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Abort, State::New),
              "Abort is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(can(Action::Abort, State::Waiting));
static_assert(can(Action::Abort, State::Prefilling));
static_assert(can(Action::Abort, State::Decoding));
static_assert(can(Action::Abort, State::Preempted));
static_assert(!can(Action::Abort, State::Finishing),
              "Abort is not legal in Finishing. Legal here: Complete, Publish, Release. See "
              "specs/Lifecycle.tla");
static_assert(
    !can(Action::Abort, State::Aborting),
    "Abort is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
static_assert(!can(Action::Abort, State::Finished),
              "Abort is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Abort, State::Aborted),
              "Abort is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Release, State::New),
              "Release is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
static_assert(!can(Action::Release, State::Waiting),
              "Release is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Release, State::Prefilling),
              "Release is not legal in Prefilling. Legal here: Acquire, Schedule, Complete, "
              "Publish, Preempt, Abort. See specs/Lifecycle.tla");
static_assert(!can(Action::Release, State::Decoding),
              "Release is not legal in Decoding. Legal here: Acquire, Schedule, Complete, Publish, "
              "Preempt, Abort. See specs/Lifecycle.tla");
static_assert(
    !can(Action::Release, State::Preempted),
    "Release is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
static_assert(can(Action::Release, State::Finishing));
static_assert(can(Action::Release, State::Aborting));
static_assert(!can(Action::Release, State::Finished),
              "Release is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
static_assert(!can(Action::Release, State::Aborted),
              "Release is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");

// What a scheduler brings: its resource types, what to do when a request has moved, and an answer
// to each guard, kept up to date rather than computed by scanning.
template <class W>
concept World = requires(W& world, const W& view, RequestId request) {
  typename W::Slot;
  typename W::Pages;
  { world.moved(Action{}, request, State{}, State{}) } noexcept;
  { view.Fits(request) } -> std::same_as<bool>;
  { view.NoneLacks() } -> std::same_as<bool>;
  { view.SlotFree() } -> std::same_as<bool>;
  { view.FirstQueued(request) } -> std::same_as<bool>;
  { view.Lacks(request) } -> std::same_as<bool>;
  { view.Wants(request) } -> std::same_as<bool>;
  { view.Starved() } -> std::same_as<bool>;
  { view.NoneEvictable() } -> std::same_as<bool>;
  { view.LastRunning(request) } -> std::same_as<bool>;
  { view.Alone(request) } -> std::same_as<bool>;
  { view.Pinned(request) } -> std::same_as<bool>;
};

// Where an engine may start from: a World, less its resources, in which every guard says yes. What
// it declares itself hides what stands here, so that guards can be answered one after the other.
struct Unguarded {
  void moved(Action, RequestId, State, State) noexcept {}
  bool Fits(RequestId) const noexcept { return true; }
  bool NoneLacks() const noexcept { return true; }
  bool SlotFree() const noexcept { return true; }
  bool FirstQueued(RequestId) const noexcept { return true; }
  bool Lacks(RequestId) const noexcept { return true; }
  bool Wants(RequestId) const noexcept { return true; }
  bool Starved() const noexcept { return true; }
  bool NoneEvictable() const noexcept { return true; }
  bool LastRunning(RequestId) const noexcept { return true; }
  bool Alone(RequestId) const noexcept { return false; }
  bool Pinned(RequestId) const noexcept { return false; }
};

// A request in state S. Move-only; it holds what the spec says that S owns.
template <State S, class W>
class [[nodiscard]] Request final {
 public:
  static constexpr State kState = S;

  Request(Request&&) noexcept = default;
  Request& operator=(Request&&) noexcept = default;
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;
  ~Request() { assert((ended(S) || !id_.held()) && "a request was dropped before it ended"); }

  // Let go of a request that has not ended. Only for tearing a whole scheduler down.
  void abandon() noexcept { const OwnedId gone = std::move(id_); }

  RequestId id() const noexcept { return id_.get(); }
  bool held() const noexcept { return id_.held(); }
  typename W::Slot& slot() noexcept
    requires(owns_slot(S))
  {
    assert(id_.held());
    return slot_.value;
  }
  const typename W::Slot& slot() const noexcept
    requires(owns_slot(S))
  {
    assert(id_.held());
    return slot_.value;
  }
  typename W::Pages& pages() noexcept
    requires(owns_pages(S))
  {
    assert(id_.held());
    return pages_.value;
  }
  const typename W::Pages& pages() const noexcept
    requires(owns_pages(S))
  {
    assert(id_.held());
    return pages_.value;
  }

 private:
  friend struct Moves;
  Request(OwnedId&& id, Held<owns_slot(S), typename W::Slot>&& slot,
          Held<owns_pages(S), typename W::Pages>&& pages) noexcept
      : id_(std::move(id)), slot_(std::move(slot)), pages_(std::move(pages)) {}

  OwnedId id_;
  [[no_unique_address]] Held<owns_slot(S), typename W::Slot> slot_;
  [[no_unique_address]] Held<owns_pages(S), typename W::Pages> pages_;
};

// The doors of Request, Permit and Verdict; only the functions below go through them.
struct Moves {
  template <State S, class W>
  static Request<S, W> make(OwnedId&& id, Held<owns_slot(S), typename W::Slot>&& slot,
                            Held<owns_pages(S), typename W::Pages>&& pages) noexcept {
    return Request<S, W>(std::move(id), std::move(slot), std::move(pages));
  }
  template <State S, class W>
  static OwnedId take_id(Request<S, W>& request) noexcept {
    return std::move(request.id_);
  }
  template <State S, class W>
  static auto take_slot(Request<S, W>& request) noexcept {
    return std::move(request.slot_);
  }
  template <State S, class W>
  static auto take_pages(Request<S, W>& request) noexcept {
    return std::move(request.pages_);
  }
  template <Action A>
  static Verdict<A> allow(RequestId id) noexcept {
    return Verdict<A>(Permit<A>(id), {});
  }
  template <Action A>
  static Verdict<A> refuse(RequestId id, std::string_view guard) noexcept {
    return Verdict<A>(Permit<A>(id), guard);
  }
  template <Action A>
  static void use(Permit<A>&& permit, RequestId id) noexcept {
    assert(permit.id_ == id && "a permit for somebody else");
    static_cast<void>(permit);
    static_cast<void>(id);
  }
};

// A request that nobody knows yet: the start of the table.
template <World W>
Request<State::New, W> create(RequestId id) noexcept {
  return Moves::make<State::New, W>(OwnedId(id), {}, {});
}

// Submit: New -> Waiting.
template <State S, World W>
  requires(can(Action::Submit, S))
Verdict<Action::Submit> permit_Submit(const W& world, const Request<S, W>& request) noexcept {
  if (!world.Fits(request.id())) return Moves::refuse<Action::Submit>(request.id(), "Fits(r)");
  return Moves::allow<Action::Submit>(request.id());
}
constexpr State after_Submit([[maybe_unused]] State from) noexcept {
  return State::Waiting;
}
template <State S, World W>
  requires(can(Action::Submit, S))
Request<after_Submit(S), W> Submit(W& world, Request<S, W>&& request,
                                   Permit<Action::Submit>&& permit) noexcept {
  const RequestId id = request.id();
  Moves::use(std::move(permit), id);
  auto out = Moves::make<after_Submit(S), W>(Moves::take_id(request), Moves::take_slot(request),
                                             Moves::take_pages(request));
  world.moved(Action::Submit, id, S, after_Submit(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Submit, S))
void Submit(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(
      S != State::Waiting,
      "Submit is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Prefilling,
                "Submit is not legal in Prefilling. Legal here: Acquire, Schedule, Complete, "
                "Publish, Preempt, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Decoding,
                "Submit is not legal in Decoding. Legal here: Acquire, Schedule, Complete, "
                "Publish, Preempt, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Preempted,
      "Submit is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Finishing,
                "Submit is not legal in Finishing. Legal here: Complete, Publish, Release. See "
                "specs/Lifecycle.tla");
  static_assert(
      S != State::Aborting,
      "Submit is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Submit is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Submit is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// Admit: Waiting -> Prefilling, Preempted -> Prefilling.
template <State S, World W>
  requires(can(Action::Admit, S))
Verdict<Action::Admit> permit_Admit(const W& world, const Request<S, W>& request) noexcept {
  if (!world.NoneLacks()) return Moves::refuse<Action::Admit>(request.id(), "NoneLacks");
  if (!world.SlotFree()) return Moves::refuse<Action::Admit>(request.id(), "SlotFree");
  if (!world.FirstQueued(request.id()))
    return Moves::refuse<Action::Admit>(request.id(), "FirstQueued(r)");
  return Moves::allow<Action::Admit>(request.id());
}
constexpr State after_Admit(State from) noexcept {
  return from == State::Waiting ? State::Prefilling : State::Prefilling;
}
template <State S, World W>
  requires(can(Action::Admit, S) && !owns_slot(S) && owns_slot(after_Admit(S)) && !owns_pages(S) &&
           owns_pages(after_Admit(S)))
Request<after_Admit(S), W> Admit(W& world, Request<S, W>&& request, Permit<Action::Admit>&& permit,
                                 typename W::Slot&& slot, typename W::Pages&& pages) noexcept {
  const RequestId id = request.id();
  Moves::use(std::move(permit), id);
  auto out = Moves::make<after_Admit(S), W>(Moves::take_id(request), {std::move(slot)},
                                            {std::move(pages)});
  world.moved(Action::Admit, id, S, after_Admit(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Admit, S))
void Admit(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Admit is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(S != State::Prefilling,
                "Admit is not legal in Prefilling. Legal here: Acquire, Schedule, Complete, "
                "Publish, Preempt, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Decoding,
                "Admit is not legal in Decoding. Legal here: Acquire, Schedule, Complete, Publish, "
                "Preempt, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Finishing,
                "Admit is not legal in Finishing. Legal here: Complete, Publish, Release. See "
                "specs/Lifecycle.tla");
  static_assert(
      S != State::Aborting,
      "Admit is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Admit is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Admit is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// Acquire: Prefilling -> Prefilling, Decoding -> Decoding.
template <State S, World W>
  requires(can(Action::Acquire, S))
Verdict<Action::Acquire> permit_Acquire(const W& world, const Request<S, W>& request) noexcept {
  if (!world.Lacks(request.id())) return Moves::refuse<Action::Acquire>(request.id(), "Lacks(r)");
  return Moves::allow<Action::Acquire>(request.id());
}
constexpr State after_Acquire(State from) noexcept {
  return from == State::Prefilling ? State::Prefilling : State::Decoding;
}
template <State S, World W>
  requires(can(Action::Acquire, S))
Request<after_Acquire(S), W> Acquire(W& world, Request<S, W>&& request,
                                     Permit<Action::Acquire>&& permit) noexcept {
  const RequestId id = request.id();
  Moves::use(std::move(permit), id);
  auto out = Moves::make<after_Acquire(S), W>(Moves::take_id(request), Moves::take_slot(request),
                                              Moves::take_pages(request));
  world.moved(Action::Acquire, id, S, after_Acquire(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Acquire, S))
void Acquire(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Acquire is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(
      S != State::Waiting,
      "Acquire is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Preempted,
      "Acquire is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Finishing,
                "Acquire is not legal in Finishing. Legal here: Complete, Publish, Release. See "
                "specs/Lifecycle.tla");
  static_assert(
      S != State::Aborting,
      "Acquire is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Acquire is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Acquire is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// Schedule: Prefilling -> Prefilling, Decoding -> Decoding.
template <State S, World W>
  requires(can(Action::Schedule, S))
Verdict<Action::Schedule> permit_Schedule(const W& world, const Request<S, W>& request) noexcept {
  if (!world.Wants(request.id())) return Moves::refuse<Action::Schedule>(request.id(), "Wants(r)");
  return Moves::allow<Action::Schedule>(request.id());
}
constexpr State after_Schedule(State from) noexcept {
  return from == State::Prefilling ? State::Prefilling : State::Decoding;
}
template <State S, World W>
  requires(can(Action::Schedule, S))
Request<after_Schedule(S), W> Schedule(W& world, Request<S, W>&& request,
                                       Permit<Action::Schedule>&& permit) noexcept {
  const RequestId id = request.id();
  Moves::use(std::move(permit), id);
  auto out = Moves::make<after_Schedule(S), W>(Moves::take_id(request), Moves::take_slot(request),
                                               Moves::take_pages(request));
  world.moved(Action::Schedule, id, S, after_Schedule(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Schedule, S))
void Schedule(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Schedule is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(
      S != State::Waiting,
      "Schedule is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Preempted,
      "Schedule is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Finishing,
                "Schedule is not legal in Finishing. Legal here: Complete, Publish, Release. See "
                "specs/Lifecycle.tla");
  static_assert(
      S != State::Aborting,
      "Schedule is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Schedule is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Schedule is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// Complete: Prefilling -> Prefilling, Prefilling -> Decoding, Prefilling -> Finishing, Decoding ->
// Decoding, Decoding -> Finishing, Finishing -> Finishing, Aborting -> Aborting.
template <State To, State S, World W>
  requires(edge(Action::Complete, S, To))
Request<To, W> Complete(W& world, Request<S, W>&& request) noexcept {
  const RequestId id = request.id();
  auto out = Moves::make<To, W>(Moves::take_id(request), Moves::take_slot(request),
                                Moves::take_pages(request));
  world.moved(Action::Complete, id, S, To);
  return out;
}
template <State To, State S, class W, class... Rest>
  requires(!edge(Action::Complete, S, To))
void Complete(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Complete is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(
      S != State::Waiting,
      "Complete is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Preempted,
      "Complete is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Complete is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Complete is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Prefilling,
                "Complete leads from Prefilling only to Prefilling, Decoding, Finishing. See "
                "specs/Lifecycle.tla");
  static_assert(
      S != State::Decoding,
      "Complete leads from Decoding only to Decoding, Finishing. See specs/Lifecycle.tla");
  static_assert(S != State::Finishing,
                "Complete leads from Finishing only to Finishing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborting,
                "Complete leads from Aborting only to Aborting. See specs/Lifecycle.tla");
}

// Publish: Prefilling -> Prefilling, Decoding -> Decoding, Finishing -> Finishing.
constexpr State after_Publish(State from) noexcept {
  return from == State::Prefilling ? State::Prefilling
         : from == State::Decoding ? State::Decoding
                                   : State::Finishing;
}
template <State S, World W>
  requires(can(Action::Publish, S))
Request<after_Publish(S), W> Publish(W& world, Request<S, W>&& request) noexcept {
  const RequestId id = request.id();
  auto out = Moves::make<after_Publish(S), W>(Moves::take_id(request), Moves::take_slot(request),
                                              Moves::take_pages(request));
  world.moved(Action::Publish, id, S, after_Publish(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Publish, S))
void Publish(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Publish is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(
      S != State::Waiting,
      "Publish is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Preempted,
      "Publish is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Aborting,
      "Publish is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Publish is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Publish is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// Preempt: Prefilling -> Preempted, Decoding -> Preempted.
template <State S, World W>
  requires(can(Action::Preempt, S))
Verdict<Action::Preempt> permit_Preempt(const W& world, const Request<S, W>& request) noexcept {
  if (!world.Starved()) return Moves::refuse<Action::Preempt>(request.id(), "Starved");
  if (!world.NoneEvictable()) return Moves::refuse<Action::Preempt>(request.id(), "NoneEvictable");
  if (!world.LastRunning(request.id()))
    return Moves::refuse<Action::Preempt>(request.id(), "LastRunning(r)");
  if (world.Alone(request.id())) return Moves::refuse<Action::Preempt>(request.id(), "~Alone(r)");
  if (world.Pinned(request.id())) return Moves::refuse<Action::Preempt>(request.id(), "~Pinned(r)");
  return Moves::allow<Action::Preempt>(request.id());
}
constexpr State after_Preempt(State from) noexcept {
  return from == State::Prefilling ? State::Preempted : State::Preempted;
}
template <State To, class W>
struct [[nodiscard]] PreemptResult {
  typename W::Slot slot;
  typename W::Pages pages;
  Request<To, W> request;
};
template <State S, World W>
  requires(can(Action::Preempt, S) && owns_slot(S) && !owns_slot(after_Preempt(S)) &&
           owns_pages(S) && !owns_pages(after_Preempt(S)))
PreemptResult<after_Preempt(S), W> Preempt(W& world, Request<S, W>&& request,
                                           Permit<Action::Preempt>&& permit) noexcept {
  const RequestId id = request.id();
  Moves::use(std::move(permit), id);
  PreemptResult<after_Preempt(S), W> out{
      std::move(Moves::take_slot(request).value), std::move(Moves::take_pages(request).value),
      Moves::make<after_Preempt(S), W>(Moves::take_id(request), {}, {})};
  world.moved(Action::Preempt, id, S, after_Preempt(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Preempt, S))
void Preempt(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Preempt is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(
      S != State::Waiting,
      "Preempt is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Preempted,
      "Preempt is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Finishing,
                "Preempt is not legal in Finishing. Legal here: Complete, Publish, Release. See "
                "specs/Lifecycle.tla");
  static_assert(
      S != State::Aborting,
      "Preempt is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Preempt is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Preempt is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// Abort: Waiting -> Aborted, Prefilling -> Aborting, Decoding -> Aborting, Preempted -> Aborted.
constexpr State after_Abort(State from) noexcept {
  return from == State::Waiting      ? State::Aborted
         : from == State::Prefilling ? State::Aborting
         : from == State::Decoding   ? State::Aborting
                                     : State::Aborted;
}
template <State S, World W>
  requires(can(Action::Abort, S))
Request<after_Abort(S), W> Abort(W& world, Request<S, W>&& request) noexcept {
  const RequestId id = request.id();
  auto out = Moves::make<after_Abort(S), W>(Moves::take_id(request), Moves::take_slot(request),
                                            Moves::take_pages(request));
  world.moved(Action::Abort, id, S, after_Abort(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Abort, S))
void Abort(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Abort is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(S != State::Finishing,
                "Abort is not legal in Finishing. Legal here: Complete, Publish, Release. See "
                "specs/Lifecycle.tla");
  static_assert(
      S != State::Aborting,
      "Abort is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Abort is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Abort is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// Release: Finishing -> Finished, Aborting -> Aborted.
template <State S, World W>
  requires(can(Action::Release, S))
Verdict<Action::Release> permit_Release(const W& world, const Request<S, W>& request) noexcept {
  if (world.Pinned(request.id())) return Moves::refuse<Action::Release>(request.id(), "~Pinned(r)");
  return Moves::allow<Action::Release>(request.id());
}
constexpr State after_Release(State from) noexcept {
  return from == State::Finishing ? State::Finished : State::Aborted;
}
template <State To, class W>
struct [[nodiscard]] ReleaseResult {
  typename W::Slot slot;
  typename W::Pages pages;
  Request<To, W> request;
};
template <State S, World W>
  requires(can(Action::Release, S) && owns_slot(S) && !owns_slot(after_Release(S)) &&
           owns_pages(S) && !owns_pages(after_Release(S)))
ReleaseResult<after_Release(S), W> Release(W& world, Request<S, W>&& request,
                                           Permit<Action::Release>&& permit) noexcept {
  const RequestId id = request.id();
  Moves::use(std::move(permit), id);
  ReleaseResult<after_Release(S), W> out{
      std::move(Moves::take_slot(request).value), std::move(Moves::take_pages(request).value),
      Moves::make<after_Release(S), W>(Moves::take_id(request), {}, {})};
  world.moved(Action::Release, id, S, after_Release(S));
  return out;
}
template <State S, class W, class... Rest>
  requires(!can(Action::Release, S))
void Release(W&, Request<S, W>&&, Rest&&...) noexcept {
  static_assert(S != State::New,
                "Release is not legal in New. Legal here: Submit. See specs/Lifecycle.tla");
  static_assert(
      S != State::Waiting,
      "Release is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Prefilling,
                "Release is not legal in Prefilling. Legal here: Acquire, Schedule, Complete, "
                "Publish, Preempt, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Decoding,
                "Release is not legal in Decoding. Legal here: Acquire, Schedule, Complete, "
                "Publish, Preempt, Abort. See specs/Lifecycle.tla");
  static_assert(
      S != State::Preempted,
      "Release is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla");
  static_assert(S != State::Finished,
                "Release is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla");
  static_assert(S != State::Aborted,
                "Release is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla");
}

// From a stored tag to the type: calls f.operator()<S>(). What it may do there, the types decide.
template <class F>
constexpr decltype(auto) visit(State state, F&& f) {
  switch (state) {
    case State::New:
      return f.template operator()<State::New>();
    case State::Waiting:
      return f.template operator()<State::Waiting>();
    case State::Prefilling:
      return f.template operator()<State::Prefilling>();
    case State::Decoding:
      return f.template operator()<State::Decoding>();
    case State::Preempted:
      return f.template operator()<State::Preempted>();
    case State::Finishing:
      return f.template operator()<State::Finishing>();
    case State::Aborting:
      return f.template operator()<State::Aborting>();
    case State::Finished:
      return f.template operator()<State::Finished>();
    case State::Aborted:
      return f.template operator()<State::Aborted>();
  }
  __builtin_unreachable();
}

}  // namespace tokenspeed::lifecycle
