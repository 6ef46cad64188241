"""What session hints are worth: conversations replayed through the real scheduler in virtual time.

Rule: nothing but the scheduler is real. A token of it stands for a block of 64, a page holds one;
the machine is a formula; and each conversation sends its next request when the answer has come and
its recorded thinking time is over. Hints know the past alone: the name of the session with a
request, and with an answer that it calls a tool.

Each pool is measured twice, with hints and with all of them withheld, which is a plain LRU, and
both with each size of host tier; and once there is a pool that never evicts. Its hits are all that
any cache could have. A copy between pool and host takes its time on a link of its own, beside the
steps; what a step's plan asks for starts with the step.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from attrs import asdict, define, field, frozen
from numpy.typing import NDArray
from rich.table import Table

from tokenspeed._core import Plan
from tokenspeed.bench.conversations import BLOCK, Conversation, generate, live_blocks, read
from tokenspeed.bench.machine import machine
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.replay import make_scheduler
from tokenspeed.fsm.svg import MONO, document, element, label

__all__ = ["Link", "Replay", "Report", "Run", "measure", "parse_sizes", "plot", "workload"]

Tell = Callable[[str, int, int], None]
"""Called with (what is measured, requests done, requests in all)."""

DECODE_TOKENS_S = 50.0
PREFILL_TOKENS_S = 200_000.0
"""The machine: tokens a second of each user, and of all prompts together; a step takes both. It is
fast enough to do without a cache, or a low hit rate would become a queue, and that a lower one."""

COPY_TOKENS_S = 1_000_000.0
"""Between pool and host, each way at once: five times as fast as computing them."""

SESSIONS = 200
"""As many are generated."""

SLOTS = 64
STEP_BLOCKS = 2048


@frozen(kw_only=True)
class Run:
    """One pool and one order of eviction.

    Attributes:
        order: "unlimited", "lru", or "learned".
        share: of the pool in what is live; of the unlimited one, infinite.
        host: size of the host tier as a multiple of the pool's; 0: there is none.
        hit_rate: prompt tokens found in the cache, of all.
        host_hit_rate: of all, those that came back from the host for it.
        recomputed_tokens: found with an unlimited pool, and not here.
        preemptions: a request.
        queued_mean_s, queued_p99_s: from arrival to the first step.
    """

    order: str
    share: float
    host: float
    pool_tokens: int
    host_tokens: int
    hit_rate: float
    host_hit_rate: float
    recomputed_tokens: int
    preemptions: float
    queued_mean_s: float
    queued_p99_s: float


@frozen(kw_only=True)
class Report:
    """All runs, and what they replayed."""

    workload: str
    conversations: int
    requests: int
    live_tokens: int
    runs: tuple[Run, ...]
    machine: str = field(factory=machine)

    def as_json(self) -> dict[str, Any]:
        """For programs; the unlimited pool's share is null."""
        found = asdict(self)
        for run in found["runs"]:
            run["share"] = run["share"] if np.isfinite(run["share"]) else None
        return found

    def table(self) -> Table:
        """For people."""
        title = f"{self.workload}: {self.requests:,} requests, {self.live_tokens:,} tokens live"
        table = Table(
            "pool", "host", "order", "hits", "host's", "recomputed", "preempted", "queued, s (p99)",
            title=title, box=None, padding=(0, 2, 0, 0),
        )  # fmt: skip
        for run in self.runs:
            table.add_row(
                f"{run.share:.1%}" if np.isfinite(run.share) else "",
                f"{run.share * run.host:.1%}" if run.host else "", run.order,
                f"{run.hit_rate:.1%}", f"{run.host_hit_rate:.1%}" if run.host else "",
                f"{run.recomputed_tokens / 1e6:,.1f} M", f"{run.preemptions:.4f}",
                f"{run.queued_mean_s:.1f} ({run.queued_p99_s:.1f})",
            )  # fmt: skip
        return table


def parse_sizes(field: str, text: str, low: float) -> tuple[float, ...]:
    """Sizes as the command has them, ascending. Raises ConfigError, by the option's name."""
    try:
        sizes = sorted({float(word) for word in text.split(",")})
    except ValueError as error:
        raise ConfigError(field, text, "numbers with commas between them") from error
    if not all(low <= size <= 16 for size in sizes):
        raise ConfigError(field, text, f"numbers from {low:g} to 16")
    return tuple(sizes)


def workload(
    trace: Path | None, gap_s: float, sessions: int | None
) -> tuple[str, list[Conversation]]:
    """What is replayed, in words, and its conversations. Raises ConfigError."""
    if not 0 < gap_s < 1e6:
        raise ConfigError("gap_s", gap_s, "seconds above 0 and below a million")
    if sessions is not None and sessions < 1:
        raise ConfigError("sessions", sessions, "at least 1")
    if trace is not None:
        return trace.name, read(trace, gap_s, sessions)
    count = SESSIONS if sessions is None else sessions
    return f"{count} generated sessions", generate(count, gap_s)


def measure(
    workload: str,
    conversations: Sequence[Conversation],
    shares: Sequence[float],
    hosts: Sequence[float],
    tell: Tell,
) -> Report:
    """Replay them without a limit; and for each share of what is live and each host tier, twice.

    Args:
        hosts: sizes as multiples of the pool's.

    Raises:
        ConfigError: a pool could not hold the largest request.
    """
    live = live_blocks(conversations)
    largest = max(t.blocks + t.answer_blocks for c in conversations for t in c.turns)
    for share in shares:
        if not largest <= share * live:
            raise ConfigError("shares", share, f"at least {largest / live:.3f}, for one request")
    requests = sum(len(c.turns) for c in conversations)
    ever = sum(len(t.fresh) + t.answer_blocks for c in conversations for t in c.turns)
    everything = Replay(conversations, ever, hints=False)

    def told(what: str) -> Callable[[int], None]:
        return lambda done: tell(what, done, requests)

    everything.run(told("unlimited"))
    runs = [everything.report("unlimited", np.inf, 0.0, everything.hits)]
    for share, host, order in itertools.product(shares, hosts, ("lru", "learned")):
        pages = int(share * live)
        learned = order == "learned"
        replay = Replay(conversations, pages, host_pages=int(host * pages), hints=learned)
        replay.run(told(f"{share:.1%} + {share * host:.1%} {order}"))
        runs.append(replay.report(order, share, host, everything.hits))
    return Report(
        workload=workload, conversations=len(conversations), requests=requests,
        live_tokens=int(live * BLOCK), runs=tuple(runs),
    )  # fmt: skip


# --- the replay -----------------------------------------------------------------------------------


@define
class _Asked:
    """A request under way."""

    conversation: int
    at: int
    arrived_s: float
    awaits_tool: bool
    joined: bool = False


@final
class Link:
    """What copies between pool and host: each way one after the other, both ways at once."""

    def __init__(self) -> None:
        self._moving: tuple[deque[tuple[float, int]], ...] = (deque(), deque())

    def start(self, stores: Sequence[int], loads: Sequence[int], now_s: float) -> None:
        """Copies of a block each, by ticket, after those that are under way."""
        for tickets, moving in zip((stores, loads), self._moving, strict=True):
            free_s = max(now_s, moving[-1][0] if moving else now_s)
            for at, ticket in enumerate(tickets, 1):
                moving.append((free_s + at * BLOCK / COPY_TOKENS_S, ticket))

    def ended(self, now_s: float) -> list[int]:
        """Tickets of the copies that have ended by now."""
        done: list[int] = []
        for moving in self._moving:
            while moving and moving[0][0] <= now_s:
                done.append(moving.popleft()[1])
        return done

    @property
    def next_s(self) -> float:
        """When all that moves one way has come: infinite if nothing moves."""
        return min((moving[-1][0] for moving in self._moving if moving), default=np.inf)


@final
class Replay:
    """A scheduler, the clients of its conversations, and the time.

    Args:
        pages: of the pool.
        host_pages: of the host tier; 0: there is none.
        hints: tell the scheduler of sessions and of time; else it is a plain LRU.
        trace: a file for every step of the lifecycle, or None.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        pages: int,
        *,
        hints: bool,
        host_pages: int = 0,
        trace: str | None = None,
    ) -> None:
        longest = max(t.blocks + t.answer_blocks for c in conversations for t in c.turns)
        self._conversations = conversations
        self._hints = hints
        self._pages = pages
        self._host_pages = host_pages
        self._link = Link()
        self._scheduler = make_scheduler(
            trace, None, page_size=1, pages=pages, slots=SLOTS, waiting_max=len(conversations),
            step_tokens=STEP_BLOCKS, context_max=longest, host_pages=host_pages,
        )  # fmt: skip
        self._prompts: list[NDArray[np.int32]] = [np.empty(0, np.int32) for _ in conversations]
        self._arrivals = [(c.start_s, number, 0) for number, c in enumerate(conversations)]
        heapq.heapify(self._arrivals)
        self._asked: dict[int, _Asked] = {}
        self._count = 0
        self._now_s = 0.0
        self._queued_s: list[float] = []
        ends = (int(t.fresh.max(initial=0)) for c in conversations for t in c.turns)
        self._answer = max(ends) + 1  # a token that begins no prompt

    @property
    def hits(self) -> int:
        """Prompt blocks that were found."""
        return self._scheduler.stats().prefix_hits

    def run(self, tell: Callable[[int], None]) -> None:
        """Until every conversation is over."""
        while self._arrivals or not self._scheduler.idle():
            self._arrive()
            self._acknowledge()
            plan = self._scheduler.plan()
            if plan is not None:
                stores, loads = (way[:, 0].tolist() for way in (plan.stores, plan.loads))
                self._link.start(stores, loads, self._now_s)
            if plan is None or not len(plan.slots):  # nobody computes: on to what comes next
                arrival_s = self._arrivals[0][0] if self._arrivals else np.inf
                self._now_s = min(arrival_s, self._link.next_s)
                continue
            self._join(plan)
            self._now_s += _step_s(plan)
            self._commit(plan)
            tell(len(self._queued_s))

    def _advance(self) -> None:
        if self._hints:
            self._scheduler.advance(int(self._now_s * 1e6))

    def _arrive(self) -> None:
        self._advance()
        while self._arrivals and self._arrivals[0][0] <= self._now_s:
            arrived_s, number, at = heapq.heappop(self._arrivals)
            turn = self._conversations[number].turns[at]
            prompt = np.concatenate([self._prompts[number][: turn.kept], turn.fresh])
            self._prompts[number] = prompt
            session = str(number) if self._hints else ""
            self._scheduler.submit(self._count, prompt, turn.answer_blocks, session=session)
            self._asked[self._count] = _Asked(number, at, arrived_s, turn.awaits_tool)
            self._count += 1

    def _acknowledge(self) -> None:
        tickets = np.array(self._link.ended(self._now_s), np.int64)
        if len(tickets):
            self._scheduler.acknowledge(tickets, np.ones(len(tickets), np.bool_))

    def _join(self, plan: Plan) -> None:
        for number in plan.joined[:, 1].tolist():
            asked = self._asked[number]
            if not asked.joined:
                asked.joined = True
                self._queued_s.append(self._now_s - asked.arrived_s)

    def _commit(self, plan: Plan) -> None:
        """Answers are never asked about again: their blocks are names of no prompt."""
        self._advance()
        rows = len(plan.numbers)
        tokens, stop = np.full(rows, self._answer, np.int32), np.zeros(rows, np.bool_)
        awaits = None
        if self._hints:
            awaits = np.array([self._asked[n].awaits_tool for n in plan.numbers.tolist()], np.bool_)
        done = self._scheduler.commit(plan.step, tokens, stop, awaits_tool=awaits)
        for number, _ in done.finished:
            asked = self._asked.pop(number)
            turns = self._conversations[asked.conversation].turns
            if asked.at + 1 < len(turns):
                next_s = self._now_s + turns[asked.at + 1].think_s
                heapq.heappush(self._arrivals, (next_s, asked.conversation, asked.at + 1))

    def report(self, order: str, share: float, host: float, hits_unlimited: int) -> Run:
        """What it came to; the first three are `Run`'s."""
        stats = self._scheduler.stats()
        return Run(
            order=order,
            share=share,
            host=host,
            pool_tokens=self._pages * BLOCK,
            host_tokens=self._host_pages * BLOCK,
            hit_rate=stats.prefix_hits / stats.prefix_queries,
            host_hit_rate=stats.prefix_hits_host / stats.prefix_queries,
            recomputed_tokens=(hits_unlimited - stats.prefix_hits) * BLOCK,
            preemptions=stats.preemptions / self._count,
            queued_mean_s=float(np.mean(self._queued_s)),
            queued_p99_s=float(np.percentile(self._queued_s, 99)),
        )


def _step_s(plan: Plan) -> float:
    """A block of every user that decodes, and the blocks of prompts."""
    decoding = bool(plan.sampled.any())
    prefill = len(plan.token_ids) - len(plan.slots)
    return decoding * BLOCK / DECODE_TOKENS_S + prefill * BLOCK / PREFILL_TOKENS_S


# --- the plot -------------------------------------------------------------------------------------

_WIDE, _HIGH, _LEFT, _TOP = 640, 400, 64, 56
_STYLES = {"lru": "muted", "learned": "accent"}
_LEGEND_X, _LEGEND_ROW = 400, 20
"""Where the names of the lines begin, at the lower right, where hit rates are never low."""


def plot(report: Report) -> str:
    """Hit rate against pool size, on a doubling scale, as SVG; the unlimited pool is a line.

    A line each for an order and a host tier; those with a host tier are dashed.
    """
    best, *limited = report.runs
    low = min(run.hit_rate for run in limited) - 0.02
    sizes = sorted({run.share for run in limited})
    hosts = sorted({run.host for run in limited})
    span = max(1.0, float(np.log2(sizes[-1] / sizes[0])))

    def x(share: float) -> float:
        return _LEFT + (_WIDE - 2 * _LEFT) * float(np.log2(share / sizes[0])) / span

    def y(rate: float) -> float:
        return _TOP + (_HIGH - 2 * _TOP) * (best.hit_rate - rate) / (best.hit_rate - low)

    body = list(_axes(x, y, sizes, low, best.hit_rate))
    lines = list(itertools.product(hosts, _STYLES))
    for row, (host, order) in enumerate(lines):
        runs = [run for run in limited if (run.host, run.order) == (host, order)]
        name = f"{order}, host tier {host:g} x pool" if host else order
        body += _line(
            [(x(run.share), y(run.hit_rate)) for run in runs], _STYLES[order], hosts.index(host),
            name, _HIGH - _TOP - 12 - _LEGEND_ROW * (len(lines) - 1 - row),
        )  # fmt: skip
    return document(_WIDE, _HIGH, "Hit rate of the prefix cache by pool size", body)


def _line(
    points: Sequence[tuple[float, float]], style: str, dashes: int, name: str, legend_y: float
) -> Iterator[str]:
    """One line, its points, and its row in the legend."""
    dash = f"{8 // dashes} 4" if dashes else "none"
    legend = ((_LEGEND_X, legend_y), (_LEGEND_X + 28, legend_y))
    for ends in (points, legend):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in ends)
        yield element(
            "polyline", points=path, class_=f"stroke {style}-line", stroke_dasharray=dash
        )  # fmt: skip
    yield from (element("circle", cx=a, cy=b, r=3, class_=style) for a, b in points)
    yield label(_LEGEND_X + 36, legend_y + 4, name, style)


def _axes(
    x: Callable[[float], float], y: Callable[[float], float], sizes: Sequence[float], low: float,
    best: float,
) -> Iterator[str]:  # fmt: skip
    yield label(
        _LEFT, 28, "prompt tokens found in the cache, by pool (share of what is live)", "ink"
    )
    for rate in (low, (low + best) / 2, best):
        ends = f"{_LEFT},{y(rate):.1f} {_WIDE - _LEFT},{y(rate):.1f}"
        yield element("polyline", points=ends, class_="line-line stroke")
        yield label(_LEFT - 8, y(rate) + 4, f"{rate:.1%}", f"muted {MONO}", "end")
    yield label(_WIDE - _LEFT, y(best) - 6, "unlimited", "muted small", "end")
    for share in sizes:
        yield label(x(share), _HIGH - 28, f"{share:.1%}", f"muted {MONO}", "middle")
