"""What the control plane costs: thread-CPU time of its calls, as the engine makes them.

Rule: what is clocked is the whole of a step through the Python API, with the executor's part left
out: `plan()`, the arrays that a decode step reads, two arrays of results, `commit()`. A figure is
the median over blocks of steps of a block's mean; nothing else happens inside a block. Pages of 64
tokens, contexts staggered over a page, no overlap, prefix cache on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, field, frozen
from numpy.typing import NDArray
from rich.table import Table

from tokenspeed._core import Plan, Scheduler
from tokenspeed.bench.machine import machine
from tokenspeed.errors import ConfigError

__all__ = ["Report", "Sizes", "measure"]

INT32, BOOL = np.dtype(np.int32), np.dtype(np.bool_)
Tokens = NDArray[np.int32]
Tell = Callable[[str, int, int], None]
"""Called with (what is measured, done, total)."""

PAGE = 64
BLOCK = 20
"""Steps between two looks at the clock, which costs as much as a small step."""

STEP_TOKENS = 1 << 16
UNSHARED_TOKENS_MAX = 1 << 24
OWN_TOKENS = 2048
"""Beyond so many tokens in all, a request has only this many that are not everybody's."""

DECODES, DECODE_CONTEXT = 16, 4096
"""What runs while prompts wait."""


@frozen(kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        rows, contexts: of the decode steps; each of the one with each of the other.
        steps: clocked of each.
        prompt_tokens: of a prompt that is admitted, or that waits.
        waiting: prompts that wait.
        repeats: admissions, of which the median counts.
    """

    rows: tuple[int, ...] = (1, 16, 64, 256, 1024)
    contexts: tuple[int, ...] = (1024, 51200)
    steps: int = 1000
    prompt_tokens: int = 51200
    waiting: int = 64
    repeats: int = 15

    def __attrs_post_init__(self) -> None:
        grown = _pages(DECODE_CONTEXT + self.steps + 2 * BLOCK) - _pages(DECODE_CONTEXT)
        prompt_min = 2 * PAGE * (DECODES * grown + 1)  # or what runs leaves room for one that waits
        for name, least in (("steps", BLOCK), ("prompt_tokens", prompt_min), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"at least {least}")
        for name, least in (("rows", 1), ("contexts", PAGE + 1)):
            if not getattr(self, name) or min(getattr(self, name)) < least:
                raise ConfigError(name, getattr(self, name), f"numbers from {least}")


@frozen(kw_only=True)
class Step:
    """A decode step of so many rows; microseconds."""

    rows: int
    context: int
    step_us: float


@frozen(kw_only=True)
class Admission:
    """`submit` and the `plan` of the whole prompt; milliseconds.

    Attributes:
        cached_ms: 15 of 16 pages are found in the cache.
        cold_ms: none is.
        evicting_ms: none is, and each page is another's until it is evicted.
    """

    tokens: int
    cached_ms: float
    cold_ms: float
    evicting_ms: float


@frozen(kw_only=True)
class Blocked:
    """What prompts that wait for pages add to a step; microseconds."""

    waiting: int
    tokens: int
    step_us: float
    added_us: float


@frozen(kw_only=True)
class Memory:
    """Resident memory of the process with the largest case in it; megabytes of 10^6 bytes."""

    rows: int
    context: int
    rss_mb: float
    token_ids_mb: float
    beyond_mb: float


@frozen(kw_only=True)
class Report:
    """All figures, and what they were measured on."""

    steps: tuple[Step, ...]
    admission: Admission
    blocked: Blocked
    stats_us: float
    memory: Memory
    machine: str = field(factory=machine)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def table(self) -> Table:
        """For people."""
        table = Table("what", "figure", title=self.machine)
        for step in self.steps:
            table.add_row(f"step, {step.rows} x {step.context:,} tokens", f"{step.step_us:.1f} us")
        entry, blocked, memory = self.admission, self.blocked, self.memory
        for name in ("cached_ms", "cold_ms", "evicting_ms"):
            what = name.removesuffix("_ms").replace("cached", "93.75 % cached")
            table.add_row(f"admission, {entry.tokens:,}, {what}", f"{getattr(entry, name):.3f} ms")
        waiting = f"{blocked.waiting} waiting prompts of {blocked.tokens:,}"
        table.add_row(f"{waiting} add to {blocked.step_us:.1f} us", f"{blocked.added_us:.2f} us")
        table.add_row("stats", f"{self.stats_us:.2f} us")
        what = f"memory, {memory.rows} x {memory.context:,}, beyond token ids"
        table.add_row(what, f"{memory.beyond_mb:.0f} MB")
        return table


def measure(sizes: Sizes, tell: Tell) -> Report:
    """Run all of it; a minute at the default sizes."""
    cases = sorted(
        ((r, c) for r in sizes.rows for c in sizes.contexts), key=lambda case: -np.prod(case)
    )
    steps, memory = [], None
    for done, (rows, context) in enumerate(cases):  # the largest first: memory that it takes is new
        tell("steps", done, len(cases))
        bed = _decoding(rows, context, sizes.steps)
        memory = memory or _memory(rows, context, bed)
        step_us = statistics.median(_blocks(bed.scheduler, sizes.steps))
        steps.append(Step(rows=rows, context=context, step_us=step_us))
    tell("steps", len(cases), len(cases))
    assert memory is not None
    return Report(
        steps=tuple(sorted(steps, key=lambda step: (step.context, step.rows))),
        admission=_admission(sizes, tell),
        blocked=_blocked(sizes, tell),
        stats_us=_stats(sizes, tell),
        memory=memory,
    )


# --- decode steps ---------------------------------------------------------------------------------


@frozen
class _Bed:
    """A scheduler in which every request decodes, and how many token ids it holds room for."""

    scheduler: Scheduler
    token_ids: int


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _scheduler(pages: int, slots: int, context_max: int, waiting: int = 0) -> Scheduler:
    return Scheduler(
        page_size=PAGE, pages=pages, slots=slots + waiting, waiting_max=slots + waiting,
        step_tokens=STEP_TOKENS, context_max=context_max,
    )  # fmt: skip


def _draw(rng: np.random.Generator, tokens: int) -> Tokens:
    return rng.integers(0, 50_000, tokens, dtype=np.int32)


def _commit(scheduler: Scheduler, plan: Plan, *, stop: bool = False) -> None:
    rows = len(plan.slots)
    scheduler.commit(plan.step, np.zeros(rows, np.int32), np.full(rows, stop))


def _settle(scheduler: Scheduler) -> None:
    """Run until a step is nothing but one token of every running request."""
    while True:
        plan = scheduler.plan()
        assert plan is not None
        _commit(scheduler, plan)
        stats = scheduler.stats()
        if len(plan.token_ids) == len(plan.slots) == stats.running and not stats.waiting:
            return


def _decoding(rows: int, context: int, steps: int) -> _Bed:
    """As many requests of a context, with room for as many steps."""
    rng = np.random.default_rng(rows)
    shared = max(0, context - OWN_TOKENS) if rows * context > UNSHARED_TOKENS_MAX else 0
    prefill_steps = rows * (context - shared) // STEP_TOKENS + 3
    room = steps + BLOCK + 2 * prefill_steps
    each = _pages(context + room) - shared // PAGE
    scheduler = _scheduler(shared // PAGE + rows * each, rows, context + room)
    common = _draw(rng, shared)
    for number in range(rows):
        own = _draw(rng, context - shared - number % PAGE)
        scheduler.submit(number, np.concatenate([common, own]), room)
        if number == 0 and shared:
            _settle(scheduler)  # so that the others find it
    _settle(scheduler)
    return _Bed(scheduler, sum(context - n % PAGE + room for n in range(rows)))


def _blocks(scheduler: Scheduler, steps: int) -> Iterator[float]:
    """The mean of a step in each block of steps, in microseconds."""
    plan_step, commit, zeros = scheduler.plan, scheduler.commit, np.zeros
    for _ in range(steps // BLOCK):
        start_ns = time.thread_time_ns()
        for _ in range(BLOCK):
            plan = plan_step()
            assert plan is not None
            read = (
                plan.numbers, plan.slots, plan.query_start, plan.token_ids, plan.context_lens,
                plan.sampled, plan.page_delta,
            )  # fmt: skip
            rows = len(read[0])
            commit(plan.step, zeros(rows, INT32), zeros(rows, BOOL))
        yield (time.thread_time_ns() - start_ns) / BLOCK / 1e3


def _memory(rows: int, context: int, bed: _Bed) -> Memory:
    """Where the system does not say, none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    rss_mb = sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6
    ids_mb = bed.token_ids * 4 / 1e6
    return Memory(
        rows=rows, context=context, rss_mb=rss_mb, token_ids_mb=ids_mb,
        beyond_mb=max(0.0, rss_mb - ids_mb),
    )  # fmt: skip


# --- the rest -------------------------------------------------------------------------------------


def _admission(sizes: Sizes, tell: Tell) -> Admission:
    rng = np.random.default_rng(0)
    tokens = sizes.prompt_tokens
    known = tokens // 16 * 15

    def cold() -> Tokens:
        return _draw(rng, tokens)

    first = cold()

    def cached() -> Tokens:
        return np.concatenate([first[:known], _draw(rng, tokens - known)])

    def one(scheduler: Scheduler, number: int, prompt: Tokens) -> float:
        start_ns = time.thread_time_ns()
        scheduler.submit(number, prompt, 64)
        plan = scheduler.plan()
        took_ms = (time.thread_time_ns() - start_ns) / 1e6
        while plan is not None:
            _commit(scheduler, plan, stop=True)
            plan = scheduler.plan()
        return took_ms

    def several(what: str, draw: Callable[[], Tokens], pages: int) -> float:
        scheduler = _scheduler(pages, 1, tokens + 64)
        for number in range(6):  # the first prompt, then whatever fills a small pool
            one(scheduler, number, draw() if number else first)
        took_ms = []
        for done in range(sizes.repeats):
            tell(what, done, sizes.repeats)
            took_ms.append(one(scheduler, 6 + done, draw()))
        tell(what, sizes.repeats, sizes.repeats)
        return statistics.median(took_ms)

    each = _pages(tokens)
    return Admission(
        tokens=tokens,
        cached_ms=several("cached", cached, (8 + sizes.repeats) * each),
        cold_ms=several("cold", cold, (8 + sizes.repeats) * each),
        evicting_ms=several("evicting", cold, 4 * each),
    )


def _blocked(sizes: Sizes, tell: Tell) -> Blocked:
    """Two equal schedulers, block by block in turn; in one of them, prompts wait for pages."""
    rng = np.random.default_rng(1)
    free, busy = _waiting(rng, sizes, 0), _waiting(rng, sizes, sizes.waiting)
    without, added = [], []
    pairs = zip(_blocks(free, sizes.steps), _blocks(busy, sizes.steps), strict=True)
    for done, (alone_us, waited_us) in enumerate(pairs):
        tell("blocked", done, sizes.steps // BLOCK)
        without.append(alone_us)
        added.append(waited_us - alone_us)
    tell("blocked", sizes.steps // BLOCK, sizes.steps // BLOCK)
    if busy.stats().waiting != sizes.waiting:
        raise RuntimeError("a prompt was admitted that there should be no pages for")
    return Blocked(
        waiting=sizes.waiting, tokens=sizes.prompt_tokens, step_us=statistics.median(without),
        added_us=statistics.median(added),
    )  # fmt: skip


def _waiting(rng: np.random.Generator, sizes: Sizes, waiting: int) -> Scheduler:
    """Requests that decode and have the pool to themselves, and prompts that begin like theirs."""
    room = sizes.steps + 2 * BLOCK
    context_max = max(DECODE_CONTEXT, sizes.prompt_tokens) + room
    pages = DECODES * _pages(DECODE_CONTEXT + room)
    scheduler = _scheduler(max(pages, _pages(sizes.prompt_tokens)), DECODES, context_max, waiting)
    first = _draw(rng, DECODE_CONTEXT)
    for number in range(DECODES):
        prompt = _draw(rng, DECODE_CONTEXT - number % PAGE) if number else first
        scheduler.submit(number, prompt, room)
    _settle(scheduler)
    alike = first[: sizes.prompt_tokens // 2 // PAGE * PAGE]
    for number in range(DECODES, DECODES + waiting):
        own = _draw(rng, sizes.prompt_tokens - len(alike))
        scheduler.submit(number, np.concatenate([alike, own]), 2)
    return scheduler


def _stats(sizes: Sizes, tell: Tell) -> float:
    scheduler = _decoding(DECODES, DECODE_CONTEXT, BLOCK).scheduler
    calls, took_us = 100, []
    for done in range(sizes.repeats):
        tell("stats", done, sizes.repeats)
        start_ns = time.thread_time_ns()
        for _ in range(calls):
            scheduler.stats()
        took_us.append((time.thread_time_ns() - start_ns) / calls / 1e3)
    tell("stats", sizes.repeats, sizes.repeats)
    return statistics.median(took_us)
