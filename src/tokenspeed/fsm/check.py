"""Breadth-first search over the interpreter: counts, invariants, shortest counterexamples.

Rule: exact states, a fixed order, the same counts as the standard tools. This is the oracle's own
search, for small bounds; symmetry and liveness are refused rather than approximated.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from attrs import field, frozen

from tokenspeed.errors import SpecError
from tokenspeed.fsm.evaluate import Label, State
from tokenspeed.fsm.model import Model, load_model
from tokenspeed.fsm.values import show

__all__ = ["Report", "check", "explore"]


@frozen
class Report:
    """The outcome of a search.

    Attributes:
        result: `ok`, or what failed.
        generated: successors computed, initial states included, repetitions counted.
        distinct: different states.
        depth: states on the longest shortest path.
        actions: successors by action name.
        violated: the invariant that does not hold, or None.
        trace: labels of a shortest way to the violation.
    """

    result: Literal["ok", "invariant", "deadlock"]
    generated: int
    distinct: int
    depth: int
    actions: dict[str, int]
    violated: str | None = None
    trace: tuple[str, ...] = field(default=())


def check(spec: Path, config: Path) -> Report:
    """Check the invariants of a configuration in every reachable state.

    Raises:
        SpecError: the spec or the configuration is outside the subset.
    """
    model = load_model(spec, config)
    if model.config.symmetry is not None:
        raise SpecError(config, 1, 1, "SYMMETRY is not supported by the interpreter; leave it out")
    if model.config.properties:
        raise SpecError(config, 1, 1, "PROPERTY is not supported by the interpreter; leave it out")
    report, _ = explore(model)
    return report


def explore(model: Model) -> tuple[Report, dict[State, tuple[State, Label] | None]]:
    """Search breadth first; also returns each state with how it was first reached."""
    config, evaluator = model.config, model.evaluator
    invariants = [(name, evaluator.predicate(name)) for name in config.invariants]
    successors = evaluator.successors(config.next)
    reached: dict[State, tuple[State, Label] | None] = {}
    frontier: list[State] = []
    generated, depth, actions = 0, 0, Counter[str]()

    def report(result: Literal["ok", "invariant", "deadlock"], at: State | None = None) -> Report:
        bad = next((n for n, holds in invariants if at is not None and not holds(at)), None)
        trace = () if at is None else _trace(reached, at)
        return Report(result, generated, len(reached), depth, dict(actions), bad, trace)

    for state in evaluator.initial(config.init):
        generated += 1
        if state not in reached:
            reached[state] = None
            frontier.append(state)
    for state in frontier:
        if not all(holds(state) for _, holds in invariants):
            return report("invariant", state), reached
    while frontier:
        depth += 1
        following: list[State] = []
        for state in frontier:
            before = generated
            for label, after in successors(state):
                generated += 1
                actions[label[0]] += 1
                if after in reached:
                    continue
                reached[after] = (state, label)
                following.append(after)
                if not all(holds(after) for _, holds in invariants):
                    return report("invariant", after), reached
            if config.check_deadlock and generated == before:
                return report("deadlock", state), reached
        frontier = following
    return report("ok"), reached


def _trace(reached: dict[State, tuple[State, Label] | None], state: State) -> tuple[str, ...]:
    steps: list[str] = []
    origin = reached[state]
    while origin is not None:
        before, (name, args) = origin
        steps.append(f"{name}({', '.join(map(show, args))})" if args else name)
        origin = reached[before]
    return tuple(reversed(steps))
