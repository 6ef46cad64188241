"""The second home of cached pages by cases: what is copied when, and what a copy keeps where it is.

Every page that a step reads is checked to hold the KV of its own tokens (`scheduling.World`), and a
copy reads its source when it ends: what was given away too early shows.
"""

from __future__ import annotations

import numpy as np
import pytest

from scheduling import Copy, World
from tokenspeed._core import Scheduler

SMALL = {"page_size": 4, "pages": 8, "slots": 4, "step_tokens": 40, "host_pages": 16}
PROMPT = list(range(16))


def world(**settings: int) -> World:
    return World(**{**SMALL, **settings})


def stores(w: World) -> list[Copy]:
    return [copy for copy in w.copies if copy.out]


def loads(w: World) -> list[Copy]:
    return [copy for copy in w.copies if not copy.out]


def cached(w: World) -> list[int]:
    """Prompt tokens that each admission found, in order."""
    return [count for plan in w.plans for count in plan.cached.tolist()]


def run(w: World, prompt: list[int], tokens: int = 1) -> None:
    w.submit(prompt, tokens)
    w.finish()


def test_what_is_published_is_stored_once() -> None:
    w = world()
    w.submit(PROMPT, 1)
    w.submit(PROMPT, 1)
    w.finish()
    pages = [copy.page for copy in w.copied]
    assert len(pages) == len(set(pages)) == w.scheduler.stats().stores == 4
    run(w, PROMPT)
    assert w.scheduler.stats().stores == 4, "it is there already"


def test_what_is_on_the_host_can_be_found_when_the_copy_is_acknowledged() -> None:
    w = world()
    w.submit(PROMPT, 1)
    w.launch()
    w.commit()
    w.launch()
    assert len(stores(w)) == 4
    assert w.scheduler.host_prefixes() == {}
    assert w.scheduler.stats().host_pages_free == 12, "the pages are taken, and hold nothing yet"
    w.acknowledge(*stores(w))
    assert sorted(len(tokens) for _, tokens in w.scheduler.host_prefixes().values()) == [
        4, 8, 12, 16,
    ]  # fmt: skip


def test_a_page_that_is_being_stored_stays() -> None:
    w = world(pages=4)
    w.submit(PROMPT, 1)
    w.launch()
    w.commit()
    w.launch()
    kept = {copy.page for copy in stores(w)}
    w.submit([9] * 12, 2)
    for _ in range(3):
        w.launch()
    assert set(w.scheduler.prefixes()) == kept, "there is no other page, and it is not taken"
    assert not w.launched
    w.finish()


def test_when_the_host_is_full_of_what_is_used_nothing_more_is_stored() -> None:
    w = world(host_pages=2)
    w.submit(PROMPT, 1)
    w.launch()
    w.commit()
    w.launch()
    assert len(stores(w)) == 2, "two of four: the others have no page there, and are not waited for"
    w.finish()
    assert sorted(len(tokens) for _, tokens in w.scheduler.host_prefixes().values()) == [4, 8]


def test_the_least_recently_used_leaf_makes_room_on_the_host() -> None:
    w = world(pages=16, host_pages=8)
    run(w, [1] * 16)
    run(w, [2] * 16)
    run(w, [1] * 17)  # uses all four again
    run(w, [3] * 9)
    there = {tokens for _, tokens in w.scheduler.host_prefixes().values()}
    assert {(1,) * n for n in (4, 8, 12, 16)} | {(2,) * 4, (2,) * 8, (3,) * 4, (3,) * 8} == there


def evicted(w: World) -> World:
    """A world in which PROMPT is on the host and not on the device."""
    run(w, PROMPT)
    for name in range(60, 64):
        if not any(tokens[0] == 0 for _, tokens in w.scheduler.prefixes().values()):
            break
        run(w, [name] * 29)
    assert not any(tokens[0] == 0 for _, tokens in w.scheduler.prefixes().values())
    assert any(tokens == tuple(PROMPT) for _, tokens in w.scheduler.host_prefixes().values())
    return w


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_what_the_device_evicted_comes_back_from_the_host(overlap: int) -> None:
    w = evicted(world(overlap=overlap))
    computed = w.scheduler.stats().steps
    run(w, [*PROMPT, 1, 2])
    assert cached(w)[-1] == 16
    assert w.plans[-1].token_ids.tolist() == [1, 2], "nothing else is computed"
    stats = w.scheduler.stats()
    assert (stats.loads, stats.prefix_hits_host) == (4, 16)
    assert stats.steps == computed + 1


def test_a_hit_may_begin_on_the_device_and_go_on_on_the_host() -> None:
    w = evicted(world())
    run(w, PROMPT[:9])
    before = w.scheduler.stats()
    run(w, [*PROMPT, 1])
    after = w.scheduler.stats()
    assert after.prefix_hits - before.prefix_hits == 16
    assert after.prefix_hits_host - before.prefix_hits_host == 8


def test_others_run_while_a_request_waits_for_its_loads() -> None:
    w = evicted(world(pages=12, host_pages=32))
    other = w.submit([7] * 3, 8)
    w.turn()
    w.submit([*PROMPT, 1], 1)
    w.launch()
    assert len(loads(w)) == 4
    assert all(plan.numbers.tolist() == [other] for plan in w.plans[-1:])
    for _ in range(3):
        w.commit()
        w.launch()
    assert w.plans[-1].numbers.tolist() == [other], "the loads have not been acknowledged"
    w.acknowledge(*w.copies)
    w.commit()
    w.launch()
    assert w.plans[-1].cached.tolist() == [16]
    w.finish()


def resumptions(prompts: int, pages: int, **settings: int) -> World:
    """A world in which prompts of four pages are on the host alone, and asked for again at once."""
    w = world(pages=pages, host_pages=128, **settings)
    for name in range(prompts):
        run(w, [name] * 16)
    run(w, [99] * (4 * pages - 1))
    first = {tokens[0] for _, tokens in w.scheduler.prefixes().values()}
    assert not first & set(range(prompts)), "they went"
    for name in range(prompts):
        w.submit([name] * 17, 1)
    w.launch()
    return w


def test_those_who_wait_behind_the_head_load_as_well() -> None:
    w = resumptions(2, pages=12)
    assert len(loads(w)) == 8, "both at once"
    w.finish()
    assert cached(w)[-2:] == [16, 16]
    assert w.scheduler.stats().prefix_hits_host == 32


def test_nobody_loads_ahead_who_would_not_fit_beside_those_before() -> None:
    w = resumptions(3, pages=12)
    assert len(loads(w)) == 8, "the third would need pages 11 to 15"
    w.finish()
    assert cached(w)[-3:] == [16, 16, 16], "and loads at its turn"


def test_so_many_load_at_once_and_no_more() -> None:
    w = resumptions(10, pages=64)
    assert len(loads(w)) == 8 * 4
    w.finish()
    assert cached(w)[-10:] == [16] * 10


def test_a_queue_for_slots_loads_while_others_run() -> None:
    w = world(pages=16, host_pages=32, slots=1)
    run(w, PROMPT)
    run(w, [99] * 63)
    w.submit([7] * 3, 8)
    w.turn()
    w.submit([*PROMPT, 1], 1)
    w.launch()
    assert len(loads(w)) == 4, "there is no slot for it yet"
    w.finish()
    assert cached(w)[-1] == 16


def test_nothing_is_loaded_without_a_hit_on_the_host() -> None:
    w = evicted(world())
    run(w, [99, *PROMPT])
    w.submit(PROMPT, 1, salt="other")
    w.finish()
    assert w.scheduler.stats().loads == 0


@pytest.mark.parametrize("good", [True, False])
def test_an_abort_during_a_load_keeps_its_pages_until_the_acknowledgement(good: bool) -> None:
    w = evicted(world())
    number = w.submit([*PROMPT, 1], 1)
    w.launch()
    taken = {copy.page for copy in loads(w)}
    blocks = {copy.block for copy in loads(w)}
    assert len(taken) == 4
    assert w.abort(number)
    w.submit([8] * 20, 8)  # wants more pages than are left
    for _ in range(4):
        w.launch()
        assert not any(page in taken for plan in w.plans[-1:] for page in plan.page_delta[:, 2])
        if w.launched:
            w.commit()
    assert blocks <= w.scheduler.host_prefixes().keys()
    w.acknowledge(*loads(w), good=good)
    w.finish()
    stats = w.scheduler.stats()
    assert stats.loads == (4 if good else 0)


def test_a_load_that_fails_is_computed_and_leaves_the_host() -> None:
    w = evicted(world())
    w.submit([*PROMPT, 1, 2], 1)
    w.launch()
    first, second, third, fourth = loads(w)
    w.acknowledge(first, second)
    w.acknowledge(third, good=False)
    w.acknowledge(fourth)
    there = {tokens for _, tokens in w.scheduler.host_prefixes().values()}
    assert tuple(PROMPT[:8]) in there
    assert tuple(PROMPT[:12]) not in there
    assert tuple(PROMPT) not in there, "nothing stands there on a page that is not there"
    w.finish()
    assert cached(w)[-1] == 8, "what came before it is used"
    stats = w.scheduler.stats()
    assert stats.copies_failed == 1
    assert tuple(PROMPT) in {tokens for _, tokens in w.scheduler.host_prefixes().values()}


def test_copies_may_end_in_any_order() -> None:
    w = evicted(world())
    w.submit([*PROMPT, 1], 1)
    w.launch()
    w.acknowledge(*reversed(loads(w)))
    w.finish()
    assert cached(w)[-1] == 16


def test_a_store_that_fails_gives_its_page_back() -> None:
    w = world()
    w.submit(PROMPT, 1)
    w.launch()
    w.commit()
    w.launch()
    w.acknowledge(*reversed(stores(w)[1:]))
    w.acknowledge(stores(w)[0], good=False)
    assert w.scheduler.host_prefixes() == {}, "and what was to hang from it was stored in vain"
    assert w.scheduler.stats().host_pages_free == 16


def test_what_a_preempted_request_had_published_is_stored() -> None:
    w = world(pages=8, slots=3)
    for name in range(3):
        w.submit([name] * 9, 18)
    w.finish()
    stats = w.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.loads > 0, "the request came back to what it had published"


def test_an_acknowledgement_counts_once() -> None:
    w = evicted(world())
    w.submit([*PROMPT, 1], 1)
    w.launch()
    tickets = np.array([copy.ticket for copy in loads(w)])
    past = np.array([copy.ticket for copy in w.copied])
    before = w.scheduler.stats()
    for wrong in (past, np.array([-1, 10**9])):
        assert w.scheduler.acknowledge(wrong, np.ones(len(wrong), bool)) == (0, len(wrong))
    after = w.scheduler.stats()
    assert after.copies_unknown - before.copies_unknown == len(past) + 2
    assert (after.stores, after.loads) == (before.stores, before.loads)
    with pytest.raises(ValueError, match="got 4 tickets and 3 flags"):
        w.scheduler.acknowledge(tickets, np.ones(3, bool))
    twice = np.concatenate([tickets, tickets])
    assert w.scheduler.acknowledge(twice, np.ones(8, bool)) == (4, 4)
    assert w.scheduler.stats().loads == before.loads + 4


def test_clearing_the_cache_clears_both_homes() -> None:
    w = evicted(world())
    run(w, PROMPT)
    w.clear_cache()
    stats = w.scheduler.stats()
    assert (stats.pages_free, stats.host_pages_free) == (8, 16)


def test_what_is_on_its_way_when_the_cache_is_cleared_does_not_arrive() -> None:
    w = evicted(world())
    w.submit([*PROMPT, 1], 1)
    w.launch()
    w.scheduler.clear_cache()
    w.acknowledge(*w.copies)
    assert w.scheduler.prefixes() == {}
    assert w.scheduler.host_prefixes() == {}
    w.finish()
    assert cached(w)[-1] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"host_pages": -1}, "host_pages: got -1"), ({"prefix_cache": False}, "host_pages: got 16")],
)
def test_bad_settings_name_the_field(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheduler(**{**SMALL, "waiting_max": 4, "context_max": 100, **settings})
