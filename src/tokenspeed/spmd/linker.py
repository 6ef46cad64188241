"""Writes a plan down: one line a module call or collective, and `del` after each last use.

Rule: what is decided is decided (`solve`, `overlap`); here it becomes straight-line Python on this
rank's part: no loop, no interpretation. Every collective that is written is recorded, as the plan's
cost counts it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from attrs import define, field, frozen
from torch import Tensor

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.collectives import Communicator, Started, local_slice
from tokenspeed.spmd.dispatch import combine, count_own, dispatch, start_combine
from tokenspeed.spmd.forms import Form, Sent
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.module import Module
from tokenspeed.spmd.moves import Move
from tokenspeed.spmd.overlap import Clock, Schedule
from tokenspeed.spmd.params import Tree, own_rows
from tokenspeed.spmd.placement import REPLICATED, Layout
from tokenspeed.spmd.solve import Solution
from tokenspeed.spmd.stages import AXIS, HOP
from tokenspeed.spmd.trace import Call, Ref, Value

__all__ = ["Collective", "Linker", "Step"]

Step = Callable[[Tree, Any, Any], tuple[Tensor, Any]]
"""(params, batch, kv) -> (logits, kv); the kv that went in is donated."""


@final
@frozen
class Collective:
    """An operation between modules.

    Attributes:
        op: all_reduce, all_gather, reduce_scatter, all_to_all, send, broadcast, or slice (which
            sends nothing).
        axis: of the mesh.
        dim: of the tensor that is joined or cut; None for all_reduce.
        given: layout before.
        wanted: layout after.
        consumer: module path that asked for it first.
        at: number of that call among the program's; the number of calls for the output.
        layer: of the model, that made what is moved; None outside of all layers.
        bytes: what one rank takes part with: the tensor before all_reduce and reduce_scatter, after
            all_gather, what is sent or broadcast, and all that a rank sends in all_to_all, its own
            share included.
        cost_s: by the model.
        started: number of the call behind which it is begun, where that is before `at`; else None.
        hidden_s: of cost_s, what lies beside modules; below 0: it waits behind another one.
    """

    op: str
    axis: str
    dim: int | None
    given: Layout
    wanted: Layout
    consumer: str
    at: int
    layer: int | None
    bytes: int
    cost_s: float
    started: int | None = None
    hidden_s: float = 0.0


@define(eq=False)
class Linker:
    """Writes the program: one line a module call or collective, and `del` after each last use."""

    mesh: Mesh
    communicator: Communicator | None
    plan: Solution
    early: Schedule
    batch: Layout
    lines: list[str] = field(factory=lambda: ["kv = kv.donate()"])
    names: dict[str, Any] = field(factory=dict)
    functions: dict[int, str] = field(factory=dict)
    collectives: list[Collective] = field(factory=list)
    converted: dict[tuple[int, Layout], str] = field(factory=dict)
    own: dict[tuple[str, int, int], str] = field(factory=dict)
    last_use: dict[str, int] = field(factory=dict)
    made_in: dict[int, int | None] = field(factory=dict)
    sizes: dict[str, tuple[int, float]] = field(factory=dict)
    clock: Clock = field(factory=Clock)
    moving: dict[tuple[int, Layout], tuple[str, int]] = field(factory=dict)
    returning: dict[int, tuple[int, Call, Form, Sent]] = field(factory=dict)

    @property
    def source(self) -> str:
        """The program's text."""
        body = list(self.lines)
        for name, line in self.last_use.items():
            if line < len(body) - 1:
                body[line] += f"; del {name}"
        return "def step(params, batch, kv):\n" + "".join(f"    {line}\n" for line in body)

    def peak_bytes(self) -> int:
        """Bytes of all names that are bound at once, at most; each is freed after its last use."""
        change = [0.0] * (len(self.lines) + 1)
        for name, (line, size) in self.sizes.items():
            change[line] += size
            change[self.last_use.get(name, line) + 1] -= size
        return round(max(itertools.accumulate(change)))

    def link(self, at: int, call: Call, form: Form) -> None:
        """Write a module call after the collectives that its inputs want, if it is ours."""
        self.made_in |= {value.number: call.layer for value in call.outputs}
        if call.module is HOP:
            self._hop(at, call, form)
        elif call.stage == self.mesh.coordinate(AXIS):
            self._call(at, call, form)
            for value, move in self.early.moves.get(at, ()):
                self._begin_move(at, value, move)

    def _call(self, at: int, call: Call, form: Form) -> None:
        moved = {
            name: self._convert(value, form.inputs[name], call.path, at)
            for name, value in call.uses.items()
        }
        away = None
        if form.sent is not None:
            moved, away = self._dispatch(at, call, form, form.sent, moved)
        for name in call.module.indices:
            moved[name] = self._own_rows(call, name, moved[name])
        arguments = []
        for name, argument in call.arguments.items():
            text = moved.get(name) or (
                argument.source if isinstance(argument, Ref) else _literal(argument)
            )
            arguments.append(f"{name}={text}")
        targets = [value.name for value in call.outputs]
        for value, lies in zip(call.outputs, form.outputs, strict=True):
            self.sizes[value.name] = len(self.lines), value.kind.local_bytes(lies, self.mesh)
        self._write(targets, self._function(call.module), arguments, tuple(moved.values()))
        self.clock.work(self.early.work_s[at])
        if form.sent is not None and away is not None:
            begun = at in self.early.combines
            name = f"{'start_' if begun else ''}combine_{form.sent.axis}"
            self.names[name] = self._sending(
                start_combine if begun else combine, axis=form.sent.axis
            )
            if begun:
                self._write([f"p{at}"], name, [away, *targets], (away, *targets))
                self.clock.begin(f"p{at}", form.sent.cost_s[1])
                sent = at, call, form, form.sent
                self.returning |= {value.number: sent for value in call.outputs}
            else:
                self._write(targets, name, [away, *targets], (away, *targets), unpack=True)
                self._note_sent(at, call, form, form.sent, 1)

    def _begin_move(self, at: int, value: Value, move: Move) -> None:
        """Write the beginning of a collective behind the call that made its value."""
        name = f"b{len(self.moving)}"
        self.sizes[name] = len(self.lines), value.kind.local_bytes(move.wanted, self.mesh)
        self._write([name], self._operation(move, begun=True), [value.name], (value.name,))
        self.clock.begin(name, move.cost_s)
        self.moving[value.number, move.wanted] = name, at

    def _await_summands(self, value: Value, at: int) -> None:
        """Write that what has travelled back is awaited, once, for the call that wants it first."""
        if value.number not in self.returning:
            return
        made, call, form, sent = self.returning[value.number]
        for one in call.outputs:
            del self.returning[one.number]
        self.names["wait"] = Started.wait
        begun = f"p{made}"
        self._write([one.name for one in call.outputs], "wait", [begun], (begun,), unpack=True)
        hidden_s = self.clock.wait(begun, sent.cost_s[1])
        self._note_sent(at, call, form, sent, 1, (made, hidden_s))

    def _hop(self, at: int, call: Call, form: Form) -> None:
        """Write this rank's side of a send, if it has one."""
        here, lies, value = self.mesh.coordinate(AXIS), form.outputs[0], call.outputs[0]
        if here == call.stage - 1:
            name = self._convert(call.uses["x"], lies, call.path, at)
            self.names["send"] = self._communicated("send")
            self._use(name)
            self.lines.append(f"send({name})")
            size = round(value.kind.local_bytes(lies, self.mesh))
            self._note("send", AXIS, at, call, size, form.hop_s, lies)
        elif here == call.stage:
            name = f"receive_{value.name}"
            self.names[name] = partial(
                _receive, self._communicated("receive"), self._blank(value, lies)
            )
            self.sizes[value.name] = len(self.lines), value.kind.local_bytes(lies, self.mesh)
            self._write([value.name], name, ["batch.token_ids"], ())

    def _blank(self, value: Value, lies: Layout) -> Callable[[Tensor], Tensor]:
        """Makes a tensor like this rank's part of a value, with a row for each of another's."""
        assert value.meta is not None
        shape = tuple(
            size // lies.parts(self.mesh, dim) for dim, size in enumerate(value.meta.shape)
        )
        return partial(
            _blank,
            shape=shape[1:],
            dtype=value.meta.dtype,
            times=self.batch.parts(self.mesh, 0),
            parts=lies.parts(self.mesh, 0),
        )

    def finish(self, calls: list[Call], result: Value) -> None:
        """Write the return of the model's output, which all stages have."""
        last, lies = next(c for c in calls if any(v is result for v in c.outputs)), self.plan.result
        here, name = self.mesh.coordinate(AXIS), result.name
        if here == last.stage:
            name = self._convert(result, lies, "output", len(calls))
        if self.mesh.size(AXIS) > 1:
            if result.meta is None:
                raise PlacementError(
                    f"{last.path}: the shape of the result is not known, and all stages of {AXIS} "
                    "want it; declare @module(meta=...)"
                )
            self.names["broadcast"] = self._communicated("broadcast", root=last.stage)
            if here != last.stage:
                self.names["blank"] = self._blank(result, lies)
                self._write([name], "blank", ["batch.sampled_rows"], ())
            self._write(["result"], "broadcast", [name], (name,))
            size = round(result.kind.local_bytes(lies, self.mesh))
            cost = self.plan.costs.link(AXIS, self.mesh).seconds(
                "broadcast", self.mesh.size(AXIS), size
            )
            self._note("broadcast", AXIS, len(calls), last, size, cost, lies)
            name = "result"
        self._use(name)
        self.lines.append(f"return {name}, kv")

    def build(self) -> Step:
        """Compile the text."""
        namespace = dict(self.names)
        exec(compile(self.source, "<compiled model>", "exec"), namespace)
        step: Step = namespace["step"]
        return step

    def _write(
        self,
        targets: list[str],
        function: str,
        arguments: list[str],
        used: tuple[str, ...],
        *,
        unpack: bool = False,
    ) -> None:
        """One assignment; with `unpack` the function gives a tuple even of one."""
        for name in used:
            self._use(name)
        for name in targets:
            self.last_use[name] = len(self.lines)
        left = ", ".join(targets) + ("," if unpack and len(targets) == 1 else "")
        self.lines.append(f"{left} = {function}({', '.join(arguments)})")

    def _use(self, name: str) -> None:
        if name in self.last_use:
            self.last_use[name] = len(self.lines)

    def _function(self, module: Module) -> str:
        if id(module) not in self.functions:
            name = re.sub(r"\W", "_", module.name)
            while (name := f"{name}_") in self.names:  # no other name in the program ends so
                pass
            self.functions[id(module)] = name
            self.names[name] = module.function
        return self.functions[id(module)]

    def _convert(self, value: Value, wanted: Layout, consumer: str, at: int) -> str:
        """The name of a value in a layout, after the moves that are still to be made."""
        self._await_summands(value, at)
        if wanted == self.plan.given[value.number]:
            return value.name
        key = value.number, wanted
        if key not in self.converted:
            move = next(m for m in self.plan.trees[value.number] if m.wanted == wanted)
            name = self._convert(value, move.given, consumer, at)
            self.converted[key] = target = f"c{len(self.converted)}"
            self.sizes[target] = len(self.lines), value.kind.local_bytes(wanted, self.mesh)
            begun, started = self.moving.get(key, (None, None))
            if begun is None:
                self._write([target], self._operation(move), [name], (name,))
                hidden_s = self.clock.pause(move.cost_s)
            else:
                self.names["wait"] = Started.wait
                self._write([target], "wait", [begun], (begun, name))
                hidden_s = self.clock.wait(begun, move.cost_s)
            self.collectives.append(
                Collective(
                    op=move.op,
                    axis=move.axis,
                    dim=move.dim,
                    given=move.given,
                    wanted=move.wanted,
                    consumer=consumer,
                    at=at,
                    layer=self.made_in.get(value.number),
                    bytes=move.bytes,
                    cost_s=move.cost_s,
                    started=started,
                    hidden_s=hidden_s,
                )
            )
        return self.converted[key]

    def _operation(self, move: Move, *, begun: bool = False) -> str:
        """The name of the function that carries out a move, or begins to."""
        parts = ("start" if begun else None, move.op, move.axis, move.from_dim, move.dim)
        name = "_".join(str(part) for part in parts if part is not None)
        where = {"dim": move.dim, "from_dim": move.from_dim}
        known: dict[str, Any] = {key: value for key, value in where.items() if value is not None}
        if move.op == "slice":
            size, at = self.mesh.size(move.axis), self.mesh.coordinate(move.axis)
            self.names[name] = partial(local_slice, size=size, at=at, **known)
        else:
            self.names[name] = self._communicated(move.op, move.axis, begun=begun, **known)
        return name

    def _communicated(
        self, op: str, axis: str = AXIS, *, begun: bool = False, **more: Any
    ) -> Callable[..., Any]:
        """A method of the communicator along an axis."""
        if self.communicator is None:
            return partial(_refuse_to_run, op, axis)
        if begun:
            return partial(self.communicator.start, op, axis=axis, **more)
        return partial(getattr(self.communicator, op), axis=axis, **more)

    def _sending(self, function: Callable[..., Any], axis: str, **more: Any) -> Callable[..., Any]:
        """`dispatch` or `combine` along an axis."""
        if self.communicator is None:
            return partial(_refuse_to_run, "all_to_all", axis)
        return partial(function, communicator=self.communicator, axis=axis, **more)

    def _dispatch(
        self, at: int, call: Call, form: Form, sent: Sent, moved: dict[str, str]
    ) -> tuple[dict[str, str], str]:
        """Send the tokens of a call; their names there, and that of what `combine` needs."""
        assert call.module.routed is not None
        routed = list(moved).index(call.module.routed)
        name = f"dispatch_{sent.axis}_{sent.rows}_{routed}"
        self.names[name] = self._sending(
            dispatch, axis=sent.axis, ranks=self.mesh.size(sent.axis), rows=sent.rows, routed=routed
        )
        there = {argument: f"s{at}_{index}" for index, argument in enumerate(moved)}
        self.sizes[f"s{at}_0"] = len(self.lines), sent.bytes[0]
        away = f"a{at}"
        sources = tuple(moved.values())
        self._write([*there.values(), away], name, list(sources), sources)
        self._note_sent(at, call, form, sent, 0)
        return there, away

    def _note(
        self,
        op: str,
        axis: str,
        at: int,
        call: Call,
        size: int,
        cost_s: float,
        lies: Layout,
        *,
        begun: tuple[int, float] | None = None,
    ) -> None:
        """Record a collective that is no move; of one begun early, behind which call, and what of
        it was hidden."""
        started, hidden_s = begun or (None, self.clock.pause(cost_s))
        where = (call.path, at, call.layer)
        self.collectives.append(
            Collective(op, axis, None, lies, lies, *where, size, cost_s, started, hidden_s)
        )

    def _note_sent(
        self,
        at: int,
        call: Call,
        form: Form,
        sent: Sent,
        way: int,
        begun: tuple[int, float] | None = None,
    ) -> None:
        """Record that tokens go to their ranks (0), or come back (1)."""
        size, cost_s = sent.bytes[way], sent.cost_s[way]
        lies = form.outputs[0]
        self._note("all_to_all", sent.axis, at, call, size, cost_s, lies, begun=begun)

    def _own_rows(self, call: Call, argument: str, name: str) -> str:
        """The name of row numbers as this rank counts them."""
        key = call.module.indices[argument]
        subtree = call.arguments[next(iter(call.arguments))]
        leaf, lies = subtree.tree[key], call.module.params.get(key, REPLICATED)
        first, rows = own_rows(leaf, lies, self.mesh, (*subtree.path, key))
        if rows == leaf.shape[0]:
            return name
        if len(leaf.sources) != 1 and not leaf.stacked:
            raise PlacementError(
                f"{call.path}: {argument} counts rows of {key}, which is joined of "
                f"{len(leaf.sources)} tensors; sharded rows can be counted in one alone"
            )
        if (name, first, rows) not in self.own:
            self.own[name, first, rows] = target = f"i{len(self.own)}"
            function = f"count_own_{first}_{rows}"
            self.names[function] = partial(count_own, first=first, rows=rows)
            self._write([target], function, [name], (name,))
        return self.own[name, first, rows]


def _literal(constant: Any) -> str:
    """A number, a string or None as Python reads it; infinity has no literal."""
    text = repr(constant)
    return (
        text if not isinstance(constant, float) or math.isfinite(constant) else f"float({text!r})"
    )


def _blank(
    like: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype, times: int, parts: int
) -> Tensor:
    """Uninitialised memory with `times` rows in `parts` for each row of `like`."""
    return torch.empty((like.shape[0] * times // parts, *shape), dtype=dtype, device=like.device)


def _receive(
    receive: Callable[[Tensor], Tensor], blank: Callable[[Tensor], Tensor], like: Tensor
) -> Tensor:
    return receive(blank(like))


def _refuse_to_run(op: str, axis: str, *_: Any) -> Any:
    raise PlacementError(
        f"{op} over {axis}: this program was compiled without a communicator and can "
        "only be described; pass compile_model(communicator=...)"
    )
