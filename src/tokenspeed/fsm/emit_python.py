"""Prints `generated.py`: the same tables for Python. Rule: no semantics of its own."""

from __future__ import annotations

from tokenspeed.fsm.lifecycle import Lifecycle

__all__ = ["emit_python"]


def emit_python(lifecycle: Lifecycle) -> str:
    """The whole module."""
    edges = "".join(
        f"    {action.name!r}: (\n"
        + "".join(f"        ({a!r}, {b!r}),\n" for a, b in action.edges)
        + "    ),\n"
        for action in lifecycle.actions
    )
    owns = "".join(f"    {s!r}: {_tuple(lifecycle.owns[s])},\n" for s in lifecycle.states)
    guards = "".join(
        f"    {a.name!r}: {_tuple(g.text for g in a.guards)},\n" for a in lifecycle.actions
    )
    text = f'''\
"""GENERATED from {lifecycle.spec} by `tokenspeed codegen`. Do not edit: change the spec.

Rule: these are the tables of the spec, in its own words.
"""

from __future__ import annotations

__all__ = [
    "ACTIONS", "EDGES", "GUARDS", "OWNS", "PAGE_KINDS", "SPEC", "SPEC_HASH", "SPEC_VERSION",
    "STATES",
]  # fmt: skip

SPEC = {lifecycle.spec!r}
SPEC_HASH = {lifecycle.digest!r}
SPEC_VERSION = {lifecycle.version!r}

STATES = {_tuple(lifecycle.states)}
ACTIONS = {_tuple(a.name for a in lifecycle.actions)}
PAGE_KINDS = {_tuple(lifecycle.page_kinds)}

EDGES: dict[str, tuple[tuple[str, str], ...]] = {{
{edges}}}
"""Action -> its moves, (from, to)."""

OWNS: dict[str, tuple[str, ...]] = {{
{owns}}}
"""State -> what a request in it holds."""

GUARDS: dict[str, tuple[str, ...]] = {{
{guards}}}
"""Action -> the conditions that look beyond the state of the request itself."""
'''
    return text.replace("'", '"')


def _tuple(items: object) -> str:
    members = [repr(str(item)) for item in items]  # type: ignore[attr-defined]
    return "(" + ", ".join(members) + ("," if len(members) == 1 else "") + ")"
