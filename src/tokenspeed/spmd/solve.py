"""The cheapest plan: a form for every call, and for every value the tree of moves to its consumers.

Rule: the search is exact. It walks the calls once and keeps, for each way in which the values that
are still wanted can lie, the cheapest way there; a state goes when another one could imitate it at
no greater cost. The price of a value is that of its whole tree, paid at its last use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

from attrs import define, field, frozen

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.cost import Costs
from tokenspeed.spmd.forms import Form, forms
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.moves import Kind, Moves, Tree
from tokenspeed.spmd.placement import Boundary, Layout, Partial
from tokenspeed.spmd.trace import Trace, Value

__all__ = ["Solution", "solve"]

_RIVALS = 8
"""Of the states before it, how many a state is compared with."""


@final
@frozen(eq=False)
class Solution:
    """The plan.

    Attributes:
        forms: of each call, in order.
        given: where each value lies when it is made, by its number.
        trees: how it gets to its consumers, by its number.
        result: where the result is wanted.
        costs: that it is cheapest by.
        cost_s: of all moves and forms.
    """

    forms: tuple[Form, ...]
    given: Mapping[int, Layout]
    trees: Mapping[int, Tree]
    result: Layout
    costs: Costs
    cost_s: float


_Live = tuple[tuple[int, Layout, frozenset[Layout]], ...]
"""Of each value that is still wanted: its number, where it was made, and where it is wanted."""


@final
@frozen(eq=False)
class _State:
    """The cheapest way to some lie of the live values."""

    cost_s: float
    before: _State | None
    form: Form | None


@final
@define(eq=False)
class _Search:
    trace: Trace
    mesh: Mesh
    batch: Layout
    costs: Costs
    last_use: dict[int, int] = field(factory=dict)
    moves: dict[Kind, Moves] = field(factory=dict)
    of_value: dict[int, Moves] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for value in self.trace.values:
            kind = value.kind
            if kind not in self.moves:
                self.moves[kind] = Moves(kind, self.mesh, self.costs, self.batch)
            self.of_value[value.number] = self.moves[kind]
        for at, call in enumerate(self.trace.calls):
            for value in call.uses.values():
                self.last_use[value.number] = at

    def after(
        self,
        states: Mapping[_Live, _State],
        at: int,
        uses: Mapping[str, Value],
        options: Sequence[Form],
    ) -> dict[_Live, _State]:
        """The states after call `at`, whose forms are given."""
        outputs = self.trace.calls[at].outputs if at < len(self.trace.calls) else ()
        found: dict[_Live, _State] = {}
        for live, state in states.items():
            for form in options:
                wants: dict[int, set[Layout]] = {}
                for name, value in uses.items():
                    wants.setdefault(value.number, set()).add(form.inputs[name])
                moved = self._moved(live, wants, at)
                if moved is None:
                    continue
                rest, cost = moved
                made = tuple(
                    (value.number, lies, frozenset[Layout]())
                    for value, lies in zip(outputs, form.outputs, strict=True)
                    if self.last_use.get(value.number, -1) > at
                )
                total = state.cost_s + cost + form.cost_s
                known = found.get((*rest, *made))
                if known is None or total < known.cost_s:
                    found[*rest, *made] = _State(total, state, form)
        return self._undominated(found)

    def _moved(
        self, live: _Live, wants: Mapping[int, set[Layout]], at: int
    ) -> tuple[_Live, float] | None:
        """The live values after some are used, and what those cost that nobody wants again."""
        rest, cost = [], 0.0
        for entry in live:
            number, given, wanted = entry
            if number not in wants:
                rest.append(entry)
                continue
            moves = self.of_value[number]
            if any(math.isinf(moves.distance(given, lies)) for lies in wants[number]):
                return None
            wanted = wanted | (wants[number] - {given})
            if self.last_use[number] > at:
                rest.append((number, given, wanted))
            else:
                cost += moves.tree(given, wanted)[0]
        return tuple(rest), cost

    def _undominated(self, found: dict[_Live, _State]) -> dict[_Live, _State]:
        """Without the states that a cheaper one can imitate by moving its values first."""
        kept: dict[_Live, _State] = {}
        for live, state in sorted(found.items(), key=lambda item: item[1].cost_s):
            rivals = list(kept.items())[:_RIVALS]
            if not any(
                other.cost_s + self._detour(rival, live) <= state.cost_s for rival, other in rivals
            ):
                kept[live] = state
        return kept

    def _detour(self, rival: _Live, live: _Live) -> float:
        """What it costs at most to go on from the rival's lie as from the other one."""
        cost = 0.0
        for (number, given, wanted), (_, other, others) in zip(rival, live, strict=True):
            if not wanted <= others | {other, given}:
                return math.inf
            cost += self.of_value[number].distance(given, other)
        return cost


def solve(
    trace: Trace, result: Value, wanted: Boundary, *, mesh: Mesh, batch: Layout, costs: Costs
) -> Solution:
    """Find the cheapest plan of a traced model.

    Args:
        trace: of the model.
        result: the value that it returns.
        wanted: how the result is to lie.
        mesh: the mesh.
        batch: how the fields of the batch lie.
        costs: of the machine.

    Raises:
        PlacementError: there is no plan; the message names the first boundary that has none.
    """
    search = _Search(trace, mesh, batch, costs)
    search.last_use[result.number] = len(trace.calls)
    lies = batch.within(mesh)
    states: dict[_Live, _State] = {
        tuple((v.number, lies, frozenset[Layout]()) for v in trace.fields.values()): _State(
            0.0, None, None
        )
    }
    known: dict[tuple[object, ...], list[Form]] = {}
    for at, call in enumerate(trace.calls):
        kinds = tuple(v.kind for v in (*call.uses.values(), *call.outputs))
        key = (call.module, tuple(call.uses), kinds)
        if key not in known or call.module.routed:
            known[key] = forms(call, mesh, batch, costs)
        after = search.after(states, at, call.uses, known[key])
        if not after:
            raise _unsolvable(search, states, call.uses, known[key], call.path, at)
        states = after
    final = wanted.resolve(batch, Layout()).within(mesh)
    last = Form({"result": final}, ())
    after = search.after(states, len(trace.calls), {"result": result}, [last])
    if not after:
        raise _unsolvable(
            search, states, {"result": result}, [last], "the output", len(trace.calls)
        )
    return _told(search, min(after.values(), key=lambda state: state.cost_s), result, final)


def _told(search: _Search, best: _State, result: Value, final: Layout) -> Solution:
    """The plan that a final state stands for."""
    chosen: list[Form] = []
    state: _State | None = best
    while state is not None and state.form is not None:
        chosen.append(state.form)
        state = state.before
    chosen = chosen[:0:-1]  # in order, and without the result's own
    lies = search.batch.within(search.mesh)
    given = {value.number: lies for value in search.trace.fields.values()}
    wanted: dict[int, set[Layout]] = {result.number: {final}}
    for call, form in zip(search.trace.calls, chosen, strict=True):
        given |= {v.number: one for v, one in zip(call.outputs, form.outputs, strict=True)}
        for name, value in call.uses.items():
            wanted.setdefault(value.number, set()).add(form.inputs[name])
    trees = {
        number: search.of_value[number].tree(given[number], frozenset(some - {given[number]}))[1]
        for number, some in wanted.items()
    }
    return Solution(tuple(chosen), given, trees, final, search.costs, best.cost_s)


def _unsolvable(
    search: _Search,
    states: Mapping[_Live, _State],
    uses: Mapping[str, Value],
    options: Sequence[Form],
    path: str,
    at: int,
) -> PlacementError:
    """Why no form of a call can be reached: the first boundary that is in the way."""
    mesh = search.mesh
    if not options:
        call = search.trace.calls[at]
        shapes = [list(v.kind.shape) for v in (*call.uses.values(), *call.outputs)]
        declared = ", ".join(map(str, call.module.boundaries))
        return PlacementError(
            f"{path}: tensors {shapes} do not divide as its boundaries say ({declared}) on the "
            f"mesh {mesh}; pad the dim to a multiple of the ranks, or choose another mesh"
        )
    live = {number: given for number, given, _ in min(states.items(), key=lambda s: s[1].cost_s)[0]}
    for name, value in uses.items():
        given, wanted = live[value.number], options[0].inputs[name]
        if not math.isinf(search.of_value[value.number].distance(given, wanted)):
            continue
        return PlacementError(
            f"{path} wants {wanted} of {name}, {value.producer} gives {given} on the mesh {mesh}: "
            f"{_reason(search, value, given, wanted)}. Declare another input placement for {path} "
            f"or another output of {value.producer}"
        )
    return PlacementError(f"{path}: no form of it fits what its producers give on the mesh {mesh}")


def _reason(search: _Search, value: Value, given: Layout, wanted: Layout) -> str:
    kind = value.kind
    for axis, placement in wanted.axes:
        if isinstance(placement, Partial) and not isinstance(given.on(axis), Partial):
            return f"along {axis} nothing turns {given.having(axis, given.on(axis))} into summands"
    for lies in (given, wanted):
        if not kind.admits(lies, search.mesh):
            return f"{list(kind.shape)} does not divide into the slices of {lies}"
    return "no sequence of collectives leads from one to the other"
