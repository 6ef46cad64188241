"""Prints `lifecycle_c.h`: the spec's tables and one machine a request, for C and what can call C.

Rule: no semantics of its own, and nothing that a caller can get wrong unnoticed: states and actions
arrive as plain ints, and a number that is none of them is refused, not trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenspeed.fsm.lifecycle import Action, Lifecycle

__all__ = ["emit_c"]


def emit_c(lifecycle: Lifecycle) -> str:
    """The whole header."""
    actions = [a.name for a in lifecycle.actions]
    parts = [
        _opening(lifecycle),
        _enum("state", lifecycle.states),
        _enum("action", actions),
        _resources(lifecycle),
        _edge(lifecycle),
        _queries(),
        _owns(lifecycle),
        _refusal(lifecycle),
        _machine(lifecycle),
        _closing(),
    ]
    return "\n".join(parts)


def _opening(lifecycle: Lifecycle) -> str:
    return f"""\
// GENERATED from {lifecycle.spec} by `tokenspeed codegen`. Do not edit: change the spec.
//
// Rule: a machine moves only along the spec's `Edges`; a move outside of them is refused with a
// sentence, and the machine stays where it is. C99 and C++; compile lifecycle_c.c to export it.
#ifndef TOKENSPEED_LIFECYCLE_C_H
#define TOKENSPEED_LIFECYCLE_C_H

#include <stdbool.h>
#include <stddef.h>

#define TOKENSPEED_SPEC "{lifecycle.spec}"
#define TOKENSPEED_SPEC_HASH \\
  "{lifecycle.digest}"
#define TOKENSPEED_SPEC_VERSION "{lifecycle.version}"

// How the functions are declared: each includer has its own, unless it exports them.
#ifndef TOKENSPEED_C_API
#define TOKENSPEED_C_API static inline
#endif

#ifdef __cplusplus
extern "C" {{
#endif

// Which spec this is, for callers that cannot read the macros.
TOKENSPEED_C_API const char* tokenspeed_spec(void) {{ return TOKENSPEED_SPEC; }}
TOKENSPEED_C_API const char* tokenspeed_spec_hash(void) {{ return TOKENSPEED_SPEC_HASH; }}
TOKENSPEED_C_API const char* tokenspeed_spec_version(void) {{ return TOKENSPEED_SPEC_VERSION; }}
"""


def _lines(items: Iterable[str], indent: str = "  ") -> str:
    return "\n".join(indent + item for item in items)


def _enum(kind: str, members: Iterable[str]) -> str:
    members = tuple(members)
    upper = kind.upper()
    return f"""\
enum tokenspeed_{kind} {{
{_lines(f"TOKENSPEED_{upper}_{m}," for m in members)}
}};
#define TOKENSPEED_{upper}S {len(members)}
// Its name in the spec; NULL for a number that is none.
TOKENSPEED_C_API const char* tokenspeed_{kind}_name(int {kind}) {{
  static const char* const names[TOKENSPEED_{upper}S] = {{
{_lines((f'"{m}",' for m in members), "      ")}
  }};
  return {kind} >= 0 && {kind} < TOKENSPEED_{upper}S ? names[{kind}] : NULL;
}}
"""


def _resources(lifecycle: Lifecycle) -> str:
    rows = (f"TOKENSPEED_OWNS_{r} = 1 << {at}," for at, r in enumerate(lifecycle.resources))
    return f"""\
// What a request may hold, as bits.
enum tokenspeed_resource {{
{_lines(rows)}
}};
"""


def _edge(lifecycle: Lifecycle) -> str:
    cases = []
    for action in lifecycle.actions:
        pairs = " || ".join(
            f"(from == TOKENSPEED_STATE_{a} && to == TOKENSPEED_STATE_{b})" for a, b in action.edges
        )
        cases.append(f"    case TOKENSPEED_ACTION_{action.name}:\n      return {pairs};")
    return f"""\
// The spec's `Edges`.
TOKENSPEED_C_API bool tokenspeed_edge(int action, int from, int to) {{
  switch (action) {{
{_lines(cases, "")}
    default:
      return false;
  }}
}}
"""


def _queries() -> str:
    return """\
// Is there any move of this action out of this state?
TOKENSPEED_C_API bool tokenspeed_can(int action, int from) {
  for (int to = 0; to < TOKENSPEED_STATES; ++to) {
    if (tokenspeed_edge(action, from, to)) return true;
  }
  return false;
}

// Does nothing lead out of this state?
TOKENSPEED_C_API bool tokenspeed_ended(int state) {
  for (int action = 0; action < TOKENSPEED_ACTIONS; ++action) {
    if (tokenspeed_can(action, state)) return false;
  }
  return tokenspeed_state_name(state) != NULL;
}
"""


def _owns(lifecycle: Lifecycle) -> str:
    by_mask: dict[str, list[str]] = {}
    for state in lifecycle.states:
        mask = " | ".join(f"TOKENSPEED_OWNS_{r}" for r in lifecycle.owns[state])
        if mask:
            by_mask.setdefault(mask, []).append(f"    case TOKENSPEED_STATE_{state}:")
    cases = [line for mask, states in by_mask.items() for line in [*states, f"return {mask};"]]
    return f"""\
// The spec's `Owns`: the TOKENSPEED_OWNS_ bits of what a request in this state holds.
TOKENSPEED_C_API unsigned tokenspeed_owns(int state) {{
  switch (state) {{
{_lines(cases, "")}
    default:
      return 0;
  }}
}}
"""


def _refusal(lifecycle: Lifecycle) -> str:
    """The sentences; how those about an action that a state does not have end is written once."""
    ends = {
        state: lifecycle.refusal(action, state).removeprefix(action.name)
        for state in lifecycle.states
        for action in lifecycle.actions
        if not action.targets(state)
    }
    rows = ("{" + ", ".join(_refusals(lifecycle, action)) + "}," for action in lifecycle.actions)
    return f"""\
// How a sentence ends about an action that a state does not have.
{_lines((f'#define TOKENSPEED_NOT_IN_{state} "{end}"' for state, end in ends.items()), "")}

// Why a move is not in the table: a sentence that names it and the spec; NULL if it is there.
TOKENSPEED_C_API const char* tokenspeed_refusal(int action, int from, int to) {{
  static const char* const sentences[TOKENSPEED_ACTIONS][TOKENSPEED_STATES] = {{
{_lines(rows, "      ")}
  }};
  if (tokenspeed_edge(action, from, to)) return NULL;
  if (!tokenspeed_state_name(from) || !tokenspeed_state_name(to)) {{
    return "no such state. See {lifecycle.spec}";
  }}
  if (!tokenspeed_action_name(action)) return "no such action. See {lifecycle.spec}";
  return sentences[action][from];
}}
"""


def _refusals(lifecycle: Lifecycle, action: Action) -> Iterator[str]:
    """The sentence of each state, about one action."""
    for state in lifecycle.states:
        if action.targets(state):
            yield f'"{lifecycle.refusal(action, state)}"'
        else:
            yield f'"{action.name}" TOKENSPEED_NOT_IN_{state}'


def _machine(lifecycle: Lifecycle) -> str:
    first = lifecycle.states[0]
    return f"""\
// One request. Zeroed memory is a request that nobody knows yet: the start of the table.
typedef struct tokenspeed_machine {{
  int state;  // a tokenspeed_state: {first} = 0
}} tokenspeed_machine;

enum tokenspeed_status {{
  TOKENSPEED_OK = 0,
  TOKENSPEED_ILLEGAL = 1,    // the action is not legal in the machine's state
  TOKENSPEED_ELSEWHERE = 2,  // it is, but does not lead to there
  TOKENSPEED_UNKNOWN = 3,    // a number that is no action or no state
}};

// Move along an edge; a tokenspeed_status. If it is not TOKENSPEED_OK the machine stays, and *error
// is the sentence (static, never freed). `error` may be NULL, `machine` may not.
TOKENSPEED_C_API int tokenspeed_apply(tokenspeed_machine* machine, int action, int to,
                                      const char** error) {{
  const int from = machine->state;
  const char* const refused = tokenspeed_refusal(action, from, to);
  if (error) *error = refused;
  if (!refused) {{
    machine->state = to;
    return TOKENSPEED_OK;
  }}
  if (!tokenspeed_action_name(action) || !tokenspeed_state_name(from) ||
      !tokenspeed_state_name(to)) {{
    return TOKENSPEED_UNKNOWN;
  }}
  return tokenspeed_can(action, from) ? TOKENSPEED_ELSEWHERE : TOKENSPEED_ILLEGAL;
}}
"""


def _closing() -> str:
    return """\
#ifdef __cplusplus
}
#endif

#endif  // TOKENSPEED_LIFECYCLE_C_H
"""
