"""What any scheduler must do, events in and plans out, in the groups of a peer's own tests.

     1  life and death                 here
     2  refusals                       here
     3  chunks                         here
     4  order and limits of a step     here; decode under prefill: test_probes.py
     5  slots                          here
     6  prefix cache                   here
     7  sliding windows                tests/test_window.py, specs/Window.tla
     8  state snapshots (Mamba)        come with a cache group for them
     9  reserved rows                  come with speculation, specs/features/Speculation.tla
    10  preemption                     here; thrashing: test_probes.py
    11  host tier                      test_host_tier.py
    12  transfer between engines       comes with the feature, specs/features/Transfer.tla
    13  KV events                      here; as files: test_kv_log.py
    14  clearing the cache             here
    15  names do not matter            here
    16  a refusal changes nothing      here

`scheduling.World` checks each cell that a step reads, who holds which page after each step, and
that all that was asked for comes out in the end.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from scheduling import World
from tokenspeed._core import QueueFull, Scheduler

SMALL = {"page_size": 4, "pages": 32, "slots": 4, "step_tokens": 16}


def world(**settings: int) -> World:
    return World(**{**SMALL, **settings})


def counts(w: World) -> tuple[int, int, int]:
    stats = w.scheduler.stats()
    return stats.waiting, stats.running, stats.draining


def everything(w: World) -> tuple[object, ...]:
    """What a refusal must leave as it is."""
    stats = w.scheduler.stats()
    names = [name for name in dir(stats) if not name.startswith("_")]
    return *(getattr(stats, name) for name in names), w.scheduler.prefixes()


# --- 1: life and death ----------------------------------------------------------------------------


def test_1_a_request_waits_prefills_decodes_and_ends() -> None:
    w = world()
    number = w.submit(list(range(20)), 3)
    assert counts(w) == (1, 0, 0)
    assert w.launch()
    assert counts(w) == (0, 1, 0)
    assert not w.plans[0].sampled[0], "16 of 20 tokens: more is to come"
    for output in (0, 1, 2, 3):
        if w.launched or w.launch():
            w.commit()
        assert len(w.clients[number].output) == output
    assert counts(w) == (0, 0, 0)
    w.finish()


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("late", [False, True])
def test_1_an_abort_in_each_state_returns_every_page(steps: int, late: bool) -> None:
    """Waiting, Prefilling, Decoding; between two steps, or with one in flight."""
    w = world(prefix_cache=0)
    number = w.submit(list(range(40)), 5)
    for _ in range(steps):
        w.turn()
    if late and w.launch():
        assert w.abort(number) == (number in (row for row, _ in w.launched[-1][1]))
        assert counts(w) == (0, 0, 1), "its pages are being written"
        w.commit()
    else:
        assert w.abort(number) == (steps < 7), "40 tokens are three steps, and five outputs"
    assert counts(w) == (0, 0, 0)
    assert w.scheduler.stats().pages_free == SMALL["pages"]


def test_1_an_abort_of_the_preempted_leaves_nothing() -> None:
    w = world(pages=8, slots=3)
    for i in range(3):
        w.submit([i] * 5, 18)
    while not w.scheduler.stats().preemptions:
        w.turn()
    victim = w.plans[-1].preempted.tolist()[0]
    assert w.abort(victim)
    w.finish()
    assert not w.abort(victim)


# --- 2: refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 1, "prompt: got no tokens"),
        ([3, -1], 1, "prompt: got a negative token id"),
        ([1], 0, "max_tokens: expected at least 1"),
        ([1], -5, "max_tokens: expected at least 1"),
        ([1] * 100, 100, "max_tokens: needs 50 pages, the pool has 32"),
        ([1] * 500, 501, "exceed context_max 1000"),
    ],
)
def test_2_what_is_wrong_is_named_and_changes_nothing(
    prompt: list[int], max_tokens: int, words: str
) -> None:
    w = world()
    w.submit([1, 2, 3], 2)
    before = everything(w)
    with pytest.raises(ValueError, match=words):
        w.submit(prompt, max_tokens)
    assert everything(w) == before
    w.finish()


def test_2_a_number_that_lives_is_refused_in_every_state() -> None:
    w = world()
    number = w.submit(list(range(40)), 3)
    for _ in range(4):
        with pytest.raises(ValueError, match="number: this request is alive already"):
            w.scheduler.submit(number, np.ones(2, np.int32), 1)
        w.turn()
    w.finish()


def test_2_what_just_fits_is_taken() -> None:
    """The last token is not fed back: 32 pages of 4 hold 129 tokens."""
    w = world()
    w.submit([1] * 100, 29)
    w.finish()
    with pytest.raises(ValueError, match="pages"):
        w.submit([1] * 100, 30)


# --- 3: chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_3_chunks_are_the_prompt_in_order(length: int, overlap: int) -> None:
    w = world(overlap=overlap)
    prompt = list(range(length))
    w.submit(prompt, 1)
    w.finish()
    fed = [token for plan in w.plans for token in plan.token_ids.tolist()]
    starts = [int(plan.context_lens[0]) for plan in w.plans]
    assert fed == prompt
    assert starts == list(range(0, length, SMALL["step_tokens"]))
    assert [bool(plan.sampled[0]) for plan in w.plans] == [False] * (len(starts) - 1) + [True]


# --- 4: order and limits of a step ----------------------------------------------------------------


def test_4_what_has_begun_is_prefilled_before_what_waits() -> None:
    w = world()
    w.submit([1] * 40, 1)
    w.turn()
    w.submit([2] * 3, 1)
    rows = []
    while w.turn():
        rows.append(w.plans[-1].numbers.tolist())
    assert rows == [[0], [0, 1]], "the second step has 8 tokens left, and room for both"


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_4_no_step_has_more_rows_or_tokens_than_allowed(overlap: int) -> None:
    w = world(pages=128, overlap=overlap)
    for i in range(12):
        w.submit([i] * (1 + 5 * i), 4)
    w.finish()
    assert max(len(plan.slots) for plan in w.plans) == SMALL["slots"]
    assert max(len(plan.token_ids) for plan in w.plans) == SMALL["step_tokens"]
    assert all(max(Counter(plan.slots.tolist()).values()) == 1 for plan in w.plans)


# --- 5: slots -------------------------------------------------------------------------------------


def test_5_a_slot_is_one_request_s_from_its_first_row_to_its_last() -> None:
    w = world(pages=128)
    for i in range(10):
        w.submit([i] * (3 + 4 * i), 3 + i % 4)
    w.finish()
    slot_of: dict[int, int] = {}
    rows: dict[int, list[int]] = {}
    for step, plan in enumerate(w.plans):
        for slot, number in plan.joined.tolist():
            assert number not in slot_of, "it was preempted, which this test does not want"
            slot_of[number] = slot
        for slot, number in zip(plan.slots.tolist(), plan.numbers.tolist(), strict=True):
            assert slot == slot_of[number]
            rows.setdefault(number, []).append(step)
    assert set(slot_of.values()) == set(range(SMALL["slots"])), "all are used, and used again"
    for slot in range(SMALL["slots"]):
        lives = sorted((rows[n][0], rows[n][-1]) for n in slot_of if slot_of[n] == slot)
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(lives))


# --- 6: prefix cache ------------------------------------------------------------------------------


def cached(w: World) -> list[int]:
    return [count for plan in w.plans for count in plan.cached.tolist()]


def test_6_without_a_cache_nothing_is_found_or_kept() -> None:
    w = world(prefix_cache=0)
    for _ in range(2):
        w.submit(list(range(16)), 1)
        w.finish()
    assert cached(w) == [0, 0]
    assert w.scheduler.prefixes() == {}


@pytest.mark.parametrize(("length", "found"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12)])
def test_6_whole_pages_are_found_but_never_the_last_token(length: int, found: int) -> None:
    w = world()
    for _ in range(2):
        w.submit(list(range(length)), 1)
        w.finish()
    assert cached(w) == [0, found]


def test_6_a_page_that_is_computed_again_is_private_and_not_published_twice() -> None:
    w = world()
    for _ in range(2):
        w.submit(list(range(16)), 1)
        w.finish()
        assert len(w.scheduler.prefixes()) == 4
    again = [page for _, _, page in w.plans[-1].page_delta.tolist()]
    assert len(again) == 4
    assert again[3] not in w.scheduler.prefixes()


def test_6_a_page_is_found_only_once_it_is_computed() -> None:
    """Twins in one step share nothing; whoever comes after them does."""
    w = world(step_tokens=64)
    for _ in range(2):
        w.submit(list(range(16)), 4)
    w.turn()
    w.submit(list(range(16)), 1)
    w.finish()
    assert cached(w) == [0, 0, 12]


def test_6_the_last_step_s_pages_are_found_too() -> None:
    w = world()
    number = w.submit(list(range(6)), 3)
    w.finish()
    told = [*range(6), *w.clients[number].output]
    assert sorted(len(tokens) for _, tokens in w.scheduler.prefixes().values()) == [4, 8]
    w.submit([*told, 1], 1)
    w.finish()
    assert cached(w) == [0, 8], "8 tokens have been fed back; the ninth has not"


def test_6_an_abort_publishes_no_more_and_takes_nothing_away() -> None:
    w = world()
    number = w.submit(list(range(40)), 5)
    w.turn()
    there = w.scheduler.prefixes()
    assert len(there) == 4
    assert w.launch()
    w.abort(number)
    w.commit()
    assert w.scheduler.prefixes() == there
    w.submit(list(range(40)), 5)
    w.finish()
    assert cached(w) == [0, 16]


def test_6_the_least_recently_used_leaf_is_evicted_first() -> None:
    w = world(pages=6)
    first, second = [1] * 9, [2] * 9
    for prompt in (first, second, first):  # each leaves two pages, and wants three
        w.submit(prompt, 1)
        w.finish()
    w.submit([3] * 13, 1)  # two pages are free: two go
    w.finish()
    left = {tokens for _, tokens in w.scheduler.prefixes().values()}
    assert tuple(first[:8]) in left
    assert tuple(second[:4]) not in left


# --- 10: preemption -------------------------------------------------------------------------------


def test_10_the_youngest_gives_way_and_computes_what_it_had_again() -> None:
    w = world(pages=12, prefix_cache=0, step_tokens=64)
    for i in range(3):
        w.submit([i] * 9, 20)
    w.finish()
    at, victims = next((i, p.preempted.tolist()) for i, p in enumerate(w.plans) if len(p.preempted))
    assert victims == [2]
    had = sum(2 in plan.numbers for plan in w.plans[:at])
    back = next(plan for plan in w.plans[at:] if 2 in plan.numbers)
    row = back.numbers.tolist().index(2)
    again = back.token_ids[back.query_start[row] : back.query_start[row + 1]]
    assert back.context_lens[row] == 0
    assert again.tolist() == [*[2] * 9, *w.clients[2].output[:had]]
    assert back.joined.tolist()[-1][1] == 2


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_10_what_is_readmitted_in_chunks_samples_only_at_its_end(overlap: int) -> None:
    w = world(pages=12, prefix_cache=0, overlap=overlap)
    for i in range(3):
        w.submit([i] * 9, 20)
    w.finish()
    assert w.scheduler.stats().preemptions
    for number, client in w.clients.items():
        rows = [
            bool(plan.sampled[plan.numbers.tolist().index(number)])
            for plan in w.plans
            if number in plan.numbers
        ]
        assert rows.count(True) >= len(client.output) == 20
        assert rows.count(False) > 0 or not any(number in p.preempted for p in w.plans)


def test_10_nobody_new_comes_in_before_the_preempted_are_back() -> None:
    w = world(pages=12)
    for i in range(3):
        w.submit([i] * 9, 20)
    while not w.scheduler.stats().preemptions:
        w.turn()
    new = w.submit([9] * 2, 2)  # would fit at once
    w.finish()
    out: set[int] = set()
    for plan in w.plans:
        out |= set(plan.preempted.tolist())
        out -= set(plan.joined[:, 1].tolist())
        if new in plan.joined[:, 1]:
            break
    assert out == set()
    assert w.scheduler.stats().preemptions > 1


def test_10_pages_of_a_step_in_flight_are_not_taken() -> None:
    """With two more steps in flight, the youngest gives way only when neither has a row of it."""
    w = world(pages=12, overlap=2)
    for i in range(3):
        w.submit([i] * 9, 20)
    while not w.scheduler.idle():
        while w.launch():
            *flying, (new, _) = w.launched
            rows = {number for plan, _ in flying for number in plan.numbers.tolist()}
            assert not rows & set(new.preempted.tolist())
        w.commit()
    assert w.scheduler.stats().preemptions
    w.finish()


# --- 13: KV events --------------------------------------------------------------------------------


def test_13_a_page_is_told_once_when_it_comes_and_once_when_it_goes() -> None:
    scheduler = Scheduler(**{**SMALL, "pages": 6}, waiting_max=8, context_max=24)
    scheduler.record_kv(True)
    told: list[tuple[str, int]] = []
    for number, first in enumerate((1, 1, 2, 3)):  # the second finds what the first left
        scheduler.submit(number, np.full(13, first, np.int32), 1)
        while plan := scheduler.plan():
            rows = len(plan.slots)
            scheduler.commit(plan.step, np.zeros(rows, np.int32), np.zeros(rows, bool))
            told += [(action, page) for action, page, *_ in scheduler.kv_events()]
    there: set[int] = set()
    for action, page in told:
        assert (page in there) == (action == "Evict")
        there ^= {page}
    assert there == scheduler.prefixes().keys()
    assert Counter(action for action, _ in told) == {"Publish": 9, "Evict": 9 - len(there)}


# --- 14: clearing the cache -----------------------------------------------------------------------


def test_14_clearing_takes_what_nobody_holds_and_leaves_the_living_alone() -> None:
    w = world()
    w.submit([1] * 16, 1)
    w.finish()
    w.submit([2] * 16, 8)
    w.turn()
    held = {page for page, (_, tokens) in w.scheduler.prefixes().items() if tokens[0] == 2}
    w.clear_cache()
    assert w.scheduler.prefixes().keys() == held
    before = everything(w)
    assert w.scheduler.clear_cache() == (0, len(held))
    assert everything(w) == before
    w.finish()


# --- 15: names do not matter ----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 2])
def test_15_plans_depend_on_the_order_of_arrival_alone(overlap: int) -> None:
    def plans(names: list[int]) -> list[list[object]]:
        scheduler = Scheduler(
            **{**SMALL, "pages": 12}, waiting_max=8, context_max=40, overlap=overlap
        )
        for name, first in zip(names, (1, 2, 1, 3), strict=True):
            scheduler.submit(name, np.full(9, first, np.int32), 12)
        out: list[list[object]] = []
        flying = []
        while True:
            while plan := scheduler.plan():
                flying.append(plan)
                order = {name: arrival for arrival, name in enumerate(names)}
                out.append(
                    [
                        [order[n] for n in plan.numbers.tolist()],
                        [order[n] for n in plan.preempted.tolist()],
                        plan.slots.tolist(),
                        plan.token_ids.tolist(),
                        plan.page_delta.tolist(),
                    ]
                )
            if not flying:
                return out
            plan = flying.pop(0)
            rows = len(plan.slots)
            scheduler.commit(plan.step, np.full(rows, 5, np.int32), np.zeros(rows, bool))

    assert plans([0, 1, 2, 3]) == plans([10**15, 7, 3, 1])


# --- 16: a refusal changes nothing ----------------------------------------------------------------


def test_16_what_waits_for_pages_touches_neither_the_cache_nor_its_order() -> None:
    """The same evictions, in the same order, with and without one that waits for one of them."""

    def evicted(waiting: bool) -> list[object]:
        scheduler = Scheduler(**{**SMALL, "pages": 14}, waiting_max=8, context_max=60)
        number = iter(range(100))

        def run(prompt: list[int], output: int) -> None:
            scheduler.submit(next(number), np.asarray(prompt, np.int32), output)

        def steps(count: int) -> None:
            for _ in range(count):
                plan = scheduler.plan()
                assert plan is not None
                rows = len(plan.slots)
                scheduler.commit(plan.step, np.zeros(rows, np.int32), np.zeros(rows, bool))

        run([1] * 9, 1)
        run([2] * 9, 1)
        steps(2)
        run([3] * 9, 48)  # grows until it has evicted them
        steps(1)
        if waiting:
            run([1] * 9 + [4] * 44, 4)  # finds the older of the two, and does not fit
        scheduler.record_kv(True)
        out: list[object] = []
        for _ in range(40):
            steps(1)
            out += [event for event in scheduler.kv_events() if event[0] == "Evict"]
            if waiting:
                assert scheduler.stats().waiting == 1
        return out

    assert evicted(False) == evicted(True)
    assert len(evicted(True)) == 3


def test_16_a_full_queue_and_a_full_pipeline_refuse_and_change_nothing() -> None:
    w = world(waiting_max=1, overlap=1)
    w.submit([1] * 20, 4)
    before = everything(w)
    with pytest.raises(QueueFull):
        w.submit([2] * 3, 1)
    assert everything(w) == before
    while w.launch():
        pass
    assert len(w.launched) == 2
    before = everything(w)
    assert w.scheduler.plan() is None
    assert everything(w) == before
    w.finish()
