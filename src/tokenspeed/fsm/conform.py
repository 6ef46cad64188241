"""Rung three: the real control plane, driven through every reachable state of a small model.

Rule: the model says what to try and what must come of it; the runtime, with its real pages and its
real prefix index, is what is judged. In every state every action is tried with every argument: what
the spec allows must happen and lead where the spec leads, what it does not must be refused and
change nothing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import final

from attrs import frozen

from tokenspeed.errors import ConfigError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Settings, state_graph
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.mirror import Action, Mirror
from tokenspeed.fsm.model import load_model
from tokenspeed.fsm.runtime import VARIABLES, Observed, Runtime, Tried, observed
from tokenspeed.fsm.steps import Step, changes
from tokenspeed.fsm.values import show

__all__ = ["Conformance", "Divergence", "Graph", "conform", "mirrored", "read_graph"]


@frozen
class Graph:
    """A labelled state graph, as far as it can be seen.

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
        ConfigError: the spec lacks a variable of the lifecycle.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.ndjson"
        state_graph(spec, config, path, settings)
        states, steps = [], []
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                states.append(observed({k: compiled.decode(v) for k, v in row["state"].items()}))
                steps.append(
                    tuple((Action(name, tuple(map(compiled.decode, args))), to)
                          for name, args, to in row["steps"])
                )  # fmt: skip
    return Graph(tuple(states), tuple(steps))


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
            found.append((action, numbers[after]))
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
    """What driving the runtime through a model showed.

    Attributes:
        states, steps: of the model; all were reached and taken, unless there is a divergence.
        refused: actions that were tried where the spec does not have them.
        graph: `Graph.digest` of what the runtime did.
        divergence: the first one, or None.
    """

    states: int
    steps: int
    refused: int
    graph: str
    divergence: Divergence | None = None


def conform(spec: Path, config: Path, settings: Settings | None = None) -> Conformance:
    """Drive the runtime through every reachable state of a model.

    Raises:
        SpecError: the model is outside the subset.
        ConfigError: it is not one of the lifecycle.
    """
    without = compiled.compiler() is None
    graph = mirrored(spec, config) if without else read_graph(spec, config, settings)
    return _Walk(load_model(spec, config).evaluator, graph).through_all()


@final
class _Walk:
    """Breadth first through a graph, each state reached by the way that reached it first."""

    def __init__(self, spec: Evaluator, graph: Graph) -> None:
        self._spec = spec
        self._graph = graph
        self._ways: dict[int, tuple[Tried, ...]] = {0: ()}
        self._taken: list[tuple[tuple[Action, int], ...]] = []
        self._refused = 0

    def through_all(self) -> Conformance:
        graph = self._graph
        if len(set(graph.states)) < len(graph.states):
            raise ConfigError("spec", "states that differ in ghosts alone", "ghosts that follow")
        numbers = {state: at for at, state in enumerate(graph.states)}
        divergence = None
        for at in range(len(graph.states)):
            divergence = self._visit(at, numbers)
            if divergence:
                break
        done = Graph(graph.states, tuple(self._taken))
        steps = sum(map(len, graph.steps))
        return Conformance(len(graph.states), steps, self._refused, done.digest(), divergence)

    def _visit(self, at: int, numbers: dict[Observed, int]) -> Divergence | None:
        """Try everything in one state."""
        way = self._ways[at]
        allowed: dict[Action, set[int]] = defaultdict(set)
        for action, to in self._graph.steps[at]:
            allowed[action].add(to)
        led: dict[Action, set[int]] = defaultdict(set)
        runtime = self._at(way)
        for tried in tuple(runtime.attempts()):
            if not runtime.take(tried):
                self._refused += 1
                continue
            if runtime.reported != {tried.action.name}:
                return Divergence(way, tried, f"it reports {', '.join(runtime.reported)}")
            after = numbers.get(runtime.state())
            if after is None or after not in allowed[tried.action]:
                return Divergence(way, tried, self._odd(at, tried, runtime.state()))
            led[tried.action].add(after)
            self._ways.setdefault(after, (*way, tried))
            runtime = self._at(way)
        for action, targets in allowed.items():
            if targets - led[action]:
                return Divergence(way, Tried(action), "the spec allows it, the runtime refuses it")
        if runtime.state() != self._graph.states[at]:
            return Divergence(way, Tried(Action("refused actions")), "they changed something")
        self._taken.append(tuple((a, to) for a, targets in led.items() for to in targets))
        return None

    def _at(self, way: Iterable[Tried]) -> Runtime:
        runtime = Runtime(self._spec)
        for tried in way:
            runtime.take(tried)
        return runtime

    def _odd(self, at: int, tried: Tried, got: Observed) -> str:
        """What an outcome that the spec does not have differs in."""
        wanted = [self._graph.states[to] for a, to in self._graph.steps[at] if a == tried.action]
        if not wanted:
            return "the spec forbids it, the runtime does it"
        old, new = (Step("", (), dict(zip(VARIABLES, s, strict=True))) for s in (wanted[0], got))
        said = "; ".join(
            f"{path} is {is_}, the spec has {was}" for path, was, is_ in changes(old, new)
        )
        return f"it leads elsewhere: {said}"
