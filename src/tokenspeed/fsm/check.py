"""Model checking: a spec and a configuration to a verdict, counts, and a shortest counterexample.

Rule: the compiled model searches (cpp/checker); the interpreter is its oracle, and stands in where
there is no C++ compiler, and says so. Both give the same counts, whatever the number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen

from tokenspeed.fsm import compiled
from tokenspeed.fsm.emit_model import CompiledModel, read_model
from tokenspeed.fsm.interpret import Outcome, Reached, Result, Search
from tokenspeed.fsm.liveness import live
from tokenspeed.fsm.model import Model, load_model
from tokenspeed.fsm.steps import Step

__all__ = ["ENDED_EARLY", "Report", "Settings", "check", "explore", "simulate", "state_graph"]

Progress = Callable[[dict[str, int]], None]

ENDED_EARLY = (
    "interrupted", "out of memory", "the memory limit was reached",
    "the limit of states was reached",
)  # fmt: skip
"""`Report.violated` of a check that did not come to its end; any other error is the spec's."""


@frozen
class Report:
    """The outcome of a check.

    Attributes:
        result: `ok`, or what failed; `error` if the check itself did, and the counts are partial.
        generated: successors computed, initial states included, repetitions counted.
        distinct: different states; of the classes, under symmetry.
        depth: states on the longest shortest path.
        seconds: of CPU time, compilation excluded.
        actions: successors by action name; one that never happens counts 0.
        violated: the property that does not hold, or what went wrong; None if all is well.
        trace: a shortest behaviour that shows it, the initial state first.
        loop: of a liveness counterexample: the step to which the last one leads back.
        engine: who searched.
        notes: what a reader should know of the result.
    """

    result: Result
    generated: int
    distinct: int
    depth: int
    seconds: float
    actions: dict[str, int]
    violated: str | None = None
    trace: tuple[Step, ...] = field(default=())
    loop: int | None = None
    engine: Literal["compiled", "interpreter"] = "compiled"
    notes: tuple[str, ...] = ()

    @property
    def dead(self) -> tuple[str, ...]:
        """Actions that never happened: what is said of them holds vacuously."""
        return tuple(name for name, count in self.actions.items() if count == 0)

    def json(self) -> dict[str, Any]:
        """For programs."""
        plain = attrs.asdict(self, recurse=False)
        return {**plain, "trace": [step.json() for step in self.trace], "dead": list(self.dead)}


@frozen
class Settings:
    """How to search.

    Attributes:
        workers: threads of the compiled model; the counts do not depend on them.
        memory_mb: what the states may take; beyond it the check ends with partial counts.
        states_max: how many states to enter at most, or None.
        initial: the place of the initial state to begin with, from 0; None begins with all.
        engine: `auto` compiles where there is a compiler.
    """

    workers: int = 1
    memory_mb: int = 4096
    states_max: int | None = None
    initial: int | None = None
    engine: Literal["auto", "compiled", "interpreter"] = "auto"


def _quiet(_: dict[str, int]) -> None:
    """Progress that nobody watches."""


def check(
    spec: Path, config: Path, settings: Settings | None = None, progress: Progress = _quiet
) -> Report:
    """Check all that a configuration asks for.

    Args:
        progress: is told `generated`, `distinct`, `depth` and `queue`, a few times a second.

    Raises:
        SpecError: the spec or the configuration is outside the subset.
        TokenSpeedError: the model could not be compiled or run.
    """
    settings = settings or Settings()
    model = load_model(spec, config)
    if settings.engine == "interpreter" or (
        settings.engine == "auto" and compiled.compiler() is None
    ):
        return _interpreted(model, settings)
    core = read_model(model)
    return _report(compiled.run(core, _options(settings), progress), _bounded(core))


def _bounded(core: CompiledModel) -> tuple[str, ...]:
    """What a reader should know of liveness under a CONSTRAINT."""
    if core.properties.debts and (core.constraints or core.step_constraints):
        return ("liveness was checked of the behaviours that keep to the CONSTRAINT, no others",)
    return ()


def simulate(
    spec: Path, config: Path, *, walks: int, depth: int, seed: int, progress: Progress = _quiet
) -> Report:
    """Random behaviours of a model that is too large to enumerate; the same for the same seed.

    Args:
        walks: how many behaviours.
        depth: steps of each, at most.

    Returns:
        `distinct` and `depth` are 0: nothing is counted but steps.
    """
    core = read_model(load_model(spec, config))
    found = compiled.run(core, {"walks": walks, "walk_depth": depth, "seed": seed}, progress)
    note = f"{found['walks']} random behaviours of at most {depth} steps, seed {seed}"
    if core.properties.debts:
        note += "; liveness was not checked"
    return _report({"distinct": 0, "depth": 0, "cpu_seconds": found["seconds"], **found}, (note,))


def _report(found: dict[str, Any], notes: tuple[str, ...]) -> Report:
    trace = tuple(
        Step(
            step["action"],
            tuple(map(compiled.decode, step["args"])),
            {name: compiled.decode(value) for name, value in step["state"].items()},
        )
        for step in found["trace"]
    )
    return Report(
        found["result"], found["generated"], found["distinct"], found["depth"],
        found["cpu_seconds"], found["actions"], found["violated"], trace, found.get("loop"),
        notes=notes,
    )  # fmt: skip


def state_graph(spec: Path, config: Path, path: Path, settings: Settings | None = None) -> Report:
    """Check, and write every reachable state with its steps to `path`, a line of JSON each.

    A line is `{"state": {...}, "steps": [[action, args, number], ...]}`; the number is the line of
    the state that the step leads to, from 0.
    """
    settings = settings or Settings()
    core = read_model(load_model(spec, config))
    return _report(compiled.run(core, {**_options(settings), "graph": path}, _quiet), ())


def _options(settings: Settings) -> dict[str, object]:
    """What the compiled model is told."""
    options: dict[str, object] = {"workers": settings.workers, "memory_mb": settings.memory_mb}
    if settings.states_max is not None:
        options["states_max"] = settings.states_max
    if settings.initial is not None:
        options["initial"] = settings.initial
    return options


# --- the interpreter ----------------------------------------------------------------------------


def _interpreted(model: Model, settings: Settings) -> Report:
    """The same by the interpreter, for small models."""
    begin = time.process_time()
    core = read_model(model)
    search = Search(core, settings.states_max, settings.initial)
    outcome = search.run()
    if outcome.result == "ok" and core.properties.debts:
        outcome = live(core, search)
    notes = _bounded(core)
    if settings.engine == "auto":
        notes = ("no C++ compiler was found: interpreted, slowly", *notes)
    return attrs.evolve(_found(search, outcome, begin), notes=notes)


def explore(model: Model, states_max: int | None = None) -> tuple[Report, Reached]:
    """Search breadth first, liveness aside; also returns each state with how it was reached."""
    begin = time.process_time()
    search = Search(read_model(model), states_max)
    return _found(search, search.run(), begin), search.reached


def _found(search: Search, outcome: Outcome, begin: float) -> Report:
    seconds = time.process_time() - begin
    return Report(
        outcome.result, search.generated, len(search.reached), search.depth, seconds,
        search.actions, outcome.violated, outcome.trace, outcome.loop, engine="interpreter",
    )  # fmt: skip
