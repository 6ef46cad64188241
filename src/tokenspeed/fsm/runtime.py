"""The real control plane by the spec's names: asked for its actions, seen as its state.

Rule: nothing is decided here and nothing is remembered but what the runtime forgets by design: the
requests that have ended. What the runtime does not have is left out of the comparison: `content`
and `stored`, ghosts that nobody can look at, and the pages of a piece of work, which follow from
its positions. Actions of the lifecycle go by their own names, where `HostTier` has `Tier` before
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any, final

from attrs import frozen

from tokenspeed._core import Control
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.mirror import ENDED, Action
from tokenspeed.fsm.steps import Step
from tokenspeed.fsm.values import Function, Value

__all__ = [
    "Observed", "Replayed", "Runtime", "Tried", "as_asked", "observed", "refuse_others", "replay",
    "visible",
]  # fmt: skip

VARIABLES = ("st", "age", "tab", "known", "planned", "done", "page", "plan", "inflight")
TIER = ("host", "moves")
"""What a host tier adds to the variables above."""

Observed = tuple[Value, ...]
"""The variables that are `visible`, in their order, as far as they can be seen."""

SEEN = ("from", "n", "samples")  # of a piece of work
IDLE = Function({"from": 0, "n": 0, "samples": False})
Row = tuple[int, int, int, bool]

METHODS = {
    "StoreStart": "store_start", "StoreEnd": "store_end", "LoadStart": "load_start",
    "LoadEnd": "load_end", "HostDrop": "host_drop",
}  # fmt: skip
ENDS = {"StoreEnd": 1, "LoadEnd": 0}
"""Where among its arguments the end of a copy has the block."""


def visible(variables: Iterable[str]) -> tuple[str, ...]:
    """Names of the variables of a spec that are compared."""
    return VARIABLES + TIER if set(TIER) <= set(variables) else VARIABLES


def as_asked(name: str, args: tuple[Value, ...]) -> Action:
    """A step of the spec as the runtime is asked for it."""
    return Action(name.removeprefix("Tier"), args)


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
        self._tier = visible(spec.variables) != VARIABLES
        self._blocks = sorted(value("Block")) if self._tier else []
        self._numbers = {
            name: at
            for names in (self._requests, self._pages, self._blocks)
            for at, name in enumerate(names)
        }
        self._chunk: int = value("Chunk")
        self._control = Control(
            page_size=value("PageSize"), pages=len(self._pages), slots=value("Slots"),
            chunk=self._chunk, in_flight_max=value("MaxInFlight"), host_pages=len(self._blocks),
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
            yield from (Tried(Action("Acquire", (r, p))) for p in self._pages)
            yield from (Tried(Action("Schedule", (r, n))) for n in range(self._chunk + 2))
        yield from (Tried(Action("Evict", (p,))) for p in self._pages)
        yield Tried(Action("Launch"))
        found = self.snapshot()
        yield from map(Tried, self._copies({block: page for page, block, _ in found["moves"]}))
        rows = found["inflight"]
        batch = [self._requests[number] for number, *_ in rows[0]] if rows else []
        for stop in chain.from_iterable(combinations(batch, n) for n in range(len(batch) + 1)):
            yield Tried(Action("Complete"), frozenset(stop))

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
        self.reported = frozenset(action for action, *_ in told)
        for action, number, _, value, to in told:
            if action == "Complete" and value >= 0 and number >= 0:
                self._known[self._requests[number]] += 1
            if to in ENDED:
                self._ended[self._requests[number]] = to
        return done

    def _ask(self, name: str, args: tuple[Value, ...], stop: frozenset[str]) -> bool:
        if name == "Submit":
            return self._submit(args[0])
        if name == "Complete":
            return self._complete(stop)
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

    def _complete(self, stop: frozenset[str]) -> bool:
        found = self.snapshot()
        if not found["inflight"]:
            return self._control.complete([], [])
        tokens, flags = [], []
        for number, *_ in found["inflight"][0]:
            r = self._requests[number]
            known = found["requests"][number][2]
            content = self._content[r]
            tokens.append(self._tokens.index(content[min(known, len(content) - 1)]))
            flags.append(int(r in stop))
        return self._control.complete(tokens, flags)

    def state(self) -> Observed:
        """What can be seen, as values of the spec."""
        found = self.snapshot()
        alive = {self._requests[number]: row for number, row in found["requests"].items()}
        requests = {r: alive.get(r) or self._remembered(r) for r in self._requests}
        tables = {r: tuple(self._pages[p] for p in row[1]) for r, row in requests.items()}
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
            *(self._host(found) if self._tier else ()),
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
        return Function(homes), frozenset(moves)

    def _key(self, salt: str, tokens: Sequence[int]) -> tuple[Value, ...]:
        """As the spec has it: the salt is the root; nothing for a page that is not cached."""
        return tuple(self._tokens[t] for t in (int(salt), *tokens)) if tokens else ()

    def _remembered(self, r: str) -> tuple[str, tuple[()], int, int, int]:
        """A request that the runtime does not know yet, or no longer."""
        return self._ended.get(r, "New"), (), self._known[r], 0, 0

    def _work(self, rows: Iterable[Row]) -> Function:
        work = dict.fromkeys(self._requests, IDLE)
        for number, start, n, samples in rows:
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
