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
    Bucket,
    Costs,
    Layout,
    Link,
    Mesh,
    Partial,
    Replicate,
    Shard,
    ThreadGroups,
    alike,
    as_batch,
    compile_model,
    layout,
    module,
    tokens,
)
from tokenspeed.spmd.collectives import local_slice
from tokenspeed.spmd.overlap import Clock
from tokenspeed.spmd.params import Parameter, Source

WIDTH = 8
EXPERTS, CHOICES = 8, 2

MESHES = [
    Mesh.of(tp=1),
    Mesh.of(tp=2),
    Mesh.of(tp=4),
    Mesh.of(dp=2, tp=2),
    Mesh.of(tp=2, dp=2),
    Mesh.of(ep=2, tp=2),
    Mesh.of(dp=2, ep=2, tp=2),
]
AXES = ("dp", "ep", "tp")
BATCHES = [REPLICATED, layout(dp=Shard(0)), layout(dp=Shard(0), ep=Shard(0)), layout(tp=Shard(0))]
placements = st.sampled_from([Replicate(), Shard(0), Shard(1)])
layouts = st.tuples(*(placements for _ in AXES)).map(
    lambda found: Layout(tuple(zip(AXES, found, strict=True)))
)
links = st.builds(Link, st.sampled_from([0.0, 1e-4]), st.sampled_from([1e6, 1e9]))


def elementwise(lies: Layout) -> Any:
    """x * 2 + 1, wherever x lies: a slice of the result is the result of the slice."""

    @module(inputs={"x": lies}, outputs=lies)
    def scale(params: Any, x: Tensor) -> Tensor:
        return x * 2 + 1

    return scale


@module(inputs={"x": tokens(), "factor": tokens()}, outputs=tokens())
def each(params: Any, x: Tensor, factor: Tensor) -> Tensor:
    """Each token by its own factor, which is moved to where the tokens are."""
    return x * factor - 1


@module(inputs={"x": as_batch()}, outputs=as_batch())
def here(params: Any, x: Tensor, factor: Tensor) -> Tensor:
    """Each token by its own factor, which the rank has of its own rows."""
    return x * factor + 2


@module(inputs={"x": alike(), "y": alike()}, outputs=alike())
def add(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """Linear: a sum of summands is a summand of the sum."""
    return (x + y) / 2


def column_then_row(axis: str) -> Any:
    """x @ A.T @ B.T with A's rows and B's columns sharded: summands of the whole product."""
    whole, parts = tokens(**{axis: Replicate()}), tokens(**{axis: Partial()})

    @module(inputs={"x": whole}, outputs=parts)
    def product(params: Any, x: Tensor, weights: Any) -> Tensor:
        a, b = weights
        return x @ a.T @ b.T

    return product


def experts(axis: str) -> Any:
    """The sum of x * w[id] over the choices of each token, with w's rows sharded."""
    whole, parts = tokens(**{axis: Replicate()}), tokens(**{axis: Partial()})

    @module(
        inputs={"x": whole, "ids": whole},
        outputs=parts,
        params={"w": layout(**{axis: Shard(0)})},
        indices={"ids": "w"},
        routed="ids",
    )
    def mixed(params: Any, x: Tensor, ids: Tensor) -> Tensor:
        own = torch.where((ids >= 0)[..., None], params["w"][ids.clamp(min=0)], 0.0)
        return (x[:, None] * own).sum(1)

    return mixed


axes = st.sampled_from(AXES)
blocks = st.lists(
    st.one_of(
        st.tuples(st.just("scale"), layouts),
        st.tuples(st.just("each"), st.none()),
        st.tuples(st.just("here"), st.none()),
        st.tuples(st.just("add"), st.integers(0, 5)),
        st.tuples(st.just("product"), axes),
        st.tuples(st.just("experts"), axes),
    ),
    min_size=1,
    max_size=6,
)


class Batch:
    """This rank's rows of x, factor and ids; and for each product its slices of A and B."""

    def __init__(self, program: list[Any], mesh: Mesh, lies: Layout, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        kind: dict[str, Any] = {"generator": random, "dtype": torch.float64}
        self.x = own_rows(torch.randn(WIDTH, WIDTH, **kind), mesh, lies)
        self.factor = own_rows(torch.rand(WIDTH, 1, **kind), mesh, lies)
        ids = torch.randint(EXPERTS, (WIDTH, CHOICES), generator=random)
        self.ids = own_rows(ids, mesh, lies)
        self.w = torch.rand(EXPERTS, WIDTH, **kind) / 2
        for index, (block, axis) in enumerate(program):
            a, b = torch.randn(2, WIDTH, WIDTH, **kind) / 3
            if block == "product":
                size, at = mesh.size(axis), mesh.coordinate(axis)
                setattr(self, f"w{index}", (a.chunk(size, 0)[at], b.chunk(size, 1)[at]))


def own_rows(whole: Tensor, mesh: Mesh, lies: Layout) -> Tensor:
    for axis, size in mesh.axes:
        if lies.on(axis).is_shard(0):
            whole = local_slice(whole, dim=0, size=size, at=mesh.coordinate(axis))
    return whole


def run(
    program: list[Any],
    mesh: Mesh,
    communicator: Any,
    *,
    lies: Layout,
    costs: Costs | None,
    tokens_known: bool,
    seed: int,
) -> Tensor:
    def model(params: Any, batch: Any, kv: Any) -> Any:
        values = [batch.x]
        for index, (block, how) in enumerate(program):
            x = values[-1]
            if block == "scale":
                made = elementwise(how)(params["none"], x)
            elif block == "each":
                made = each(params["none"], x, batch.factor)
            elif block == "here":
                made = here(params["none"], x, batch.factor)
            elif block == "add":
                made = add(params["none"], x, values[min(how, index)])
            elif block == "product":
                made = column_then_row(how)(params["none"], x, getattr(batch, f"w{index}"))
            else:
                made = experts(how)(params["moe"][index], x, batch.ids)
            values.append(made)
        return values[-1], kv

    batch = Batch(program, mesh, lies, seed)
    fields = {
        name: torch.empty(WIDTH, *one.shape[1:], dtype=one.dtype, device="meta")
        for name, one in (("x", batch.x), ("factor", batch.factor), ("ids", batch.ids))
    }
    table = Parameter((Source("w", (EXPERTS, WIDTH)),))
    compiled = compile_model(
        model,
        {"none": {}, "moe": [{"w": table} for _ in program]},
        0,
        mesh=mesh,
        communicator=communicator,
        bucket=Bucket(tokens=WIDTH if tokens_known else None, fields=fields),
        batch=lies,
        costs=costs,
    )
    params: Any = {"none": {}, "moe": []}
    for block, axis in program:
        at, size = (mesh.coordinate(axis), mesh.size(axis)) if block == "experts" else (0, 1)
        params["moe"].append({"w": local_slice(batch.w, dim=0, size=size, at=at)})
    return compiled(params, batch, KV(()))[0]


@given(
    program=blocks,
    mesh=st.sampled_from(MESHES),
    lies=st.sampled_from(BATCHES),
    costs=st.none()
    | st.builds(
        lambda a, b, c, memory: Costs({"dp": a, "ep": b, "tp": c}, memory, begin_s=0.0),
        links,
        links,
        links,
        st.sampled_from([1e4, 1e12]),  # beside slow modules collectives are begun early
    ),
    tokens_known=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_ranks_equal_one_rank(
    program: list[Any], mesh: Mesh, lies: Layout, costs: Costs | None, tokens_known: bool, seed: int
) -> None:
    how: dict[str, Any] = {"lies": lies, "costs": costs, "seed": seed, "tokens_known": tokens_known}
    alone = run(program, Mesh.single(), None, **how)
    with ThreadPoolExecutor(mesh.ranks) as pool:
        communicators = ThreadGroups.of(mesh, timeout_s=10)
        results = list(pool.map(lambda c: run(program, c.mesh, c, **how), communicators))
    for communicator, result in zip(communicators, results, strict=True):
        own = own_rows(alone, communicator.mesh, lies)
        torch.testing.assert_close(result, own, atol=1e-9, rtol=1e-9)


seconds = st.integers(0, 9).map(float)


@given(st.lists(st.tuples(st.sampled_from(["work", "pause", "begin", "wait"]), seconds)))
def test_a_step_takes_all_but_what_is_hidden_and_no_less_than_either_side(events: Any) -> None:
    clock, under_way, hidden = Clock(), dict[str, float](), 0.0
    worked = sent = 0.0
    for number, (event, took) in enumerate(events):
        if event == "work":
            clock.work(took)
            worked += took
        elif event == "wait":
            if under_way:
                name = next(iter(under_way))
                hidden += clock.wait(name, under_way.pop(name))
        else:
            sent += took
            if event == "pause":
                hidden += clock.pause(took)
            else:
                clock.begin(str(number), took)
                under_way[str(number)] = took
    hidden += sum(clock.wait(name, took) for name, took in under_way.items())
    assert clock.now_s == worked + sent - hidden
    assert max(worked, sent) <= clock.now_s <= worked + sent
