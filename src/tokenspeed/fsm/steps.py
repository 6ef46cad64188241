"""A behaviour as values: the steps of a counterexample, a trace or a walk.

Rule: plain values and nothing else; whoever finds a behaviour and whoever tells it share only this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen

from tokenspeed.fsm.values import Function, Value, ordered, show

__all__ = ["Step", "changes", "differences"]


@frozen
class Step:
    """One step: what happened, and the state after it.

    Attributes:
        action: the spec's name; empty for the initial state, `stutter` where nothing moves.
        args: the action's arguments.
        state: variable -> value.
    """

    action: str
    args: tuple[Value, ...]
    state: dict[str, Value]

    @property
    def label(self) -> str:
        """As the spec would write it: `Schedule(r1, 2)`."""
        return f"{self.action}({', '.join(map(show, self.args))})" if self.args else self.action

    def json(self) -> dict[str, Any]:
        """For programs: values in TLA+ syntax."""
        state = {name: show(value) for name, value in self.state.items()}
        return {"action": self.action, "args": [show(a) for a in self.args], "state": state}


def changes(before: Step, after: Step) -> list[tuple[str, str, str]]:
    """What a step changed, as (path, old, new) in TLA+ syntax, as deep as the two have one shape.

    Example:
        >>> old = Step("", (), {"st": Function({"r1": "New", "r2": "New"})})
        >>> new = Step("Submit", ("r1",), {"st": Function({"r1": "Waiting", "r2": "New"})})
        >>> changes(old, new)
        [('st["r1"]', '"New"', '"Waiting"')]
    """
    return [
        (name + "".join(f"[{show(key)}]" for key in keys), show(old), show(new))
        for (name, *keys), old, new in differences(before, after)
    ]


def differences(before: Step, after: Step) -> Iterator[tuple[tuple[Value, ...], Value, Value]]:
    """The same as values: the path is the variable and the keys that lead to the place."""
    for name, value in before.state.items():
        yield from _differences((name,), value, after.state[name])


def _differences(
    path: tuple[Value, ...], old: Value, new: Value
) -> Iterator[tuple[tuple[Value, ...], Value, Value]]:
    if old == new:
        return
    if (
        isinstance(old, Function)
        and isinstance(new, Function)
        and old.items.keys() == new.items.keys()
    ):
        for key in ordered(frozenset(old.items)):
            yield from _differences((*path, key), old.items[key], new.items[key])
    else:
        yield path, old, new
