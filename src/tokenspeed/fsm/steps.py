"""A behaviour as values: the steps of a counterexample, a trace or a walk.

Rule: plain values and nothing else; whoever finds a behaviour and whoever tells it share only this.
"""

from __future__ import annotations

from typing import Any

from attrs import frozen

from tokenspeed.fsm.values import Value, show

__all__ = ["Step"]


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
