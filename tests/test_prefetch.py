"""Pages for a turn that has not come: fetched ahead of it, and never at anybody's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scheduling import World
from tokenspeed.fsm.replay import make_scheduler, play
from tokenspeed.fsm.trace import read_trace, validate

SPECS = Path(__file__).resolve().parents[1] / "specs"
SECOND = 1_000_000
SMALL = {
    "page_size": 4, "pages": 16, "slots": 2, "step_tokens": 8, "host_pages": 64,
    "session_pages_max": 16,
}  # fmt: skip
TURN = [1] * 17
"""Four pages of it are cached: the last token is computed again."""


def world(**settings: int) -> World:
    return World(**{**SMALL, **settings})


def run(w: World, prompt: list[int], **hints: Any) -> int:
    """A request to its end; prompt tokens that it found cached."""
    w.submit(prompt, 1, **hints)
    w.finish()
    return next(cached for plan in reversed(w.plans) for cached in plan.cached.tolist())


def there(w: World, first: int) -> int:
    """Pages of a prompt that are on the device, without looking at them through a request."""
    return sum(set(tokens) == {first} for _, tokens in w.scheduler.prefixes().values())


def fill(w: World, first: int) -> None:
    """A request that needs every page of the pool."""
    run(w, [first] * (4 * w.config["pages"]))


def evicted(**settings: int) -> World:
    """A world with a session whose turn is on the host alone."""
    w = world(**settings)
    run(w, TURN, session="a")
    fill(w, 10)
    assert there(w, 1) == 0
    assert any(set(tokens) == {1} for _, tokens in w.scheduler.host_prefixes().values())
    return w


def loads(w: World) -> int:
    return sum(not copy.out for copy in w.copies)


def test_the_next_turn_finds_what_was_fetched_for_it() -> None:
    w = evicted()
    assert w.scheduler.prefetch("a", 60 * SECOND) == 4
    assert w.scheduler.idle(), "a wish alone is no work"
    w.launch()
    assert loads(w) == 4
    assert not w.scheduler.idle()
    w.finish()
    stats = w.scheduler.stats()
    assert (there(w, 1), stats.prefetches, stats.loads, stats.pages_kept) == (4, 4, 4, 4)
    assert w.scheduler.prefetch("a", 60 * SECOND) == 0, "it is all there"
    assert run(w, TURN, session="a") == 16
    assert w.scheduler.stats().loads == 4, "nothing was loaded again"


def test_strangers_do_not_take_what_was_fetched_while_its_time_lasts() -> None:
    w = evicted()
    w.scheduler.advance(SECOND)
    w.scheduler.prefetch("a", 60 * SECOND)
    w.finish()
    for stranger in range(20, 30):
        run(w, [stranger] * 29)
    assert there(w, 1) == 4
    w.scheduler.advance(62 * SECOND)
    assert w.scheduler.stats().pages_kept == 0
    for stranger in range(30, 40):
        run(w, [stranger] * 29)
        w.scheduler.advance((62 + stranger) * SECOND)
    assert there(w, 1) < 4


def test_nothing_comes_while_somebody_waits() -> None:
    w = evicted(slots=1)
    w.submit([2] * 9, 2)
    w.submit([3] * 9, 2)
    w.launch()
    assert w.scheduler.stats().waiting == 1
    w.scheduler.prefetch("a", 60 * SECOND)
    while w.scheduler.stats().waiting:
        assert loads(w) == 0
        if not w.launch():
            w.commit()
    w.finish()
    assert w.scheduler.stats().prefetches == 4


def test_no_page_comes_that_is_promised_or_that_a_next_step_may_take() -> None:
    w = evicted(pages=8, session_pages_max=0)
    number = w.submit([2] * 21, 1)
    w.launch()
    assert w.scheduler.prefetch("a", 60 * SECOND) == 4
    for _ in range(2):  # of eight pages it takes six, two a step, and two more are a next step's
        w.commit()
        w.launch()
        assert loads(w) == 0
    w.commit()
    assert w.clients[number].done
    w.launch()
    assert loads(w) == 4
    w.finish()


def test_what_somebody_asked_to_be_kept_is_not_taken_for_it() -> None:
    w = evicted(pages=10)
    for name in "bc":
        run(w, [ord(name)] * 17, session=name, keep_us=100 * SECOND)
    assert w.scheduler.stats().pages_kept == 8
    assert w.scheduler.prefetch("a", 60 * SECOND) == 4
    w.finish()
    assert [there(w, first) for first in (1, ord("b"), ord("c"))] == [2, 4, 4]


@pytest.mark.parametrize("how", ["turn", "end", "time", "clear"])
def test_a_wish_is_over_when_its_turn_comes_or_cannot(how: str) -> None:
    w = evicted(slots=1)
    w.submit([2] * 9, 2)
    w.submit([3] * 9, 2)
    w.launch()
    assert w.scheduler.prefetch("a", 60 * SECOND) == 4
    if how == "turn":
        w.submit([9] * 5, 1, session="a", supersedes=True)
    elif how == "end":
        assert w.scheduler.end_session("a")
    elif how == "time":
        w.scheduler.advance(61 * SECOND)
    else:
        w.clear_cache()
    w.finish()
    stats = w.scheduler.stats()
    assert (stats.prefetches, there(w, 1)) == (0, 0)


def test_what_came_goes_first_when_the_session_ends() -> None:
    w = evicted()
    w.scheduler.prefetch("a", 60 * SECOND)
    w.finish()
    assert w.scheduler.end_session("a")
    assert w.scheduler.stats().pages_kept == 0
    run(w, [5] * 29)
    assert there(w, 1) == 0, "before any stranger's"
    assert w.scheduler.prefetch("a", SECOND) is None


def test_what_is_left_of_a_path_comes_when_its_leaves_are_gone() -> None:
    w = world(host_pages=19)
    run(w, [1] * 33, session="a")
    fill(w, 10)
    left = sum(set(tokens) == {1} for _, tokens in w.scheduler.host_prefixes().values())
    assert (there(w, 1), left) == (0, 3), "the host let five of eight go"
    assert w.scheduler.prefetch("a", SECOND) == 1, "of three, what is found again"
    w.finish()
    assert there(w, 1) == w.scheduler.stats().prefetches == 1


def test_a_copy_that_fails_is_no_harm() -> None:
    w = evicted()
    w.scheduler.prefetch("a", 60 * SECOND)
    w.launch()
    w.acknowledge(*w.copies, good=False)
    assert (there(w, 1), w.scheduler.stats().prefetches) == (0, 0)
    assert run(w, TURN, session="a") == 0
    assert there(w, 1) == 4


def test_while_a_turn_runs_there_is_nothing_to_fetch() -> None:
    w = evicted()
    w.submit([4] * 9, 3, session="a")
    w.launch()
    assert w.scheduler.prefetch("a", SECOND) == 0
    assert w.scheduler.prefetch("nobody's", SECOND) is None
    w.finish()


@pytest.mark.parametrize("keep_us", [0, -1, 10**15])
def test_a_time_out_of_bounds_is_refused(keep_us: int) -> None:
    with pytest.raises(ValueError, match=f"keep_us: got {keep_us}; expected 1 to"):
        world().scheduler.prefetch("a", keep_us)


def test_it_is_traced_as_the_spec_allows_and_replayed(tmp_path: Path) -> None:
    trace, recording = tmp_path / "trace", tmp_path / "recording"
    settings = {**SMALL, "pages": 10, "waiting_max": 4, "context_max": 40}
    scheduler = make_scheduler(str(trace), str(recording), **settings)

    def turn() -> None:
        while (plan := scheduler.plan()) is not None:
            for copies in (plan.stores, plan.loads):
                scheduler.acknowledge(copies[:, 0].copy(), np.ones(len(copies), bool))
            rows = len(plan.slots)
            if rows:
                scheduler.commit(plan.step, np.zeros(rows, np.int32), np.ones(rows, bool))

    for number, (first, tokens) in enumerate(((1, 17), (2, 39))):
        session = "a" if first == 1 else ""
        scheduler.submit(number, np.full(tokens, first, np.int32), 1, "", session)
        turn()
    assert (scheduler.prefetch("a", SECOND) or 0) > 0
    turn()
    assert scheduler.stats().prefetches > 0
    header, steps = read_trace(trace)
    assert any(step.action == "LoadEnd" for step in steps)
    assert validate(SPECS, header, steps) is None
    found = play(recording, check=True)
    assert found.difference is None
