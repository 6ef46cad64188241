"""Rung three: the real control plane, driven through every reachable state of a small model.

Rule: the model says what to try and what must come of it; the control plane, with its real pages
and its real prefix index, is what is judged. In every state every action is tried with every
argument: what the spec allows must happen and lead where the spec leads, what it does not must be
refused and change nothing. What cannot even be looked at is a divergence too.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from attrs import frozen

from tokenspeed.errors import ConfigError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Settings
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.graph import compiled_steps
from tokenspeed.fsm.mirror import Action, Mirror
from tokenspeed.fsm.model import load_model
from tokenspeed.fsm.runtime import Observed, Runtime, Tried, as_asked, observed, visible
from tokenspeed.fsm.steps import Step, changes
from tokenspeed.fsm.values import show

__all__ = ["Conformance", "Divergence", "Graph", "conform", "mirrored", "read_graph"]


@frozen
class Graph:
    """A whole labelled state graph, as far as it can be seen.

    Attributes:
        states: in the order in which they are found, breadth first; the first is initial.
        steps: of each state: (action, number of the state that it leads to).
    """

    states: tuple[Observed, ...]
    steps: tuple[tuple[tuple[Action, int], ...], ...]

    def digest(self) -> str:
        """SHA-256 over the set of (state, action, state) in TLA+ syntax."""
        shown = [hashlib.sha256(show(state).encode()).hexdigest() for state in self.states]
        triples = {
            f"{shown[at]} {action} {shown[to]}\n"
            for at, steps in enumerate(self.steps)
            for action, to in steps
        }
        return hashlib.sha256("".join(sorted(triples)).encode()).hexdigest()


def read_graph(spec: Path, config: Path, settings: Settings | None = None) -> Graph:
    """The graph of the compiled model.

    Raises:
        ConfigError: the spec lacks a variable of the lifecycle, or the check ended early.
    """
    report, states, found = compiled_steps(spec, config, settings or Settings())
    if report.result != "ok":
        raise ConfigError(
            "config", f"{config.name}: {report.result}, {report.violated}",
            "a model that holds, reached to its end; a part of its graph proves nothing",
        )  # fmt: skip
    steps: list[list[tuple[Action, int]]] = [[] for _ in states]
    for at, step, to in found:
        steps[at].append((as_asked(step.action, step.args), to))
    return Graph(tuple(map(observed, states)), tuple(map(tuple, steps)))


def mirrored(spec: Path, config: Path) -> Graph:
    """The same by the mirror, which is slow and simple."""
    mirror = Mirror.load(spec, config)
    numbers = {state: at for at, state in enumerate(mirror.initial)}
    states, steps = list(mirror.initial), []
    for state in states:  # grows while it is walked
        found = []
        for action, after in mirror.steps(state):
            if after not in numbers:
                numbers[after] = len(states)
                states.append(after)
            found.append((as_asked(action.name, action.args), numbers[after]))
        steps.append(tuple(found))
    seen = (dict(zip(state.variables, state.values, strict=True)) for state in states)
    return Graph(tuple(map(observed, seen)), tuple(steps))


@frozen
class Divergence:
    """Where spec and runtime part, with a shortest way there.

    Attributes:
        path: what was done since the start.
        tried: what was tried then.
        why: what the one says and the other does.
    """

    path: tuple[Tried, ...]
    tried: Tried
    why: str

    def __str__(self) -> str:
        way = " > ".join(str(each.action) for each in self.path) or "initially"
        return f"after {way}: {self.tried.action}: {self.why}"


@frozen
class Conformance:
    """What driving the control plane through a model showed.

    Attributes:
        states, steps: that were reached and taken.
        refused: actions that it was asked for and refused, where the spec does not have them.
        graph: `Graph.digest` of what it did.
        divergence: the first one, or None.
    """

    states: int
    steps: int
    refused: int
    graph: str
    divergence: Divergence | None = None


def conform(spec: Path, config: Path, settings: Settings | None = None) -> Conformance:
    """Drive the control plane through every reachable state of a model.

    Raises:
        SpecError: the model is outside the subset.
        ConfigError: it is not one of the lifecycle, does not hold, or is reduced, so that its
            graph is not the whole one.
    """
    model = load_model(spec, config)
    asked = model.config
    reduced = [asked.symmetry, *asked.constraints, *asked.action_constraints]
    if any(reduced):
        raise ConfigError(
            "config", f"{config.name} with {', '.join(filter(None, reduced))}",
            "a model without SYMMETRY and CONSTRAINT: what they leave out is not illegal",
        )  # fmt: skip
    without = compiled.compiler() is None
    graph = mirrored(spec, config) if without else read_graph(spec, config, settings)
    names = visible(model.evaluator.variables)
    if len(set(graph.states)) < len(graph.states):
        raise ConfigError(
            "config", f"{config.name}, where states differ in what cannot be seen alone",
            f"a model whose states differ in one of {', '.join(names)}",
        )  # fmt: skip
    if len(list(model.evaluator.initial(asked.init))) != 1:
        raise ConfigError(
            "config", f"{config.name} with several initial states", "a model with one"
        )
    return _Walk(model.evaluator, graph).through_all()


@final
class _Walk:
    """Breadth first through a graph, each state reached by the way that reached it first."""

    def __init__(self, spec: Evaluator, graph: Graph) -> None:
        self._spec = spec
        self._graph = graph
        self._numbers = {state: at for at, state in enumerate(graph.states)}
        self._ways: dict[int, tuple[Tried, ...]] = {0: ()}
        self._seen: list[Observed] = []
        self._taken: list[tuple[tuple[Action, int], ...]] = []
        self._refused = 0

    def through_all(self) -> Conformance:
        divergence = None
        for at in range(len(self._graph.states)):
            divergence = self._visit(at)
            if divergence:
                break
        whole = Graph(tuple(self._seen), tuple(self._taken)).digest() if not divergence else ""
        steps = sum(map(len, self._taken))
        return Conformance(len(self._seen), steps, self._refused, whole, divergence)

    def _visit(self, at: int) -> Divergence | None:
        """Try everything in one state."""
        way = self._ways[at]
        allowed: dict[Action, set[int]] = defaultdict(set)
        for action, to in self._graph.steps[at]:
            allowed[action].add(to)
        led: dict[Action, set[int]] = defaultdict(set)
        runtime = self._at(way)
        self._seen.append(runtime.state())
        before = runtime.snapshot()
        for tried in tuple(runtime.attempts()):
            try:
                after = self._outcome(at, tried, runtime, before)
            except Exception as error:  # where no spec could lead, there may be nothing to show
                return Divergence(way, tried, f"it raises {type(error).__name__}: {error}")
            if isinstance(after, str):
                return Divergence(way, tried, after)
            if after is None:
                self._refused += 1
                continue
            led[tried.action].add(after)
            self._ways.setdefault(after, (*way, tried))
            runtime = self._at(way)
        for action, targets in allowed.items():
            if targets - led[action]:
                return Divergence(way, Tried(action), "the spec allows it, the runtime refuses it")
        self._taken.append(tuple((a, to) for a, targets in led.items() for to in targets))
        return None

    def _at(self, way: Iterable[Tried]) -> Runtime:
        runtime = Runtime(self._spec)
        for tried in way:
            runtime.take(tried)
        return runtime

    def _outcome(
        self, at: int, tried: Tried, runtime: Runtime, before: Mapping[str, Any]
    ) -> int | str | None:
        """The state that an action led to, None if it was refused, or what was wrong with that."""
        if not runtime.take(tried):
            changed = runtime.reported or runtime.snapshot() != before
            return "it is refused, and yet something changed" if changed else None
        return self._wrong(at, tried, runtime) or self._numbers[runtime.state()]

    def _wrong(self, at: int, tried: Tried, runtime: Runtime) -> str:
        """What an action that was taken should not have done; empty if it is the spec's."""
        if runtime.reported != {tried.action.name}:
            return f"it reports {', '.join(sorted(runtime.reported)) or 'nothing'}"
        if amiss := runtime.amiss():
            return "; ".join(amiss)
        wanted = [self._graph.states[to] for a, to in self._graph.steps[at] if a == tried.action]
        if not wanted:
            return "the spec forbids it, the runtime does it"
        got = runtime.state()
        if got in wanted:
            return ""
        names = visible(self._spec.variables)
        old, new = (Step("", (), dict(zip(names, s, strict=True))) for s in (wanted[0], got))
        differs = "; ".join(
            f"{path} is {is_}, the spec has {was}" for path, was, is_ in changes(old, new)
        )
        return f"it leads elsewhere: {differs}"
