"""A mesh as it is on this machine: what its collectives take, and a decode step of a model on it.

Rule: every rank is a process, as when it serves, and times the same things at once; what is told is
rank 0's. On GPUs by CUDA events, each measurement also as a CUDA graph, where nothing waits for the
CPU; a program that sends tokens to their experts has no graph. Medians.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, final

import attrs
import numpy as np
import torch
from attrs import frozen
from rich.table import Table
from torch import Tensor

from tokenspeed import models
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError, RankLost
from tokenspeed.plan import StepPlan
from tokenspeed.ranks import check_gpus, connect, device_of
from tokenspeed.spmd import KV, Communicator, Mesh, ProcessGroups
from tokenspeed.spmd.batch import Batch, Slots
from tokenspeed.spmd.replay import capture, underived
from tokenspeed.spmd.report import batch_of, parse_mesh

__all__ = ["Report", "captured", "measure"]

T = TypeVar("T")

PAGE = 64
WARM, ROUNDS, REPEATS = 3, 5, 20
BYTES = {"cpu": (1 << 10, 1 << 15, 1 << 20), "cuda": tuple(1 << n for n in range(10, 29, 2))}
OPS: dict[str, dict[str, int]] = {
    "all_reduce": {},
    "all_gather": {"dim": 0},
    "reduce_scatter": {"dim": 0},
    "all_to_all": {"dim": 0, "from_dim": 0},
}
"""What is timed along each axis; sizes as `Collective.bytes` counts them."""


@final
@frozen(kw_only=True)
class Timed:
    """Seconds of one thing; `graph_s` None: there is no graph of it here."""

    what: str
    axis: str
    bytes: int
    eager_s: float
    graph_s: float | None


@final
@frozen(kw_only=True)
class Report:
    """What `tokenspeed bench mesh` found, as rank 0 saw it.

    Attributes:
        model, mesh, device, dtype, rows, context: what was measured.
        collectives: by axis, op and size.
        step: a decode step, None of what was not asked for.
    """

    model: str | None
    mesh: str
    device: str
    dtype: str
    rows: int
    context: int
    collectives: tuple[Timed, ...]
    step: Timed | None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return attrs.asdict(self)

    def table(self) -> Table:
        """For people: microseconds."""
        table = Table(title=f"mesh {self.mesh} on {self.device}, {self.dtype}")
        for name in ("what", "axis", "bytes", "eager µs", "graph µs", "GB/s"):
            table.add_column(name, justify="left" if name in ("what", "axis") else "right")
        for one in (*self.collectives, *filter(None, [self.step])):
            best = one.graph_s or one.eager_s
            graph = "" if one.graph_s is None else f"{one.graph_s * 1e6:,.1f}"
            rate = f"{one.bytes / best / 1e9:,.1f}" if one.bytes else ""
            size = f"{one.bytes:,}" if one.bytes else ""
            table.add_row(one.what, one.axis, size, f"{one.eager_s * 1e6:,.1f}", graph, rate)
        return table


def measure(
    model: str | None, mesh: str, *, device: str, dtype: str, rows: int, context: int
) -> Report:
    """Start the ranks, have them time collectives and, with a model, a decode step.

    Args:
        model: a configuration, or the name of a shape that is shipped, for random weights; None:
            collectives alone.
        mesh: as `tp=2`.
        device: cpu or cuda: a GPU a rank.
        dtype: of weights, activations, KV and what the collectives carry.
        rows: of the step, of all ranks together.
        context: cached tokens of each row.

    Raises:
        ConfigError: a flag cannot be used.
        RankLost: a rank ended.
        CheckpointError, PlacementError: see `models.build`.
    """
    axes = parse_mesh(mesh)
    config = EngineConfig(device=device, dtype=dtype)
    check_gpus(config, axes)
    parts = batch_of(axes).parts(axes)
    if rows < 1 or rows % parts:
        raise ConfigError("rows", rows, f"a multiple of {parts}: so many ranks have their own")
    if context < 0:
        raise ConfigError("context", context, "0 tokens or more")
    job = _Job(model, axes, config, rows, context)
    if model is not None:
        models.compile_config(models.find_config(model), axes)  # what does not fit starts no rank
    with tempfile.TemporaryDirectory(prefix="tokenspeed-") as folder:
        meeting, out = str(Path(folder) / "ranks"), Path(folder) / "found.json"
        start = multiprocessing.get_context("spawn").Process
        others = [
            start(target=_rank, args=(job, rank, meeting, out), daemon=True)
            for rank in range(axes.ranks)
        ]
        for process in others:
            process.start()
        _join(others)
        found = json.loads(out.read_text())
    collectives = tuple(Timed(**one) for one in found["collectives"])
    step = Timed(**found["step"]) if found["step"] else None
    return Report(
        model=model,
        mesh=mesh,
        device=found["device"],
        dtype=dtype,
        rows=rows,
        context=context,
        collectives=collectives,
        step=step,
    )


def _join(ranks: Sequence[BaseProcess]) -> None:
    """Wait for all; where one fails, its message is on stderr, and nobody waits for the others."""
    waiting: dict[Any, tuple[int, BaseProcess]] = {
        process.sentinel: (rank, process) for rank, process in enumerate(ranks)
    }
    failed = None
    while waiting:
        for sentinel in wait(list(waiting)):
            rank, process = waiting.pop(sentinel)
            process.join()
            if process.exitcode and failed is None:
                failed = f"rank {rank} ended with status {process.exitcode}"
                for _, other in waiting.values():
                    other.kill()
    if failed is not None:
        raise RankLost(f"{failed}: nothing was measured")


@final
@frozen
class _Job:
    model: str | None
    mesh: Mesh
    config: EngineConfig
    rows: int
    context: int


@torch.inference_mode()
def _rank(job: _Job, rank: int, meeting: str, out: Path) -> None:
    mesh = job.mesh.at(rank)
    device = device_of(job.config, rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // mesh.ranks))
    communicator = connect(mesh, device, meeting, None)
    found = [
        attrs.asdict(_collective(communicator, mesh, axis, op, size, job.config, device))
        for axis, ranks in mesh.axes
        if ranks > 1
        for op in OPS
        for size in BYTES[job.config.device]
    ]
    step = None if job.model is None else attrs.asdict(_step(job, mesh, communicator, device))
    if rank == 0:
        name = device if device == "cpu" else torch.cuda.get_device_name()
        out.write_text(json.dumps({"collectives": found, "step": step, "device": name}))
    torch.distributed.destroy_process_group()


def _collective(
    communicator: ProcessGroups,
    mesh: Mesh,
    axis: str,
    op: str,
    size: int,
    config: EngineConfig,
    device: str,
) -> Timed:
    kind: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "device": device}
    elements = size // kind["dtype"].itemsize
    x = torch.randn(elements // (mesh.size(axis) if op == "all_gather" else 1), **kind)
    run = partial(getattr(communicator, op), x, axis=axis, **OPS[op])
    repeats = REPEATS if size < 1 << 22 else 4
    return Timed(what=op, axis=axis, bytes=size, **_timed(run, device, repeats))


def _step(job: _Job, mesh: Mesh, communicator: Communicator, device: str) -> Timed:
    assert job.model is not None
    model = models.build(
        models.open_model(job.model, "dummy"),
        mesh,
        dtype=job.config.dtype,
        device=device,
        communicator=communicator,
        tokens=job.rows,
        batch=batch_of(mesh),
    )
    batch, kv = decode(model, job.rows // batch_of(mesh).parts(mesh), job.context)
    pages = kv.pages

    def run() -> Tensor:
        return model.step(model.params, underived(batch), KV(pages))[0]

    times = _timed(run, device, 4, graph=model.step.capturable)
    return Timed(what="decode", axis="", bytes=0, **times)


def decode(model: models.Model, rows: int, context: int) -> tuple[Batch, KV]:
    """A step in which each of so many rows has one token behind so many cached ones, and the KV."""
    each = context // PAGE + 1
    ids = np.arange(rows, dtype=np.int32)
    plan = StepPlan(
        step=0,
        slots=ids,
        query_start=np.arange(rows + 1, dtype=np.int32),
        token_ids=ids % model.config.vocab_size,
        context_lens=np.full(rows, context, np.int32),
        sampled=np.ones(rows, np.bool_),
        page_delta=np.array(
            [(row, i, row * each + i) for row in range(rows) for i in range(each)], np.int32
        ).reshape(-1, 3),
    )
    slots = Slots(rows, each, PAGE, model.kv)
    slots.patch(plan)
    return slots.batch(plan), model.kv.allocate(rows * each, PAGE)


def captured(run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """What `run` gives, which each replay of its CUDA graph fills again, and that replay.

    All ranks of a mesh capture alike, after a few runs, in which NCCL connects.
    """
    beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    return capture(run)


def _timed(
    run: Callable[[], Any], device: str, repeats: int, *, graph: bool = True
) -> dict[str, Any]:
    for _ in range(WARM):
        run()
    if device == "cpu":
        return {"eager_s": _median(run, repeats, _clocked), "graph_s": None}
    eager_s = _median(run, repeats, _by_events)
    if not graph:
        return {"eager_s": eager_s, "graph_s": None}
    _, replay = captured(run)
    return {"eager_s": eager_s, "graph_s": _median(replay, repeats, _by_events)}


Clock = Callable[[Callable[[], Any], int], float]


def _median(run: Callable[[], Any], repeats: int, clock: Clock) -> float:
    times: Sequence[float] = [clock(run, repeats) for _ in range(ROUNDS)]
    return statistics.median(times)


def _clocked(run: Callable[[], Any], repeats: int) -> float:
    began_s = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began_s) / repeats


def _by_events(run: Callable[[], Any], repeats: int) -> float:
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    first, last = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / repeats
