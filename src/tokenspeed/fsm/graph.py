"""The state graph of a model as values: what can be reached, and by which steps.

Rule: the checker searches, here its result is read; states are numbered as they were found.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Report, Settings, state_graph
from tokenspeed.fsm.emit_model import read_model
from tokenspeed.fsm.interpret import Search
from tokenspeed.fsm.model import Model, load_model
from tokenspeed.fsm.steps import Step, called
from tokenspeed.fsm.values import Value

__all__ = ["StateGraph", "Steps", "compiled_steps", "read_state_graph"]

Steps = list[tuple[int, Step, int]]
"""(from, what happened, to), by the states' numbers."""

State = Mapping[str, Value]


@frozen
class StateGraph:
    """States and the labelled steps between them, by number.

    Attributes:
        states: variable -> value, in the order in which they were found.
        steps: (from, label, to), each once.
        initial: states that a behaviour may start in.
        violating: states that break what was checked.
    """

    states: tuple[State, ...]
    steps: tuple[tuple[int, str, int], ...]
    initial: frozenset[int]
    violating: frozenset[int] = frozenset()


def read_state_graph(spec: Path, config: Path, settings: Settings, report: Report) -> StateGraph:
    """The graph of a model that has been checked, up to where the check ended.

    Args:
        report: what the check said.

    Raises:
        SpecError: the spec or the configuration is outside the subset.
        TokenSpeedError: the model could not be compiled or run.
    """
    model = load_model(spec, config)
    names = model.evaluator.variables
    if report.engine == "compiled":
        _, found, steps = compiled_steps(spec, config, settings)
    else:
        found, steps = _interpreted(model, settings)
    starts = set(model.evaluator.initial(model.config.init))
    values = [tuple(state[name] for name in names) for state in found]
    if report.violated in model.config.invariants:
        holds = model.evaluator.predicate(report.violated)
        violating = {at for at, state in enumerate(values) if not holds(state)}
    else:
        broke = report.result in ("invariant", "deadlock")  # in one state, not by a whole behaviour
        bad = [step.state for step in report.trace[-1:]] if broke else []
        violating = {at for at, state in enumerate(found) if state in bad}
    return StateGraph(
        tuple(found),
        tuple(dict.fromkeys((at, called(step), to) for at, step, to in steps)),
        frozenset(at for at, state in enumerate(values) if state in starts),
        frozenset(violating),
    )


def compiled_steps(
    spec: Path, config: Path, settings: Settings
) -> tuple[Report, list[State], Steps]:
    """All that the compiled model reaches, and what its check said: was it all?"""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.ndjson"
        report = state_graph(spec, config, path, settings)
        with path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    decode = compiled.decode
    states: list[State] = [{name: decode(v) for name, v in line["state"].items()} for line in lines]
    steps = [
        (at, Step(action, tuple(map(decode, args)), dict(states[to])), to)
        for at, line in enumerate(lines)
        for action, args, to in line["steps"]
    ]
    return report, states, steps


def _interpreted(model: Model, settings: Settings) -> tuple[list[State], Steps]:
    search = Search(read_model(model), settings.states_max, settings.initial)
    search.run()
    numbers = {state: at for at, state in enumerate(search.reached)}
    names = model.evaluator.variables
    states: list[State] = [dict(zip(names, state, strict=True)) for state in numbers]
    steps = [
        (at, Step(action, args, dict(states[to])), to)
        for state, at in numbers.items()
        for (action, args), after in search.successors(state)
        if (to := numbers.get(search.canonical(after))) is not None
        and search.step_inside(state, after)
    ]
    return states, steps
