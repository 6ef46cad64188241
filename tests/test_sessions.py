"""Sessions in the scheduler: whose cached pages outlive whose, within which bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scheduling import World
from tokenspeed._core import Scheduler
from tokenspeed.fsm.replay import make_scheduler, play
from tokenspeed.fsm.trace import read_trace, validate

SMALL = {"page_size": 4, "pages": 12, "slots": 2, "step_tokens": 64}
SPECS = Path(__file__).resolve().parents[1] / "specs"
SECOND = 1_000_000


def world(**settings: int) -> World:
    return World(**{**SMALL, "session_pages_max": 6, **settings})


def turn(w: World, first: int, tokens: int = 17, **hints: Any) -> int:
    """A request of its own tokens from start to end; prompt tokens that were cached."""
    w.submit([first] * tokens, 1, **hints)
    w.finish()
    return next(cached for plan in reversed(w.plans) for cached in plan.cached.tolist())


def cached(w: World, first: int) -> int:
    """Pages of a prompt that are there, without looking at them through a request."""
    return sum(set(tokens) == {first} for _, tokens in w.scheduler.prefixes().values())


def test_a_kept_turn_outlives_strangers_for_its_time() -> None:
    w = world()
    w.scheduler.advance(SECOND)
    turn(w, 1, session="a", keep_us=60 * SECOND)
    assert w.scheduler.stats().pages_kept == 4
    for stranger in range(10, 20):
        turn(w, stranger)
    assert cached(w, 1) == 4, "strangers' pages went instead"
    assert turn(w, 1, session="a", keep_us=60 * SECOND) == 16
    w.scheduler.advance(62 * SECOND)
    assert w.scheduler.stats().pages_kept == 0
    for stranger in range(20, 30):
        turn(w, stranger)
        w.scheduler.advance((62 + stranger) * SECOND)
    assert cached(w, 1) < 4


@pytest.mark.parametrize(
    ("groups", "kept"), [({"window": 5}, 1), ({"window": 5, "full_groups": 1, "pages": 24}, 5)]
)
def test_with_a_window_what_is_kept_is_what_a_next_turn_finds(
    groups: dict[str, int], kept: int
) -> None:
    """The last window of the turn, and all of it for the layers that see all."""
    w = world(step_tokens=8, **groups)
    w.scheduler.advance(SECOND)
    turn(w, 1, session="a", keep_us=60 * SECOND)
    turn(w, 2)
    assert w.scheduler.stats().pages_kept == kept
    for stranger in range(10, 30):
        turn(w, stranger)
    assert cached(w, 1) == kept, "strangers' pages went instead"
    assert turn(w, 2) == 0
    assert turn(w, 1, session="a", keep_us=60 * SECOND) == 16
    assert w.scheduler.end_session("a")
    turn(w, 40)
    assert cached(w, 1) < kept
    w.clear_cache()
    assert w.scheduler.stats().prefix_nodes == 0


def test_what_is_kept_never_keeps_anybody_waiting() -> None:
    w = world(session_pages_max=12)
    turn(w, 1, tokens=45, session="a", keep_us=10**12)
    assert w.scheduler.stats().pages_kept == 11
    w.submit([2] * 44, 1)
    assert w.launch()
    assert w.plans[-1].joined[:, 1].tolist() == [1], "it is let in at once"
    w.finish()


def test_the_bound_on_kept_pages_holds() -> None:
    w = world()
    turn(w, 1, session="a", keep_us=10**9)
    turn(w, 2, session="b", keep_us=10**9)
    assert w.scheduler.stats().pages_kept == 4, "four more would be beyond six"
    assert w.scheduler.stats().sessions == 2


def test_a_turn_that_supersedes_lets_the_old_branch_go_first() -> None:
    w = world(pages=16)
    turn(w, 3)  # a stranger, used longer ago
    w.submit([1] * 8 + [2] * 9, 1, session="a", keep_us=10**9)
    w.finish()
    w.submit([1] * 8 + [4] * 9, 1, session="a", supersedes=True)
    w.finish()
    turn(w, 9, tokens=29)
    prefixes = [tokens for _, tokens in w.scheduler.prefixes().values()]
    assert not any(2 in tokens for tokens in prefixes)
    assert sum(4 in tokens for tokens in prefixes) == 2


def test_the_pages_of_an_ended_session_go_first() -> None:
    w = world()
    turn(w, 1, session="a", keep_us=10**9)
    turn(w, 2)
    assert w.scheduler.end_session("a")
    assert not w.scheduler.end_session("a"), "it is forgotten"
    assert w.scheduler.stats().sessions == 0
    turn(w, 3, tokens=29)
    assert (cached(w, 1), cached(w, 2)) == (0, 4)


def test_a_session_that_ends_while_it_runs_is_forgotten_afterwards() -> None:
    w = world()
    w.submit([1] * 17, 3, session="a", keep_us=10**9)
    w.launch()
    assert w.scheduler.end_session("a")
    w.finish()
    stats = w.scheduler.stats()
    assert (stats.sessions, stats.pages_kept) == (0, 0)


def test_tools_are_awaited_by_row() -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=40)
    scheduler.submit(1, np.arange(8, dtype=np.int32), 4, session="a")
    plan = scheduler.plan()
    assert plan is not None
    one, yes = np.ones(1, np.int32), np.ones(1, bool)
    with pytest.raises(ValueError, match="awaits_tool; expected 1"):
        scheduler.commit(plan.step, one, yes, awaits_tool=np.ones(2, bool))
    assert scheduler.commit(plan.step, one, yes, 1000, yes).finished == [(1, "stop")]


@pytest.mark.parametrize("keep_us", [-1, 10**15])
def test_a_wish_out_of_bounds_is_refused(keep_us: int) -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=40)
    with pytest.raises(ValueError, match=f"keep_us: got {keep_us}; expected 0 to"):
        scheduler.submit(1, np.arange(8, dtype=np.int32), 4, session="a", keep_us=keep_us)
    assert scheduler.stats().sessions == 0


def test_hints_are_traced_as_the_spec_allows_and_replayed(tmp_path: Path) -> None:
    trace, recording = tmp_path / "trace", tmp_path / "recording"
    settings = {**SMALL, "waiting_max": 4, "context_max": 40, "session_pages_max": 4}
    scheduler = make_scheduler(str(trace), str(recording), **settings)
    for number in range(6):
        scheduler.advance(number * SECOND)
        session = f"s{number % 2}"
        prompt = np.full(17, number % 3, np.int32)
        scheduler.submit(number, prompt, 1, "", session, 2 * SECOND, number == 4)
        while (plan := scheduler.plan()) is not None:
            rows = len(plan.slots)
            scheduler.commit(plan.step, np.zeros(rows, np.int32), np.ones(rows, bool), 0, None)
    assert scheduler.end_session("s1")
    header, steps = read_trace(trace)
    assert any(step.action == "Evict" for step in steps)
    assert validate(SPECS, header, steps) is None
    found = play(recording, check=True)
    assert found.difference is None
    assert found.calls > 12
