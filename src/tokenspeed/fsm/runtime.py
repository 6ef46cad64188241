"""The real control plane by the spec's names: asked for its actions, seen as its state.

Rule: nothing is decided here and nothing is remembered but what the runtime forgets by design: the
requests that have ended. What the runtime does not have is left out of the comparison: `content`
and `stored`, ghosts that nobody can look at, and the pages of a piece of work, which follow from
its positions. Actions of the lifecycle go by their own names, where `HostTier`, `Draft` and
`Window` have a prefix before them; a `Complete` of drafts says what each request gained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations, product
from typing import Any, final

from attrs import frozen

from tokenspeed._core import Control
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.mirror import ENDED, Action
from tokenspeed.fsm.steps import Step
from tokenspeed.fsm.values import Function, Value, function

__all__ = [
    "Observed", "Replayed", "Runtime", "Tried", "as_asked", "observed", "refuse_others", "replay",
    "visible",
]  # fmt: skip

VARIABLES = ("st", "age", "tab", "known", "planned", "done", "page", "plan", "inflight")
MORE = ("host", "moves", "draft")
"""What a host tier and drafts add to the variables above."""

Observed = tuple[Value, ...]
"""The variables that are `visible`, in their order, as far as they can be seen."""

SEEN = ("from", "n", "samples")  # of a piece of work
IDLE = Function({"from": 0, "n": 0, "samples": False})
LIVE = ("Prefilling", "Decoding")
PREFIXES = ("Tier", "Draft", "Sliding")  # of actions as the modules that extend the lifecycle say
Row = tuple[int, int, int, bool, int]

METHODS = {
    "StoreStart": "store_start", "StoreEnd": "store_end", "LoadStart": "load_start",
    "LoadEnd": "load_end", "HostDrop": "host_drop",
}  # fmt: skip
ENDS = {"StoreEnd": 1, "LoadEnd": 0}
"""Where among its arguments the end of a copy has the block."""


def visible(variables: Iterable[str]) -> tuple[str, ...]:
    """Names of the variables of a spec that are compared."""
    there = set(variables)
    return VARIABLES + tuple(name for name in MORE if name in there)


def as_asked(name: str, args: tuple[Value, ...]) -> Action:
    """A step of the spec as the runtime is asked for it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return Action("Complete" if name == "CompleteAs" else name, args)


def refuse_others(variables: Iterable[str]) -> None:
    """Refuse a spec that the runtime knows nothing of.

    Raises:
        ConfigError: it lacks a variable of the lifecycle.
    """
    missing = sorted(set(VARIABLES) - set(variables))
    if missing:
        raise ConfigError(
            "spec", f"variables {', '.join(variables)}",
            f"the lifecycle's, to drive the runtime by: {', '.join(missing)} are missing",
        )  # fmt: skip


def observed(state: Mapping[str, Value]) -> Observed:
    """What can be seen of a state of the spec.

    Raises:
        ConfigError: it lacks a variable of the lifecycle.
    """
    refuse_others(state)
    seen = {name: state[name] for name in visible(state)}
    seen["plan"] = _work_seen(state["plan"])
    seen["inflight"] = tuple(map(_work_seen, state["inflight"]))
    return tuple(seen.values())


def _work_seen(step: Value) -> Function:
    return Function({r: Function({k: work[k] for k in SEEN}) for r, work in step.items.items()})


# --- the runtime by the spec's names ------------------------------------------------------------


@frozen
class Tried:
    """An action as the runtime is asked for it; `stop` is the choice that `Complete` leaves."""

    action: Action
    stop: frozenset[str] = frozenset()


@final
class Runtime:
    """The control plane at the constants of a model: asked by the spec's names, seen as its state.

    Args:
        spec: `Lifecycle`, or a module that extends it, with its constants.

    Attributes:
        reported: names of the actions that the runtime traced when it was asked last.
    """

    def __init__(self, spec: Evaluator) -> None:
        value = spec.value
        self._content: dict[str, tuple[Value, ...]] = value("Content").items
        self._prompt: dict[str, int] = value("PromptLen").items
        self._salt: dict[str, Value] = value("Salt").items
        self._patience: dict[str, int] = value("Patience").items
        self._requests = sorted(value("Req"))
        self._pages = sorted(value("Page"))
        self._tokens = sorted(value("Token"))
        self._seen = visible(spec.variables)
        self._drafts: int | None = value("Drafts") if "draft" in self._seen else None
        self._sliding = "Slide" in spec.definitions
        self._hole: list[Value] = [value("Hole")] if self._sliding else []  # by the number -1
        self._blocks = sorted(value("Block")) if "host" in self._seen else []
        self._numbers = {
            name: at
            for names in (self._requests, self._pages, self._blocks)
            for at, name in enumerate(names)
        }
        self._chunk: int = value("Chunk")
        self._control = Control(
            page_size=value("PageSize"), pages=len(self._pages), slots=value("Slots"),
            chunk=self._chunk, in_flight_max=value("MaxInFlight"), host_pages=len(self._blocks),
            drafts_max=self._drafts or 0, window=value("Window") if self._sliding else 0,
        )  # fmt: skip
        self._age: list[str] = []
        self._known = dict(self._prompt)  # told by the trace: the runtime forgets who has ended
        self._ended: dict[str, str] = {}
        self.reported: frozenset[str] = frozenset()

    def attempts(self) -> Iterator[Tried]:
        """Everything that could be asked for, in any state: legal or not.

        Not the identity of a request that has ended: the runtime has forgotten it, and would take
        it for a new one.
        """
        for r in self._requests:
            if r not in self._ended:
                yield Tried(Action("Submit", (r,)))
            for name in ("Admit", "Abort", "Release", "Preempt", "Publish"):
                yield Tried(Action(name, (r,)))
            yield from map(Tried, self._of_drafts_and_windows(r))
            yield from (Tried(Action("Acquire", (r, p))) for p in self._pages)
            yield from (Tried(Action("Schedule", (r, n))) for n in range(self._chunk + 2))
        yield from (Tried(Action("Evict", (p,))) for p in self._pages)
        yield Tried(Action("Launch"))
        found = self.snapshot()
        yield from map(Tried, self._copies({block: page for page, block, _ in found["moves"]}))
        yield from self._completions(found)

    def _of_drafts_and_windows(self, r: str) -> Iterator[Action]:
        if self._sliding:
            yield Action("Slide", (r,))
        if self._drafts is not None:
            yield Action("Trim", (r,))
            yield from (Action("Reserve", (r, p)) for p in self._pages)
            yield from (Action("Speculate", (r, k)) for k in range(self._drafts + 2))

    def _completions(self, found: Mapping[str, Any]) -> Iterator[Tried]:
        """Whoever stops, and whatever comes of drafts; of a row without there is no choice."""
        rows: list[Row] = found["inflight"][0] if found["inflight"] else []
        batch = [self._requests[number] for number, *_ in rows]
        stops = chain.from_iterable(combinations(batch, n) for n in range(len(batch) + 1))
        if self._drafts is None:
            yield from (Tried(Action("Complete"), frozenset(stop)) for stop in stops)
            return
        gains: list[Iterable[int]] = []
        for number, _, _, samples, drafts in rows:
            counts = samples and found["requests"][number][0] in LIVE
            gains.append((0,) if not counts else range(drafts + 2) if drafts else (1,))
        for stop in stops:
            for gain in product(*gains):
                each = dict.fromkeys(self._requests, 0) | dict(zip(batch, gain, strict=True))
                yield Tried(Action("Complete", (Function(each),)), frozenset(stop))

    def _copies(self, copied: Mapping[int, int]) -> Iterator[Action]:
        """Of the host tier. The runtime knows a copy by its block: the page is the one it has."""
        for at, b in enumerate(self._blocks):
            yield Action("HostDrop", (b,))
            for p in self._pages:
                yield from (Action("StoreStart", (p, b)), Action("LoadStart", (b, p)))
            p = self._pages[copied.get(at, 0)]
            for good in (False, True):
                yield from (Action("StoreEnd", (p, b, good)), Action("LoadEnd", (b, p, good)))

    def snapshot(self) -> dict[str, Any]:
        """All of the control plane as plain values."""
        return self._control.snapshot()

    def amiss(self) -> list[str]:
        """What the control plane finds wrong with itself, counting from scratch."""
        return self._control.check()

    def take(self, tried: Tried) -> bool:
        """Ask for an action; did it happen?"""
        done = self._ask(tried.action.name, tried.action.args, tried.stop)
        told = self._control.trace()
        self.reported = frozenset(action for action, *_ in told if action != "Accept")
        for action, number, _, value, to in told:  # an Accept is a part of the Complete after it
            if action in ("Accept", "Complete") and value >= 0 and number >= 0:
                self._known[self._requests[number]] += 1
            if to in ENDED:
                self._ended[self._requests[number]] = to
        return done

    def _ask(self, name: str, args: tuple[Value, ...], stop: frozenset[str]) -> bool:
        if name == "Submit":
            return self._submit(args[0])
        if name == "Complete":
            return self._complete(stop, args[0].items if args else {})
        if name == "Speculate":
            self._propose(*args)
        action: Callable[..., bool] = getattr(self._control, METHODS.get(name, name.lower()))
        if name in ENDS:
            args = (args[ENDS[name]], args[-1])
        return action(*(self._numbers.get(value, value) for value in args))

    def _submit(self, r: str) -> bool:
        content = [self._tokens.index(token) for token in self._content[r]]
        prompt = content[: self._prompt[r]]
        salt = str(self._tokens.index(self._salt[r]))
        done = self._control.submit(self._numbers[r], prompt, len(content), salt, self._patience[r])
        self._age += [r] if done else []
        return done

    def _propose(self, r: str, drafts: int) -> None:
        """Guesses, all of them right: how many are taken, `Complete` says."""
        request = self.snapshot()["requests"].get(self._numbers[r])
        if request is not None:
            self._control.propose(self._numbers[r], self._said(r, request[2], drafts))

    def _said(self, r: str, known: int, n: int) -> list[int]:
        """What a request says next, n tokens; beyond its end, the last again."""
        content = self._content[r]
        at = (min(known + i, len(content) - 1) for i in range(n))
        return [self._tokens.index(content[i]) for i in at]

    def _complete(self, stop: frozenset[str], gain: Mapping[str, int]) -> bool:
        """A run for each row. Of a request that drains it is whole, and has to be dropped."""
        found = self.snapshot()
        rows: list[Row] = found["inflight"][0] if found["inflight"] else []
        tokens, flags = [], []
        for number, _, _, _, drafts in rows:
            r = self._requests[number]
            state, _, known, *_ = found["requests"][number]
            taken = gain[r] if drafts and state in LIVE else drafts + 1
            tokens += self._said(r, known, taken) + [-1] * (drafts + 1 - taken)
            flags.append(int(r in stop))
        return self._control.complete(tokens, flags)

    def state(self) -> Observed:
        """What can be seen, as values of the spec."""
        found = self.snapshot()
        alive = {self._requests[number]: row for number, row in found["requests"].items()}
        requests = {r: alive.get(r) or self._remembered(r) for r in self._requests}
        named = [*self._pages, *self._hole]
        tables = {r: tuple(named[p] for p in row[1]) for r, row in requests.items()}
        order = iter(alive)  # the runtime's order, among those that it has forgotten
        pages = {
            self._pages[at]: Function({"kind": kind, "ref": ref, "key": self._key(salt, key)})
            for at, (kind, ref, salt, key) in enumerate(found["pages"])
        }
        return (
            Function({r: row[0] for r, row in requests.items()}),
            tuple(next(order) if r in alive else r for r in self._age),
            Function(tables),
            *(Function({r: row[at] for r, row in requests.items()}) for at in (2, 3, 4)),
            Function(pages),
            self._work(found["plan"]),
            tuple(self._work(rows) for rows in found["inflight"]),
            *(self._host(found) if "host" in self._seen else ()),
            *([self._guessed(found)] if "draft" in self._seen else ()),
        )

    def _host(self, found: Mapping[str, Any]) -> tuple[Value, Value]:
        """`host` and `moves`."""
        homes = {
            self._blocks[at]: Function({"kind": kind, "key": self._key(salt, key)})
            for at, (kind, salt, key) in enumerate(found["host"])
        }
        moves = (
            Function({"page": self._pages[page], "block": self._blocks[block], "out": out})
            for page, block, out in found["moves"]
        )
        return function(homes), frozenset(moves)

    def _guessed(self, found: Mapping[str, Any]) -> Function:
        """`draft`."""
        drafts = dict.fromkeys(self._requests, 0)
        for number, *_, of_row in chain(found["plan"], *found["inflight"]):
            drafts[self._requests[number]] += of_row
        return Function(drafts)

    def _key(self, salt: str, tokens: Sequence[int]) -> tuple[Value, ...]:
        """As the spec has it: the salt is the root; nothing for a page that is not cached."""
        return tuple(self._tokens[t] for t in (int(salt), *tokens)) if tokens else ()

    def _remembered(self, r: str) -> tuple[str, tuple[()], int, int, int]:
        """A request that the runtime does not know yet, or no longer."""
        return self._ended.get(r, "New"), (), self._known[r], 0, 0

    def _work(self, rows: Iterable[Row]) -> Function:
        work = dict.fromkeys(self._requests, IDLE)
        for number, start, n, samples, _ in rows:
            work[self._requests[number]] = Function(
                dict(zip(SEEN, (start, n, samples), strict=True))
            )
        return Function(work)


# --- along one behaviour ------------------------------------------------------------------------


@frozen
class Replayed:
    """How far the runtime followed a behaviour.

    Attributes:
        steps: that it took as told.
        why: what it did at the next one; empty if it took all.
    """

    steps: int
    why: str = ""


def replay(spec: Evaluator, behaviour: Sequence[Step]) -> Replayed:
    """Ask the runtime for the steps of a counterexample, one by one.

    Args:
        spec: what the behaviour is of, for its constants.
        behaviour: the initial state first.

    Raises:
        ConfigError: the behaviour is not of the lifecycle.
    """
    way: list[Tried] = []
    for number, step in enumerate(behaviour[1:]):
        wanted = observed(step.state)
        why = "it refuses"
        action = as_asked(step.action, step.args)
        for tried in _choices(spec, way, action):
            runtime = Runtime(spec)
            if not all(map(runtime.take, (*way, tried))):
                continue
            if runtime.state() == wanted:
                way.append(tried)
                break
            why = "it does this, with another outcome"
        else:
            return Replayed(number, f"{action}: {why}")
    return Replayed(len(behaviour) - 1)


def _choices(spec: Evaluator, way: Iterable[Tried], action: Action) -> list[Tried]:
    """The ways to ask for an action where a behaviour has led."""
    runtime = Runtime(spec)
    for tried in way:
        runtime.take(tried)
    return [tried for tried in runtime.attempts() if tried.action == action]
