"""Collectives beside modules: which of them are begun early, and what of their time that hides.

Rule: calls keep their order. A collective whose value is there before it is wanted is begun as soon
as the value is there, and awaited where it is wanted, if what the modules in between take hides
more of it than beginning and awaiting cost. All ranks of a stage decide alike. Collectives follow
each other, as one queue: a step takes the longer of the two where both are under way, else the sum.

The search (`solve`) adds up, and is exact in that; it does not look for plans that cost more added
up and less beside each other. So a plan with its overlap is never dearer than the cheapest without,
and may be dearer than the cheapest with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from attrs import define, field, frozen

from tokenspeed.spmd.cost import Costs
from tokenspeed.spmd.forms import Form
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.moves import Move
from tokenspeed.spmd.params import Path
from tokenspeed.spmd.solve import Solution
from tokenspeed.spmd.stages import AXIS, HOP
from tokenspeed.spmd.trace import Call, Trace, Value

__all__ = ["Clock", "Schedule", "schedule"]

_NOTHING_S = 1e-12
"""Less is rounding."""


@final
@frozen(eq=False)
class Schedule:
    """What is begun early on this rank.

    Attributes:
        moves: of each call, which of its results are moved on as soon as it is made.
        combines: calls whose summands travel back while others run.
        work_s: what each call of this stage takes, by the model; 0 of others.
    """

    moves: Mapping[int, tuple[tuple[Value, Move], ...]]
    combines: frozenset[int]
    work_s: tuple[float, ...]


@final
@define
class Clock:
    """A step as the model sees it: modules one after the other, and one queue of collectives."""

    now_s: float = 0.0
    free_s: float = 0.0
    ends_s: dict[str, float] = field(factory=dict)

    def work(self, seconds: float) -> None:
        """A module runs."""
        self.now_s += seconds

    def begin(self, name: str, cost_s: float) -> None:
        """A collective joins the queue."""
        self.free_s = self.ends_s[name] = max(self.now_s, self.free_s) + cost_s

    def wait(self, name: str, cost_s: float) -> float:
        """It is awaited; how much of it was hidden (less than 0: it stood behind another one)."""
        waited_s = max(0.0, self.ends_s.pop(name) - self.now_s)
        self.now_s += waited_s
        hidden_s = cost_s - waited_s
        return hidden_s if abs(hidden_s) > _NOTHING_S else 0.0

    def pause(self, cost_s: float) -> float:
        """A collective that is awaited at once."""
        self.begin("", cost_s)
        return self.wait("", cost_s)


def schedule(
    trace: Trace,
    plan: Solution,
    result: Value,
    mesh: Mesh,
    costs: Costs,
    param_bytes: Mapping[Path, int],
) -> Schedule:
    """Choose what is begun early.

    Args:
        trace: of the program.
        plan: that was found for it.
        result: the value that the program returns.
        mesh: as this rank sees it.
        costs: of the machine.
        param_bytes: of this rank's part of each parameter.
    """
    calls, itemsize = trace.calls, trace.bucket.dtype.itemsize
    work = tuple(
        _work_s(call, form, mesh, costs, param_bytes, itemsize)
        for call, form in zip(calls, plan.forms, strict=True)
    )
    first = _first_uses(calls, plan, result)
    moves: dict[int, tuple[tuple[Value, Move], ...]] = {}
    combines = set()

    def hides(at: int, until: int, cost_s: float) -> bool:
        return min(cost_s, sum(work[at + 1 : until])) > costs.begin_s

    for at, (call, form) in enumerate(zip(calls, plan.forms, strict=True)):
        if call.stage != mesh.coordinate(AXIS) or call.module is HOP:
            continue
        if form.sent is not None:
            until = min((first.get(value.number, at) for value in call.outputs), default=at)
            if hides(at, until, form.sent.cost_s[1]):
                combines.add(at)
            continue
        moves[at] = tuple(
            (value, move)
            for value in call.outputs
            for move in plan.trees.get(value.number, ())
            if move.given == plan.given[value.number]
            and move.op != "slice"
            and hides(at, first.get((value.number, move), at), move.cost_s)
        )
    return Schedule(moves, frozenset(combines), work)


def _work_s(
    call: Call,
    form: Form,
    mesh: Mesh,
    costs: Costs,
    param_bytes: Mapping[Path, int],
    itemsize: int,
) -> float:
    """What a call takes: it reads and writes its values and weights, or multiplies by the weights.

    Tables of which it reads single rows count as nothing.
    """
    if call.stage != mesh.coordinate(AXIS) or call.module is HOP:
        return 0.0
    tables = set(call.module.indices.values())
    weights = sum(param_bytes.get(path, 0) for path in call.params if path[-1] not in tables)
    tokens = 1.0
    for name, value in call.uses.items():
        if value.kind.shape:
            tokens = value.kind.shape[0] / form.inputs[name].parts(mesh, 0)
            break
    products_s = 2 * tokens * weights / itemsize / costs.flops_per_s
    return form.touched_s + max(costs.touched_s(weights), products_s)


_Uses = dict[int | tuple[int, Move], int]


def _first_uses(calls: Sequence[Call], plan: Solution, result: Value) -> _Uses:
    """The first call that wants a value, by its number, and a move of it, by both."""
    first: _Uses = {}
    wanted = [
        (at, value, form.inputs[name])
        for at, (call, form) in enumerate(zip(calls, plan.forms, strict=True))
        for name, value in call.uses.items()
    ]
    for at, value, where in (*wanted, (len(calls), result, plan.result)):
        first.setdefault(value.number, at)
        lies = where
        while lies != plan.given[value.number]:
            move = next(one for one in plan.trees[value.number] if one.wanted == lies)
            first.setdefault((value.number, move), at)
            lies = move.given
    return first
