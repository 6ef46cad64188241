"""The placement compiler: a model function is traced once and comes out as straight-line code.

Rule: every model is reached through `compile_model`. Tracing records which module feeds which;
where the producer's layout is not the consumer's, the collective that turns one into the other is
inserted, once for all consumers, and left out where the axis has one rank. What has no such
collective is refused. The result is a Python function of assignments: no loop, no interpretation.

    Partial   -> Replicate   all_reduce          Shard(d)  -> Replicate   all_gather
    Partial   -> Shard(d)    reduce_scatter      Replicate -> Shard(d)    slice
    Shard(a)  -> Shard(b)    all_gather, slice   anything  -> Partial     refused
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

from attrs import define, field, frozen
from torch import Tensor

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.collectives import Communicator, local_slice
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.module import Module
from tokenspeed.spmd.params import Parameter, Path, Tree, leaves, shard_slice
from tokenspeed.spmd.placement import REPLICATED, Layout, Partial, Placement, Replicate, Shard
from tokenspeed.spmd.trace import Call, Ref, Trace, Value

__all__ = ["Collective", "Program", "Step", "compile_model"]

Step = Callable[[Tree, Any, Any], tuple[Tensor, Any]]
"""(params, batch, kv) -> (logits, kv); the kv that went in is donated."""


@final
@frozen
class Collective:
    """An operation between modules.

    Attributes:
        op: all_reduce, all_gather, reduce_scatter or slice.
        axis: of the mesh.
        dim: of the tensor; None for all_reduce.
        given: layout before.
        wanted: layout after.
        consumer: module path that asked for it first.
    """

    op: str
    axis: str
    dim: int | None
    given: Layout
    wanted: Layout
    consumer: str

    @property
    def symbol(self) -> str:
        """The name it has in the compiled source."""
        return "_".join(str(part) for part in (self.op, self.axis, self.dim) if part is not None)


@final
@frozen(eq=False)
class Program:
    """A compiled model on one mesh. Call it: `(params, batch, kv) -> (logits, kv)`.

    Attributes:
        mesh: as this rank sees it.
        step: the straight-line function.
        source: its text.
        calls: module calls in order.
        collectives: what was inserted, in order.
        param_layouts: how each parameter lies, by path.
    """

    mesh: Mesh
    step: Step
    source: str
    calls: tuple[Call, ...]
    collectives: tuple[Collective, ...]
    param_layouts: Mapping[Path, Layout]

    def __call__(self, params: Tree, batch: Any, kv: Any) -> tuple[Tensor, Any]:
        """Run one step. `kv` is donated: use the one that is returned."""
        return self.step(params, batch, kv)

    def describe(self) -> str:
        """The plan as text: modules with their boundaries, and the collectives between them."""
        lines = [f"mesh {self.mesh}: {len(self.collectives)} collectives"]
        waiting = list(self.collectives)
        for call in self.calls:
            while waiting and waiting[0].consumer == call.path:
                lines.append(_collective_line(waiting.pop(0)))
            takes = ", ".join(f"{name} {lies}" for name, lies in call.module.inputs.items())
            gives = ", ".join(str(value.layout) for value in call.outputs)
            lines.append(f"  {call.path}  ({takes}) -> {gives}")
        lines += [_collective_line(one) for one in waiting]
        return "\n".join(lines)


def _collective_line(one: Collective) -> str:
    return f"    {one.op} over {one.axis}  {one.given} -> {one.wanted}"


def compile_model(
    function: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Tree,
    layers: int,
    *,
    mesh: Mesh,
    communicator: Communicator | None = None,
) -> Program:
    """Trace `function(params, batch, kv) -> (logits, kv)` and link its modules on a mesh.

    Args:
        function: calls modules on branches of its arguments and on their outputs, nothing else.
        params: tree of Parameter and Constant leaves.
        layers: length of the KV.
        mesh: the mesh, as this rank sees it.
        communicator: carries out the collectives; needed where the program has any but slices.

    Raises:
        PlacementError: two boundaries cannot be joined, or a parameter cannot be split.
    """
    trace = Trace()
    kv = Ref(trace, "kv", [()] * layers)
    result, kv_out = function(Ref(trace, "params", params), Ref(trace, "batch"), kv)
    if not isinstance(result, Value) or kv_out is not kv:
        raise PlacementError("a model returns (the output of a module, the kv it was given)")
    for path, leaf in leaves(params):
        if isinstance(leaf, Parameter):
            for source in leaf.sources:
                shard_slice(source, trace.param_layouts.get(path, REPLICATED), mesh, path)
    linker = _Linker(mesh, communicator)
    for call in trace.calls:
        linker.link(call)
    linker.finish(result)
    return Program(
        mesh=mesh,
        step=linker.build(),
        source=linker.source,
        calls=tuple(trace.calls),
        collectives=tuple(linker.collectives),
        param_layouts=trace.param_layouts,
    )


@define(eq=False)
class _Linker:
    """Writes the program: one line a module call or collective, and `del` after each last use."""

    mesh: Mesh
    communicator: Communicator | None
    lines: list[str] = field(factory=lambda: ["kv = kv.donate()"])
    names: dict[str, Any] = field(factory=dict)
    functions: dict[int, str] = field(factory=dict)
    collectives: list[Collective] = field(factory=list)
    converted: dict[tuple[int, Layout], str] = field(factory=dict)
    last_use: dict[str, int] = field(factory=dict)

    @property
    def source(self) -> str:
        """The program's text."""
        body = list(self.lines)
        for name, line in self.last_use.items():
            if line < len(body) - 1:
                body[line] += f"; del {name}"
        return "def step(params, batch, kv):\n" + "".join(f"    {line}\n" for line in body)

    def link(self, call: Call) -> None:
        """Write a module call after the collectives that its inputs want."""
        arguments = []
        for name, argument in call.arguments.items():
            if isinstance(argument, Value):
                wanted = call.module.inputs[name]
                arguments.append(f"{name}={self._convert(argument, wanted, call.path)}")
            elif isinstance(argument, Ref):
                arguments.append(f"{name}={argument.source}")
            else:
                arguments.append(f"{name}={argument!r}")
        for text in arguments:
            self._use(text.partition("=")[2])
        targets = ", ".join(f"v{value.number}" for value in call.outputs)
        for value in call.outputs:
            self.last_use[f"v{value.number}"] = len(self.lines)
        self.lines.append(f"{targets} = {self._function(call.module)}({', '.join(arguments)})")

    def finish(self, result: Value) -> None:
        """Write the return of the model's output, whole on every rank."""
        name = self._convert(result, REPLICATED, "output")
        self._use(name)
        self.lines.append(f"return {name}, kv")

    def build(self) -> Step:
        """Compile the text."""
        namespace = dict(self.names)
        exec(compile(self.source, "<compiled model>", "exec"), namespace)
        step: Step = namespace["step"]
        return step

    def _use(self, name: str) -> None:
        if name in self.last_use:
            self.last_use[name] = len(self.lines)

    def _function(self, module: Module) -> str:
        if id(module) not in self.functions:
            taken = set(self.functions.values())
            name = module.name
            while name in taken:
                name += "_"
            self.functions[id(module)] = name
            self.names[name] = module.function
        return self.functions[id(module)]

    def _convert(self, value: Value, wanted: Layout, consumer: str) -> str:
        given, wanted = value.layout.within(self.mesh), wanted.within(self.mesh)
        name = f"v{value.number}"
        for step in _conversion(given, wanted, self.mesh, value.producer, consumer):
            key = (value.number, step.wanted)
            if key not in self.converted:
                target = f"c{len(self.converted)}"
                self.names.setdefault(step.symbol, self._operation(step))
                self._use(name)
                self.last_use[target] = len(self.lines)
                self.lines.append(f"{target} = {step.symbol}({name})")
                self.converted[key] = target
                self.collectives.append(step)
            name = self.converted[key]
        return name

    def _operation(self, step: Collective) -> Callable[[Tensor], Tensor]:
        axis, dim, communicator = step.axis, step.dim, self.communicator
        if step.op == "slice":
            assert dim is not None
            return partial(
                local_slice, dim=dim, size=self.mesh.size(axis), at=self.mesh.coordinate(axis)
            )
        if communicator is None:
            return partial(_refuse_to_run, step)
        if step.op == "all_reduce":
            return partial(communicator.all_reduce, axis=axis)
        return partial(getattr(communicator, step.op), axis=axis, dim=dim)


def _refuse_to_run(step: Collective, _x: Tensor) -> Tensor:
    raise PlacementError(
        f"{step.op} over {step.axis}: this program was compiled without a communicator and can "
        "only be described; pass compile_model(communicator=...)"
    )


def _conversion(
    given: Layout, wanted: Layout, mesh: Mesh, producer: str, consumer: str
) -> list[Collective]:
    """Collectives that turn `given` into `wanted`: first what makes whole, then what slices."""
    if given == wanted:
        return []

    def refuse(why: str) -> PlacementError:
        return PlacementError(
            f"{consumer} wants {wanted}, {producer} gives {given} on the mesh {mesh}: {why}. "
            f"Declare another input placement for {consumer} or another output of {producer}"
        )

    for lies in (given, wanted):
        dims = [p.dim for _, p in lies.axes if isinstance(p, Shard)]
        if len(set(dims)) < len(dims):
            raise refuse(f"{lies} shards one dim along several axes, and a move would mix them up")
    steps: list[Collective] = []
    now = given

    def step(op: str, axis: str, dim: int | None, after: Placement) -> Layout:
        lies = Layout((*((a, p) for a, p in now.axes if a != axis), (axis, after)))
        steps.append(Collective(op, axis, dim, now, lies, consumer))
        return lies

    for axis, _ in reversed(mesh.axes):
        have, want = now.on(axis), wanted.on(axis)
        if have == want:
            continue
        if isinstance(want, Partial):
            raise refuse(f"along {axis} nothing turns {have} into summands")
        if isinstance(have, Partial) and isinstance(want, Replicate):
            now = step("all_reduce", axis, None, want)
        elif isinstance(have, Shard):
            now = step("all_gather", axis, have.dim, Replicate())
    for axis, _ in mesh.axes:
        have, want = now.on(axis), wanted.on(axis)
        if have != want and isinstance(want, Shard):
            op = "reduce_scatter" if isinstance(have, Partial) else "slice"
            now = step(op, axis, want.dim, want)
    return steps
