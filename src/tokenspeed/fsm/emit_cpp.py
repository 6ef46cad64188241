"""Prints `lifecycle.hpp`: the typestate runtime that the scheduler runs on.

Rule: no semantics of its own. Which functions exist, what they take and give back, and which pairs
are refuted, is computed from the tables of the `Lifecycle`; this file only knows C++.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenspeed.fsm.lifecycle import Action, Lifecycle

__all__ = ["emit_cpp"]


def emit_cpp(lifecycle: Lifecycle) -> str:
    """The whole header."""
    parts = [
        _opening(lifecycle),
        _enum("State", lifecycle.states),
        _enum("Action", [a.name for a in lifecycle.actions]),
        _enum("PageKind", lifecycle.page_kinds),
        _edges(lifecycle),
        _owns(lifecycle),
        _matrix(lifecycle),
        _world(lifecycle),
        _unguarded(lifecycle),
        _request(lifecycle),
        _moves(lifecycle),
        *(_action(lifecycle, action) for action in lifecycle.actions),
        _visit(lifecycle),
        "}  // namespace tokenspeed::lifecycle\n",
    ]
    return "\n".join(parts)


def _opening(lifecycle: Lifecycle) -> str:
    return f"""\
// GENERATED from {lifecycle.spec} by `tokenspeed codegen`. Do not edit: change the spec.
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

namespace tokenspeed::lifecycle {{

inline constexpr std::string_view kSpec = "{lifecycle.spec}";
inline constexpr std::string_view kSpecHash =
    "{lifecycle.digest}";
inline constexpr std::string_view kSpecVersion = "{lifecycle.version}";
"""


def _lines(items: Iterable[str], indent: str) -> str:
    return "\n".join(indent + item for item in items)


def _enum(name: str, members: Iterable[str]) -> str:
    members = tuple(members)
    quoted = _lines((f'"{m}",' for m in members), "    ")
    return f"""\
enum class {name} : std::uint8_t {{
{_lines((f"{m}," for m in members), "  ")}
}};
inline constexpr std::array<std::string_view, {len(members)}> k{name}Names{{
{quoted}
}};
constexpr std::string_view name({name} value) noexcept {{
  return k{name}Names[static_cast<std::size_t>(value)];
}}
"""


def _edges(lifecycle: Lifecycle) -> str:
    cases = []
    for action in lifecycle.actions:
        pairs = [f"(from == State::{a} && to == State::{b})" for a, b in action.edges]
        joined = " ||\n             ".join(pairs)
        cases.append(f"    case Action::{action.name}:\n      return {joined};")
    body = "\n".join(cases)
    return f"""\
// The spec's `Edges`.
constexpr bool edge(Action action, State from, State to) noexcept {{
  switch (action) {{
{body}
  }}
  return false;
}}

// Is there any move of this action out of this state?
constexpr bool can(Action action, State from) noexcept {{
  for (std::size_t to = 0; to < kStateNames.size(); ++to) {{
    if (edge(action, from, static_cast<State>(to))) return true;
  }}
  return false;
}}

// Does nothing lead out of this state?
constexpr bool ended(State state) noexcept {{
  for (std::size_t action = 0; action < kActionNames.size(); ++action) {{
    if (can(static_cast<Action>(action), state)) return false;
  }}
  return true;
}}
"""


def _owns(lifecycle: Lifecycle) -> str:
    out = ["// The spec's `Owns`."]
    for resource in lifecycle.resources:
        tests = " || ".join(f"state == State::{s}" for s in lifecycle.owners(resource))
        out.append(
            f"constexpr bool owns_{resource.lower()}(State state) noexcept {{\n"
            f"  return {tests};\n}}"
        )
    return "\n".join(out) + "\n"


def _matrix(lifecycle: Lifecycle) -> str:
    out = ["// Every pair outside the table is refuted, every pair inside it confirmed."]
    for action in lifecycle.actions:
        for state in lifecycle.states:
            if state in action.sources():
                out.append(f"static_assert(can(Action::{action.name}, State::{state}));")
            else:
                words = lifecycle.refusal(action, state)
                out.append(f'static_assert(!can(Action::{action.name}, State::{state}),\n'
                           f'              "{words}");')  # fmt: skip
    return "\n".join(out) + "\n"


def _world(lifecycle: Lifecycle) -> str:
    guards = {g.name: g for action in lifecycle.actions for g in action.guards}
    tests = [
        f"{{ view.{g.name}({'request' if g.of_request else ''}) }} -> std::same_as<bool>;"
        for g in guards.values()
    ]
    types = [f"typename W::{resource};" for resource in lifecycle.resources]
    return f"""\
// What a scheduler brings: its resource types, what to do when a request has moved, and an answer
// to each guard, kept up to date rather than computed by scanning.
template <class W>
concept World = requires(W& world, const W& view, RequestId request) {{
{_lines(types, "  ")}
  {{ world.moved(Action{{}}, request, State{{}}, State{{}}) }} noexcept;
{_lines(tests, "  ")}
}};
"""


def _unguarded(lifecycle: Lifecycle) -> str:
    """Says yes to every guard that is not wanted both ways; those are left to the engine."""
    guards = dict.fromkeys(g for action in lifecycle.actions for g in action.guards)
    names = [g.name for g in guards]
    answers = [
        f"bool {g.name}({'RequestId' if g.of_request else ''}) const noexcept {{ "
        f"return {'false' if g.negated else 'true'}; }}"
        for g in guards
        if names.count(g.name) == 1
    ]
    return f"""\
// Where an engine may start from: a World, less its resources, in which every guard says yes. What
// it declares itself hides what stands here, so that guards can be answered one after the other.
struct Unguarded {{
  void moved(Action, RequestId, State, State) noexcept {{}}
{_lines(answers, "  ")}
}};
"""


def _held(resource: str, owned: str) -> str:
    return f"Held<{owned}, typename W::{resource}>"


def _request(lifecycle: Lifecycle) -> str:
    accessors, members, params, inits = [], [], [], []
    for resource in lifecycle.resources:
        low = resource.lower()
        owned = f"owns_{low}(S)"
        for const in ("", "const "):
            accessors.append(
                f"{const}typename W::{resource}& {low}() {const}noexcept\n"
                f"    requires({owned})\n"
                f"  {{\n    assert(id_.held());\n    return {low}_.value;\n  }}"
            )
        members.append(f"[[no_unique_address]] {_held(resource, owned)} {low}_;")
        params.append(f"{_held(resource, owned)}&& {low}")
        inits.append(f"{low}_(std::move({low}))")
    return f"""\
// A request in state S. Move-only; it holds what the spec says that S owns.
template <State S, class W>
class [[nodiscard]] Request final {{
 public:
  static constexpr State kState = S;

  Request(Request&&) noexcept = default;
  Request& operator=(Request&&) noexcept = default;
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;
  ~Request() {{ assert((ended(S) || !id_.held()) && "a request was dropped before it ended"); }}

  // Let go of a request that has not ended. Only for tearing a whole scheduler down.
  void abandon() noexcept {{ const OwnedId gone = std::move(id_); }}

  RequestId id() const noexcept {{ return id_.get(); }}
  bool held() const noexcept {{ return id_.held(); }}
{_lines(accessors, "  ")}

 private:
  friend struct Moves;
  Request(OwnedId&& id, {", ".join(params)}) noexcept
      : id_(std::move(id)), {", ".join(inits)} {{}}

  OwnedId id_;
{_lines(members, "  ")}
}};
"""


def _moves(lifecycle: Lifecycle) -> str:
    """The only code that can make a request or take one apart."""
    params = "".join(
        f", Held<owns_{r.lower()}(S), typename W::{r}>&& {r.lower()}" for r in lifecycle.resources
    )
    moved = "".join(f", std::move({r.lower()})" for r in lifecycle.resources)
    takes = "\n".join(
        f"  template <State S, class W>\n"
        f"  static auto take_{r.lower()}(Request<S, W>& request) noexcept {{\n"
        f"    return std::move(request.{r.lower()}_);\n  }}"
        for r in lifecycle.resources
    )
    first = lifecycle.states[0]
    return f"""\
// The doors of Request, Permit and Verdict; only the functions below go through them.
struct Moves {{
  template <State S, class W>
  static Request<S, W> make(OwnedId&& id{params}) noexcept {{
    return Request<S, W>(std::move(id){moved});
  }}
  template <State S, class W>
  static OwnedId take_id(Request<S, W>& request) noexcept {{
    return std::move(request.id_);
  }}
{takes}
  template <Action A>
  static Verdict<A> allow(RequestId id) noexcept {{
    return Verdict<A>(Permit<A>(id), {{}});
  }}
  template <Action A>
  static Verdict<A> refuse(RequestId id, std::string_view guard) noexcept {{
    return Verdict<A>(Permit<A>(id), guard);
  }}
  template <Action A>
  static void use(Permit<A>&& permit, RequestId id) noexcept {{
    assert(permit.id_ == id && "a permit for somebody else");
    static_cast<void>(permit);
    static_cast<void>(id);
  }}
}};

// A request that nobody knows yet: the start of the table.
template <World W>
Request<State::{first}, W> create(RequestId id) noexcept {{
  return Moves::make<State::{first}, W>(OwnedId(id){", {}" * len(lifecycle.resources)});
}}
"""


def _action(lifecycle: Lifecycle, action: Action) -> str:
    """The functions of one action: its guards, its moves, and the refusal of everything else."""
    shapes: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
    for source, target in action.edges:
        gained = tuple(r for r in lifecycle.owns[target] if r not in lifecycle.owns[source])
        lost = tuple(r for r in lifecycle.owns[source] if r not in lifecycle.owns[target])
        shapes.add((gained, lost))
    out = [f"// {action.name}: {', '.join(f'{a} -> {b}' for a, b in action.edges)}."]
    if action.guards:
        out.append(_permit(action))
    if not _chosen(action):
        out.append(_after(action))
    given = {lost for _, lost in shapes if lost}
    out += [_result(action, lost) for lost in sorted(given)]
    out += [_move(lifecycle, action, *shape) for shape in sorted(shapes)]
    out.append(_refusal(lifecycle, action))
    return "\n".join(out) + "\n"


def _chosen(action: Action) -> bool:
    """Does some state leave the caller a choice of where to go?"""
    return any(len(action.targets(source)) > 1 for source in action.sources())


def _permit(action: Action) -> str:
    name = action.name
    tests = []
    for guard in action.guards:
        call = f"world.{guard.name}({'request.id()' if guard.of_request else ''})"
        test = call if guard.negated else f"!{call}"
        no = f'Moves::refuse<Action::{name}>(request.id(), "{guard.text}")'
        tests.append(f"if ({test}) return {no};")
    return f"""\
template <State S, World W>
  requires(can(Action::{name}, S))
Verdict<Action::{name}> permit_{name}(const W& world,
                                      const Request<S, W>& request) noexcept {{
{_lines(tests, "  ")}
  return Moves::allow<Action::{name}>(request.id());
}}"""


def _result(action: Action, lost: tuple[str, ...]) -> str:
    """What an action returns that gives resources back."""
    fields = "".join(f" typename W::{r} {r.lower()};" for r in lost)
    return (
        f"template <State To, class W>\nstruct [[nodiscard]] {action.name}Result {{\n"
        f" {fields} Request<To, W> request;\n}};"
    )


def _move(
    lifecycle: Lifecycle, action: Action, gained: tuple[str, ...], lost: tuple[str, ...]
) -> str:
    """One function: the target is the caller's choice where the table leaves one."""
    name, chosen = action.name, _chosen(action)
    target = "To" if chosen else f"after_{name}(S)"
    legal = f"edge(Action::{name}, S, To)" if chosen else f"can(Action::{name}, S)"
    params = ["W& world", "Request<S, W>&& request"]
    params += [f"Permit<Action::{name}>&& permit"] if action.guards else []
    params += [f"typename W::{r}&& {r.lower()}" for r in gained]
    held = ["Moves::take_id(request)"]
    for resource in lifecycle.resources:
        low = resource.lower()
        kept = "{}" if resource in lost else f"Moves::take_{low}(request)"
        held.append(f"{{std::move({low})}}" if resource in gained else kept)
    made = f"Moves::make<{target}, W>({', '.join(held)})"
    body = ["const RequestId id = request.id();"]
    if action.guards:
        body.append("Moves::use(std::move(permit), id);")
    result = f"Request<{target}, W>"
    if lost:
        result = f"{name}Result<{target}, W>"
        given = ", ".join(f"std::move(Moves::take_{r.lower()}(request).value)" for r in lost)
        body.append(f"{result} out{{{given}, {made}}};")
    else:
        body.append(f"auto out = {made};")
    body += [f"world.moved(Action::{name}, id, S, {target});", "return out;"]
    return f"""\
template <{"State To, " if chosen else ""}State S, World W>
  requires({legal}{_shape(gained, lost, target)})
{result} {name}({", ".join(params)}) noexcept {{
{_lines(body, "  ")}
}}"""


def _refusal(lifecycle: Lifecycle, action: Action) -> str:
    """The overload that an illegal call finds: it has no body but the reason."""
    name = action.name
    head = "State S"
    legal = f"can(Action::{name}, S)"
    reasons = [
        f'static_assert(S != State::{state}, "{lifecycle.refusal(action, state)}");'
        for state in lifecycle.states
        if state not in action.sources()
    ]
    if _chosen(action):
        head, legal = "State To, State S", f"edge(Action::{name}, S, To)"
        for state in action.sources():
            words = lifecycle.refusal(action, state)
            reasons.append(f'static_assert(S != State::{state}, "{words}");')
    return f"""\
template <{head}, class W, class... Rest>
  requires(!{legal})
void {name}(W&, Request<S, W>&&, Rest&&...) noexcept {{
{_lines(reasons, "  ")}
}}"""


def _shape(gained: tuple[str, ...], lost: tuple[str, ...], target: str) -> str:
    """What tells this function from the action's others: the resources it takes and gives."""
    tests = [f" && !owns_{r.lower()}(S) && owns_{r.lower()}({target})" for r in gained]
    tests += [f" && owns_{r.lower()}(S) && !owns_{r.lower()}({target})" for r in lost]
    return "".join(tests)


def _after(action: Action) -> str:
    branches = " : ".join(f"from == State::{a} ? State::{b}" for a, b in action.edges[:-1])
    last = f"State::{action.edges[-1][1]}"
    expression = f"{branches} : {last}" if branches else last
    unused = "" if branches else "[[maybe_unused]] "
    return (
        f"constexpr State after_{action.name}({unused}State from) noexcept {{\n"
        f"  return {expression};\n}}"
    )


def _visit(lifecycle: Lifecycle) -> str:
    cases = [
        f"case State::{s}:\n      return f.template operator()<State::{s}>();"
        for s in lifecycle.states
    ]
    return f"""\
// From a stored tag to the type: calls f.operator()<S>(). What it may do there, the types decide.
template <class F>
constexpr decltype(auto) visit(State state, F&& f) {{
  switch (state) {{
{_lines(cases, "    ")}
  }}
  __builtin_unreachable();
}}
"""
