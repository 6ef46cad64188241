"""The scheduler by cases: events in, plans out."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from scheduling import World
from tokenspeed._core import SPEC_HASH, Committed, Plan, QueueFull, Scheduler
from tokenspeed.fsm.generated import SPEC_HASH as MIRROR_HASH

SMALL = {"page_size": 4, "pages": 32, "slots": 4, "step_tokens": 16}


def world(**settings: int) -> World:
    return World(**{**SMALL, **settings})


def baseline(w: World) -> bool:
    stats = w.scheduler.stats()
    return stats.pages_free + stats.pages_cached == stats.pages_total


def test_both_halves_come_from_one_spec() -> None:
    assert SPEC_HASH == MIRROR_HASH


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_a_request_runs_to_its_end_and_returns_its_pages(overlap: int) -> None:
    w = world(overlap=overlap)
    w.submit(list(range(10)), 7)
    w.finish()
    assert w.scheduler.stats().steps >= 7


def test_chunks_sum_to_the_prompt() -> None:
    w = world(prefix_cache=0)
    w.submit(list(range(50)), 1)
    w.finish()
    rows = [(int(p.context_lens[0]), p.token_ids.tolist()) for p in w.plans]
    assert [start for start, _ in rows] == [0, 16, 32, 48]
    assert [t for _, tokens in rows for t in tokens] == list(range(50))
    assert [bool(p.sampled[0]) for p in w.plans] == [False, False, False, True]


def test_prefill_is_mixed_with_decode_and_starves_nobody() -> None:
    w = world()
    first = w.submit([1, 2, 3], 40)
    w.turn()
    for i in range(3):
        w.submit([50 + i] * 30, 2)
    before = len(w.clients[first].output)
    for _ in range(6):
        w.turn()
    assert len(w.clients[first].output) == before + 6, "a decode row in every step"
    assert any(p.slots.size > 1 for p in w.plans)
    w.finish()


def test_admission_is_in_order_of_arrival() -> None:
    w = world(slots=1, step_tokens=4)
    for name in (5, 3, 9, 1):
        w.submit([name] * 3, 2)
    w.finish()
    joined = [number for plan in w.plans for _, number in plan.joined.tolist()]
    assert joined == [0, 1, 2, 3]


def test_a_prefix_hit_skips_pages_but_never_the_last_token() -> None:
    w = world()
    prompt = list(range(16))
    w.submit(prompt, 1)
    w.finish()
    w.submit(prompt, 1)
    w.submit([*prompt[:8], 99, 98, 97, 96, 95], 1)
    w.submit(prompt, 1, salt="other")
    w.finish()
    cached = [c for plan in w.plans for c in plan.cached.tolist()]
    assert cached == [0, 12, 8, 0], "whole pages, the last token again, and a salt of one's own"


def test_generated_pages_serve_the_next_turn() -> None:
    w = world()
    number = w.submit(list(range(6)), 10)
    w.finish()
    turn = [*range(6), *w.clients[number].output, 7, 7, 7]
    w.submit(turn, 1)
    w.finish()
    assert w.plans[-1].cached.tolist() == [12], "15 of the 16 have KV: three whole pages"


def test_an_aborted_request_publishes_nothing_more() -> None:
    w = world()
    number = w.submit(list(range(30)), 5)
    w.launch()
    assert w.abort(number)
    w.commit()
    assert w.scheduler.stats().pages_cached == 0
    assert baseline(w)


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("after", range(9))
def test_abort_at_every_step_returns_every_page(overlap: int, after: int) -> None:
    w = world(overlap=overlap)
    number = w.submit(list(range(20)), 6)
    for _ in range(after):
        w.launch()
        if len(w.launched) > overlap:
            w.commit()
    w.abort(number)
    assert not w.abort(number), "the second time there is nothing to end"
    w.finish()
    assert baseline(w)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_preemption_gives_the_same_output(overlap: int) -> None:
    w = world(pages=12, overlap=overlap)
    for i in range(4):
        w.submit([i] * 9, 20)
    w.finish()
    assert w.scheduler.stats().preemptions > 0


def test_the_youngest_is_preempted_and_comes_back_in_order() -> None:
    w = world(pages=8, slots=3)
    for i in range(3):
        w.submit([i] * 5, 18)
    w.finish()
    preempted = [n for plan in w.plans for n in plan.preempted.tolist()]
    assert preempted
    assert 0 not in preempted, "the oldest always goes on"


def test_results_after_the_stop_are_dropped() -> None:
    w = world(overlap=2)
    number = w.submit([1, 2, 3], 50, stop_after=5)
    w.finish()
    assert len(w.clients[number].output) == 5


def test_a_number_can_live_again_only_when_its_pages_are_back() -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=100)
    prompt = np.arange(8, dtype=np.int32)
    scheduler.submit(1, prompt, 4)
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.abort(1)
    with pytest.raises(ValueError, match="alive"):
        scheduler.submit(1, prompt, 4)
    scheduler.commit(plan.step, np.zeros(1, np.int32), np.zeros(1, bool))
    scheduler.submit(1, prompt, 4)
    again = scheduler.plan()
    assert again is not None
    assert again.incarnations[0] == plan.incarnations[0] + 1


def test_a_wrong_batch_of_results_changes_nothing() -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=100)
    scheduler.submit(1, np.arange(8, dtype=np.int32), 4)
    plan = scheduler.plan()
    assert plan is not None
    one, no = np.ones(1, np.int32), np.zeros(1, bool)
    for step, tokens, stop, words in (
        (plan.step + 1, one, no, "order of their launch"),
        (plan.step, np.ones(2, np.int32), no, "one a row"),
        (plan.step, -one, no, "no token"),
    ):
        with pytest.raises(ValueError, match=words):
            scheduler.commit(step, tokens, stop)
    assert scheduler.tokens(1) == list(range(8))
    assert scheduler.commit(plan.step, one, no).accepted.tolist() == [True]
    with pytest.raises(ValueError, match="no step is in flight"):
        scheduler.commit(plan.step, one, no)


def test_a_plan_keeps_its_memory_as_long_as_an_array_of_it_is_held() -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=100)
    scheduler.submit(1, np.arange(8, dtype=np.int32), 50)
    held = []
    for step in range(40):
        plan = scheduler.plan()
        assert plan is not None
        if step % 3 == 0:
            held.append((plan.token_ids[:], plan.context_lens.copy(), plan.context_lens))
        done = scheduler.commit(plan.step, np.full(1, step, np.int32), np.zeros(1, bool))
        assert done.accepted.tolist() == [True]
    for ids, before, now in held[1:]:
        assert ids.tolist() == [int(before[0]) - 8], "the token of the step before"
        assert now.tolist() == before.tolist()


def test_results_of_another_type_or_layout_are_converted() -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=100)
    scheduler.submit(1, np.arange(16, dtype=np.int64)[::2], 4)
    plan = scheduler.plan()
    assert plan is not None
    wide = np.array([7, 0], ">i4")
    scheduler.commit(plan.step, wide[::2], np.array([0, 1])[::2])
    assert scheduler.tokens(1) == [0, 2, 4, 6, 8, 10, 12, 14, 7]
    with pytest.raises(TypeError, match="token_ids: got an array of <U5; expected integers"):
        scheduler.commit(plan.step, "seven", np.zeros(1, bool))  # type: ignore[arg-type]


def test_plans_and_results_come_from_the_scheduler_alone() -> None:
    for kind in (Plan, Committed):
        with pytest.raises(TypeError):
            kind()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 1, "prompt"),
        ([-1], 1, "prompt"),
        ([1], 0, "max_tokens"),
        ([1] * 60, 60, "context_max"),
        ([1] * 40, 50, "pages"),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], max_tokens: int, words: str) -> None:
    scheduler = Scheduler(**{**SMALL, "pages": 20}, waiting_max=4, context_max=100)
    with pytest.raises(ValueError, match=words):
        scheduler.submit(1, np.asarray(prompt, np.int32), max_tokens)
    assert scheduler.idle()


def test_a_full_queue_is_its_own_error() -> None:
    scheduler = Scheduler(**SMALL, waiting_max=1, context_max=100)
    scheduler.submit(1, np.ones(3, np.int32), 1)
    with pytest.raises(QueueFull):
        scheduler.submit(2, np.ones(3, np.int32), 1)
    assert scheduler.abort(1)
    scheduler.submit(2, np.ones(3, np.int32), 1)


def test_equal_calls_give_equal_plans() -> None:
    def run() -> list[list[int]]:
        w = world(pages=12, overlap=1)
        for i in range(5):
            w.submit([i % 2] * 9, 12)
        w.finish()
        return [[*p.slots.tolist(), -1, *p.token_ids.tolist()] for p in w.plans]

    assert run() == run()


@pytest.mark.parametrize("token", [2**32 + 5, 2**31, -(2**32) + 5, 2**62])
def test_a_token_beyond_32_bits_is_refused_and_not_cut(token: int) -> None:
    scheduler = Scheduler(pages=8, slots=1, step_tokens=16, context_max=32)
    for prompt in (np.array([1, token], np.int64), [1, token]):
        with pytest.raises(ValueError, match=f"prompt: got {token} at index 1; expected -2"):
            scheduler.submit(1, prompt, 1)  # type: ignore[arg-type]
    assert scheduler.idle()
    scheduler.submit(1, np.array([1, 2**31 - 1], np.int64), 1)  # type: ignore[arg-type]
    plan = scheduler.plan()
    assert plan is not None
    assert plan.token_ids.tolist() == [1, 2**31 - 1]
    with pytest.raises(ValueError, match=f"token_ids: got {token} at index 0; expected -2"):
        scheduler.commit(plan.step, np.array([token]), np.zeros(1, np.bool_))  # type: ignore[arg-type]


FRACTIONS = [1.5, 2.0, np.float32(1.5), np.float64(2), Decimal("1.5"), Fraction(3, 2), "2", None]


@pytest.mark.parametrize("value", FRACTIONS, ids=repr)
def test_what_is_no_integer_is_refused_by_name_and_not_cut(value: Any) -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=100)
    prompt, flag = np.ones(3, np.int32), np.zeros(1, np.bool_)
    calls: dict[str, Callable[[], object]] = {
        "number": lambda: scheduler.submit(value, prompt, 1),
        "max_tokens": lambda: scheduler.submit(1, prompt, value),
        "keep_us": lambda: scheduler.submit(1, prompt, 1, keep_us=value),
        "priority": lambda: scheduler.submit(1, prompt, 1, priority=value),
        "prompt": lambda: scheduler.submit(1, [1, value], 1),  # type: ignore[arg-type]
        "step": lambda: scheduler.commit(value, np.zeros(1, np.int32), flag),
        "token_ids": lambda: scheduler.commit(0, np.array([value]), flag),
        "stop": lambda: scheduler.commit(0, np.zeros(1, np.int32), np.array([value])),
        "duration_us": lambda: scheduler.commit(0, np.zeros(1, np.int32), flag, duration_us=value),
        "now_us": lambda: scheduler.advance(value),
        "draft": lambda: scheduler.propose(1, np.array([value])),
        "numbers": lambda: scheduler.guess(np.array([value])),
        "tickets": lambda: scheduler.acknowledge(np.array([value]), flag),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: got .*; expected integers"):
            call()
    assert scheduler.idle()


def test_integers_of_any_kind_are_taken_and_larger_ones_are_refused_by_name() -> None:
    scheduler = Scheduler(**SMALL, waiting_max=4, context_max=100)
    scheduler.submit(np.int8(1), np.array([1, 2], np.uint8), np.uint64(2))  # type: ignore[arg-type]
    scheduler.submit(False, np.array([True, False]), 2)  # type: ignore[arg-type]
    for told, bits, call in (
        (f"number: got {2**63}", 64, lambda: scheduler.submit(2**63, np.ones(1, np.int32), 1)),
        (f"max_tokens: got {2**31}", 32, lambda: scheduler.submit(3, np.ones(1, np.int32), 2**31)),
        (
            f"prompt: got {2**64 - 1} at index 0",
            32,
            lambda: scheduler.submit(3, np.array([2**64 - 1], np.uint64), 1),
        ),
    ):
        limits = f"-{2 ** (bits - 1)} to {2 ** (bits - 1) - 1}"
        with pytest.raises(ValueError, match=f"^{told}; expected {limits}$"):
            call()
