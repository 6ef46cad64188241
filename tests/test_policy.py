"""Who runs when: what a latency budget leaves for prefill, and who goes ahead of whom."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from scheduling import World
from tokenspeed._core import Plan, Scheduler
from tokenspeed.bench.policy import H100_8B, Simulation, Workload, measure
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError, RequestError
from tokenspeed.fsm.manifest import specs_directory
from tokenspeed.fsm.replay import make_scheduler
from tokenspeed.fsm.trace import read_trace, validate
from tokenspeed.request import Request

SPECS = specs_directory()
PROGRESS_TOKENS = 16
"""Prefill that goes on beside decoding under any budget."""

BUDGET_US = 10_000
ARRIVALS = 16
"""That one step of priority is worth."""


def chunks(plan: Plan) -> NDArray[np.int32]:
    """Tokens of each row."""
    return np.diff(plan.query_start)


def linear_us(plan: Plan) -> int:
    """A machine: a constant, and something for each token and what it attends to."""
    tokens = chunks(plan).astype(np.int64)
    return int(2000 + 5 * tokens.sum() + 0.01 * (tokens * plan.context_lens).sum())


class Timed:
    """A scheduler whose steps take what a machine says."""

    def __init__(self, **settings: int) -> None:
        sizes = {
            "page_size": 16, "pages": 9000, "slots": 12, "waiting_max": 100, "step_tokens": 4096,
            "context_max": 20_000, "itl_budget_us": BUDGET_US,
        }  # fmt: skip
        self.scheduler = Scheduler(**{**sizes, **settings})  # type: ignore[arg-type]
        self.took_us: Callable[[Plan], int] = linear_us
        self._launched: deque[Plan] = deque()
        self._number = 0

    def submit(self, tokens: int, max_tokens: int, priority: int = 0) -> int:
        """A request whose prompt nobody else has."""
        self._number += 1
        prompt = np.full(tokens, self._number, np.int32)
        self.scheduler.submit(self._number, prompt, max_tokens, priority=priority)
        return self._number

    def turns(self, turns: int) -> list[Plan]:
        """So many steps, each planned as early as may be, and their plans."""
        return [plan for _ in range(turns) if (plan := self._turn()) is not None]

    def _turn(self) -> Plan | None:
        while (plan := self.scheduler.plan()) is not None:
            self._launched.append(plan)
        if not self._launched:
            return None
        plan = self._launched.popleft()
        rows = plan.slots.size
        zeros = np.zeros(rows, np.int32), np.zeros(rows, np.bool_)
        self.scheduler.commit(plan.step, *zeros, self.took_us(plan))
        return plan

    def finish(self) -> None:
        while self._turn() is not None:
            pass
        assert self.scheduler.idle()


def crowded(waiting: int = 1, **settings: int) -> Timed:
    """Four requests decode; long prompts come."""
    timed = Timed(**settings)
    for _ in range(4):
        timed.submit(20, 1500)
    timed.turns(40)
    for _ in range(waiting):
        timed.submit(9000, 2)
    return timed


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_prefill_takes_what_the_budget_leaves(overlap: int) -> None:
    w = crowded(overlap=overlap)
    plans = w.turns(30)
    beside = [p for p in plans if chunks(p).max() > 1]
    assert all(linear_us(p) <= BUDGET_US for p in beside)
    assert max(map(linear_us, beside)) > 0.9 * BUDGET_US, "and it takes all of it"
    assert all((chunks(p) == 1).sum() == 4 for p in beside), "with everybody who decodes"
    w.finish()


def test_the_chunk_grows_no_faster_than_what_was_seen() -> None:
    w = crowded()
    first = [int(chunks(p).max()) for p in w.turns(4)]
    seen = 4 * 20  # the prompts of those who decode
    assert first[0] <= 2 * seen
    assert all(after <= 2 * before for before, after in itertools.pairwise(first))


def test_a_budget_that_cannot_be_kept_stalls_nobody() -> None:
    w = crowded(itl_budget_us=1)
    plans = w.turns(20)
    assert all(sorted(chunks(p)) == [1, 1, 1, 1, PROGRESS_TOKENS] for p in plans)
    w.finish()


def test_without_durations_nothing_is_guessed() -> None:
    w = Timed()
    w.took_us = lambda _plan: 0
    w.submit(8, 400)
    w.turns(1)
    w.submit(2000, 2)
    assert all(chunks(p).tolist() == [1, PROGRESS_TOKENS] for p in w.turns(10))


def test_while_nobody_decodes_a_step_is_full() -> None:
    w = Timed(itl_budget_us=1)
    w.submit(10_000, 1)
    assert [chunks(p).tolist() for p in w.turns(3)] == [[4096], [4096], [1808]]


def test_several_prefills_share_a_step() -> None:
    w = crowded(waiting=0)
    for _ in range(6):
        w.submit(50, 2)
    (plan,) = w.turns(1)
    assert sorted(chunks(plan)) == [1, 1, 1, 1, 26, 50], "twice what was seen"
    w.finish()


def test_one_long_step_changes_little() -> None:
    def after(factor: int) -> list[int]:
        w = crowded(waiting=0)
        w.took_us = lambda plan: factor * linear_us(plan)
        w.turns(1)
        w.took_us = linear_us
        w.turns(20)
        w.submit(9000, 2)
        return [int(chunks(plan).max()) for plan in w.turns(20)]

    assert np.allclose(after(50), after(1), rtol=0.05)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"itl_budget_us: got -1; expected 0 to 60000000"):
        Scheduler(
            page_size=1, pages=9, slots=1, waiting_max=1, step_tokens=1, context_max=9,
            itl_budget_us=-1,
        )  # fmt: skip


def test_a_rate_is_a_budget() -> None:
    assert EngineConfig().itl_budget_us == 0
    assert EngineConfig(itl_budget_ms=12.5).itl_budget_us == 12_500
    assert EngineConfig(tps_floor=40).itl_budget_us == 25_000
    with pytest.raises(ConfigError, match=r"tps_floor: got 40; expected none beside itl_budget_ms"):
        EngineConfig(tps_floor=40, itl_budget_ms=25)
    with pytest.raises(ConfigError, match=r"itl_budget_ms: got 0; expected milliseconds from 0\.1"):
        EngineConfig(itl_budget_ms=0)
    with pytest.raises(ConfigError, match=r"tps_floor: got nan; expected tokens/s from 0\.02"):
        EngineConfig(tps_floor=float("nan"))


# --- turns ----------------------------------------------------------------------------------------


def order(priorities: list[int]) -> list[int]:
    """Numbers in the order of admission, one at a time, if all wait behind one that runs."""
    w = World(page_size=4, pages=32, slots=1, step_tokens=16)
    w.submit([1], 3)
    w.turn()
    for priority in priorities:
        w.submit([1, 2], 1, priority=priority)
    w.finish()
    return [number for plan in w.plans for _, number in plan.joined.tolist()][1:]


def test_a_lower_priority_goes_first() -> None:
    assert order([0, 5, -1, 5, -2]) == [5, 3, 1, 2, 4]


def test_equal_priorities_keep_the_order_of_arrival() -> None:
    assert order([7] * 20) == list(range(1, 21))


def test_a_step_of_priority_is_worth_so_many_arrivals() -> None:
    assert order([1] + [0] * 40) == [*range(2, 2 + ARRIVALS), 1, *range(2 + ARRIVALS, 42)]
    assert order([2] + [1] * 40) == order([1] + [0] * 40), "the difference counts"


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=120))
def test_nobody_is_passed_by_more_than_a_bound(priorities: list[int]) -> None:
    came = order(priorities)
    assert sorted(came) == list(range(1, len(priorities) + 1))
    for at, number in enumerate(came):
        for before in came[:at]:
            lower = priorities[number - 1] - priorities[before - 1]
            assert before <= number + max(0, ARRIVALS * lower)


def test_the_last_in_turn_is_preempted() -> None:
    w = World(page_size=4, pages=12, slots=4, step_tokens=16)
    patient = w.submit([1] * 5, 30, priority=3)
    for number in range(2):
        w.submit([2 + number] * 5, 30)
    while not any(plan.preempted.size for plan in w.plans):
        assert w.turn()
    assert w.plans[-1].preempted.tolist() == [patient], "though it came first"
    w.finish()


def test_an_urgent_request_is_given_its_prefill_first() -> None:
    w = crowded(waiting=2)
    w.turns(3)
    urgent = w.submit(40, 2, priority=-1)
    (plan,) = w.turns(1)
    assert urgent in plan.numbers.tolist()


@pytest.mark.parametrize("priority", [-101, 101, 2**31 - 1])
def test_a_priority_out_of_bounds_is_refused(priority: int) -> None:
    w = World(page_size=4, pages=32, slots=1, step_tokens=16)
    with pytest.raises(ValueError, match=f"priority: got {priority}; expected -100 to 100"):
        w.submit([1], 1, priority=priority)
    with pytest.raises(RequestError, match="expected an integer from -100 to 100"):
        Request(prompt_ids=(1,), priority=priority)


# --- in virtual time ------------------------------------------------------------------------------


def test_a_budget_beats_every_fixed_chunk() -> None:
    workload = Workload(users=8, context=500, answer=200, prompts=2, prompt_tokens=20_000)
    told: list[tuple[str, int, int]] = []
    (row,) = measure([100], lambda *progress: told.append(progress), workload).rows
    assert row.budget_ms == 10
    assert row.budgeted.p50_ms <= row.budgeted.p99_ms <= 1.1 * row.budget_ms
    assert row.fixed is not None
    assert row.chunk is not None
    assert row.fixed.p99_ms <= 1.1 * row.budget_ms
    assert row.share is not None
    assert row.share >= 0.9
    assert told[0] == ("100 tok/s", 0, told[0][2])
    assert told[-1] == ("100 tok/s", told[0][2], told[0][2])


def test_a_floor_that_no_chunk_meets_is_told() -> None:
    workload = Workload(users=8, context=500, answer=50, prompts=2, prompt_tokens=500)
    report = measure([5000], lambda *_: None, workload)
    assert (report.rows[0].chunk, report.rows[0].share) == (None, None)
    assert report.as_json()["rows"][0]["fixed"] is None


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_run_in_virtual_time_is_a_behaviour_of_the_spec(tmp_path: Path, overlap: int) -> None:
    path = tmp_path / "trace"
    scheduler = make_scheduler(
        str(path), None, page_size=4, pages=40, slots=4, waiting_max=8, step_tokens=40,
        context_max=80, overlap=overlap, itl_budget_us=3000,
    )  # fmt: skip
    run = Simulation(scheduler, H100_8B)
    for number in range(3):
        run.submit(np.full(8, number, np.int32), 12)
    for _ in range(4):
        run.step()
    for number, priority in enumerate([2, 0, -1]):
        run.submit(np.full(60, 9 - number, np.int32), 2, priority)
    while run.step() is not None:
        pass
    assert sorted(run.take_ended()) == list(range(6))
    header, steps = read_trace(path)
    assert validate(SPECS, header, steps) is None
    for at, step in enumerate(steps):
        if step.action == "Submit" and step.request == 3:
            steps[at] = attrs.evolve(step, value=0)
    assert validate(SPECS, header, steps) is not None, "with another patience, it is none"
