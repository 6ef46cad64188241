"""A behaviour as values: the steps of a counterexample, a trace or a walk.

Rule: plain values and nothing else; whoever finds a behaviour and whoever tells it share only this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen

from tokenspeed.fsm.values import Function, Value, ordered, show

__all__ = ["Step", "called", "changes", "differences", "named", "spoken"]


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


def called(step: Step) -> str:
    """A step's action as people write it, names without quotes: `RcvPrepared(rm1)`."""
    args = ", ".join(map(named, step.args))
    return f"{step.action}({args})" if args else step.action


def named(value: Value) -> str:
    """As an argument or an index: names without quotes."""
    return value if isinstance(value, str) else spoken(value)


def spoken(value: Value) -> str:
    """A value in TLA+ syntax, records as records: `[type |-> "Commit"]`."""
    match value:
        case frozenset():
            return "{" + ", ".join(spoken(item) for item in ordered(value)) + "}"
        case tuple():
            return "<<" + ", ".join(map(spoken, value)) + ">>"
        case Function() if all(isinstance(k, str) and k.isidentifier() for k in value.items):
            fields = (f"{k} |-> {spoken(v)}" for k, v in sorted(value.items.items()))
            return f"[{', '.join(fields)}]"
    return show(value)
