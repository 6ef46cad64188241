"""Follows a scheduler by the moves that it reports, and refuses the first that the spec lacks.

Rule: a move is (action, request, incarnation, from, to); a request's moves must join end to end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from tokenspeed.fsm.generated import STATES
from tokenspeed.fsm.mirror import IllegalTransition, RequestMachine

__all__ = ["Monitor", "Move"]

Move = tuple[str, int, int, str, str]


@final
class Monitor:
    """The machines of all requests that have been heard of."""

    def __init__(self) -> None:
        self.machines: dict[tuple[int, int], RequestMachine] = {}

    def feed(self, moves: Iterable[Move]) -> None:
        """Follow some moves.

        Raises:
            IllegalTransition: a move is not in the table, or does not start where the last one ended.
        """
        for action, request, incarnation, source, to in moves:
            key = (request, incarnation)
            machine = self.machines.setdefault(key, RequestMachine(request))
            if machine.state != source:
                raise IllegalTransition(
                    f"{action} of request {request} claims to start in {source}; it is in {machine.state}"
                )
            machine.apply(action, to)

    def live(self) -> list[RequestMachine]:
        """Requests that have been submitted and have not ended."""
        ended = {STATES[0], "Finished", "Aborted"}
        return [machine for machine in self.machines.values() if machine.state not in ended]
