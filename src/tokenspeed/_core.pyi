from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

SPEC_HASH: str

class QueueFull(Exception):
    """The waiting queue is at its bound."""

class Plan:
    """One step; see `tokenspeed.plan.StepPlan`. The arrays live as long as the plan."""

    @property
    def step(self) -> int: ...
    @property
    def numbers(self) -> NDArray[np.int64]: ...
    @property
    def incarnations(self) -> NDArray[np.int32]: ...
    @property
    def slots(self) -> NDArray[np.int32]: ...
    @property
    def query_start(self) -> NDArray[np.int32]: ...
    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def context_lens(self) -> NDArray[np.int32]: ...
    @property
    def sampled(self) -> NDArray[np.bool_]: ...
    @property
    def drafts(self) -> NDArray[np.int32]:
        """int32[rows]: how many of the row's last tokens are guesses."""

    @property
    def page_delta(self) -> NDArray[np.int32]: ...
    @property
    def joined(self) -> NDArray[np.int64]:
        """int64[joined, 2]: slot, number."""

    @property
    def cached(self) -> NDArray[np.int32]:
        """int32[joined]: tokens found in the prefix cache."""

    @property
    def preempted(self) -> NDArray[np.int64]: ...
    @property
    def stores(self) -> NDArray[np.int64]:
        """int64[copies, 3]: ticket, device page, host page that it is copied to."""

    @property
    def loads(self) -> NDArray[np.int64]:
        """int64[copies, 3]: ticket, device page, host page that it is copied from."""

class Committed:
    @property
    def accepted(self) -> NDArray[np.bool_]:
        """bool[rows]: the row's token was taken, or several."""

    @property
    def taken(self) -> NDArray[np.int32]:
        """int32[rows]: how many tokens of its run were."""

    @property
    def finished(self) -> list[tuple[int, str]]:
        """(number, "stop" or "length") of requests that end with this step."""

    @property
    def released(self) -> list[int]:
        """Numbers of requests whose pages are back."""

class Stats:
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def draining(self) -> int: ...
    @property
    def pages_total(self) -> int: ...
    @property
    def pages_free(self) -> int: ...
    @property
    def pages_cached(self) -> int: ...
    @property
    def pages_kept(self) -> int: ...
    @property
    def sessions(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_looks(self) -> int:
        """Walks down the prefix index: what letting in, and waiting, cost."""

    @property
    def prefix_nodes(self) -> int:
        """Of the prefix index: roots, cached pages, and what is remembered above them."""

    @property
    def prefix_hits(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def prefix_hits_host(self) -> int: ...
    @property
    def host_pages_total(self) -> int: ...
    @property
    def host_pages_free(self) -> int: ...
    @property
    def host_pages_cached(self) -> int: ...
    @property
    def stores(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def prefetches(self) -> int: ...
    @property
    def copies_failed(self) -> int: ...
    @property
    def copies_unknown(self) -> int: ...
    @property
    def drafts(self) -> int:
        """Tokens that were guessed, and whose rows came to something."""

    @property
    def drafts_accepted(self) -> int:
        """Of these, tokens that were right."""

class Scheduler:
    """Continuous batching over the generated lifecycle. Any thread may look while one drives.

    Raises:
        ValueError: a setting is out of bounds; the message names it, what was given, the bounds.
        TypeError: a setting is no integer, or there is none of that name.
    """

    def __init__(
        self,
        *,
        page_size: int = 16,
        pages: int,
        slots: int = 64,
        waiting_max: int = 1024,
        step_tokens: int = 512,
        context_max: int,
        overlap: int = 0,
        prefix_cache: bool = True,
        itl_budget_us: int = 0,
        session_pages_max: int = 0,
        host_pages: int = 0,
        draft_tokens: int = 0,
        window: int = 0,
        full_groups: int = 0,
        window_groups: int = 1,
    ) -> None: ...
    def submit(
        self,
        number: int,
        prompt: NDArray[np.int32],
        max_tokens: int,
        salt: str = "",
        session: str = "",
        keep_us: int = 0,
        supersedes: bool = False,
        priority: int = 0,
    ) -> None:
        """Queue a request. Raises ValueError naming the field, or QueueFull.

        Args:
            session: that it is a turn of; "" for none. Its pages go when they are least likely to
                be asked for, by what sessions have done so far.
            keep_us: once it has ended, its pages go after everybody else's for so long, if
                `session_pages_max` leaves room for all of them.
            supersedes: what only the turn before had cached goes first.
            priority: -100 to 100; for each step that it is lower, the request goes ahead of 16
                earlier arrivals, and of no more.
        """

    def plan(self) -> Plan | None:
        """Plan and launch a step; None if nothing can run or `overlap + 1` steps are in flight.

        A plan without rows (its `step` is -1) has copies alone: nothing is launched or to commit.
        """

    def propose(self, number: int, draft: NDArray[np.int32]) -> int:
        """Guess what a decoding request says next; how many guesses are kept.

        At most `draft_tokens` are, and none if it does not decode. They are for the first step that
        is planned when all of its tokens are known, as far as there is room and pages; until then
        it is not planned ahead. They are forgotten when it says something, or is preempted.
        """

    def guess(self, numbers: NDArray[np.int64]) -> int:
        """The same for each of these, with what followed the last time that its text ended alike.

        How many guesses are kept in all. Of the four latest places where the last three tokens
        stand, the one with the longest match is taken. It costs O(new tokens).
        """

    def commit(
        self,
        step: int,
        token_ids: NDArray[np.int32],
        stop: NDArray[np.bool_],
        duration_us: int = 0,
        awaits_tool: NDArray[np.bool_] | None = None,
    ) -> Committed:
        """Complete the oldest launched step. Raises ValueError, changing nothing, on another.

        `token_ids` is int32[rows + drafts]: of a row with n drafts a run of n + 1. It begins with
        the drafts that are right, goes on with the token that was sampled after them, and is -1
        from there on. `stop` is bool[rows]: the last token of the run ends the request.

        `duration_us` is the time since the completion before, or since there was work again; 0 if
        nobody knows. The latency budget learns from it what a step costs. `awaits_tool` flags rows
        whose session is going to come back with the result of a tool.
        """

    def advance(self, now_us: int) -> None:
        """Time passes. It orders what is evicted, never runs backwards, and may be left out."""

    def end_session(self, session: str) -> bool:
        """No next turn will come: its cached pages go first. False if the session is unknown."""

    def prefetch(self, session: str, keep_us: int) -> int | None:
        """The next turn is near: pages of the last one that come back from the host.

        They come while nobody waits, as far as there are pages that nobody is promised, wants or
        has asked to be kept, and are kept for so long, within `session_pages_max`: until the turn
        comes, the session ends, or the time is over. 0 if all is there, nothing is left, or a turn
        runs; None if the session is unknown.

        Raises:
            ValueError: the time is out of bounds.
        """

    def acknowledge(self, tickets: NDArray[np.int64], good: NDArray[np.bool_]) -> tuple[int, int]:
        """Say what became of copies, in any order: how many were awaited, and how many were not.

        A ticket that is unknown, or was told before, does nothing and is counted. Until its ticket
        is told, both pages of a copy stay what they are. Raises ValueError if the lengths differ.
        """

    def abort(self, number: int) -> bool:
        """End a request in whatever state; False if it is unknown or ending already."""

    def clear_cache(self) -> tuple[int, int]:
        """Evict every cached page that no request holds: pages that went, pages that are held."""

    def tokens(self, number: int) -> Sequence[int] | None:
        """Prompt and accepted output of a live request."""

    def stats(self) -> Stats: ...
    def idle(self) -> bool:
        """No request is alive, and no step and no copy is in flight or to be handed out."""

    def check(self) -> list[str]:
        """Recompute who holds which page; what is wrong, in words."""

    def record(self, on: bool) -> None:
        """Keep every move for `events`."""

    def transitions(self) -> dict[tuple[str, str, str], int]:
        """(action, from, to) -> how often, for every edge of the spec."""

    def trace(self) -> list[tuple[str, int, int, int, str]]:
        """Steps of the spec since the last call: (action, request, page, value, to).

        -1 and "" stand for what a step does not have. `value` is the patience of a Submit, the
        tokens of a Schedule, the drafts of a Speculate, the pages that an Admit found, the token
        that a Complete accepted for a request, after an Accept for each one before it in its run. A
        step's completion is a Complete for each of its rows, then one for the step.
        """

    def events(self) -> list[tuple[str, int, int, str, str]]:
        """Moves since the last call: (action, number, incarnation, from, to)."""

    def record_kv(self, on: bool) -> None:
        """Keep what enters and leaves the prefix cache for `kv_events`, from now on."""

    def kv_events(self) -> list[tuple[str, int, int, str, tuple[int, ...]]]:
        """That, in order, since the last call: (action, page, parent, salt, tokens of the page).

        Of a Publish, `parent` is the page before, or -1 for a first one, which alone has the salt.
        An Evict has a page alone; a Clear has nothing, and follows the last Evict.
        """

    def prefixes(self) -> dict[int, tuple[str, tuple[int, ...]]]:
        """The prefix cache, for checks: page -> (salt, tokens of it and of all before it)."""

    def host_prefixes(self) -> dict[int, tuple[str, tuple[int, ...]]]:
        """The same of its second home: by host page."""

Row: TypeAlias = tuple[int, int, int, bool]
"""(number, first position, tokens, samples): the work of one request in a step."""

class Control:
    """What the scheduler drives: each action of the spec as one method.

    A method says whether it did its action; if the spec does not allow it, nothing changes.

    Raises:
        ValueError: a setting is out of bounds; the message names it.
    """

    def __init__(
        self,
        *,
        page_size: int,
        pages: int,
        slots: int,
        chunk: int,
        in_flight_max: int,
        host_pages: int = 0,
        drafts_max: int = 0,
        window: int = 0,
    ) -> None: ...
    def submit(
        self, number: int, prompt: Sequence[int], length_max: int, salt: str, patience: int
    ) -> bool: ...
    def admit(self, number: int) -> bool: ...
    def acquire(self, number: int, page: int) -> bool: ...
    def schedule(self, number: int, tokens: int) -> bool: ...
    def publish(self, number: int) -> bool: ...
    def slide(self, number: int) -> bool: ...
    def propose(self, number: int, draft: Sequence[int]) -> int:
        """Guesses of what comes next; how many are kept. No action: `speculate` takes them."""

    def reserve(self, number: int, page: int) -> bool: ...
    def speculate(self, number: int, drafts: int) -> bool: ...
    def trim(self, number: int) -> bool: ...
    def preempt(self, number: int) -> bool: ...
    def abort(self, number: int) -> bool: ...
    def release(self, number: int) -> bool: ...
    def launch(self) -> bool: ...
    def complete(self, token_ids: Sequence[int], stop: Sequence[int]) -> bool:
        """Complete the oldest launched step: for each of its rows a run of tokens and a stop flag.

        A run is one token, or as many as the row has drafts, and one: those that are right, what
        was sampled after them, then -1.
        """

    def evict(self, page: int) -> bool: ...
    def store_start(self, page: int, block: int) -> bool: ...
    def store_end(self, block: int, good: bool) -> bool: ...
    def load_start(self, block: int, page: int) -> bool: ...
    def load_end(self, block: int, good: bool) -> bool: ...
    def host_drop(self, block: int) -> bool: ...
    def snapshot(self) -> dict[str, Any]:
        """All of it as values.

        `requests`: number -> (state, pages, known, planned, done), oldest first; `pages`: by id,
        (kind, references, salt, tokens of the key); `plan`: rows, (number, from, tokens, samples,
        drafts); `inflight`: rows of each launched step, oldest first; `host`: by block, (kind,
        salt, tokens of the key); `moves`: copies under way, (page, block, from device to host). A
        page of a table is -1 where a hole is.
        """

    def trace(self) -> list[tuple[str, int, int, int, str]]:
        """As the scheduler's."""

    def check(self) -> list[str]:
        """Recompute who holds which page; what is wrong, in words."""
