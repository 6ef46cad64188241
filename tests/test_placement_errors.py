"""What the placement compiler refuses, in words that say what was given, where, and what to do; and
that what it writes is straight-line code."""

from __future__ import annotations

import ast
from queue import Empty
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenspeed import models
from tokenspeed.errors import PlacementError
from tokenspeed.spmd import (
    REPLICATED,
    Bucket,
    Mesh,
    Partial,
    Program,
    Replicate,
    Shard,
    ThreadGroups,
    as_batch,
    compile_model,
    layout,
    module,
    tokens,
)
from tokenspeed.spmd.params import Parameter, Source

STATEMENTS = (ast.Assign, ast.Expr, ast.Delete, ast.Return)


def compiled(*calls: Any, mesh: Mesh, rows: int | None = 8, **kind: Any) -> Program:
    """Modules one after the other, from batch.x [rows, 4] on."""

    def model(params: Any, batch: Any, kv: Any) -> Any:
        value = batch.x
        for index, call in enumerate(calls):
            value = call(params["layers"][index], value)
        return value, kv

    fields = {"x": torch.empty(rows or 1, 4, device="meta")}
    weight = Parameter((Source("w", (8, 4)),))
    tree = {"layers": [{"w": weight} for _ in calls]}
    bucket = Bucket(tokens=rows, fields=fields)
    return compile_model(model, tree, len(calls), mesh=mesh, bucket=bucket, **kind)


def declared(**how: Any) -> Any:
    @module(**how)
    def block(params: Any, x: Tensor) -> Tensor:
        return x

    return block


WHOLE = declared(inputs={"x": tokens()}, outputs=tokens())


def test_both_placements_the_module_the_mesh_and_the_fix_are_named() -> None:
    wants = declared(inputs={"x": layout(tp=Partial())})
    with pytest.raises(PlacementError) as caught:
        compiled(WHOLE, wants, mesh=Mesh.of(dp=2, tp=2))
    text = str(caught.value)
    for part in (
        "layers.1:block wants P@tp of x",
        "layers.0:block gives R",
        "on the mesh dp=2,tp=2",
        "along tp nothing turns R into summands",
        "Declare another input placement for layers.1:block or another output of layers.0:block",
    ):
        assert part in text


def test_a_dim_that_does_not_divide_is_named() -> None:
    cut = declared(inputs={"x": layout(tp=Shard(0))}, outputs=layout(tp=Shard(0)))
    with pytest.raises(
        PlacementError, match=r"layers.0:block: tensors \[\[8, 4\].*S\(0\)@tp.*tp=3"
    ):
        compiled(cut, mesh=Mesh.of(tp=3))
    assert compiled(cut, mesh=Mesh.of(tp=3), rows=9).cost_s > 0
    assert compiled(cut, mesh=Mesh.of(tp=3), rows=None).cost_s > 0  # it is found out when it runs


def test_shapes_have_to_be_known_for_a_bucket() -> None:
    makes = declared(outputs=as_batch())
    with pytest.raises(
        PlacementError, match=r"layers.0:block: the shape .* declare @module\(meta="
    ):
        compiled(makes, mesh=Mesh.of(tp=2))
    two = declared(inputs={"x": as_batch()}, outputs=as_batch(), meta=lambda params, x: x[:, :2])
    assert compiled(two, mesh=Mesh.of(tp=2)).calls[0].outputs[0].kind.shape == (8, 2)
    pair = module(
        inputs={"x": as_batch()}, outputs=(as_batch(), as_batch()), meta=lambda params, x: (x,)
    )(lambda params, x: (x, x))
    with pytest.raises(PlacementError, match="meta gives 1 tensors for 2 outputs"):
        compiled(pair, mesh=Mesh.of(tp=2))


@pytest.mark.parametrize("lies", [layout(dp=Shard(1)), layout(dp=Partial()), layout(pp=Shard(0))])
def test_a_batch_is_cut_along_its_rows_alone(lies: Any) -> None:
    with pytest.raises(PlacementError, match=r"a batch lies .*, expected Shard\(0\)"):
        compiled(WHOLE, mesh=Mesh.of(dp=2, pp=1), batch=lies)


def test_what_has_no_row_for_each_token_is_not_sent_between_stages() -> None:
    pooled = declared(inputs={"x": REPLICATED}, meta=lambda params, x: x[:1])
    with pytest.raises(PlacementError, match=r"layers.0:block gives a value \[1, 4\].*8 tokens"):
        compiled(pooled, declared(inputs={"x": REPLICATED}), mesh=Mesh.of(pp=2))


def test_what_is_routed_comes_in_whole_and_goes_out_in_summands() -> None:
    lies: dict[str, Any] = {"params": {"w": layout(ep=Shard(0))}, "indices": {"x": "w"}}
    whole = tokens(ep=Replicate())
    routed = declared(inputs={"x": whole}, outputs=whole, routed="x", **lies)
    with pytest.raises(PlacementError, match=r"x is routed along ep.*Partial outputs"):
        compiled(routed, mesh=Mesh.of(ep=2))


def test_a_rank_that_waits_for_nothing_is_told() -> None:
    _, second = ThreadGroups.of(Mesh.of(pp=2), timeout_s=0.05)
    with pytest.raises(Empty):
        second.receive(torch.empty(1), axis="pp")


@pytest.mark.parametrize("mesh", ["", "tp=4", "ep=4", "dp=2,ep=2", "pp=3,tp=2"])
def test_programs_are_straight_line_code(mesh: str) -> None:
    axes = Mesh(tuple((a, int(n)) for a, _, n in (p.partition("=") for p in mesh.split(",")) if n))
    batch = layout(**{axis: Shard(0) for axis, _ in axes.axes if axis in ("dp", "ep")})
    bucket = Bucket(tokens=16, rows=16)
    config = models.find_config("deepseek-v2-lite")
    program = models.compile_config(config, axes, bucket=bucket, batch=batch)
    (step,) = ast.parse(program.source).body
    assert isinstance(step, ast.FunctionDef)
    assert all(isinstance(line, STATEMENTS) for line in step.body)
    loops = (ast.comprehension, ast.Lambda, ast.IfExp)
    assert not any(isinstance(node, loops) for node in ast.walk(step))
