"""Liveness by the interpreter: is there a fair behaviour that never does what it should?

Rule: what cpp/checker/liveness.hpp does, in the same order, so that a counterexample is the same:
the whole graph, without symmetry; a behaviour may stutter for ever wherever fairness lets it, and
under a CONSTRAINT it keeps to it.

A property is refuted by a path to a state where it starts to be owed, from there within states that
do not pay, into a strongly connected component that is fair (Tarjan 1972; strong fairness as in
Emerson & Lei 1987, by removing the states where the neglected action is enabled).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import final

from tokenspeed.fsm.emit_model import CompiledModel
from tokenspeed.fsm.evaluate import UNSET
from tokenspeed.fsm.interpret import Outcome, Search, ended
from tokenspeed.fsm.syntax import Expr
from tokenspeed.fsm.temporal import Debt, Fairness

__all__ = ["live"]


def live(core: CompiledModel, search: Search) -> Outcome:
    """Refute the liveness properties of a model whose states have all been reached."""
    return ended(lambda: _Liveness(core, search).run(), lambda: ())


@final
class _Liveness:
    """States are numbered as they were reached."""

    def __init__(self, core: CompiledModel, search: Search) -> None:
        self._search, self._debts = search, core.asked.debts
        self._evaluator = core.model.evaluator
        self._states = list(search.reached)
        self._numbers = {state: at for at, state in enumerate(self._states)}
        self._edges = [self._followers(state) for state in self._states]
        self._fairness = [fair for fair, _ in core.fairness]
        self._takes = [self._evaluator.steps(fair.action, {}) for fair in self._fairness]
        self._known: dict[tuple[int, int], tuple[bool, list[int]]] = {}

    def run(self) -> Outcome:
        """The first property that fails, if one does."""
        for debt in self._debts:
            found = self._refute(debt)
            if found is not None:
                return found
        return Outcome("ok")

    def _followers(self, state: tuple[object, ...]) -> list[int]:
        numbers, inside = self._numbers, self._search.step_inside
        after = (t for _, t in self._search.successors(state))
        return sorted({numbers[t] for t in after if t in numbers and inside(state, t)})

    def _refute(self, debt: Debt[Expr]) -> Outcome | None:
        starts, owing, visited = (
            [bool(holds(state)) for state in self._states]
            for holds in map(self._evaluator.expression, (debt.starts, debt.owing, debt.visited))
        )
        if debt.from_start:
            origins = self._search.reached.values()
            starts = [yes and origin is None for yes, origin in zip(starts, origins, strict=True)]
        begin = [at for at in range(len(self._states)) if starts[at] and owing[at]]
        came = self._closure(begin, owing.__getitem__)
        component = self._fair_component(sorted(came), visited)
        return self._witness(debt.name, component, visited, came) if component else None

    def _closure(self, begin: list[int], within: Callable[[int], bool]) -> dict[int, int | None]:
        """What is reached without leaving `within`, breadth first, and from where."""
        came: dict[int, int | None] = dict.fromkeys(begin)
        queue = list(begin)
        for at in queue:
            for to in self._edges[at]:
                if to not in came and within(to):
                    came[to] = at
                    queue.append(to)
        return came

    # --- fairness -------------------------------------------------------------------------------

    def _fair(self, k: int, at: int) -> tuple[bool, list[int]]:
        """Is condition k enabled in a state, and where do its steps lead within the graph?"""
        if (k, at) not in self._known:
            state, fair = self._states[at], self._fairness[k]
            after = list(self._takes[k](state))
            for each in after:
                self._refuse_missing(fair, each)
            moved = [t for t in after if any(t[i] != state[i] for i in fair.subscript)]
            goals = (self._numbers[t] for t in moved if t in self._numbers)
            inside = [to for to in goals if to in self._edges[at]]
            self._known[k, at] = bool(moved), inside
        return self._known[k, at]

    def _refuse_missing(self, fair: Fairness, after: tuple[object, ...]) -> None:
        if UNSET in after:
            missing = self._evaluator.variables[after.index(UNSET)]
            raise fair.action.span.error(
                f"{fair.name} does not say what {missing}' is; add it, or UNCHANGED"
            )

    def _fair_component(self, states: Collection[int], visited: list[bool]) -> list[int]:
        """States in which a fair behaviour can stay for ever and meet `visited`; perhaps none."""
        work = list(self._components(states))
        while work:
            component = work.pop()
            rest = self._judge(component, visited)
            if rest is None:
                return component
            work += self._components(rest)
        return []

    def _judge(self, component: list[int], visited: list[bool]) -> list[int] | None:
        """None if a fair behaviour can stay in the component; else where one might still."""
        if not any(visited[at] for at in component):
            return []
        inside = set(component)
        for k, fair in enumerate(self._fairness):
            enabled = [at for at in component if self._fair(k, at)[0]]
            asked = enabled if fair.strong else len(enabled) == len(component)
            if not asked or any(not inside.isdisjoint(self._fair(k, at)[1]) for at in enabled):
                continue
            return sorted(inside.difference(enabled)) if fair.strong else []
        return None

    def _components(self, states: Collection[int]) -> Iterator[list[int]]:
        """The strongly connected components within `states`, each sorted (Tarjan, iterative)."""
        inside = set(states)
        number: dict[int, int] = {}
        low: dict[int, int] = {}
        opened: dict[int, None] = {}
        for root in states:
            way = [] if root in number else [root]
            following: dict[int, Iterator[int]] = {}
            while way:
                at = way[-1]
                if at not in number:
                    number[at] = low[at] = len(number)
                    opened[at] = None
                    following[at] = iter(self._edges[at])
                to = next((to for to in following[at] if to in inside), None)
                if to is None:
                    way.pop()
                    if way:
                        low[way[-1]] = min(low[way[-1]], low[at])
                    if low[at] == number[at]:
                        yield _closed(opened, at)
                elif to not in number:
                    way.append(to)
                elif to in opened:
                    low[at] = min(low[at], number[to])

    # --- the counterexample ---------------------------------------------------------------------

    def _witness(
        self, name: str, component: list[int], visited: list[bool], came: dict[int, int | None]
    ) -> Outcome:
        """A path into the component and a loop in it that meets every condition."""
        inside = set(component)
        first = component[0]
        approach: list[int] = [first]
        while (origin := came[approach[-1]]) is not None:
            approach.append(origin)
        cycle = [first]
        self._walk(cycle, inside, visited.__getitem__)
        for k in range(len(self._fairness)):
            self._meet(k, cycle, inside)
        self._walk(cycle, inside, lambda at: at == first)
        until = self._search.behaviour(self._states[approach.pop()])
        path = [self._states[at] for at in reversed(approach)]
        loop = len(until) + len(path) - 1
        path += [self._states[at] for at in cycle[1:]]
        return Outcome("liveness", name, (*until[:-1], *self._search.along(until[-1], path)), loop)

    def _meet(self, k: int, cycle: list[int], inside: set[int]) -> None:
        """Go on until condition k is met: where it is not enabled, or by a step of it."""

        def off(at: int) -> bool:
            return not self._fair(k, at)[0]

        def taken(at: int) -> list[int]:
            return [to for to in self._fair(k, at)[1] if to in inside]

        if (all if self._fairness[k].strong else any)(map(off, inside)):
            self._walk(cycle, inside, off)
            return
        self._walk(cycle, inside, lambda at: bool(taken(at)))
        cycle.append(taken(cycle[-1])[-1])

    def _walk(self, cycle: list[int], inside: set[int], wanted: Callable[[int], bool]) -> None:
        """Go on within `inside` by a shortest way to a state that `wanted` accepts."""
        came = self._closure([cycle[-1]], inside.__contains__)
        goal = next(at for at in came if wanted(at))
        way = []
        while (origin := came[goal]) is not None:
            way.append(goal)
            goal = origin
        cycle += reversed(way)


def _closed(opened: dict[int, None], root: int) -> list[int]:
    """Take a component off the stack."""
    component = []
    while True:
        at, _ = opened.popitem()
        component.append(at)
        if at == root:
            return sorted(component)
