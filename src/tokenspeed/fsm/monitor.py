"""Follows a scheduler by the moves that it reports, and refuses the first that the spec lacks.

Rule: a move is (action, request, incarnation, from, to); a request's moves must join end to end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from tokenspeed.fsm.generated import STATES
from tokenspeed.fsm.mirror import ENDED, IllegalTransition, RequestMachine

__all__ = ["Monitor", "Move"]

Move = tuple[str, int, int, str, str]


@final
class Monitor:
    """The machines of all requests that have been heard of, by (request, incarnation)."""

    def __init__(self) -> None:
        self.machines: dict[tuple[int, int], RequestMachine] = {}

    def feed(self, moves: Iterable[Move]) -> None:
        """Follow some moves.

        Raises:
            IllegalTransition: a move is not in the table, or does not start where the last ended.
        """
        for action, request, incarnation, source, to in moves:
            machine = self.machines.get((request, incarnation))
            if machine is None:
                machine = self.machines[request, incarnation] = RequestMachine(request)
            if machine.state != source:
                raise IllegalTransition(
                    f"{action} of request {request} claims to start in {source}; "
                    f"it is in {machine.state}"
                )
            machine.apply(action, to)

    def live(self) -> list[RequestMachine]:
        """Requests that have been submitted and have not ended."""
        quiet = ENDED | {STATES[0]}
        return [machine for machine in self.machines.values() if machine.state not in quiet]
