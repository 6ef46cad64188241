"""An engine as a newcomer would write it: paged KV, a prefix cache, steps in flight, preemption.

Rule: it is right, small and slow; tests break one of its methods and see who notices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from attrs import define, field

from tokenspeed.fsm.generated import OWNS
from tokenspeed.fsm.monitor import Move
from tokenspeed.fsm.testing import Bounds, Holdings, Step


@define(eq=False)
class Request:
    name: int
    incarnation: int
    salt: str
    tokens: list[int]
    length_max: int
    arrival: int
    state: str = "New"
    table: list[int] = field(factory=list)
    planned: int = 0
    computed: int = 0
    pins: int = 0


class Plain:
    """Drives itself by four calls; see `tokenspeed.fsm.testing.Engine`."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.free = list(range(bounds.pages))
        self.refs: dict[int, int] = {}  # page -> tables that it stands in
        self.keys: dict[tuple[str, tuple[int, ...]], int] = {}  # prefix -> page
        self.alive: dict[int, Request] = {}
        self.submitted = self.steps = 0
        self.short = False  # in the step being made, somebody lacked a page
        self.flight: deque[tuple[int, list[tuple[Request, int]]]] = deque()
        self.log: list[Move] = []

    # --- what the suite calls -------------------------------------------------------------------

    def submit(self, request: int, prompt: tuple[int, ...], output_max: int, salt: str) -> bool:
        if request in self.alive or not self.bounds.fits(prompt, output_max):
            return False
        self.submitted += 1
        length_max = len(prompt) + output_max
        one = Request(request, self.submitted, salt, list(prompt), length_max, self.submitted)
        self.alive[request] = one
        self.move(one, "Submit", "Waiting")
        return True

    def abort(self, request: int) -> bool:
        one = self.alive.get(request)
        if one is None or one.state in ("Finishing", "Aborting"):
            return False
        if one.state in ("Waiting", "Preempted"):
            self.move(one, "Abort", "Aborted")
        else:
            self.move(one, "Abort", "Aborting")
            self.release(one)
        return True

    def launch(self) -> Step | None:
        if len(self.flight) >= self.bounds.in_flight_max:
            return None
        work, self.short = [], False
        for one in sorted(self.alive.values(), key=lambda one: one.arrival):
            if one.state in ("Waiting", "Preempted") and not self.admit(one):
                break
            tokens = self.acquire(one)
            if tokens:
                self.move(one, "Schedule", one.state)
                one.planned += tokens
                one.pins += 1
                work.append((one, tokens))
        if not work:
            return None
        self.steps += 1
        self.flight.append((self.steps, work))
        return Step(self.steps, {one.name: frozenset(one.table) for one, _ in work})

    def complete(self, step: int, stop: frozenset[int]) -> bool:
        if not self.flight or self.flight[0][0] != step:
            return False
        _, work = self.flight.popleft()
        for one, tokens in work:
            self.computed(one, tokens, one.name in stop)
        return True

    def moves(self) -> Iterable[Move]:
        log, self.log = self.log, []
        return log

    def holdings(self) -> Holdings:
        cached = tuple(page for page in self.keys.values() if not self.refs.get(page))
        tables = {name: tuple(one.table) for name, one in self.alive.items()}
        return Holdings(tuple(self.free), cached, tables, dict(self.refs))

    # --- how ------------------------------------------------------------------------------------

    def move(self, one: Request, action: str, to: str) -> None:
        self.log.append((action, one.name, one.incarnation, one.state, to))
        one.state = to
        if to in ("Finished", "Aborted"):
            del self.alive[one.name]

    def admit(self, one: Request) -> bool:
        holding = sum("Slot" in OWNS[other.state] for other in self.alive.values())
        if self.short or holding >= self.bounds.slots:
            return False
        self.move(one, "Admit", "Prefilling")
        size = self.bounds.page_size
        while (len(one.table) + 1) * size < len(one.tokens):
            page = self.keys.get(self.key(one, len(one.table)))
            if page is None:
                break
            self.hold(one, page)
        one.planned = one.computed = len(one.table) * size
        return True

    def key(self, one: Request, index: int) -> tuple[str, tuple[int, ...]]:
        return one.salt, tuple(one.tokens[: (index + 1) * self.bounds.page_size])

    def acquire(self, one: Request) -> int:
        """Pages for the next tokens; how many tokens there is room for."""
        if "Slot" not in OWNS[one.state] or one.state in ("Finishing", "Aborting"):
            return 0
        wanted = len(one.tokens) - one.planned
        if not wanted and one.pins and one.planned < one.length_max - 1:
            wanted = 1  # the token that a launched step is about to sample
        wanted = min(wanted, self.bounds.chunk)
        size = self.bounds.page_size
        while wanted and len(one.table) * size < one.planned + wanted:
            page = self.find_page(one)
            if page is None:
                break
            self.hold(one, page)
        return min(wanted, len(one.table) * size - one.planned)

    def find_page(self, one: Request) -> int | None:
        while not self.free:
            self.short = True
            unused = [key for key, page in self.keys.items() if not self.refs.get(page)]
            running = [o for o in self.alive.values() if o.state in ("Prefilling", "Decoding")]
            youngest = max(running, key=lambda o: o.arrival)
            if unused:
                self.free.append(self.keys.pop(max(unused, key=lambda key: len(key[1]))))
            elif youngest is not one and not youngest.pins:
                self.move(youngest, "Preempt", "Preempted")
                self.give_back(youngest)
            else:
                return None
        return self.free.pop()

    def hold(self, one: Request, page: int) -> None:
        one.table.append(page)
        self.refs[page] = self.refs.get(page, 0) + 1

    def computed(self, one: Request, tokens: int, stop: bool) -> None:
        one.pins -= 1
        one.computed += tokens
        to = one.state
        if one.state in ("Prefilling", "Decoding") and one.computed >= len(one.tokens):
            one.tokens.append(len(one.tokens) % 4)
            to = "Finishing" if stop or len(one.tokens) == one.length_max else "Decoding"
        self.move(one, "Complete", to)
        if self.bounds.prefix_cache and to != "Aborting":
            self.publish(one)
        if to in ("Finishing", "Aborting"):
            self.release(one)

    def publish(self, one: Request) -> None:
        for index in range(one.computed // self.bounds.page_size):
            if (index + 1) * self.bounds.page_size <= len(one.tokens):
                self.keys.setdefault(self.key(one, index), one.table[index])

    def release(self, one: Request) -> None:
        if not one.pins:
            self.give_back(one)
            self.move(one, "Release", {"Finishing": "Finished", "Aborting": "Aborted"}[one.state])

    def give_back(self, one: Request) -> None:
        for page in one.table:
            self.drop(page)
        one.table = []
        one.planned = one.computed = 0

    def drop(self, page: int) -> None:
        self.refs[page] -= 1
        if not self.refs[page] and page not in self.keys.values():
            self.free.append(page)
