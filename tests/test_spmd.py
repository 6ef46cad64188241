"""Meshes, placements and the compiler: what it inserts, what it refuses, and that ranks agree."""

from __future__ import annotations

import multiprocessing
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import models_here
import tiny
from tokenspeed import models
from tokenspeed.errors import ConfigError, PlacementError, StepError
from tokenspeed.models import LlamaConfig
from tokenspeed.plan import StepPlan
from tokenspeed.spmd import (
    KV,
    REPLICATED,
    Bucket,
    Communicator,
    Costs,
    Link,
    Mesh,
    Partial,
    ProcessGroups,
    Program,
    Replicate,
    Shard,
    ThreadGroups,
    compile_model,
    layout,
    module,
    tokens,
)
from tokenspeed.spmd.batch import Slots
from tokenspeed.spmd.moves import Kind, Moves
from tokenspeed.spmd.params import Constant, Parameter, Source, local_shape, own_sources

SMOLLM2 = LlamaConfig(
    architecture="llama",
    vocab_size=49152,
    layers=30,
    hidden=576,
    heads=8,
    kv_heads=4,
    head_dim=64,
    ffn=1536,
    context_max=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
    tied=True,
)


def test_ranks_are_numbered_row_major() -> None:
    mesh = Mesh.of(dp=2, tp=3, rank=4)
    assert (mesh.coordinate("dp"), mesh.coordinate("tp"), mesh.coordinate("ep")) == (1, 1, 0)
    assert mesh.peers("tp") == (3, 4, 5)
    assert mesh.peers("dp") == (1, 4)
    assert mesh.peers("ep") == (4,)
    assert Mesh.single().ranks == 1


@pytest.mark.parametrize(
    "axes",
    [(("tp", 0),), (("tp", 2), ("tp", 2)), (("t p", 2),), (("tp", 2.5),), (("tp", "2"),)],
    ids=["empty", "twice", "name", "fraction", "text"],
)
def test_bad_meshes_are_refused(axes: Any) -> None:
    with pytest.raises(ConfigError, match="mesh"):
        Mesh(axes)


def test_layouts_that_mean_the_same_are_equal() -> None:
    assert layout(tp=Replicate(), dp=Shard(0)) == layout(dp=Shard(0))
    assert layout(tp=Partial()).within(Mesh.of(tp=1)) == REPLICATED
    with pytest.raises(PlacementError, match="sum"):
        layout(tp=Partial("max"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_all_reduces_a_layer(ranks: int) -> None:
    program = models.compile_config(SMOLLM2, Mesh.of(tp=ranks))
    reduces = [one for one in program.collectives if one.op == "all_reduce"]
    for index in range(SMOLLM2.layers):
        produced = [
            one.consumer
            for one in reduces
            if one.consumer == f"layers.{index}.mlp_norm:add_norm"
            or one.consumer == f"layers.{index + 1}.attention_norm:add_norm"
        ]
        assert len(produced) == (2 if index < SMOLLM2.layers - 1 else 1)
    assert len(reduces) == 2 * SMOLLM2.layers  # the last one stands before the head
    assert [one.op for one in program.collectives[-2:]] == ["all_reduce", "all_gather"]
    assert len(program.collectives) == 2 * SMOLLM2.layers + 1
    assert {one.axis for one in program.collectives} == {"tp"}


def test_one_rank_needs_no_collective() -> None:
    for mesh in (Mesh.single(), Mesh.of(tp=1), Mesh.of(dp=2)):
        program = models.compile_config(SMOLLM2, mesh)
        assert program.collectives == ()
        assert "for " not in program.source


def test_the_plan_can_be_read() -> None:
    text = models.compile_config(SMOLLM2, Mesh.of(tp=2)).describe()
    assert text.startswith("mesh tp=2: 61 collectives")
    lines = text.splitlines()
    at = lines.index("  layers.3.attention:attention  (x R) -> P@tp")
    assert lines[at + 1] == "    all_reduce over tp  P@tp -> R"
    assert lines[at + 2].startswith("  layers.3.mlp_norm:add_norm")


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"k_proj.*tp=8.*4 units of 64.*divisor of 4"):
        models.compile_config(SMOLLM2, Mesh.of(tp=8))


# --- small programs -------------------------------------------------------------------------------


def weight(*shape: int) -> Parameter:
    return Parameter((Source("w", shape),))


def linked(produced: Any, wanted: Any, mesh: Mesh, **kind: Any) -> Program:
    """ids -> make -> take, with the given placements between the two."""

    @module(outputs=produced, params={"w": layout(tp=Shard(0))})
    def make(params: Any, ids: Tensor) -> Tensor:
        return ids

    @module(inputs={"x": wanted}, outputs=wanted)
    def take(params: Any, x: Tensor) -> Tensor:
        return x

    def model(params: Any, batch: Any, kv: Any) -> Any:
        return take(params["b"], make(params["a"], batch.token_ids)), kv

    tree = {"a": {"w": weight(8, 2)}, "b": {}}
    return compile_model(model, tree, 0, mesh=mesh, **kind)


@pytest.mark.parametrize(
    ("produced", "wanted", "ops"),
    [
        (Partial(), Replicate(), ["all_reduce"]),
        (Shard(1), Replicate(), ["all_gather"]),
        (Replicate(), Shard(0), ["slice", "all_gather"]),
        (Partial(), Shard(0), ["reduce_scatter", "all_gather"]),
        (Shard(0), Shard(1), ["all_to_all", "all_gather"]),
        (Shard(1), Shard(1), ["all_gather"]),
        (Partial(), Partial(), ["all_reduce"]),
        (Replicate(), Replicate(), []),
    ],
)
def test_inserted_collectives(produced: Any, wanted: Any, ops: list[str]) -> None:
    program = linked(layout(tp=produced), layout(tp=wanted), Mesh.of(tp=2))
    assert [one.op for one in program.collectives] == ops


@pytest.mark.parametrize("produced", [Replicate(), Shard(0)])
def test_nothing_becomes_partial(produced: Any) -> None:
    with pytest.raises(PlacementError) as caught:
        linked(layout(tp=produced), layout(tp=Partial()), Mesh.of(dp=2, tp=2))
    text = str(caught.value)
    for part in ("b:take wants P@tp", "a:make gives", "dp=2,tp=2", "Declare"):
        assert part in text


def test_a_dim_on_two_axes_is_split_in_mesh_order() -> None:
    both, mesh = layout(dp=Shard(0), tp=Shard(0)), Mesh.of(dp=2, tp=2)
    moves = Moves(Kind((8, 8), 4, False), mesh, Costs())
    inner = moves.tree(both, frozenset([layout(dp=Shard(0))]))[1]
    assert [(one.op, one.axis) for one in inner] == [("all_gather", "tp")]
    outer = moves.tree(both, frozenset([layout(tp=Shard(0))]))[1]  # dp is not the innermost
    assert [one.op for one in outer] != ["all_gather"]
    assert len(outer) > 1


def test_an_undeclared_input_is_refused() -> None:
    @module()
    def make(params: Any, ids: Tensor) -> Tensor:
        return ids

    @module()
    def take(params: Any, x: Tensor) -> Tensor:
        return x

    def model(params: Any, batch: Any, kv: Any) -> Any:
        return take(params["b"], make(params["a"], batch.token_ids)), kv

    with pytest.raises(PlacementError, match=r"b:take: argument x comes from a:make"):
        compile_model(model, {"a": {}, "b": {}}, 0, mesh=Mesh.single())


def test_a_parameter_has_one_placement() -> None:
    def using(lies: Any) -> Any:
        @module(inputs={"x": REPLICATED}, params={"w": lies})
        def use(params: Any, x: Tensor) -> Tensor:
            return x

        return use

    @module()
    def make(params: Any, ids: Tensor) -> Tensor:
        return ids

    def model(params: Any, batch: Any, kv: Any) -> Any:
        x = make(params["a"], batch.token_ids)
        x = using(layout(tp=Shard(0)))(params["b"], x)
        return using(layout(tp=Shard(1)))(params["b"], x), kv

    with pytest.raises(PlacementError, match=r"parameter b.w is .*S\(1\)@tp here and S\(0\)@tp"):
        compile_model(model, {"a": {}, "b": {"w": weight(4, 4)}}, 0, mesh=Mesh.of(tp=2))


def test_modules_do_not_run_outside_the_compiler() -> None:
    with pytest.raises(PlacementError, match="outside a trace"):
        models.llama.mlp({}, torch.zeros(1))
    with pytest.raises(PlacementError, match="placements for y"):
        module(inputs={"y": REPLICATED})(lambda params, x: x)


def test_without_a_communicator_a_program_is_only_described() -> None:
    program = linked(layout(tp=Partial()), REPLICATED, Mesh.of(tp=2))
    with pytest.raises(PlacementError, match="without a communicator"):
        program({"a": {}, "b": {}}, Slotless(torch.ones(2)), KV(()))


class Slotless:
    """A batch of one field."""

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids = token_ids


def test_a_donated_kv_is_dead() -> None:
    program = linked(REPLICATED, REPLICATED, Mesh.single())
    kv, batch = KV(()), Slotless(torch.ones(2))
    params: Any = {"a": {}, "b": {}}
    _, after = program(params, batch, kv)
    with pytest.raises(StepError, match="donated"):
        program(params, batch, kv)
    with pytest.raises(StepError, match="donated"):
        len(kv)
    program(params, batch, after)


def test_a_value_gathered_for_one_serves_all() -> None:
    @module(outputs=layout(tp=Partial()))
    def make(params: Any, ids: Tensor) -> Tensor:
        return ids

    @module(inputs={"x": REPLICATED, "y": REPLICATED})
    def take(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def model(params: Any, batch: Any, kv: Any) -> Any:
        x = make(params["a"], batch.token_ids)
        return take(params["b"], take(params["b"], x, x), x), kv

    program = compile_model(model, {"a": {}, "b": {}}, 0, mesh=Mesh.of(tp=2))
    assert [one.op for one in program.collectives] == ["all_reduce"]


# --- ranks agree ----------------------------------------------------------------------------------


def on_threads(mesh: Mesh, work: Callable[[ThreadGroups], Any]) -> list[Any]:
    with ThreadPoolExecutor(mesh.ranks) as pool:
        return list(pool.map(work, ThreadGroups.of(mesh, timeout_s=20)))


def logits_of(folder: Path, mesh: Mesh, communicator: Communicator | None = None) -> Tensor:
    """Two prompts in one step, then one more token each."""
    model = models.build(models.open_checkpoint(folder), mesh, communicator=communicator)
    kv, slots = model.kv.allocate(8, 4), Slots(2, 4, 4, model.kv)
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    first = StepPlan(
        step=0,
        slots=ints(0, 1),
        query_start=ints(0, 5, 12),
        token_ids=ints(3, 9, 27, 81, 50, 4, 8, 16, 32, 64, 33, 66),
        context_lens=ints(0, 0),
        sampled=np.array([True, True]),
        page_delta=np.array([(s, i, 4 * s + i) for s in (0, 1) for i in range(4)], np.int32),
    )
    second = StepPlan(
        step=1,
        slots=ints(1, 0),
        query_start=ints(0, 1, 2),
        token_ids=ints(70, 71),
        context_lens=ints(7, 5),
        sampled=np.array([True, True]),
        page_delta=np.zeros((0, 3), np.int32),
    )
    outputs = []
    with torch.inference_mode():
        for plan in (first, second):
            slots.patch(plan)
            logits, kv = model.step(model.params, slots.batch(plan), kv)
            outputs.append(logits)
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "axes",
    [{"tp": 2}, {"dp": 2, "tp": 2}, {"tp": 2, "ep": 1}, {"pp": 2}, {"tp": 2, "pp": 2}],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_equal_one_rank(tmp_path: Path, axes: dict[str, int], tied: bool) -> None:
    folder = tiny.write(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    alone = logits_of(folder, Mesh.single())
    for logits in on_threads(Mesh.of(**axes), lambda c: logits_of(folder, c.mesh, c)):
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def _gloo_rank(rank: int, port: int, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = Mesh.of(tp=2, rank=rank)
    communicator = ProcessGroups(mesh)
    x = torch.arange(8.0).view(2, 4) * (rank + 1)
    results.put(
        (
            rank,
            logits_of(folder, mesh, communicator).numpy(),
            communicator.reduce_scatter(x, axis="tp", dim=1).numpy(),
            communicator.all_gather(x, axis="tp", dim=0).numpy(),
        )
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_gloo_processes_equal_one_rank(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_gloo_rank, args=(r, port, folder, results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    got = sorted((results.get(timeout=120) for _ in ranks), key=lambda entry: entry[0])
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    alone = logits_of(folder, Mesh.single()).numpy()
    x = np.arange(8.0).reshape(2, 4)
    for rank, logits, scattered, gathered in got:
        np.testing.assert_allclose(logits, alone, atol=1e-5)
        np.testing.assert_array_equal(scattered, 3 * x[:, 2 * rank : 2 * rank + 2])
        np.testing.assert_array_equal(gathered, np.concatenate([x, 2 * x]))


def test_constants_are_on_every_rank() -> None:
    @module()
    def make(params: Any, table: Tensor) -> Tensor:
        return table

    def model(params: Any, batch: Any, kv: Any) -> Any:
        return make(params["a"], params["table"]), kv

    tree = {"a": {}, "table": Constant(lambda: torch.ones(2))}
    program = compile_model(model, tree, 0, mesh=Mesh.of(tp=2))
    logits, _ = program({"a": {}, "table": torch.ones(2)}, None, KV(()))
    assert logits.tolist() == [1, 1]


# --- what the compiler chooses --------------------------------------------------------------------


def smollm2(mesh: Mesh, tokens: int, **kind: Any) -> Program:
    bucket = Bucket(tokens=tokens, rows=8, dtype=torch.bfloat16)
    return models.compile_config(SMOLLM2, mesh, bucket=bucket, **kind)


def test_the_residual_is_cut_along_tokens_when_there_are_many() -> None:
    few, many = smollm2(Mesh.of(tp=4), 16), smollm2(Mesh.of(tp=4), 16384)
    assert {c.op for c in few.collectives if c.layer == 3} == {"all_reduce"}
    layer = [c.op for c in many.collectives if c.layer == 3]
    assert layer == ["all_gather", "reduce_scatter"] * 2
    uneven = smollm2(Mesh.of(tp=4), 16383)  # cannot be cut into four
    assert {c.op for c in uneven.collectives if c.layer == 3} == {"all_reduce"}


def test_slow_links_are_avoided() -> None:
    dear = Costs.of(tp=Link(latency_s=1e-3, bytes_per_s=1e12))
    cheap = Costs.of(tp=Link(latency_s=0.0, bytes_per_s=1e11))
    ops = [
        [c.op for c in smollm2(Mesh.of(tp=4), 4096, costs=costs).collectives if c.layer == 3]
        for costs in (dear, cheap)
    ]
    assert ops[0] == ["all_reduce", "all_reduce"]
    assert set(ops[1]) == {"reduce_scatter", "all_gather"}


def test_axes_of_one_size_are_not_one_axis() -> None:
    """Rank sets are compared: along tp and ep there are two ranks each, but others."""
    program = linked(layout(tp=Shard(0)), layout(ep=Shard(0)), Mesh.of(tp=2, ep=2))
    assert {(one.op, one.axis) for one in program.collectives} >= {("all_gather", "tp")}
    same = linked(layout(ep=Shard(0)), layout(ep=Shard(0)), Mesh.of(tp=2, ep=2))
    assert [(one.op, one.axis) for one in same.collectives] == [("all_gather", "ep")]


EXPERTS, CHOICES, WIDE = 8, 2, 4
EXPERT = tokens(ep=Replicate())


@module(
    inputs={"x": EXPERT, "ids": EXPERT},
    outputs=tokens(ep=Partial()),
    params={"w": layout(ep=Shard(0))},
    indices={"ids": "w"},
    routed="ids",
)
def experts(params: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The sum of x * w[id] over the choices of each token."""
    own = torch.where((ids >= 0)[..., None], params["w"][ids.clamp(min=0)], 0.0)
    total: Tensor = (x[:, None] * own).sum(1)
    return total


def _mix(mesh: Mesh, costs: Costs | None, communicator: Communicator | None = None) -> Program:
    def model(params: Any, batch: Any, kv: Any) -> Any:
        return experts(params["moe"], batch.x, batch.ids), kv

    fields = {
        "x": torch.empty(8, WIDE, device="meta"),
        "ids": torch.empty(8, CHOICES, dtype=torch.int64, device="meta"),
    }
    return compile_model(
        model,
        {"moe": {"w": weight(EXPERTS, WIDE)}},
        0,
        mesh=mesh,
        communicator=communicator,
        bucket=Bucket(tokens=8, fields=fields),
        batch=layout(ep=Shard(0)),
        costs=costs,
    )


class Mixed:
    """x and ids of some tokens."""

    def __init__(self, x: Tensor, ids: Tensor) -> None:
        self.x, self.ids = x, ids


@pytest.mark.parametrize("sent", [True, False])
def test_tokens_go_to_their_experts_or_experts_get_all(sent: bool) -> None:
    mesh = Mesh.of(ep=4)
    random = torch.Generator().manual_seed(3)
    x = torch.randn(8, WIDE, generator=random)
    w = torch.randn(EXPERTS, WIDE, generator=random)
    ids = torch.randint(EXPERTS, (8, CHOICES), generator=random)
    ids[2:6] = 1  # two ranks whose tokens all go to the first, and whom nobody asks
    link = Link(0.0, 1e3) if sent else Link(1.0, 1e12)
    whole = _mix(Mesh.single(), None)({"moe": {"w": w}}, Mixed(x, ids), KV(()))[0]

    def work(communicator: ThreadGroups) -> Tensor:
        program = _mix(communicator.mesh, Costs.of(ep=link), communicator)
        ops = [one.op for one in program.collectives]
        assert program.capturable != sent
        assert ops == (
            ["all_to_all"] * 2 if sent else ["all_gather", "all_gather", "reduce_scatter"]
        )
        at = communicator.mesh.coordinate("ep")
        own = Mixed(x[2 * at : 2 * at + 2], ids[2 * at : 2 * at + 2])
        return program({"moe": {"w": w[2 * at : 2 * at + 2]}}, own, KV(()))[0]

    torch.testing.assert_close(torch.cat(on_threads(mesh, work)), whole)


def test_boundaries_that_leave_different_axes_open_are_refused() -> None:
    with pytest.raises(PlacementError, match="name the same axes"):
        module(inputs={"x": tokens()}, outputs=tokens(tp=Partial()))(lambda params, x: x)
    with pytest.raises(PlacementError, match="routed is 'y'"):
        module(inputs={"x": tokens()}, routed="y")(lambda params, x, y: x)


def test_groups_of_sources_are_dealt_out_whole() -> None:
    """Experts: dim 0 counts the groups, and dims beyond it are those of each source."""
    names = [f"{e}.{part}" for e in range(4) for part in ("gate", "up")]
    stack = Parameter(tuple(Source(name, (6, 3)) for name in names), stacked=4)
    assert stack.shape == (4, 12, 3)
    mesh = Mesh.of(ep=2, tp=2, rank=3)
    lies = layout(ep=Shard(0), tp=Shard(1))
    own = own_sources(stack, lies, mesh, ("experts",))
    assert [source.name for source, _ in own] == names[4:]
    assert all(part == (slice(3, 6), slice(0, 3)) for _, part in own)
    assert local_shape(stack, lies, mesh, ("experts",)) == (2, 6, 3)
    with pytest.raises(PlacementError, match=r"experts.*4 units of 1 over 3 ranks"):
        own_sources(stack, lies, Mesh.of(ep=3), ("experts",))


# --- stages ---------------------------------------------------------------------------------------


def test_each_stage_has_its_own_layers(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path)
    checkpoint = models.open_checkpoint(folder)
    layers = checkpoint.config.layers
    held: list[int] = []
    for mesh in (Mesh.of(pp=2, rank=0), Mesh.of(pp=2, rank=1)):
        model = models.build(checkpoint, mesh)
        here = list(model.step.held_layers)
        held += here
        for index, layer in enumerate(model.params["layers"]):
            assert (layer["mlp"]["down"].numel() > 0) == (index in here)
        assert (model.params["embed"]["weight"].numel() > 0) == (mesh.rank == 0)
        assert (model.params["head"]["weight"].numel() > 0) == (mesh.rank == 1)
        kv = model.kv.allocate(4, 2)
        assert [bool(kv[index]) for index in range(layers)] == [i in here for i in range(layers)]
        whole = models.build(checkpoint, Mesh.single()).kv.token_bytes
        assert model.kv.token_bytes * layers == whole * len(here)
        ops = [one.op for one in model.step.collectives]
        assert ops == (["send", "send", "broadcast"] if mesh.rank == 0 else ["broadcast"])
    assert held == list(range(layers))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"30 layers .* over 31 stages .* from 1 to 30"):
        models.compile_config(SMOLLM2, Mesh.of(pp=31))


def test_what_is_sent_between_stages_is_cut_where_that_is_cheaper() -> None:
    """The residual goes as it lies: along tokens, a part a rank, if there are many."""
    few, many = (smollm2(Mesh.of(pp=2, tp=4), tokens) for tokens in (16, 16384))
    for program, parts in ((few, 1), (many, 4)):
        sent = [one for one in program.collectives if one.op == "send"]
        rows = program.bucket.tokens or 0
        assert sent[-1].bytes == rows * SMOLLM2.hidden * 2 // parts


# --- without an engine ----------------------------------------------------------------------------


def test_a_model_is_a_step(tmp_path: Path) -> None:
    """A plan by hand, then its next token; the KV that went in is gone."""
    step = models.build(models.open_checkpoint(tiny.write(tmp_path)), Mesh.single())
    kv = step.allocate(slots=1, pages=4, page_size=4)
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731

    def plan(ids: list[int], context: int, pages: Any) -> StepPlan:
        return StepPlan(
            step=0,
            slots=ints(0),
            query_start=ints(0, len(ids)),
            token_ids=ints(*ids),
            context_lens=ints(context),
            sampled=np.array([True]),
            page_delta=np.array(pages, np.int32).reshape(-1, 3),
        )

    after, _ = step(step.params, kv, plan([5, 9, 2, 7], 0, [(0, 0, 3), (0, 1, 1)]))
    _, cached = step(step.params, after, plan([30], 4, []))
    fresh = step.allocate(slots=1, pages=4, page_size=4)
    whole = plan([5, 9, 2, 7, 30], 0, [(0, 0, 0), (0, 1, 2)])
    _, logits = step(step.params, fresh, whole)
    torch.testing.assert_close(cached, logits, atol=1e-5, rtol=1e-5)
    for gone in (kv, after, fresh):
        with pytest.raises(StepError, match="donated"):
            step(step.params, gone, whole)


@models_here.needs_smollm2
def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = Path(__file__).resolve().parents[1].joinpath("README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*StepPlan[^`]*)```", readme)
    assert len(example.splitlines()) <= 15
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out == "[7042]\n"  # " Paris"
