"""The placement compiler: a model function is traced once and comes out as straight-line code.

Rule: every model is reached through `compile_model`. Tracing records which module feeds which and
how large what is fed is; `solve` finds the cheapest collectives that join all boundaries; `linker`
writes them down between the calls, once for all consumers. The result is a Python function of
assignments: no loop, no interpretation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, final

from attrs import frozen
from torch import Tensor

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.collectives import Communicator
from tokenspeed.spmd.cost import Costs
from tokenspeed.spmd.forms import Form
from tokenspeed.spmd.linker import Collective, Linker, Step
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.overlap import schedule
from tokenspeed.spmd.params import (
    Parameter,
    Path,
    Tree,
    leaves,
    local_shape,
    own_sources,
)
from tokenspeed.spmd.placement import REPLICATED, Layout, as_batch
from tokenspeed.spmd.solve import solve
from tokenspeed.spmd.stages import AXIS, held_layers, split
from tokenspeed.spmd.trace import Bucket, Call, Trace, trace_model

__all__ = ["Collective", "Program", "Step", "compile_model"]


@final
@frozen(eq=False)
class Program:
    """A compiled model on one mesh. Call it: `(params, batch, kv) -> (logits, kv)`.

    Attributes:
        mesh: as this rank sees it.
        bucket: that it was compiled for.
        step: the straight-line function.
        source: its text.
        calls: module calls in order.
        forms: how each of them is made.
        collectives: what was inserted, in order.
        param_layouts: how each parameter lies, by path.
        held_params: paths of those that this rank's calls want.
        held_layers: whose KV this rank has.
        param_bytes: of this rank's part of each that it holds; one that is there twice counts once.
        result: how the result lies.
        peak_bytes: of what lies between modules at once, at most; what modules need inside is not
            known here.
        cost_s: of all collectives and of what modules read and write, by the model, less what
            this rank hides.
    """

    mesh: Mesh
    bucket: Bucket
    step: Step
    source: str
    calls: tuple[Call, ...]
    forms: tuple[Form, ...]
    collectives: tuple[Collective, ...]
    param_layouts: Mapping[Path, Layout]
    held_params: frozenset[Path]
    held_layers: range
    param_bytes: Mapping[Path, int]
    result: Layout
    peak_bytes: int
    cost_s: float

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it: not where tokens are sent, which the CPU counts."""
        return not any(form.sent for form in self.forms)

    @property
    def hidden_s(self) -> float:
        """What collectives take beside modules, and so cost nothing."""
        return sum(one.hidden_s for one in self.collectives)

    def holds(self, path: Path) -> bool:
        """Whether this rank has a part of a parameter: not if only other stages want it."""
        return path in self.held_params or path not in self.param_layouts

    def __call__(self, params: Tree, batch: Any, kv: Any) -> tuple[Tensor, Any]:
        """Run one step. `kv` is donated: use the one that is returned."""
        return self.step(params, batch, kv)

    def describe(self) -> str:
        """The plan as text: modules with their boundaries, and the collectives between them."""
        lines = [f"mesh {self.mesh}: {len(self.collectives)} collectives"]
        waiting = list(self.collectives)
        for at, (call, form) in enumerate(zip(self.calls, self.forms, strict=True)):
            while waiting and waiting[0].at == at:
                lines.append(self._line(waiting.pop(0)))
            takes = ", ".join(f"{name} {lies}" for name, lies in form.inputs.items())
            gives = ", ".join(map(str, form.outputs))
            lines.append(f"  {call.path}  ({takes}) -> {gives}")
        lines += [self._line(one) for one in waiting]
        return "\n".join(lines)

    def _line(self, one: Collective) -> str:
        line = f"    {one.op} over {one.axis}  {one.given} -> {one.wanted}"
        return line if one.started is None else f"{line}, since {self.calls[one.started].path}"


def compile_model(
    function: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Tree,
    layers: int,
    *,
    mesh: Mesh,
    communicator: Communicator | None = None,
    bucket: Bucket | None = None,
    batch: Layout = REPLICATED,
    costs: Costs | None = None,
) -> Program:
    """Trace `function(params, batch, kv) -> (logits, kv)` and link its modules on a mesh.

    Args:
        function: calls modules on branches of its arguments and on their outputs, nothing else.
        params: tree of Parameter and Constant leaves.
        layers: length of the KV.
        mesh: the mesh, as this rank sees it.
        communicator: carries out the collectives; needed where the program has any but slices.
        bucket: the step it is compiled for; left out, one of any number of tokens.
        batch: how the batch lies: Shard(0) along the axes whose ranks have rows of their own, all
            with as many tokens. The result lies as the batch does.
        costs: of the machine; left out, of NVIDIA H100 hosts.

    Raises:
        PlacementError: two boundaries cannot be joined, or a parameter cannot be split.
    """
    held = held_layers(layers, mesh)
    trace, result = trace_model(function, params, layers, bucket or Bucket())
    if not isinstance(batch, Layout) or not all(
        p.is_shard(0) and axis != AXIS for axis, p in batch.axes
    ):
        raise PlacementError(
            f"a batch lies {batch}, expected Shard(0) or Replicate along each axis but {AXIS}"
        )
    split(trace, layers, mesh)
    for path, leaf in leaves(params):
        if isinstance(leaf, Parameter):
            own_sources(leaf, trace.param_layouts.get(path, REPLICATED), mesh, path)
    plan = solve(
        trace, result, as_batch(), mesh=mesh, batch=batch, costs=(costs or Costs()).on(mesh)
    )
    here = mesh.coordinate(AXIS)
    held_params = frozenset(p for call in trace.calls if call.stage == here for p in call.params)
    param_bytes = _param_bytes(trace, params, held_params, mesh)
    early = schedule(trace, plan, result, mesh, plan.costs, param_bytes)
    linker = Linker(mesh, communicator, plan, early, batch.within(mesh))
    for at, (call, form) in enumerate(zip(trace.calls, plan.forms, strict=True)):
        linker.link(at, call, form)
    linker.finish(trace.calls, result)
    return Program(
        mesh=mesh,
        bucket=trace.bucket,
        step=linker.build(),
        source=linker.source,
        calls=tuple(trace.calls),
        forms=plan.forms,
        collectives=tuple(linker.collectives),
        param_layouts=trace.param_layouts,
        held_params=held_params,
        held_layers=held,
        param_bytes=param_bytes,
        result=plan.result,
        peak_bytes=linker.peak_bytes(),
        cost_s=plan.cost_s - sum(one.hidden_s for one in linker.collectives),
    )


def _param_bytes(trace: Trace, params: Tree, held: frozenset[Path], mesh: Mesh) -> dict[Path, int]:
    seen, found = set[tuple[Any, Layout]](), dict[Path, int]()
    for path, leaf in leaves(params):
        if isinstance(leaf, Parameter) and path in held:
            lies = trace.param_layouts[path].within(mesh)
            key = (leaf.sources[0].name, leaf.shape), lies
            shape = local_shape(leaf, lies, mesh, path)
            itemsize = trace.parameter(leaf).element_size()
            found[path] = 0 if key in seen else math.prod(shape) * itemsize
            seen.add(key)
    return found
