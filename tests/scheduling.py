"""A model executor for scheduler tests: it computes on simulated pages and notices foul play.

Each page cell holds what was last written there: (request's salt, all tokens up to that position).
A step reads every cell that its row's attention would read and fails if one holds anything else. So
a page that was freed too early, mapped twice, or matched wrongly shows at once.

What the scheduler of a test was asked is recorded; if the test fails, the report says where.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from attrs import frozen

from tokenspeed._core import Plan, Scheduler
from tokenspeed.fsm.kv_adapters import ADAPTERS, EventBatch
from tokenspeed.fsm.kv_events import Batch, Clear, Evict, Publish
from tokenspeed.fsm.kv_log import Noted, Pages, page_hash
from tokenspeed.fsm.monitor import Monitor
from tokenspeed.fsm.replay import RecordedScheduler
from tokenspeed.fsm.trace import TraceHeader, TraceWriter

Cell = tuple[str, tuple[int, ...]]

recordings = Path()
"""The directory of this run's recordings; conftest.py sets it."""


def recording(test: str) -> Path:
    """Where the last scheduler of a test is recorded; of Hypothesis, in the smallest example."""
    return recordings / re.sub(r"\W+", "-", test)[-120:]


def next_token(prefix: Sequence[int]) -> int:
    """The model: a function of the whole prefix."""
    return (sum((i + 1) * t for i, t in enumerate(prefix)) * 31 + len(prefix)) % 97


class Client:
    """One request as its sender sees it."""

    def __init__(self, prompt: list[int], max_tokens: int, salt: str, stop_after: int) -> None:
        self.prompt, self.max_tokens, self.salt = prompt, max_tokens, salt
        self.stop_after = stop_after
        self.output: list[int] = []
        self.done = False
        self.aborted = False

    def expected(self) -> list[int]:
        """What any schedule must produce."""
        tokens = list(self.prompt)
        for _ in range(min(self.max_tokens, self.stop_after)):
            tokens.append(next_token(tokens))
        return tokens[len(self.prompt) :]


@cache
def key(salt: str, tokens: tuple[int, ...], size: int) -> str:
    """The key of the page that these tokens end with, as the monitor reads it."""
    before = None
    for at in range(0, len(tokens), size):
        before = page_hash(before, tokens[at : at + size], "" if at else salt)
    assert before is not None
    return msgspec.json.decode(msgspec.json.encode(before), type=str)


class Listener:
    """Who knows of the prefix cache what the KV events say, as a file has them, and no more."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages = Pages()
        self.prefixes: dict[Hashable, tuple[object, ...]] = {}

    def hear(self, noted: Iterable[Noted]) -> None:
        line = msgspec.json.encode(EventBatch(ts=0.0, events=[*self.pages.tell(noted)]))
        for event in ADAPTERS["tokenspeed"].read(msgspec.json.decode(line)):
            match event:
                case Publish(parent=parent, tokens=tokens):
                    assert event.key not in self.prefixes
                    assert tokens is not None
                    above = () if parent is None else self.prefixes[parent]
                    self.prefixes[event.key] = (*above, *tokens)
                case Evict():
                    del self.prefixes[event.key]
                case Clear():
                    self.prefixes.clear()
                case Batch():
                    pass

    def check(self, there: Mapping[int, tuple[str, tuple[int, ...]]]) -> None:
        """What was heard is what is there: every key, and what it stands for."""
        found = {key(salt, tokens, self.page_size): tokens for salt, tokens in there.values()}
        assert len(found) == len(there), "two pages have one key"
        assert self.prefixes == found


@frozen
class Copy:
    """One page on its way. What it reads it finds when it ends, however late that is."""

    ticket: int
    page: int
    block: int
    out: bool


class World:
    """A scheduler, its clients, and an executor that checks what it is told to do."""

    def __init__(self, **config: int) -> None:
        self.config = {"waiting_max": 1000, "context_max": 1000, **config}
        path = recording(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
        self.scheduler = RecordedScheduler(path, Scheduler(**self.config), self.config)
        self.scheduler.record(True)
        self.scheduler.record_kv(True)
        self.listener = Listener(config["page_size"])
        self.monitor = Monitor()
        self.clients: dict[int, Client] = {}
        window = self.config.get("window", 0)
        full, sliding = self.config.get("full_groups", 0), self.config.get("window_groups", 1)
        self.windows = [0] * full + [window] * sliding  # of each cache group; 0: none
        self.cells: dict[tuple[int, int], Cell] = {}
        self.group_of: dict[int, int] = {}  # that a page was written for last
        self.table: dict[tuple[int, int], int] = {}
        self.fed: dict[int, list[int]] = {}
        self.launched: deque[tuple[Plan, list[tuple[int, list[int]]]]] = deque()
        self.host: dict[tuple[int, int], Cell] = {}
        self.copies: list[Copy] = []  # under way
        self.copied: list[Copy] = []  # acknowledged
        self.late = False  # copies end only when nothing else is left to do
        self.plans: list[Plan] = []

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        salt: str = "",
        stop_after: int = 10**9,
        **hints: Any,
    ) -> int:
        number = len(self.clients)
        self.scheduler.submit(number, np.asarray(prompt, np.int32), max_tokens, salt, **hints)
        self.clients[number] = Client(prompt, max_tokens, salt, stop_after)
        return number

    def propose(self, number: int, right: int, wrong: int = 0) -> int:
        """Guess: so many tokens that it will say, then so many that it will not."""
        client = self.clients[number]
        tokens = [*client.prompt, *client.output]
        for at in range(right + wrong):
            tokens.append((next_token(tokens) + (at >= right)) % 97)
        draft = tokens[len(tokens) - right - wrong :]
        return self.scheduler.propose(number, np.array(draft, np.int32))

    def abort(self, number: int) -> bool:
        ended = self.scheduler.abort(number)
        if ended:
            self.clients[number].aborted = True
        return ended

    def clear_cache(self) -> None:
        cached = self.scheduler.stats().pages_cached
        evicted, held = self.scheduler.clear_cache()
        assert held == len(self.scheduler.prefixes())
        assert self.scheduler.stats().pages_cached == cached - evicted
        assert evicted == cached or self.copies, "a copy may keep what it touches"
        self.check()

    def launch(self) -> bool:
        running = self.scheduler.stats().running
        plan = self.scheduler.plan()
        if plan is None or not len(plan.slots):
            assert self.scheduler.stats().running <= running, "let in, and nobody hears of it"
        if plan is None:
            return False
        for out, copies in ((True, plan.stores), (False, plan.loads)):
            self.copies += [Copy(*row, out=out) for row in copies.tolist()]
        if len(plan.slots):
            self.plans.append(plan)
            self.launched.append((plan, self._compute(plan)))
        return True

    def acknowledge(self, *copies: Copy, good: bool = True) -> None:
        """Let copies end now, in this order."""
        for copy in copies:
            self.copies.remove(copy)
            self.copied.append(copy)
            ends = [(self.cells, copy.page), (self.host, copy.block)]
            (source, read), (target, written) = ends if copy.out else reversed(ends)
            for offset in range(self.config["page_size"]):
                cell = source[read, offset] if good else ("spoilt", ())
                target[written, offset] = cell
        tickets = np.array([copy.ticket for copy in copies], np.int64)
        done = self.scheduler.acknowledge(tickets, np.full(len(copies), good))
        assert done == (len(copies), 0)
        self.check()

    def _compute(self, plan: Plan) -> list[tuple[int, list[int]]]:
        """Run the step in launch order; (number, run of tokens) by row."""
        for slot, index, page in plan.page_delta.tolist():
            self.table[slot, index] = page
        for slot, number in plan.joined.tolist():
            self.fed[slot] = []
            del number
        out = []
        size = self.config["page_size"]
        for row, number in enumerate(plan.numbers.tolist()):
            client, slot = self.clients[number], int(plan.slots[row])
            context = int(plan.context_lens[row])
            tokens = plan.token_ids[plan.query_start[row] : plan.query_start[row + 1]].tolist()
            prefix = self._read(slot, context, client, size)
            for position, token in enumerate(tokens, start=context):
                fed = next_token(prefix) if token < 0 else token
                prefix.append(fed)
                for group in range(len(self.windows)):
                    page = self._page(slot, position, group)
                    self.cells[page, position % size] = (client.salt, tuple(prefix))
                    self.group_of[page] = group
            out.append((number, self._judge(prefix, int(plan.drafts[row]))))
        return out

    def _judge(self, fed: list[int], drafts: int) -> list[int]:
        """The drafts that are right, the token after them, and -1 for each that is not."""
        run: list[int] = []
        for at in range(len(fed) - drafts, len(fed) + 1):
            run.append(next_token(fed[:at]))
            if at < len(fed) and run[-1] != fed[at]:
                break
        return run + [-1] * (drafts + 1 - len(run))

    def _read(self, slot: int, context: int, client: Client, size: int) -> list[int]:
        """The tokens behind the row's context, each cell checked against the last."""
        if context == 0:
            return []
        salt, prefix = self.cells[self._page(slot, context - 1, 0), (context - 1) % size]
        assert salt == client.salt
        for group, window in enumerate(self.windows):
            for position in range(max(0, context + 1 - window) if window else 0, context):
                page = self._page(slot, position, group)
                assert self.group_of[page] == group, "a page holds the KV of other layers"
                cell = self.cells[page, position % size]
                expected = (client.salt, prefix[: position + 1])
                assert cell == expected, "a page does not hold its tokens"
        known = [*client.prompt, *client.expected()]
        if not client.done:
            shared = min(len(known), context)
            assert list(prefix[:shared]) == known[:shared]
        return list(prefix)

    def _page(self, slot: int, position: int, group: int) -> int:
        at = position // self.config["page_size"]
        return self.table[slot, at * len(self.windows) + group]

    def commit(self) -> None:
        plan, rows = self.launched.popleft()
        stop = np.zeros(len(rows), np.bool_)
        for row, (number, run) in enumerate(rows):
            client = self.clients[number]
            most = client.stop_after - len(client.output)
            stop[row] = len(run) - run.count(-1) >= most
            run[max(1, most) :] = [-1] * len(run[max(1, most) :])
        tokens = np.array([token for _, run in rows for token in run], np.int32)
        done = self.scheduler.commit(plan.step, tokens, stop)
        for row, (number, run) in enumerate(rows):
            assert bool(done.accepted[row]) == (done.taken[row] > 0)
            self.clients[number].output += run[: done.taken[row]]
        for number, _ in done.finished:
            self.clients[number].done = True
        self.check()

    def check(self) -> None:
        assert self.scheduler.check() == []
        assert self.scheduler.stats().pages_kept <= self.config.get("session_pages_max", 0)
        self.monitor.feed(self.scheduler.events())
        if self.windows == [0]:  # else an event has no form: its parent may be gone
            self.listener.hear(self.scheduler.kv_events())
            self.listener.check(self.scheduler.prefixes())
        size = self.config["page_size"]
        for block, (salt, tokens) in self.scheduler.host_prefixes().items():
            held = [self.host[block, offset] for offset in range(size)]
            start = len(tokens) - size
            assert held == [(salt, tokens[: start + at + 1]) for at in range(size)]

    def turn(self) -> bool:
        """Fill the pipeline and complete one step; False when nothing is left to do."""
        while self.launch():
            pass
        if self.copies and not (self.late and self.launched):
            self.acknowledge(*self.copies)
        elif not self.launched:
            return False
        if self.launched:
            self.commit()
        return True

    def finish(self, steps_max: int = 20_000) -> None:
        """Run until idle; everybody has what any schedule must give, and every page is back."""
        for _ in range(steps_max):
            if not self.turn():
                break
        assert self.scheduler.idle(), "requests are left, and nothing can run"
        self.check()
        stats = self.scheduler.stats()
        assert stats.pages_free + stats.pages_cached == stats.pages_total
        assert stats.host_pages_free + stats.host_pages_cached == stats.host_pages_total
        for number, client in self.clients.items():
            if not client.aborted:
                assert client.done
                assert client.output == client.expected(), number

    def write_trace(self, path: Path) -> Path:
        """All that the scheduler did, as `serve --trace-lifecycle` writes it."""
        c = self.config
        header = TraceHeader(
            c["pages"], c["page_size"], c["slots"], c["step_tokens"], c.get("overlap", 0),
            c.get("host_pages", 0), c.get("draft_tokens", 0), c.get("window", 0),
        )  # fmt: skip
        writer = TraceWriter(path, header)
        for number, client in self.clients.items():
            length = len(client.prompt) + client.max_tokens
            writer.submitted(number, client.prompt, length, client.salt)
        writer.write(self.scheduler.trace())
        return path
