"""The lifecycle of one request in Python: a `transitions` machine over the generated tables.

Rule: the tables come from the spec; this file has no opinion about what is legal.
"""

from __future__ import annotations

from typing import final

from transitions import Machine

from tokenspeed.fsm.generated import ACTIONS, EDGES, OWNS, SPEC, STATES

__all__ = ["ENDED", "IllegalTransition", "RequestMachine", "legal", "targets"]


class IllegalTransition(Exception):
    """An action that the spec does not have in a state."""


def legal(state: str) -> tuple[str, ...]:
    """Actions that the spec has in a state."""
    return tuple(
        action for action in ACTIONS if any(source == state for source, _ in EDGES[action])
    )


def targets(action: str, state: str) -> tuple[str, ...]:
    """Where an action may lead from a state; empty if it is not legal there."""
    return tuple(to for source, to in EDGES[action] if source == state)


ENDED = frozenset(state for state in STATES if not legal(state))
"""States that nothing leads out of."""

# One trigger an edge: in `transitions` a trigger has one target, an action may have several.
_MACHINE = Machine(
    model=None,
    states=list(STATES),
    transitions=[
        {"trigger": f"{action}_{to}", "source": source, "dest": to}
        for action in ACTIONS
        for source, to in EDGES[action]
    ],
    initial=STATES[0],
    auto_transitions=False,
)


@final
class RequestMachine:
    """The live view of one request: its state, and the moves that it can make.

    Example:
        >>> machine = RequestMachine(17)
        >>> machine.apply("Submit"), machine.apply("Admit"), machine.apply("Complete", "Decoding")
        ('Waiting', 'Prefilling', 'Decoding')

    Args:
        request: a name for messages.

    Attributes:
        state: where the request is, by the spec's name.
    """

    def __init__(self, request: object) -> None:
        self.request = request
        self.state: str = STATES[0]

    def apply(self, action: str, to: str | None = None) -> str:
        """Move; `to` chooses where the spec leaves a choice. Returns the new state.

        Raises:
            IllegalTransition: the move is not in the spec's table, or needs a choice of `to`. The
                request stays where it is.
            KeyError: the spec has no such action at all.
        """
        choices = targets(action, self.state)
        where = f"{self.state} (request {self.request})"
        if not choices:
            allowed = ", ".join(legal(self.state)) or "nothing"
            raise IllegalTransition(
                f"{action} is not legal in {where}. Legal here: {allowed}. See {SPEC}"
            )
        target = choices[0] if to is None and len(choices) == 1 else to
        if target not in choices:
            raise IllegalTransition(
                f"{action} to {target} is not legal in {where}. "
                f"It leads to: {', '.join(choices)}. See {SPEC}"
            )
        _MACHINE.events[f"{action}_{target}"].trigger(self)
        return self.state

    @property
    def holds(self) -> tuple[str, ...]:
        """What the request holds in its state."""
        return OWNS[self.state]
