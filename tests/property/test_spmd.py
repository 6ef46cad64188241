"""Random programs with random placements on random meshes equal the program on one rank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenspeed.spmd import (
    KV,
    REPLICATED,
    Mesh,
    Partial,
    Replicate,
    Shard,
    ThreadGroups,
    compile_model,
    layout,
    module,
)

WIDTH = 8

meshes = st.sampled_from(
    [Mesh.of(tp=2), Mesh.of(tp=4), Mesh.of(dp=2, tp=2), Mesh.of(tp=2, dp=2), Mesh.of(tp=1)]
)
placements = st.sampled_from([Replicate(), Shard(0), Shard(1)])


@module()
def start(params: Any, x: Tensor) -> Tensor:
    return x


def elementwise(lies: Any) -> Any:
    """x * 2 + 1, wherever x lies: a slice of the result is the result of the slice."""

    @module(inputs={"x": lies}, outputs=lies)
    def scale(params: Any, x: Tensor) -> Tensor:
        return x * 2 + 1

    return scale


def column_then_row(axis: str) -> Any:
    """x @ A.T @ B.T with A's rows and B's columns sharded: summands of the whole product."""

    @module(inputs={"x": REPLICATED}, outputs=layout(**{axis: Partial()}))
    def product(params: Any, x: Tensor, weights: Any) -> Tensor:
        a, b = weights
        return x @ a.T @ b.T

    return product


blocks = st.lists(
    st.one_of(
        st.tuples(st.just("scale"), placements, placements),
        st.tuples(st.just("product"), st.sampled_from(["tp", "dp"]), st.none()),
    ),
    min_size=1,
    max_size=6,
)


def valid(program: list[Any]) -> bool:
    """No tensor dim on two axes: what the compiler refuses is another test's matter."""
    return all(
        not (kind == "scale" and isinstance(one, Shard) and one == other)
        for kind, one, other in program
    )


def run(program: list[Any], mesh: Mesh, communicator: Any, x: Tensor) -> Tensor:
    def model(params: Any, batch: Any, kv: Any) -> Any:
        value = start(params["none"], batch.x)
        for index, (kind, one, other) in enumerate(program):
            if kind == "scale":
                value = elementwise(layout(tp=one, dp=other))(params["none"], value)
            else:
                value = column_then_row(one)(params["none"], value, getattr(batch, f"w{index}"))
        return value, kv

    compiled = compile_model(model, {"none": {}}, 0, mesh=mesh, communicator=communicator)
    return compiled({"none": {}}, Batch(program, mesh, x), KV(()))[0]


class Batch:
    """x, and for each product this rank's slices of A and B."""

    def __init__(self, program: list[Any], mesh: Mesh, x: Tensor) -> None:
        self.x = x
        random = torch.Generator().manual_seed(7)
        for index, (kind, axis, _) in enumerate(program):
            a, b = torch.randn(2, WIDTH, WIDTH, generator=random, dtype=torch.float64) / 3
            if kind == "product":
                size, at = mesh.size(axis), mesh.coordinate(axis)
                setattr(self, f"w{index}", (a.chunk(size, 0)[at], b.chunk(size, 1)[at]))


@given(program=blocks, mesh=meshes, seed=st.integers(0, 99))
@settings(max_examples=60)
def test_ranks_equal_one_rank(program: list[Any], mesh: Mesh, seed: int) -> None:
    program = [step for step in program if valid([step])]
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(WIDTH, WIDTH, generator=random, dtype=torch.float64)
    alone = run(program, Mesh.single(), None, x)
    with ThreadPoolExecutor(mesh.ranks) as pool:
        communicators = ThreadGroups.of(mesh, timeout_s=10)
        results = list(pool.map(lambda c: run(program, c.mesh, c, x), communicators))
    for result in results:
        torch.testing.assert_close(result, alone, atol=1e-5, rtol=1e-5)
