"""Our test suite for anybody's engine: a Hypothesis state machine that needs one adapter.

Rule: the engine says what it did (moves) and what it holds (pages); the spec's tables and the page
invariants judge it, after every action. Nothing here knows how an engine works.

An engine is driven by four actions; what it decides for itself (Admit, Acquire, Schedule, Publish,
Preempt, Release, Evict) it reports. A whole adapter, and its suite:

    class Mine:
        def __init__(self, bounds: Bounds) -> None:
            self.core = MyScheduler(pages=bounds.pages, slots=bounds.slots, ...)

        def submit(self, request: int, prompt: tuple[int, ...], output_max: int, salt: str) -> bool:
            return self.core.add(request, prompt, output_max)

        def abort(self, request: int) -> bool:
            return self.core.cancel(request)

        def launch(self) -> Step | None:
            batch = self.core.schedule()
            return batch and Step(batch.id, {r: frozenset(batch.pages(r)) for r in batch.requests})

        def complete(self, step: int, stop: frozenset[int]) -> bool:
            return self.core.on_result(step, stop)

        def moves(self) -> Iterable[Move]:
            return self.core.log.take()  # (action, request, incarnation, from, to)

        def holdings(self) -> Holdings:
            return Holdings(self.core.free, self.core.cached, self.core.tables, self.core.refs)

    class MySuite(LifecycleMachine[Mine]):
        def engine(self, bounds: Bounds) -> Mine:
            return Mine(bounds)

    TestMine = MySuite.TestCase
    TestMine.settings = PROFILE

A rule that is broken is raised as `Broken`, with the shortest sequence of actions that Hypothesis
finds. The rules, by the names of the spec:

    Edges                each move is in the table and starts where the last one ended; what was
                         accepted moves a request
    FreeUnique           a free page is free once, and nobody's; no page is twice in a table
    RefExact             a page is referred to as often as it stands in tables
    NoReuseInFlight      what a launched step touches is still held by whom it is touched for
    ContentMatches       a page in two tables stands for the same tokens and tenant in both
    AccountingExact      free, cached and held pages are all the pages there are
    TerminalReleasesAll  who owns no pages in its state holds none, and no step touches any for it
    AdmitSound           what can never fit is refused, what fits is not; slots are never exceeded
    EpochMatch           what comes late, twice or out of turn is refused and changes nothing
    Full                 no step is launched beyond `in_flight_max`
    EveryRequestEnds     when nothing new comes, each request ends and every page comes back
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Generic, Protocol, TypeVar, final

from attrs import field, frozen

from tokenspeed.fsm.generated import OWNS, STATES
from tokenspeed.fsm.mirror import ENDED, IllegalTransition, legal
from tokenspeed.fsm.monitor import Monitor, Move

try:
    from hypothesis import HealthCheck, settings
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
except ImportError as error:
    raise ImportError(
        "tokenspeed.fsm.testing needs Hypothesis, which is not installed; "
        "run: pip install 'tokenspeed[test]'"
    ) from error

__all__ = ["PROFILE", "Bounds", "Broken", "Engine", "Holdings", "LifecycleMachine", "Step"]

PROFILE = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
"""The same examples on every machine: a suite that fails here fails everywhere."""

DRAIN_STEPS_MAX = 5_000
"""Steps after which what is still alive is taken to be stuck; no suite makes work for a tenth."""


@final
class Broken(AssertionError):
    """A rule does not hold.

    Args:
        rule: its name, as in the module's docstring.
        sentence: what was seen.
    """

    def __init__(self, rule: str, sentence: str) -> None:
        super().__init__(f"{rule}: {sentence}")
        self.rule = rule
        self.sentence = sentence


# --- What an adapter says -------------------------------------------------------------------------


@frozen(kw_only=True)
class Bounds:
    """The engine that a run wants. Small, so that everything runs short.

    Attributes:
        pages: device pages.
        page_size: tokens in a page.
        slots: requests that may hold pages at once.
        chunk: tokens of one step, at most; no fewer than `slots`, nor than `page_size`.
        in_flight_max: steps launched and not completed; overlap + 1.
        prefix_cache: whether pages of equal prefixes are shared.
    """

    pages: int
    page_size: int
    slots: int
    chunk: int
    in_flight_max: int
    prefix_cache: bool

    def fits(self, prompt: Sequence[int], output_max: int) -> bool:
        """Whether a request can finish alone. Its last token is never fed back."""
        return -(-(len(prompt) + output_max - 1) // self.page_size) <= self.pages


@frozen
class Step:
    """A launched step.

    Attributes:
        number: names the step to `Engine.complete`; never used again.
        touches: request -> the pages that the step reads or writes for it.
    """

    number: int
    touches: Mapping[int, frozenset[int]]


@frozen
class Holdings:
    """Which page is where, at one moment.

    Attributes:
        free: the free pages, as the allocator has them; or their number, if it does not tell.
        cached: the pages in the prefix cache that nobody holds; or their number.
        tables: request -> its pages in order; a request that has none may be missing.
        refs: page -> its reference count, for the pages that are counted; None if none are.
    """

    free: Sequence[int] | int
    cached: Collection[int] | int
    tables: Mapping[int, Sequence[int]]
    refs: Mapping[int, int] | None = field(default=None)


class Engine(Protocol):
    """What the suite drives. Requests are small numbers; one that ended may be submitted anew."""

    def submit(self, request: int, prompt: tuple[int, ...], output_max: int, salt: str) -> bool:
        """Submit; False if refused. `salt` keeps the prefixes of tenants apart."""

    def abort(self, request: int) -> bool:
        """Abort; False if there is nothing to abort."""

    def launch(self) -> Step | None:
        """Assemble a step and launch it; None if nothing can run now."""

    def complete(self, step: int, stop: frozenset[int]) -> bool:
        """Bring a step's results: the model ends the requests of `stop` that sampled in it.

        False if the step is none that is awaited now: unknown, completed already, out of turn.
        """

    def moves(self) -> Iterable[Move]:
        """(action, request, incarnation, from, to) since the last call, in order.

        The incarnation is another each time that a request is submitted.
        """

    def holdings(self) -> Holdings:
        """Which page is where, now. A value: later actions do not change it."""


# --- The suite ------------------------------------------------------------------------------------

EngineT = TypeVar("EngineT", bound=Engine)

_REQUESTS = range(6)
_tokens = st.integers(0, 3)


class LifecycleMachine(RuleBasedStateMachine, Generic[EngineT]):
    """Drives an engine at random; an author defines `engine` and nothing else.

    Attributes:
        depth_max: the most steps in flight that are asked for; lower it for an engine without.
        bounds: of this run.
        subject: the engine.
        monitor: the machine of each request that was heard of.
        launched: steps in flight, oldest first.
        holdings: as they were after the last action.
    """

    depth_max: ClassVar[int] = 3
    bounds: Bounds
    subject: EngineT
    _sound = False  # nothing is drained before there is an engine, nor after it broke a rule

    def engine(self, bounds: Bounds) -> EngineT:
        """A fresh engine with these bounds. The one method that an author must define."""
        raise NotImplementedError(f"{type(self).__name__} must define engine(self, bounds)")

    @initialize(
        pages=st.integers(4, 16),
        page_size=st.integers(1, 4),
        slots=st.integers(1, 4),
        extra=st.integers(0, 8),
        in_flight_max=st.integers(1, 3),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(
        self,
        pages: int,
        page_size: int,
        slots: int,
        extra: int,
        in_flight_max: int,
        prefix_cache: bool,
    ) -> None:
        """A fresh engine, with nothing in it."""
        self.bounds = Bounds(
            pages=pages,
            page_size=page_size,
            slots=slots,
            chunk=max(slots, page_size) + extra,
            in_flight_max=min(in_flight_max, self.depth_max),
            prefix_cache=prefix_cache,
        )
        self.subject = self.engine(self.bounds)
        self.monitor = Monitor()
        self.launched: deque[Step] = deque()
        self.completed: list[int] = []
        self._incarnations: dict[int, int] = {}
        self._prompts: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._look()
        self._sound = True

    # --- actions --------------------------------------------------------------------------------

    @rule(
        count=st.integers(1, 3),
        first=st.sampled_from([0, 0, 1, 2]),
        base=st.integers(0, 1),
        length=st.integers(0, 24),
        own=st.lists(_tokens, max_size=3),
        output_max=st.integers(1, 12),
        salt=st.sampled_from(["", "", "", "tenant"]),
    )
    def submit(
        self,
        count: int,
        first: int,
        base: int,
        length: int,
        own: list[int],
        output_max: int,
        salt: str,
    ) -> None:
        """Some requests with one prompt, that is like others at its start, or but for it."""
        room = self.bounds.pages * self.bounds.page_size
        output_max = min(output_max, room)
        prompt = tuple([first, *[base] * length, *own][: room - output_max + 1])
        for request in [r for r in _REQUESTS if r not in self.alive()][:count]:
            self._prompts[request] = salt, prompt
            new = self.state(request) == STATES[0]  # not every engine takes a name twice
            self._act(
                f"Submit of request {request} ({len(prompt)} + {output_max} tokens)",
                partial(self.subject.submit, request, prompt, output_max, salt),
                expected=True if new else None,
                rule="AdmitSound",
            )

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Legal but for draining requests, where nothing may happen."""
        request = data.draw(st.sampled_from(self.alive()), label="request")
        self._act(
            f"Abort of request {request} in {self.state(request)}",
            lambda: self.subject.abort(request),
            expected="Abort" in legal(self.state(request)),
            rule="EpochMatch",
        )

    @rule()
    def disabled(self) -> None:
        """Every action that the spec does not have here is refused, and changes nothing."""
        for what, call, broken in self._disabled():
            self._act(what, call, expected=False, rule=broken)

    @rule()
    def launch(self) -> None:
        """Launch a step if the engine has one; it must not if it is full."""
        self._launch()

    @precondition(lambda self: self.launched)
    @rule(stop=st.frozensets(st.sampled_from(_REQUESTS), max_size=3))
    def complete(self, stop: frozenset[int]) -> None:
        """The oldest step's results come."""
        step = self.launched.popleft()
        self._act(
            f"Complete of step {step.number}",
            lambda: self.subject.complete(step.number, stop),
            expected=True,
            rule="EpochMatch",
        )
        self.completed.append(step.number)

    @rule(turns=st.integers(1, 6))
    def turns(self, turns: int) -> None:
        """Several steps with the pipeline full, as an engine runs."""
        for _ in range(turns):
            if not self._turn():
                break

    def teardown(self) -> None:
        """Nothing new comes: every request ends, every page comes back."""
        if not self._sound:
            return
        for _ in range(DRAIN_STEPS_MAX):
            if not self._turn():
                break
        left = [f"{m.request} in {m.state}" for m in self.monitor.live()]
        if left:
            raise Broken("EveryRequestEnds", f"nothing new came, and left are: {', '.join(left)}")

    # --- how ------------------------------------------------------------------------------------

    def alive(self) -> list[int]:
        """Requests that were submitted and have not ended."""
        return [r for r in _REQUESTS if self.state(r) not in ENDED | {STATES[0]}]

    def state(self, request: int) -> str:
        """Where a request's last incarnation is."""
        incarnation = self._incarnations.get(request)
        if incarnation is None:
            return STATES[0]
        return self.monitor.machines[request, incarnation].state

    def _launch(self) -> bool:
        """Whether anything moved. An engine may make room, or admit, and still have no step."""
        full = len(self.launched) >= self.bounds.in_flight_max
        expected = False if full else None
        return self._act("Launch", self._take_step, expected=expected, rule="Full", free=True)

    def _take_step(self) -> bool:
        step = self.subject.launch()
        if step is None:
            return False
        if step.number in self.completed or any(step.number == s.number for s in self.launched):
            raise Broken("EpochMatch", f"step {step.number} is launched twice")
        self.launched.append(step)
        return True

    def _turn(self) -> bool:
        """Fill the pipeline and complete one step; False if nothing happens any more."""
        moved = False
        while len(self.launched) < self.bounds.in_flight_max:
            before = len(self.launched)
            moved |= self._launch()
            if len(self.launched) == before:
                break
        if self.launched:
            self.complete(frozenset())
            return True
        return moved

    def _disabled(self) -> Iterator[tuple[str, Callable[[], bool], str]]:
        """(what, its call, the rule that its acceptance breaks)."""
        engine = self.subject
        long = (0,) * (self.bounds.pages * self.bounds.page_size + 1)
        for request in _REQUESTS:
            who = f"request {request}, which is {self.state(request)},"
            if request in self.alive():
                yield f"Submit of {who}", partial(engine.submit, request, (0,), 1, ""), "EpochMatch"
            else:
                yield f"Abort of {who}", partial(engine.abort, request), "EpochMatch"
                submit = partial(engine.submit, request, long, 1, "")
                yield f"Submit of {len(long)} + 1 tokens", submit, "AdmitSound"
        late = [(step, "is completed") for step in self.completed[:1] + self.completed[-1:]]
        early = [(step.number, "is not the oldest") for step in list(self.launched)[1:]]
        for step, why in late + early:
            complete = partial(engine.complete, step, frozenset[int]())
            yield f"Complete of step {step}, which {why},", complete, "EpochMatch"

    def _act(
        self,
        what: str,
        call: Callable[[], bool],
        *,
        expected: bool | None,
        rule: str,
        free: bool = False,
    ) -> bool:
        """Do it, judge the answer, then what it changed; whether anything moved.

        Args:
            what: the action, for a sentence.
            call: does it; whether the engine took it.
            expected: what `call` must return; None if the engine may choose.
            rule: is broken by another answer, and by a refusal that changes something.
            free: a refusal may change something.
        """
        self._sound, before = False, self.holdings
        took = call()
        if expected is not None and took != expected:
            raise Broken(rule, f"{what} was {'accepted' if took else 'refused'}")
        moves = self._look()
        if took and not moves:
            raise Broken("Edges", f"{what} was accepted, and no move says so")
        if not took and not free and (moves or self.holdings != before):
            raise Broken(rule, f"{what} was refused, and yet changed {moves or self.holdings}")
        self._sound = True
        return bool(moves)

    def _look(self) -> list[Move]:
        """Follow the engine's moves, and hold what it says against the invariants."""
        moves = list(self.subject.moves())
        for move in moves:
            if move[0] == "Submit":
                self._incarnations[move[1]] = move[2]
        try:
            self.monitor.feed(moves)
        except IllegalTransition as error:
            raise Broken("Edges", str(error)) from error
        self.holdings = self.subject.holdings()
        self._pages_have_one_place()
        self._references_are_exact()
        self._states_own_what_they_hold()
        self._shared_pages_stand_for_the_same()
        self._nothing_in_flight_was_given_away()
        return moves

    # --- invariants -----------------------------------------------------------------------------

    def _pages_have_one_place(self) -> None:
        held = self.holdings
        for request, table in held.tables.items():
            for page, count in Counter(table).items():
                if count > 1:
                    raise Broken("FreeUnique", f"page {page} is twice in the table of {request}")
        mapped = {page for table in held.tables.values() for page in table}
        for name, pages in (("free", held.free), ("cached", held.cached)):
            if isinstance(pages, int):
                continue
            for page, count in Counter(pages).items():
                if count > 1:
                    raise Broken("FreeUnique", f"page {page} is {name} {count} times")
                if page in mapped:
                    raise Broken("FreeUnique", f"page {page} is {name}, and in a table")
        free, cached = _count(held.free), _count(held.cached)
        if free + cached + len(mapped) != self.bounds.pages:
            raise Broken(
                "AccountingExact",
                f"{free} free + {cached} cached + {len(mapped)} held, of {self.bounds.pages} pages",
            )

    def _references_are_exact(self) -> None:
        held = self.holdings
        if held.refs is None:
            return
        holders = Counter(page for table in held.tables.values() for page in table)
        for page, count in held.refs.items():
            if count != holders[page]:
                raise Broken(
                    "RefExact", f"page {page} counts {count} references; {holders[page]} hold it"
                )

    def _shared_pages_stand_for_the_same(self) -> None:
        """As far as prompts tell: what an engine samples is its own affair."""
        first: dict[int, tuple[int, int]] = {}
        for request, table in self.holdings.tables.items():
            for index, page in enumerate(table):
                other, place = first.setdefault(page, (request, index))
                (salt, prompt), (tenant, text) = self._prompts[request], self._prompts[other]
                known = min((index + 1) * self.bounds.page_size, len(prompt), len(text))
                if (index, salt, prompt[:known]) != (place, tenant, text[:known]):
                    raise Broken(
                        "ContentMatches",
                        f"page {page} is page {place} of request {other} and page {index} of "
                        f"request {request}, which differ in their tokens or tenants",
                    )

    def _nothing_in_flight_was_given_away(self) -> None:
        held = self.holdings
        free = set() if isinstance(held.free, int) else set(held.free)
        for step in self.launched:
            for request, pages in step.touches.items():
                for page in sorted(pages):
                    if page in free or page not in held.tables.get(request, ()):
                        raise Broken(
                            "NoReuseInFlight",
                            f"step {step.number} touches page {page} for request {request}, which "
                            f"{'is free' if page in free else 'does not hold it'} meanwhile",
                        )

    def _states_own_what_they_hold(self) -> None:
        for request, table in self.holdings.tables.items():
            state = self.state(request)
            if table and "Pages" not in OWNS[state]:
                raise Broken(
                    "TerminalReleasesAll",
                    f"request {request} holds {len(table)} pages in {state}, which owns none",
                )
        slots = sum("Slot" in OWNS[m.state] for m in self.monitor.machines.values())
        if slots > self.bounds.slots:
            raise Broken(
                "AdmitSound", f"{slots} requests hold slots; there are {self.bounds.slots}"
            )


def _count(pages: Collection[int] | int) -> int:
    return pages if isinstance(pages, int) else len(pages)
