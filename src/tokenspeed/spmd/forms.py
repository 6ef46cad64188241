"""The ways to make a call on a mesh: one choice for all that its boundaries leave open.

Rule: a form fixes where every input and output of a call lies. A call has one form for each way of
sharding its tokens along the open axes, and for each of these another one if tokens can be sent to
the ranks that hold their rows instead of being brought to all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import final

from attrs import evolve, frozen

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.cost import Costs
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import REPLICATED, Layout, Partial, Placement, Replicate, Rest, Shard
from tokenspeed.spmd.stages import AXIS, HOP
from tokenspeed.spmd.trace import Call, Value

__all__ = ["Form", "Sent", "forms"]


@final
@frozen
class Sent:
    """Tokens travel along an axis to the ranks that hold their rows, and summands travel back.

    Attributes:
        axis: of the mesh.
        rows: of the parameter on each rank.
        bytes: expected to be sent by a rank, there and back; what stays counts.
        cost_s: of going there, the counts included, and of coming back.
    """

    axis: str
    rows: int
    bytes: tuple[int, int]
    cost_s: tuple[float, float]


@final
@frozen(eq=False)
class Form:
    """Where the inputs and outputs of a call lie.

    Attributes:
        inputs: by argument.
        outputs: of each result.
        sent: how tokens get to the call, if not as the inputs lie.
        touched_s: of reading inputs and writing outputs.
        hop_s: of sending the input to the next stage.
    """

    inputs: Mapping[str, Layout]
    outputs: tuple[Layout, ...]
    sent: Sent | None = None
    touched_s: float = 0.0
    hop_s: float = 0.0

    @property
    def cost_s(self) -> float:
        """Of all of it."""
        return self.touched_s + self.hop_s + (sum(self.sent.cost_s) if self.sent else 0.0)


def forms(call: Call, mesh: Mesh, batch: Layout, costs: Costs) -> list[Form]:
    """All forms of a call, the plainest first; those that do not divide are left out.

    Raises:
        PlacementError: `routed` is declared, but not that inputs are whole and outputs summands.
    """
    found = []
    for chosen in _choices(call, mesh, batch):
        inputs = {
            name: call.module.inputs[name].resolve(batch, chosen).within(mesh) for name in call.uses
        }
        outputs = tuple(b.resolve(batch, chosen).within(mesh) for b in call.module.outputs)
        form = Form(inputs, outputs)
        for one in (form, *_sending(call, form, mesh, batch, costs)):
            if all(v.kind.admits(lies, mesh) for v, lies in _placed(call, one)):
                touched = sum(v.kind.local_bytes(lies, mesh) for v, lies in _placed(call, one))
                hop_s = 0.0
                if call.module is HOP:
                    hop_s = costs.link(AXIS, mesh).seconds("send", 2, touched / 2)
                found.append(evolve(one, touched_s=costs.touched_s(touched), hop_s=hop_s))
    return found


def _placed(call: Call, form: Form) -> Iterator[tuple[Value, Layout]]:
    """Inputs and outputs with their layouts."""
    for name, value in call.uses.items():
        yield value, form.inputs[name]
    yield from zip(call.outputs, form.outputs, strict=True)


def _choices(call: Call, mesh: Mesh, batch: Layout) -> Iterator[Layout]:
    """What the compiler may choose for the open axes of a call."""
    free = next((one for one in call.module.boundaries if one.is_free), None)
    if free is None:
        yield Layout()
        return
    named = {axis for axis, _ in free.named}
    open_axes = [a for a, size in mesh.axes if size > 1 and a not in named and a != AXIS]
    any_count = next(iter((*call.uses.values(), *call.outputs))).kind.any_count
    options: list[list[Placement]] = []
    for axis in open_axes:
        ways: list[Placement] = [Replicate()]
        if not any_count or batch.on(axis).is_shard(0):
            ways.append(Shard(0))
        if free.rest is Rest.ANY:
            ways.append(Partial())
        options.append(ways)
    for combination in itertools.product(*options):
        yield Layout(tuple(zip(open_axes, combination, strict=True)))


def _sending(call: Call, form: Form, mesh: Mesh, batch: Layout, costs: Costs) -> Iterator[Form]:
    """The form in which tokens travel, where there is one axis along which they can."""
    module = call.module
    if module.routed is None:
        return
    table = call.arguments[next(iter(call.arguments))].tree[module.indices[module.routed]]
    lies = module.params.get(module.indices[module.routed], REPLICATED).within(mesh)
    axes = [axis for axis, placement in lies.axes if placement.is_shard(0)]
    if len(axes) != 1:
        return
    axis, size = axes[0], mesh.size(axes[0])
    whole = all(lies.on(axis).is_replicate() for lies in form.inputs.values())
    if not whole or not all(isinstance(lies.on(axis), Partial) for lies in form.outputs):
        raise PlacementError(
            f"{call.path}: {module.routed} is routed along {axis}, where the inputs lie "
            f"{', '.join(map(str, form.inputs.values()))} and the outputs "
            f"{', '.join(map(str, form.outputs))}; declare Replicate inputs and Partial outputs"
        )
    first = call.uses[module.routed]
    if first.kind.any_count and not batch.on(axis).is_shard(0):
        return
    inputs = {name: lies.having(axis, Shard(0)) for name, lies in form.inputs.items()}
    outputs = tuple(lies.having(axis, Shard(0)) for lies in form.outputs)
    choices = first.kind.shape[1] if len(first.kind.shape) > 1 else 1
    share = size * (1 - (1 - 1 / size) ** choices)  # of the ranks, how many a token visits
    link = costs.link(axis, mesh)
    there, back = (
        [math.ceil(share * v.kind.local_bytes(lies, mesh)) for v, lies in some]
        for some in (
            [(value, inputs[name]) for name, value in call.uses.items()],
            list(zip(call.outputs, outputs, strict=True)),
        )
    )
    counts = 8 * size  # which are exchanged first; then a message for each tensor
    cost = tuple(
        sum(link.seconds("all_to_all", size, one) for one in sizes)
        for sizes in ([counts, *there], back)
    )
    sent = Sent(axis, table.shape[0] // size, (counts + sum(there), sum(back)), (cost[0], cost[1]))
    yield Form(inputs, outputs, sent)
