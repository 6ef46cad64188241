"""What a compiled model does on a mesh, layer by layer: collectives, bytes, cost, memory.

Rule: a report is read off programs; it needs neither weights nor more than one process. Bytes are
those that one rank takes part with, as `Collective.bytes` counts them; slices send nothing.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, final

import torch
from attrs import frozen
from rich.console import Group
from rich.table import Table

from tokenspeed.errors import ConfigError
from tokenspeed.spmd.compile import Collective, Program
from tokenspeed.spmd.cost import Link
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import Layout, Shard
from tokenspeed.spmd.stages import AXIS
from tokenspeed.spmd.trace import COUNT_MAX

__all__ = ["AXES", "Layer", "Report", "batch_of", "parse_links", "parse_mesh", "report", "rows_of"]

AXES = ("dp", "ep", "tp", "pp")
"""Those that models name; a mesh may have others for models that name them."""

BATCH_AXES = ("dp", "ep")
"""Along these, ranks have rows of their own: data-parallel attention."""

_ROWS_MAX = 256
_TOKENS = 32


@final
@frozen
class Layer:
    """A layer of the model; `index` None: what is outside of all layers."""

    index: int | None
    collectives: tuple[Collective, ...]
    parameter_bytes: int
    cost_s: float

    @property
    def sent(self) -> tuple[Collective, ...]:
        """The collectives that send something."""
        return tuple(one for one in self.collectives if one.op != "slice")

    @property
    def bytes(self) -> int:
        """Of all collectives."""
        return sum(one.bytes for one in self.sent)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        sent = [
            {
                "op": c.op,
                "axis": c.axis,
                "bytes": c.bytes,
                "cost_s": c.cost_s,
                "hidden_s": c.hidden_s,
            }
            for c in self.sent
        ]
        return {
            "layer": self.index,
            "collectives": sent,
            "bytes": self.bytes,
            "parameter_bytes": self.parameter_bytes,
            "cost_s": self.cost_s,
        }


@final
@frozen
class Report:
    """A model on a mesh.

    Attributes:
        model: its name, as given.
        mesh: with all axes.
        tokens, rows: of the step, of all ranks together; rows are those whose logits are wanted.
        layers: in order; the last one is what is outside of all layers.
        parameter_bytes: of the rank that has most.
        activation_bytes: between modules at once, of the rank that has most.
        kv_token_bytes: of a token in the cache of the rank that has most.
        cost_s: of a step, by the cost model.
        compile_s: what compiling took.
    """

    model: str
    mesh: Mesh
    tokens: int
    rows: int
    layers: tuple[Layer, ...]
    parameter_bytes: int
    activation_bytes: int
    kv_token_bytes: int
    cost_s: float
    compile_s: float

    def as_json(self) -> dict[str, Any]:
        """For programs; `bytes_per_rank` are parameters, of the rank that has most."""
        *layers, outside = self.layers
        return {
            "model": self.model,
            "mesh": dict(self.mesh.axes),
            "ranks": self.mesh.ranks,
            "tokens": self.tokens,
            "rows": self.rows,
            "layers": [layer.as_json() for layer in layers],
            "outside": outside.as_json(),
            "bytes_per_rank": self.parameter_bytes,
            "activation_bytes_per_rank": self.activation_bytes,
            "kv_bytes_per_token_per_rank": self.kv_token_bytes,
            "cost_s": self.cost_s,
            "compile_s": self.compile_s,
        }

    def table(self) -> Group:
        """For people; layers in a row that do the same share a line."""
        head = (
            f"{self.model} on {self.mesh}: {_several(self.mesh.ranks, 'rank')}, "
            f"{_several(self.tokens, 'token')} a step\n"
            f"on a rank: {_size(self.parameter_bytes)} of parameters, {self.kv_token_bytes:,} B of "
            f"KV a token, {_size(self.activation_bytes)} between modules\n"
            f"{self.cost_s * 1e6:,.0f} µs a step by the cost model, without what modules compute\n"
            f"compiled in {self.compile_s:.2f} s"
        )
        table = Table()
        for name in ("layers", "collectives", "bytes", "µs", "parameters"):
            where: Literal["left", "right"] = "left" if name == "collectives" else "right"
            table.add_column(name, justify=where, no_wrap=True)
        for _, group in itertools.groupby(self.layers, _alike):
            same = list(group)
            one = same[0]
            table.add_row(
                _numbers(same),
                "\n".join(_lines(one)) or "none",
                _size(one.bytes),
                f"{one.cost_s * 1e6:,.1f}",
                _size(one.parameter_bytes),
            )
        return Group(head, table)


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _lines(layer: Layer) -> list[str]:
    counts = Counter((c.op, c.axis, c.bytes, c.started is not None) for c in layer.sent)
    return [
        f"{count} {op} over {axis}, {_size(size)}{', overlapped' if beside else ''}"
        for (op, axis, size, beside), count in counts.items()
    ]


def _alike(layer: Layer) -> tuple[Any, ...]:
    sent = tuple((c.op, c.axis, c.bytes) for c in layer.sent)
    return layer.index is None, sent, layer.parameter_bytes, round(layer.cost_s, 9)


def _numbers(layers: list[Layer]) -> str:
    first, last = layers[0].index, layers[-1].index
    if first is None:
        return "outside"
    return f"{first}" if first == last else f"{first} to {last}, each"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.4g} GB"


def parse_mesh(text: str) -> Mesh:
    """`tp=4,ep=4`. Raises ConfigError."""
    axes = []
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if not size.isdecimal():
            raise ConfigError("mesh", text, "axes with their sizes, as in tp=4,ep=4")
        axes.append((name.strip(), int(size)))
    return Mesh(tuple(axes))


def parse_links(texts: Iterable[str]) -> dict[str, Link]:
    """`dp=10,50`: by axis, latency in microseconds and 10^9 bytes/s. Raises ConfigError."""
    links = {}
    for text in texts:
        axis, _, numbers = text.partition("=")
        try:
            latency_us, gigabytes = map(float, numbers.split(","))
        except ValueError:
            raise ConfigError(
                "link", text, "AXIS=LATENCY,BANDWIDTH in µs and GB/s, as in dp=10,50"
            ) from None
        links[axis] = Link(latency_us * 1e-6, gigabytes * 1e9)
    return links


def batch_of(mesh: Mesh) -> Layout:
    """How the batch lies: each rank along BATCH_AXES has rows of its own."""
    return Layout(tuple((axis, Shard(0)) for axis, _ in mesh.axes if axis in BATCH_AXES))


def rows_of(mesh: Mesh, tokens: int | None) -> tuple[int, int]:
    """(tokens, rows) of a step: one row a token, but not more than 256.

    Raises:
        ConfigError: the ranks of the batch cannot have as many tokens each.
    """
    parts = batch_of(mesh).parts(mesh)
    if tokens is None:
        tokens = _TOKENS * parts
    if not 1 <= tokens <= COUNT_MAX or tokens % parts:
        raise ConfigError(
            "tokens",
            tokens,
            f"{parts:,} to {COUNT_MAX:,}"
            + (f", a multiple of {parts}: so many ranks have rows of their own" * (parts > 1)),
        )
    return tokens, min(tokens, max(_ROWS_MAX // parts, 1) * parts)


def report(
    model: str,
    mesh: Mesh,
    compiled: Callable[[Mesh], Program],
    kv: Iterable[tuple[tuple[int, ...], Layout]],
    kv_dtype: torch.dtype,
) -> Report:
    """Compile a model for one rank of each stage, and read off what they do.

    Args:
        model: a name for the report.
        mesh: any rank's.
        compiled: the model on a mesh, as a rank sees it.
        kv: the parts of what a layer keeps of a token, and how they lie.
        kv_dtype: of these.
    """
    began = time.perf_counter()
    stages = {mesh.at(rank).coordinate(AXIS): mesh.at(rank) for rank in range(mesh.ranks)}
    programs = [compiled(stages[stage]) for stage in sorted(stages)]
    compile_s = time.perf_counter() - began
    bucket = programs[0].bucket
    kv_bytes = kv_dtype.itemsize * sum(
        _elements(shape, lies.within(mesh), mesh) for shape, lies in kv
    )
    indices = [layer for program in programs for layer in program.held_layers]
    return Report(
        model=model,
        mesh=mesh,
        tokens=bucket.tokens or 1,
        rows=bucket.rows,
        layers=tuple(_layer(programs, index) for index in (*indices, None)),
        parameter_bytes=max(sum(program.param_bytes.values()) for program in programs),
        activation_bytes=max(program.peak_bytes for program in programs),
        kv_token_bytes=kv_bytes * max(len(program.held_layers) for program in programs),
        cost_s=programs[0].cost_s - sum(program.hidden_s for program in programs[1:]),
        compile_s=compile_s,
    )


def _elements(shape: tuple[int, ...], lies: Layout, mesh: Mesh) -> int:
    count = 1
    for dim, size in enumerate(shape):
        count *= size // lies.parts(mesh, dim)
    return count


def _layer(programs: list[Program], index: int | None) -> Layer:
    # All stages take part in the broadcast of the result: it is counted where it is made, once.
    collectives = tuple(
        one
        for program in programs
        for one in program.collectives
        if one.layer == index and (one.op != "broadcast" or program is programs[0])
    )
    sizes = [
        size
        for program in programs
        for path, size in program.param_bytes.items()
        if (path[1] if path[0] == "layers" else None) == index
    ]
    plan = zip(programs[0].calls, programs[0].forms, strict=True)  # of all stages
    touched = sum(form.touched_s for call, form in plan if call.layer == index)
    spent = sum(c.cost_s - c.hidden_s for c in collectives)
    return Layer(index, collectives, sum(sizes), touched + spent)
