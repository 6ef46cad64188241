"""Whatever is submitted, aborted, interleaved: right outputs, every page back, legal moves.

Drafts are proposed, right and wrong ones, and any prefix of them is accepted.

With or without a second home for cached pages, whose copies end late, in any order, and badly.

The cache may be cleared at any time; and what the KV events say, replayed from nothing, is what is
cached, at every step. Sessions may say what they like, and time may pass: what is kept for them
stays within its bound, and nobody waits for it. The next turn may be said to be near at any time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduling import World

SESSIONS = st.sampled_from(["one", "two"])
HINTS = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "session": SESSIONS,
            "keep_us": st.sampled_from([0, 2_000_000]),
            "supersedes": st.booleans(),
            "priority": st.sampled_from([0, 0, -1, 1]),
        }
    ),
)


class Scheduling(RuleBasedStateMachine):
    """Tiny pools, shared prefixes, salts, overlap 0 to 2; steps complete when they like."""

    @initialize(
        overlap=st.integers(0, 2),
        pages=st.integers(8, 20),
        slots=st.integers(1, 4),
        page_size=st.integers(1, 4),
        prefix_cache=st.booleans(),
        extra=st.integers(0, 8),
        session_pages_max=st.integers(0, 12),
        host_pages=st.sampled_from([0, 0, 1, 3, 8, 40]),
        draft_tokens=st.sampled_from([0, 1, 2, 5]),
        late=st.booleans(),
    )
    def start(
        self, pages: int, slots: int, page_size: int, extra: int, late: bool, **settings: int
    ) -> None:
        settings["host_pages"] *= settings["prefix_cache"]
        self.world = World(
            pages=pages, slots=slots, page_size=page_size,
            step_tokens=max(slots, page_size) + extra, **settings,
        )  # fmt: skip
        self.world.late = late
        self.room = pages * page_size
        self.now_us = 0

    @rule(
        base=st.integers(0, 2),
        length=st.integers(1, 24),
        own=st.lists(st.integers(0, 3), max_size=3),
        max_tokens=st.integers(1, 16),
        salt=st.sampled_from(["", "", "tenant"]),
        stop_after=st.one_of(st.just(10**9), st.integers(1, 6)),
        hints=HINTS,
    )
    def submit(
        self,
        base: int,
        length: int,
        own: list[int],
        max_tokens: int,
        salt: str,
        stop_after: int,
        hints: dict[str, Any],
    ) -> None:
        prompt = ([base] * length + own)[: max(1, self.room - max_tokens)]
        if len(prompt) + max_tokens - 1 <= self.room:
            self.world.submit(prompt, max_tokens, salt, stop_after, **hints)

    @rule(seconds=st.sampled_from([0.1, 1, 10, 1000]))
    def advance(self, seconds: float) -> None:
        self.now_us += int(seconds * 1e6)
        self.world.scheduler.advance(self.now_us)

    @rule(session=SESSIONS)
    def end_session(self, session: str) -> None:
        self.world.scheduler.end_session(session)

    @rule(session=SESSIONS, seconds=st.sampled_from([1, 100]))
    def prefetch(self, session: str, seconds: int) -> None:
        pages = self.world.scheduler.prefetch(session, seconds * 1_000_000)
        assert pages is None or 0 <= pages <= self.world.scheduler.stats().host_pages_cached

    @precondition(lambda self: self.world.clients)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(sorted(self.world.clients))))

    @rule()
    def clear_cache(self) -> None:
        self.world.clear_cache()

    @rule()
    def launch(self) -> None:
        self.world.launch()

    @precondition(lambda self: self.world.clients)
    @rule(data=st.data(), right=st.integers(0, 4), wrong=st.integers(0, 3))
    def propose(self, data: st.DataObject, right: int, wrong: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.world.clients)))
        most = self.world.config["draft_tokens"]
        assert self.world.propose(number, right, wrong) in (0, min(right + wrong, most))

    @precondition(lambda self: self.world.launched)
    @rule()
    def commit(self) -> None:
        self.world.commit()

    @precondition(lambda self: self.world.copies)
    @rule(data=st.data(), good=st.sampled_from([True, True, False]))
    def acknowledge(self, data: st.DataObject, good: bool) -> None:
        copies = data.draw(st.permutations(self.world.copies))
        self.world.acknowledge(*copies[: data.draw(st.integers(1, len(copies)))], good=good)

    @precondition(lambda self: self.world.copied)
    @rule(data=st.data(), good=st.booleans())
    def acknowledge_again(self, data: st.DataObject, good: bool) -> None:
        copy = data.draw(st.sampled_from(self.world.copied))
        before = self.world.scheduler.stats()
        again = self.world.scheduler.acknowledge(np.array([copy.ticket]), np.array([good]))
        assert again == (0, 1)
        assert self.world.scheduler.stats().host_pages_free == before.host_pages_free

    @rule(turns=st.integers(1, 8))
    def turns(self, turns: int) -> None:
        for _ in range(turns):
            self.world.turn()

    @invariant()
    def every_page_has_one_place(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
