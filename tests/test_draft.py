"""Speculation in the plan: drafts reserve pages if nobody wants them, any prefix is accepted."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scheduling
from scheduling import World, next_token
from tokenspeed._core import Scheduler
from tokenspeed.fsm.replay import play
from tokenspeed.fsm.trace import TraceStep, read_trace, validate

SPECS = Path(__file__).resolve().parents[1] / "specs"
NONE = np.zeros(0, np.int32)


def world(**more: int) -> World:
    return World(**{"pages": 16, "page_size": 2, "slots": 2, "step_tokens": 8, **more})


def decoding(there: World, prompt: list[int], max_tokens: int = 12) -> int:
    """A request that has its first token."""
    number = there.submit(prompt, max_tokens)
    there.launch()
    there.commit()
    return number


@pytest.mark.parametrize("right", range(5))
def test_any_prefix_is_accepted_and_the_rest_rolled_back(right: int) -> None:
    there = world(draft_tokens=4, step_tokens=16)
    number = decoding(there, [1, 2, 3])
    free = there.scheduler.stats().pages_free
    assert there.propose(number, right, 4 - right) == 4
    there.launch()
    (plan, _) = there.launched[-1]
    assert plan.drafts.tolist() == [4]
    assert np.diff(plan.query_start).tolist() == [5]
    there.commit()
    held = min(4, -(-(4 + right + 1) // 2))
    assert len(there.clients[number].output) == right + 2
    stats = there.scheduler.stats()
    assert (stats.drafts, stats.drafts_accepted) == (4, right)
    assert free - stats.pages_free == held - 2, "pages for what is known, and no more"
    there.finish()


def test_drafts_end_where_the_request_may(tmp_path: Path) -> None:
    there = world(draft_tokens=4)
    number = decoding(there, [1, 2, 3], max_tokens=4)
    assert there.propose(number, 4) == 4
    there.launch()
    assert there.launched[-1][0].drafts.tolist() == [2], "the token after them is the last"
    there.commit()
    assert there.clients[number].done


def test_a_stop_within_a_run_ends_the_request() -> None:
    there = world(draft_tokens=4)
    number = there.submit([1, 2, 3], 12, stop_after=3)
    there.launch()
    there.commit()
    there.propose(number, 4)
    there.launch()
    there.commit()
    assert there.clients[number].done
    there.finish()  # which compares the output


def test_drafts_preempt_nobody_and_make_do_with_the_room_there_is() -> None:
    there = world(draft_tokens=4, pages=4)
    first = there.submit([1, 2, 3], 4)  # two pages; the next token fills the second one
    second = decoding(there, [5, 6, 7], max_tokens=2)
    assert there.scheduler.stats().pages_free == 0
    there.propose(first, 4)
    there.launch()
    plan, _ = there.launched[-1]
    assert first in plan.numbers
    assert plan.drafts.sum() == 0, "there is no page for them"
    there.commit()
    assert there.scheduler.stats().preemptions == 0
    assert there.clients[second].done


def test_drafts_keep_nobody_out() -> None:
    there = world(draft_tokens=4, pages=5, prefix_cache=0)
    first = decoding(there, [1, 2, 3], max_tokens=6)
    there.submit([5] * 6, 1)  # which needs all the three that are left
    there.propose(first, 4)
    there.launch()
    plan, _ = there.launched[-1]
    assert len(plan.joined) == 1
    there.finish()


@pytest.mark.parametrize("overlap", [1, 2])
def test_a_request_with_drafts_is_not_planned_ahead(overlap: int) -> None:
    there = world(draft_tokens=2, overlap=overlap)
    number = there.submit([1, 2, 3], 12)
    there.launch()
    there.commit()
    there.launch()
    assert there.propose(number, 2) == 2
    assert not there.launch(), "where the next token comes is not known"
    there.commit()
    assert there.propose(number, 2) == 2
    there.launch()
    assert there.launched[-1][0].drafts.tolist() == [2]
    assert not there.launch()
    there.commit()
    assert there.launch(), "without drafts it is planned ahead again"
    assert there.launch()
    there.finish()


def test_who_does_not_decode_has_no_drafts() -> None:
    there = world(draft_tokens=2)
    number = there.submit([1, 2, 3], 12)
    assert there.propose(number, 2) == 0
    assert there.scheduler.propose(99, NONE) == 0
    assert world().scheduler.propose(0, NONE) == 0
    there.launch()
    there.commit()
    there.propose(number, 2)
    there.launch()
    assert there.propose(number, 2) == 0, "those that are under way stay what they are"
    there.finish()


def test_a_run_that_cannot_be_is_refused_whole() -> None:
    there = world(draft_tokens=2)
    number = decoding(there, [1, 2, 3])
    there.propose(number, 2)
    there.launch()
    plan, rows = there.launched[-1]
    one, two, three = rows[0][1]
    stop = np.zeros(1, bool)
    for run, why in (
        ([one], "got 1 tokens and 1 stop flags; expected 3 and 1"),
        ([-1, -1, -1], "was sampled and has no token"),
        ([one, -1, three], "goes on after its end"),
        ([one, two, -2], "goes on after its end"),
        ([one + 1, two, three], "has a token behind a draft that is another one"),
    ):
        with pytest.raises(ValueError, match=why):
            there.scheduler.commit(plan.step, np.array(run, np.int32), stop)
    there.finish()


def test_drafts_of_an_aborted_request_come_to_nothing() -> None:
    there = world(draft_tokens=2)
    number = decoding(there, [1, 2, 3])
    there.propose(number, 2)
    there.launch()
    there.abort(number)
    there.commit()
    assert there.scheduler.stats().drafts == 0
    there.finish()


def test_prefill_and_drafts_share_a_step() -> None:
    there = world(draft_tokens=4, pages=40, step_tokens=8)
    number = decoding(there, [1, 2, 3])
    there.submit([7] * 20, 2)
    there.propose(number, 4)
    there.launch()
    plan, _ = there.launched[-1]
    assert plan.query_start[-1] <= 8
    assert plan.drafts.max() == 3, "half of what is left of the step"
    assert np.diff(plan.query_start).tolist() == [4, 4]
    there.finish()


ACTIONS = st.tuples(
    st.sampled_from(["propose", "propose", "launch", "commit", "submit", "abort"]),
    st.integers(0, 4), st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    overlap=st.integers(0, 2), page_size=st.integers(1, 3), pages=st.integers(8, 10),
    host_pages=st.sampled_from([0, 0, 4]), draft_tokens=st.integers(1, 3),
    actions=st.lists(ACTIONS, max_size=25),
)  # fmt: skip
def test_any_run_is_a_behaviour_of_the_spec(
    tmp_path_factory: pytest.TempPathFactory,
    actions: list[tuple[str, int, int]],
    **settings: int,
) -> None:
    there = World(slots=2, step_tokens=4, **settings)
    there.submit([1], 6)
    for name, a, b in actions:
        match name:
            case "propose":
                for number in there.clients:
                    there.propose(number, a, b)
            case "launch":
                there.launch()
            case "commit" if there.launched:
                there.commit()
            case "submit" if len(there.clients) < 4:
                there.submit([1] * (1 + b), 1 + a, stop_after=3 if b else 9)
            case "abort" if a == 4:
                there.abort(b % len(there.clients))
    there.finish()
    header, steps = read_trace(there.write_trace(tmp_path_factory.mktemp("t") / "trace"))
    assert header.draft_tokens > 0
    assert validate(SPECS, header, steps) is None


def test_a_trace_that_lies_about_drafts_is_refused(tmp_path: Path) -> None:
    there = world(draft_tokens=3)
    number = decoding(there, [1, 2, 3], max_tokens=9)
    there.propose(number, 1, 2)
    there.turn()
    there.finish()
    header, steps = read_trace(there.write_trace(tmp_path / "trace"))
    assert validate(SPECS, header, steps) is None
    at = next(i for i, s in enumerate(steps) if s.action == "Speculate")
    assert {s.action for s in steps} >= {"Reserve", "Accept", "Trim"}
    accept = next(i for i, s in enumerate(steps) if s.action == "Accept")
    for lie in (
        [*steps[:at], attrs.evolve(steps[at], value=4), *steps[at + 1 :]],
        [*steps[:accept], *[steps[accept]] * 3, *steps[accept:]],
        [*steps[: at + 1], TraceStep("Trim", number), *steps[at + 1 :]],
        [*steps[: at + 1], steps[at], *steps[at + 1 :]],
    ):
        assert validate(SPECS, header, lie) is not None


def test_a_recording_has_the_drafts() -> None:
    there = world(draft_tokens=3)
    number = decoding(there, [1, 2, 3])
    while there.launched or there.launch():
        there.commit()
        there.propose(number, 2, 1)
    name = test_a_recording_has_the_drafts.__name__
    (path,) = (p for p in scheduling.recordings.iterdir() if name in p.name)
    found = play(path, check=True)
    assert found.difference is None
    assert found.calls > 10
    assert b"propose" in path.read_bytes()


def test_without_drafts_none_are_taken() -> None:
    scheduler = Scheduler(pages=8, page_size=2, slots=2, step_tokens=4, context_max=16)
    scheduler.submit(0, np.array([1, 2], np.int32), 4)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan.step, np.array([next_token([1, 2])], np.int32), np.zeros(1, bool))
    assert scheduler.propose(0, np.array([1], np.int32)) == 0
    with pytest.raises(ValueError, match="draft_tokens: got -1; expected 0 to 1024"):
        Scheduler(pages=8, context_max=16, draft_tokens=-1)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (-1, "a token out of bounds; expected 0 to"),
        (2**31, "2147483648 at index [01]; expected -2147483648 to 2147483647"),
        (2**32 + 5, "4294967301 at index [01]; expected -2147483648 to 2147483647"),
    ],
)
def test_what_is_no_token_is_not_guessed(token: int, reason: str) -> None:
    scheduler = Scheduler(pages=8, slots=1, step_tokens=16, context_max=32, draft_tokens=2)
    for draft in ([token], np.array([3, token], np.int64)):
        with pytest.raises(ValueError, match=f"draft: got {reason}"):
            scheduler.propose(1, draft)  # type: ignore[arg-type]
