"""The suite for any engine: it passes ours and a plain one, and finds each seeded bug by name.

Each bug is one method of the plain engine done wrong, and names the rule that must find it.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import pytest
from attrs import fields
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from plain_engine import Plain, Request
from scheduling import World
from tokenspeed.fsm.generated import EDGES, OWNS
from tokenspeed.fsm.monitor import Move
from tokenspeed.fsm.testing import PROFILE, Bounds, Broken, Holdings, LifecycleMachine, Step

# --- Bugs: one method done wrong; the docstring begins with the rule that finds it ----------------


class LeaksAPage(Plain):
    """AccountingExact: the last page of a table is forgotten."""

    def give_back(self, one: Request) -> None:
        one.table = one.table[:-1]
        super().give_back(one)


class FreesTwice(Plain):
    """FreeUnique: a page goes to the free list twice."""

    def drop(self, page: int) -> None:
        super().drop(page)
        if page in self.free and not page % 2:
            self.free.append(page)


class FreesInFlight(Plain):
    """NoReuseInFlight: an abort does not wait for the launched step."""

    def release(self, one: Request) -> None:
        pins, one.pins = one.pins, 0
        super().release(one)
        one.pins = pins

    def computed(self, one: Request, tokens: int, stop: bool) -> None:
        if one.name in self.alive:
            super().computed(one, tokens, stop)


class PreemptsInFlight(Plain):
    """NoReuseInFlight: the youngest gives way while a step still writes its pages."""

    def find_page(self, one: Request) -> int | None:
        held = {o: o.pins for o in self.alive.values()}
        for other in held:
            other.pins = 0
        try:
            return super().find_page(one)
        finally:
            for other, pins in held.items():
                other.pins = pins


class AcceptsALateCompletion(Plain):
    """EpochMatch: results of a completed step are taken again."""

    def complete(self, step: int, stop: frozenset[int]) -> bool:
        return super().complete(step, stop) or step <= self.steps - len(self.flight)


class AcceptsAnyTurn(Plain):
    """EpochMatch: the newest step's results are taken before the oldest's."""

    def complete(self, step: int, stop: frozenset[int]) -> bool:
        self.flight = deque(sorted(self.flight, key=lambda launched: launched[0] != step))
        return super().complete(step, stop)


class AbortsTwice(Plain):
    """EpochMatch: an abort of a draining request is taken again."""

    def abort(self, request: int) -> bool:
        return super().abort(request) or request in self.alive


class SubmitsTheLiving(Plain):
    """EpochMatch: the name of a living request is taken by another."""

    def submit(self, request: int, prompt: tuple[int, ...], output_max: int, salt: str) -> bool:
        living = self.alive.pop(request, None)
        if super().submit(request, prompt, output_max, salt):
            return True
        if living:
            self.alive[request] = living
        return False


class ForgetsAReference(Plain):
    """RefExact: a page found in the prefix cache is not counted."""

    def hold(self, one: Request, page: int) -> None:
        one.table.append(page)
        self.refs[page] = max(self.refs.get(page, 0), 1)


class SharesAcrossTenants(Plain):
    """ContentMatches: the salt is no part of the key."""

    def key(self, one: Request, index: int) -> tuple[str, tuple[int, ...]]:
        return "", super().key(one, index)[1]


class KeysByLength(Plain):
    """ContentMatches: two prefixes have one key."""

    def key(self, one: Request, index: int) -> tuple[str, tuple[int, ...]]:
        salt, tokens = super().key(one, index)
        return salt, (*(0 for _ in tokens[1:]), tokens[-1])


class KeepsPagesWhenPreempted(Plain):
    """TerminalReleasesAll: a preempted request still has its table."""

    def give_back(self, one: Request) -> None:
        if one.state != "Preempted":
            super().give_back(one)


class TakesWhatCannotFit(Plain):
    """AdmitSound: a request is queued that no number of evictions makes room for."""

    def submit(self, request: int, prompt: tuple[int, ...], output_max: int, salt: str) -> bool:
        pages, self.bounds = self.bounds, Bounds(**{**bounds_of(self.bounds), "pages": 10**6})
        try:
            return super().submit(request, prompt, output_max, salt)
        finally:
            self.bounds = pages


class IgnoresSlots(Plain):
    """AdmitSound: more requests run than there are slots."""

    def admit(self, one: Request) -> bool:
        slots, self.bounds = self.bounds, Bounds(**{**bounds_of(self.bounds), "slots": 10**6})
        try:
            return super().admit(one)
        finally:
            self.bounds = slots


class LaunchesTooManySteps(Plain):
    """Full: one more step is launched than was asked for."""

    def __init__(self, bounds: Bounds) -> None:
        more = {**bounds_of(bounds), "in_flight_max": bounds.in_flight_max + 1}
        super().__init__(Bounds(**more))


class Resurrects(Plain):
    """Edges: a result brings a draining request back."""

    def computed(self, one: Request, tokens: int, stop: bool) -> None:
        if one.state == "Aborting" and not stop:
            self.move(one, "Complete", "Decoding")
        super().computed(one, tokens, stop)


class SaysNothing(Plain):
    """Edges: an accepted abort is not reported."""

    def abort(self, request: int) -> bool:
        took, self.log = super().abort(request), []
        return took


class NeverResumes(Plain):
    """EveryRequestEnds: who was preempted stays out."""

    def admit(self, one: Request) -> bool:
        return one.state == "Waiting" and super().admit(one)


class NeverReleases(Plain):
    """EveryRequestEnds: an abort between steps has nobody to finish it."""

    def abort(self, request: int) -> bool:
        one = self.alive.get(request)
        if one is None or one.state not in ("Prefilling", "Decoding"):
            return super().abort(request)
        self.move(one, "Abort", "Aborting")
        return True


BUGS = [bug for bug in Plain.__subclasses__() if bug.__module__ == __name__]


def bounds_of(bounds: Bounds) -> dict[str, Any]:
    return {a.name: getattr(bounds, a.name) for a in fields(Bounds)}


def suite(subject: type[Plain]) -> type[LifecycleMachine[Plain]]:
    class Suite(LifecycleMachine[Plain]):
        def engine(self, bounds: Bounds) -> Plain:
            return subject(bounds)

    return Suite


class Tally(Plain):
    """Counts what the suite brings a right engine to do."""

    seen: ClassVar[Counter[str]] = Counter()

    def move(self, one: Request, action: str, to: str) -> None:
        self.seen[f"{action} {one.state} {to}"] += 1
        super().move(one, action, to)

    def hold(self, one: Request, page: int) -> None:
        self.seen["share"] += bool(self.refs.get(page))
        super().hold(one, page)


def test_a_plain_engine_passes_and_is_led_everywhere() -> None:
    """Every edge of the spec but those that this engine does not report, and shared pages."""
    run_state_machine_as_test(suite(Tally), settings=PROFILE)
    reported = {action for action in EDGES if action not in ("Acquire", "Publish")}
    edges = {f"{action} {a} {b}" for action in reported for a, b in EDGES[action]}
    assert edges <= Tally.seen.keys()
    assert Tally.seen["share"] > 100


FIRST = settings(PROFILE, phases=[Phase.generate])
"""The first failure will do; the shortest takes seconds more."""


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_each_bug_is_found_by_name(bug: type[Plain]) -> None:
    with pytest.raises(Broken) as found:
        run_state_machine_as_test(suite(bug), settings=FIRST)
    assert found.value.rule == (bug.__doc__ or "").split(":")[0]


def test_a_bug_is_shown_by_its_shortest_history() -> None:
    with pytest.raises(Broken) as found:
        run_state_machine_as_test(suite(LeaksAPage), settings=PROFILE)
    calls = [line for line in "\n".join(found.value.__notes__).splitlines() if "state." in line]
    assert [call.split("(")[0] for call in calls] == [
        "state.start",
        "state.submit",
        "state.teardown",
    ]


def test_an_author_must_say_which_engine() -> None:
    class Empty(LifecycleMachine[Plain]):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define engine"):
        run_state_machine_as_test(Empty, settings=FIRST)


def test_without_hypothesis_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import tokenspeed.fsm.testing"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "ImportError: tokenspeed.fsm.testing needs Hypothesis" in ran.stderr
    assert "pip install 'tokenspeed[test]'" in ran.stderr


# --- Our own scheduler ----------------------------------------------------------------------------


class Heard(World):
    """The simulated executor, which reads every cell; its moves are kept for the suite."""

    def __init__(self, **config: int) -> None:
        self.heard: list[Move] = []
        super().__init__(**config)

    def check(self) -> None:
        assert self.scheduler.check() == []
        moves = self.scheduler.events()
        self.heard += moves
        self.monitor.feed(moves)


class Ours:
    """`tokenspeed._core.Scheduler`. It names each submission anew, by a number of its own."""

    def __init__(self, bounds: Bounds) -> None:
        self.world = Heard(
            pages=bounds.pages,
            page_size=bounds.page_size,
            slots=bounds.slots,
            step_tokens=bounds.chunk,
            overlap=bounds.in_flight_max - 1,
            prefix_cache=bounds.prefix_cache,
        )
        self.numbers: dict[int, int] = {}  # request -> its last number
        self.names: dict[int, int] = {}
        self.slots: dict[int, int] = {}  # slot -> number
        self.tables: dict[int, dict[int, int]] = {}  # number -> index -> page

    def submit(self, request: int, prompt: tuple[int, ...], output_max: int, salt: str) -> bool:
        number = self.numbers.get(request, -1)
        scheduler = self.world.scheduler
        try:
            if scheduler.tokens(number) is None:
                number = self.world.submit(list(prompt), output_max, salt)
            else:
                scheduler.submit(number, np.asarray(prompt, np.int32), output_max, salt)
        except ValueError:
            return False
        self.numbers[request], self.names[number] = number, request
        return True

    def abort(self, request: int) -> bool:
        return self.world.abort(self.numbers.get(request, -1))

    def launch(self) -> Step | None:
        if not self.world.launch():
            return None
        plan, _ = self.world.launched[-1]
        for slot, number in plan.joined.tolist():
            self.slots[slot], self.tables[number] = number, {}
        for slot, index, page in plan.page_delta.tolist():
            self.tables[self.slots[slot]][index] = page
        ends = plan.context_lens + np.diff(plan.query_start)
        touches = {
            self.names[number]: frozenset(
                page
                for index, page in self.tables[number].items()
                if index * self.world.config["page_size"] < end
            )
            for number, end in zip(plan.numbers.tolist(), ends.tolist(), strict=True)
        }
        return Step(plan.step, touches)

    def complete(self, step: int, stop: frozenset[int]) -> bool:
        launched = [plan.step for plan, _ in self.world.launched]
        if launched[:1] == [step]:
            for request in stop & self.numbers.keys():
                client = self.world.clients[self.numbers[request]]
                client.stop_after = min(client.stop_after, len(client.output) + 1)
            self.world.commit()
            return True
        rows = next(len(plan.numbers) for plan in self.world.plans if plan.step == step)
        try:
            self.world.scheduler.commit(step, np.zeros(rows, np.int32), np.zeros(rows, bool))
        except ValueError:
            return False
        return True

    def moves(self) -> Iterable[Move]:
        self.world.check()
        moves, self.world.heard = self.world.heard, []
        # By the last move: one plan may preempt a request and admit it again.
        for number, to in {number: to for _, number, _, _, to in moves}.items():
            if "Pages" not in OWNS[to]:
                self.tables.pop(number, None)
        return [
            (action, self.names[number], number, source, to)
            for action, number, _, source, to in moves
        ]

    def holdings(self) -> Holdings:
        stats = self.world.scheduler.stats()
        tables = {
            self.names[number]: tuple(page for _, page in sorted(table.items()))
            for number, table in self.tables.items()
        }
        return Holdings(stats.pages_free, stats.pages_cached, tables)


class OurSuite(LifecycleMachine[Ours]):
    def engine(self, bounds: Bounds) -> Ours:
        return Ours(bounds)

    def teardown(self) -> None:
        super().teardown()
        if self._sound:
            self.subject.world.finish()


TestOurs = OurSuite.TestCase
TestOurs.settings = PROFILE


def test_an_admission_without_a_row_is_not_lost() -> None:
    """The shortest history that the suite found, with three steps in flight."""
    state = OurSuite()
    state.start(pages=5, page_size=1, slots=2, extra=0, in_flight_max=3, prefix_cache=True)
    one = {"count": 1, "first": 0, "base": 0, "length": 0, "own": [], "salt": ""}
    state.submit(output_max=5, **one)
    state.turns(turns=3)
    state.submit(output_max=1, **one)
    state.teardown()
