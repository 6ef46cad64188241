"""The search by the interpreter: what cpp/checker/search.hpp does, for small models, in Python.

Rule: the same order, so the same counts and the same counterexample. Under SYMMETRY another state
may stand for its class, so that the counts up to a violation may differ; the whole never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, final

from attrs import frozen

from tokenspeed.errors import SpecError
from tokenspeed.fsm.core import walk
from tokenspeed.fsm.emit_model import CompiledModel
from tokenspeed.fsm.evaluate import Label, State
from tokenspeed.fsm.steps import Step
from tokenspeed.fsm.symmetry import canonical, mentions
from tokenspeed.fsm.syntax import Span

__all__ = ["Outcome", "Reached", "Result", "Search", "ended"]

Result = Literal["ok", "invariant", "deadlock", "liveness", "error"]
Reached = dict[State, tuple[State, Label] | None]
"""Each state that was found, in this order, and how it was first reached; None for a start."""


@frozen
class Outcome:
    """What a search came to; the fields are `Report`'s."""

    result: Result
    violated: str | None = None
    trace: tuple[Step, ...] = ()
    loop: int | None = None


def ended(search: Callable[[], Outcome], behaviour: Callable[[], tuple[Step, ...]]) -> Outcome:
    """The outcome of a search, or why it has none; what was found so far stands.

    Args:
        behaviour: that led to where the search ended.
    """
    try:
        return search()
    except SpecError as error:  # something has no value
        why = str(error)
    except KeyboardInterrupt:
        why = "interrupted"
    except MemoryError:
        why = "out of memory"
    return Outcome("error", why, behaviour())


@final
class Search:
    """Breadth first through the states that keep to the constraints.

    Args:
        core: the model, read.
        states_max: how many states to enter at most, or None.
        initial: the place of the initial state to begin with, or None.

    Attributes:
        reached: the states; under SYMMETRY one of each class.
        generated, depth, actions: as in `Report`.
        successors: of a state, in the order of the spec.
        canonical: the state that stands for a state.
    """

    def __init__(
        self, core: CompiledModel, states_max: int | None, initial: int | None = None
    ) -> None:
        evaluator, config, asked = core.model.evaluator, core.model.config, core.asked
        evaluator.single |= _single(core)
        self.reached: Reached = {}
        self.generated = self.depth = 0
        self.actions = dict.fromkeys(
            evaluator.action_names(evaluator.definition(config.next).body), 0
        )
        self.successors = evaluator.successors(config.next)
        self._evaluator, self._config, self._states_max = evaluator, config, states_max
        self._initial = initial
        self.canonical = canonical(core.symmetric, core.variables, Span(config.path, 1, 1))
        self._initially = [(name, evaluator.expression(e)) for name, e in asked.initially]
        self._invariants = [(name, evaluator.expression(e)) for name, e in asked.invariants]
        self._steps = [(name, evaluator.step_predicate(e)) for name, e in asked.steps]
        self._inside = [evaluator.predicate(name) for name in config.constraints]
        self._step_inside = [
            evaluator.step_predicate(evaluator.definition(name).body)
            for name in config.action_constraints
        ]
        self._symmetric = bool(core.symmetric)
        self._at: State | None = None

    def run(self) -> Outcome:
        """Until all is seen, or something is violated or has no value."""
        return ended(lambda: self._start() or self._levels(), lambda: self.behaviour(self._at))

    def step_inside(self, state: State, after: State) -> bool:
        """Does a step keep to every ACTION_CONSTRAINT?"""
        return all(holds(state, after) for holds in self._step_inside)

    def behaviour(self, at: State | None) -> tuple[Step, ...]:
        """A shortest one to a state that was reached; empty for None."""
        path: list[tuple[Label, State]] = []
        while at is not None:
            origin = self.reached[at]
            path.append((origin[1] if origin else ("", ()), at))
            at = origin and origin[0]
        path.reverse()
        if not path or not self._symmetric:
            return tuple(self.told(*label, state) for label, state in path)
        starts = self._evaluator.starts(self._config.init)
        first = next(state for state in starts if self.canonical(state) == path[0][1])
        return self.along(self.told("", (), first), (state for _, state in path[1:]))

    def along(self, begin: Step, path: Iterable[State]) -> tuple[Step, ...]:
        """The steps from a state through others, each the first that leads there."""
        steps = [begin]
        for to in path:
            state = tuple(steps[-1].state.values())
            found = ((la, t) for la, t in self.successors(state) if self.canonical(t) == to)
            (name, args), after = next(found, (("stutter", ()), state))
            steps.append(self.told(name, args, after))
        return tuple(steps)

    def told(self, name: str, args: tuple[object, ...], state: State) -> Step:
        """A step with the state that it leads to."""
        return Step(name, args, dict(zip(self._evaluator.variables, state, strict=True)))

    # --- the search -----------------------------------------------------------------------------

    def _start(self) -> Outcome | None:
        found = None
        for place, state in enumerate(self._evaluator.starts(self._config.init)):
            if self._initial is not None and place != self._initial:
                continue
            self.generated += 1
            inside = all(holds(state) for holds in self._inside)
            key = self.canonical(state)
            if found is not None or key in self.reached:
                continue
            why = self._broken(state) or next(
                (name for name, holds in self._initially if not holds(state)), None
            )
            if inside or why:
                self.reached[key] = None
            if why:
                found = Outcome("invariant", why, self.behaviour(key))
        return found

    def _levels(self) -> Outcome:
        frontier = list(self.reached)
        while frontier:
            self.depth += 1
            following: list[State] = []
            for at in frontier:
                found = self._expand(at, following)
                if found is not None:
                    return found
            frontier = following
        return Outcome("ok")

    def _expand(self, at: State, following: list[State]) -> Outcome | None:
        self._at = at
        before = self.generated
        for label, after in self.successors(at):
            self.generated += 1
            self.actions[label[0]] += 1
            found = self._judge(at, label, after, following)
            if found is not None:
                return found
        if self._config.check_deadlock and self.generated == before:
            return Outcome("deadlock", "deadlock", self.behaviour(at))
        return None

    def _judge(
        self, at: State, label: Label, after: State, following: list[State]
    ) -> Outcome | None:
        """What is to be said of a step; if nothing, a new state that it leads to is entered."""
        wrong = next((name for name, holds in self._steps if not holds(at, after)), None)
        if wrong:
            return Outcome("invariant", wrong, self._ending(at, label, after))
        key = self.canonical(after)
        if key in self.reached:
            return None
        inside = all(holds(after) for holds in self._inside) and self.step_inside(at, after)
        bad = self._broken(after)
        if not inside and not bad:
            return None
        if not bad and self._states_max is not None and len(self.reached) >= self._states_max:
            return Outcome("error", "the limit of states was reached", self.behaviour(at))
        self.reached[key] = (at, label)
        following.append(key)
        return Outcome("invariant", bad, self._ending(at, label, after)) if bad else None

    def _broken(self, state: State) -> str | None:
        return next((name for name, holds in self._invariants if not holds(state)), None)

    def _ending(self, at: State, label: Label, after: State) -> tuple[Step, ...]:
        """The behaviour that a step ends; where another state stands for `at`, a step like it."""
        steps = self.behaviour(at)
        state = tuple(steps[-1].state.values())
        if state == at:
            return (*steps, self.told(*label, after))
        (name, args), bad = next(
            (like, t)
            for like, t in self.successors(state)
            if self._broken(t) or any(not holds(state, t) for _, holds in self._steps)
        )
        return (*steps, self.told(name, args, bad))


def _single(core: CompiledModel) -> set[Span]:
    """Where a choice could tell interchangeable names apart."""
    if not core.symmetric:
        return set()
    properties = core.properties
    said = [core.initial, *core.constraints, *core.step_constraints]
    said += [action.body for action in core.actions]
    said += [node for action in core.actions for node in action.args]
    said += [domain for action in core.actions for _, domain in action.binders]
    said += [n for _, n in (*properties.initially, *properties.invariants, *properties.steps)]
    return {
        node.span
        for node in walk(tuple(said))
        if node.op == "choose" and mentions(node.type, core.symmetric)
    }
