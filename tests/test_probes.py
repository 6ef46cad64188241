"""What ended, starved or deceived another engine's scheduler, asked of ours.

Rule: each probe has the sizes with which it was measured there; the sentence above a test says what
happened. Tokens mean nothing here: `Driver` answers every step with the same one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from test_schedules import schedule
from tokenspeed._core import Plan, Scheduler
from tokenspeed.fsm.trace import read_trace, traced, validate

SPECS = Path(__file__).resolve().parents[1] / "specs"

PAGE = 64
CHUNK = 8192
FULL = {"page_size": PAGE, "slots": 8, "step_tokens": CHUNK}
SMALL = {"page_size": 4, "pages": 64, "slots": 4, "step_tokens": 16}


class Driver:
    """A scheduler whose steps all complete, as late as its overlap allows, and copies at once.

    With a path it writes its trace there.
    """

    def __init__(self, trace: Path | None = None, **settings: int) -> None:
        sizes = {"waiting_max": 1000, "context_max": 1 << 20, **settings}
        self.scheduler = traced(str(trace), **sizes) if trace else Scheduler(**sizes)
        self.overlap = settings.get("overlap", 0)
        self.launched: deque[Plan] = deque()
        self.plans: list[Plan] = []
        self.outputs: Counter[int] = Counter()
        self.preempted: Counter[int] = Counter()

    def submit(self, number: int, prompt: Sequence[int], max_tokens: int) -> None:
        self.scheduler.submit(number, np.asarray(prompt, np.int32), max_tokens)

    def launch(self) -> bool:
        plan = self.scheduler.plan()
        if plan is None:
            return False
        if len(plan.slots):
            self.launched.append(plan)
            self.plans.append(plan)
        self.preempted.update(plan.preempted.tolist())
        tickets = np.concatenate([plan.stores[:, 0], plan.loads[:, 0]])
        self.scheduler.acknowledge(tickets, np.ones(len(tickets), bool))
        return True

    def commit(self) -> None:
        plan = self.launched.popleft()
        rows = len(plan.slots)
        done = self.scheduler.commit(plan.step, np.full(rows, 7, np.int32), np.zeros(rows, bool))
        self.outputs.update(plan.numbers[done.accepted].tolist())

    def step(self) -> bool:
        """Fill the pipeline and complete a step; False if nothing can run."""
        while len(self.launched) <= self.overlap and self.launch():
            pass
        if not self.launched:
            return False
        self.commit()
        return True

    def finish(self, steps_max: int = 100_000) -> None:
        """Nobody is left and every page is back."""
        for _ in range(steps_max):
            if not self.step():
                break
        assert self.scheduler.idle()
        assert self.scheduler.check() == []
        stats = self.scheduler.stats()
        assert stats.pages_free + stats.pages_cached == stats.pages_total


def draw(seed: int, tokens: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50_000, tokens).tolist()


# --- The end of the process -----------------------------------------------------------------------


# Two legal requests, 22,526 + 900 tokens at step 1 and 27,648 + 200 at step 5, in a pool of 737
# pages of 64, with and without a host tier: "cache admission failed without a retractable request",
# and the process aborted at step 9. Sizes around it too: what matters is a pool that is full.
@pytest.mark.parametrize("host_pages", [0, 1537])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("pages", [*range(733, 742), 769])
def test_two_requests_that_fill_the_pool_exactly_both_finish(
    pages: int, overlap: int, host_pages: int
) -> None:
    driver = Driver(**FULL, pages=pages, overlap=overlap, host_pages=host_pages)
    fill_the_pool(driver)
    assert driver.outputs == {0: 900, 1: 200}


def fill_the_pool(driver: Driver) -> None:
    driver.step()
    driver.submit(0, draw(0, 22_526), 900)
    for _ in range(4):
        driver.step()
    driver.submit(1, draw(1, 27_648), 200)
    driver.finish()


# Of 60 random schedules on tiny pools, 48 ended the process.
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_schedules_on_tiny_pools_end(first: int) -> None:
    for seed in range(20_000 + first, 20_000 + first + 20):
        schedule(seed)


# --- Starvation -----------------------------------------------------------------------------------


# Ties were broken by name: `zzz`, submitted first, did not run in 50 steps of younger arrivals.
def test_the_oldest_runs_first_whatever_it_is_called() -> None:
    driver = Driver(**SMALL)
    let_younger_ones_arrive(driver)
    assert all(OLDEST in plan.numbers for plan in driver.plans[:31])
    assert driver.outputs[OLDEST] == 30
    joined = [number for plan in driver.plans for _, number in plan.joined.tolist()]
    assert joined == sorted(joined, key=lambda number: number % OLDEST)


OLDEST = 10**12


def let_younger_ones_arrive(driver: Driver) -> None:
    driver.submit(OLDEST, draw(0, 20), 30)
    for number in range(50):
        driver.submit(number, draw(number, 20), 4)
        assert driver.step()
    driver.finish()


# A large request that did not fit was passed by all small ones that came later.
def test_a_large_request_is_not_passed_by_small_ones() -> None:
    driver = Driver(**SMALL)
    let_a_large_one_wait(driver)
    joined = [number for plan in driver.plans for _, number in plan.joined.tolist()]
    assert joined.index(3) == 3, "right after those that were there before it"


def let_a_large_one_wait(driver: Driver) -> None:
    for number in range(3):
        driver.submit(number, draw(number, 40), 12)
    driver.step()
    driver.submit(3, draw(3, 200), 4)
    for number in range(4, 60):
        driver.submit(number, draw(number, 8), 2)
        driver.step()
    driver.finish()


# Prefill went first: a decode ran in none of 50 steps while prompts kept arriving.
@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_every_decode_runs_in_every_step(overlap: int) -> None:
    driver = Driver(**{**SMALL, "pages": 512}, overlap=overlap)
    during = driver.plans[slice(*let_prompts_arrive(driver))]
    assert len(during) >= 50
    assert all(0 in plan.numbers for plan in during)
    assert all(len(plan.token_ids) > len(plan.slots) for plan in during[2:]), "and so does prefill"
    driver.finish()


def let_prompts_arrive(driver: Driver) -> tuple[int, int]:
    """From which step to which they do."""
    driver.submit(0, draw(0, 3), 100)
    driver.step()
    before = len(driver.plans)
    for number in range(1, 51):
        driver.submit(number, draw(number, 30), 2)
        driver.step()
    return before, len(driver.plans)


# --- Deception ------------------------------------------------------------------------------------


# The result of an aborted `r` was appended to a new `r`: 129 tokens where 128 were expected.
@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_a_result_reaches_only_the_incarnation_that_it_is_of(overlap: int) -> None:
    driver = Driver(**{**SMALL, "step_tokens": 128, "pages": 256, "overlap": overlap})
    driver.submit(1, draw(0, 128), 8)
    while driver.launch():
        pass
    late = driver.launched[-1]
    assert len(driver.launched) == overlap + 1
    assert driver.scheduler.abort(1)
    with pytest.raises(ValueError, match="alive"):  # its pages are still being written
        driver.submit(1, draw(1, 128), 8)
    while driver.launched:
        driver.commit()
    assert driver.outputs == {}
    driver.submit(1, draw(1, 128), 8)
    assert driver.launch()
    with pytest.raises(ValueError, match="order of their launch"):
        driver.scheduler.commit(late.step, np.ones(1, np.int32), np.zeros(1, bool))
    assert driver.scheduler.tokens(1) == draw(1, 128)
    assert driver.plans[-1].incarnations[0] == late.incarnations[0] + 1
    driver.finish()
    assert driver.outputs == {1: 8}


# Events before a bad one stayed applied, later ones were lost.
def test_a_batch_of_results_is_applied_whole_or_not_at_all() -> None:
    driver = Driver(**SMALL)
    for number in range(3):
        driver.submit(number, draw(number, 3), 4)
    assert driver.launch()
    plan = driver.launched[0]
    with pytest.raises(ValueError, match="row 2 was sampled and has no token"):
        driver.scheduler.commit(plan.step, np.array([7, 7, -1], np.int32), np.zeros(3, bool))
    assert [len(driver.scheduler.tokens(n) or ()) for n in range(3)] == [3, 3, 3]
    driver.finish()
    assert driver.outputs == {0: 4, 1: 4, 2: 4}


# --- Thrashing ------------------------------------------------------------------------------------


# 20,000 to 60,000 tokens each in a pool of 82,000 and a host tier of 8,000: over 3,600 preemptions,
# one request more than 800 times, and six requests finished in 25,000 steps. Here the youngest
# gives way, and comes back when there are pages for all that it knows. Longer outputs, so that
# somebody has to.
@pytest.mark.parametrize(
    ("requests", "prompt", "max_tokens"),
    [(12, (20_000, 60_000), 900), (12, (20_000, 40_000), 4_000), (32, (1_000, 9_000), 8_000)],
)
@pytest.mark.parametrize("host_pages", [0, 129])
@pytest.mark.parametrize("overlap", [0, 1])
def test_long_requests_in_a_small_pool_do_not_thrash(
    requests: int,
    prompt: tuple[int, int],
    max_tokens: int,
    overlap: int,
    host_pages: int,
    record_property: Callable[[str, object], None],
) -> None:
    slots = 16
    driver = Driver(
        page_size=PAGE, pages=1281, slots=slots, step_tokens=CHUNK, overlap=overlap,
        host_pages=host_pages,
    )  # fmt: skip
    chance = np.random.default_rng(1)
    for number in range(requests):
        driver.submit(number, draw(number, int(chance.integers(*prompt))), max_tokens)
        for _ in range(5):
            driver.step()
    driver.finish()
    assert driver.outputs == dict.fromkeys(range(requests), max_tokens)
    total, most = driver.preempted.total(), max(driver.preempted.values(), default=0)
    record_property(
        f"{requests} requests of {prompt[0]:,} to {prompt[1]:,} + {max_tokens:,} tokens",
        f"{total} preemptions in {len(driver.plans):,} steps, {most} of one request at most",
    )
    assert most < slots
    assert total <= 2 * requests
    assert total > 0 or max_tokens < 1_000


# --- By the specification -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probe", "settings"),
    [
        (fill_the_pool, {**FULL, "pages": 737}),
        (fill_the_pool, {**FULL, "pages": 737, "overlap": 1}),
        (let_younger_ones_arrive, SMALL),
        (let_a_large_one_wait, SMALL),
        (let_prompts_arrive, {**SMALL, "overlap": 2}),
    ],
)
def test_what_a_probe_leads_to_is_a_behaviour_of_the_spec(
    probe: Callable[[Driver], object], settings: dict[str, int], tmp_path: Path
) -> None:
    driver = Driver(tmp_path / "trace", **settings)
    probe(driver)
    header, steps = read_trace(tmp_path / "trace")
    assert len(steps) > 500
    assert validate(SPECS, header, steps) is None
