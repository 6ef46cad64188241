"""The lifecycle of one request in Python: a `transitions` machine over the generated tables.

Rule: the tables come from the spec; this file has no opinion about what is legal.
"""

from __future__ import annotations

from typing import final

from transitions import Machine, MachineError

from tokenspeed.fsm.generated import ACTIONS, EDGES, OWNS, SPEC, STATES

__all__ = ["IllegalTransition", "RequestMachine", "legal", "targets"]


class IllegalTransition(Exception):
    """An action that the spec does not have in a state."""


def legal(state: str) -> tuple[str, ...]:
    """Actions that the spec has in a state."""
    return tuple(action for action in ACTIONS if any(source == state for source, _ in EDGES[action]))


def targets(action: str, state: str) -> tuple[str, ...]:
    """Where an action may lead from a state; empty if it is not legal there."""
    return tuple(to for source, to in EDGES[action] if source == state)


@final
class RequestMachine:
    """The live view of one request: its state, and the moves that it has made.

    Args:
        request: a name for messages.
    """

    def __init__(self, request: object) -> None:
        self.request = request
        self.state = STATES[0]
        rows = [
            {"trigger": f"{action}_{to}", "source": source, "dest": to}
            for action in ACTIONS
            for source, to in EDGES[action]
        ]
        self.machine = Machine(
            model=self,
            states=list(STATES),
            transitions=rows,
            initial=STATES[0],
            auto_transitions=False,
        )

    def apply(self, action: str, to: str | None = None) -> str:
        """Move; `to` chooses where the spec leaves a choice. Returns the new state.

        Raises:
            IllegalTransition: the pair is not in the spec's table.
        """
        choices = targets(action, self.state)
        target = to if to is not None else choices[0] if len(choices) == 1 else None
        try:
            if target is None:
                raise MachineError(f"{action} in {self.state}: choose one of {choices}")
            self.trigger(f"{action}_{target}")  # type: ignore[attr-defined]
        except (MachineError, AttributeError) as error:
            allowed = ", ".join(legal(self.state)) or "nothing"
            raise IllegalTransition(
                f"{action} is not legal in {self.state} (request {self.request}). "
                f"Legal here: {allowed}. See {SPEC}"
            ) from error
        return self.state

    @property
    def holds(self) -> tuple[str, ...]:
        """What the request holds in its state."""
        return OWNS[self.state]
