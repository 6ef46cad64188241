"""Decode steps that are recorded once and replayed.

Rule: what a step of one token a row does depends on how many rows there are, on nothing else; what
differs is what its batch holds. So the first step of each number of rows is recorded on a batch
that stays where it is; later ones are copied into that batch, and what was recorded is done again
as one call: on a CPU a list of kernel calls, on a GPU a CUDA graph. A model that does what cannot
be recorded runs as it is, and so do programs of several ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar, final

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.plan import StepPlan
from tokenspeed.spmd.batch import Batch, Paged, Slots
from tokenspeed.spmd.compile import Program, Step
from tokenspeed.spmd.kv import KV, LayerKV
from tokenspeed.spmd.params import Tree

__all__ = [
    "Calls",
    "DecodeSteps",
    "Graphs",
    "Recorder",
    "bucket",
    "capture",
    "decodes",
    "padded",
    "recorder",
    "underived",
]

log = logging.getLogger("tokenspeed.executor")

T = TypeVar("T")
Run = Callable[[], Tensor]
Replay = Callable[[], None]
Pool = Any
"""What torch.cuda.graph_pool_handle returns, the type of which has no public name."""

CALLS_ROWS_MAX = 16
"""With more, the calls of a step on a CPU are little beside its work."""
BUCKET = 16
"""From so many rows on, a bucket of a GPU's is a multiple of it."""


class Recorder(Protocol):
    """How steps are recorded on a device.

    Attributes:
        pads: steps are recorded with more rows than they have, for which there must be a slot, and
            a page, that nobody has.
    """

    pads: bool

    def rows(self, rows: int) -> int:
        """To how many rows a step of so many is padded, to be recorded; 0: it is not recorded."""
        ...

    def record(self, run: Run) -> tuple[Tensor, Replay | None]:
        """Run a step, and record it.

        Returns:
            Its result, and what fills that anew from what lies where the step read its inputs;
            None: steps of so many rows cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """Nothing recorded is replayed from here on, and other kernels may run now."""
        ...


def recorder(
    program: Program, device: torch.device, page_size: int, *, graphs: bool
) -> Recorder | None:
    """What records the steps of a program, if anything does.

    Args:
        program: to be run.
        device: of its tensors.
        page_size: of the KV.
        graphs: whether a GPU's steps may be captured.
    """
    if program.mesh.ranks > 1:
        return None
    if device.type == "cpu":
        return Calls()
    return Graphs(page_size) if graphs and device.type == "cuda" else None


@final
class Calls:
    """Steps of a CPU as lists of kernel calls; a step has the rows that it has."""

    pads = False

    def __init__(self) -> None:
        self._workspace = kernels.Workspace()

    def rows(self, rows: int) -> int:
        """See Recorder."""
        return rows if rows <= CALLS_ROWS_MAX else 0

    def record(self, run: Run) -> tuple[Tensor, Replay | None]:
        """See Recorder."""
        result, found = kernels.record(run, self._workspace)
        if isinstance(found, str):
            log.debug("decode steps are not recorded: %s", found)
            return result, None
        return result, found.replay

    def forget(self) -> None:
        """See Recorder."""
        self._workspace = kernels.Workspace()


@final
class Graphs:
    """Steps of a GPU as CUDA graphs, one for each bucket of rows.

    They share their memory: they run one after the other, and nobody reads one's logits when the
    next one runs. Nothing else outlives a graph, for a step writes the KV where it lies.
    """

    pads = True

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._failed = False
        self._pool: Pool | None = None

    def rows(self, rows: int) -> int:
        """See Recorder."""
        return 0 if self._failed else bucket(rows, self._page_size)

    def record(self, run: Run) -> tuple[Tensor, Replay | None]:
        """See Recorder. The step runs before it is captured, which compiles what it launches."""
        result = run()
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            captured, replay = capture(run, self._pool)
        except Exception:  # a kernel of somebody else's, say, that waits for the device
            log.exception("a decode step could not be captured; steps run without CUDA graphs")
            self._failed = True
            return result, None
        replay()
        return captured, replay

    def forget(self) -> None:
        """See Recorder. A pool takes no more once its graphs are gone or a capture in it failed."""
        self._failed = False
        self._pool = None


def capture(run: Callable[[], T], pool: Pool | None = None) -> tuple[T, Replay]:
    """What a function launches, as a CUDA graph; its result is not there before the replay.

    What other threads do meanwhile, on streams of their own, is not looked at.

    Args:
        run: launches.
        pool: of memory, which graphs that were captured with it share: a replay of one overwrites
            what another one returned. None: the graph has memory of its own.
    """
    graph, stream = torch.cuda.CUDAGraph(), _beside(torch.cuda.current_device())
    # A capture that ends in an error leaves torch on the stream that it captured.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
    ):
        result = run()
    return result, graph.replay


@cache
def _beside(_device: int) -> torch.cuda.Stream:
    """What is captured on, of the current device: torch's own stream for that is of whichever
    device captured first."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def decodes(plan: StepPlan) -> bool:
    """Whether every row of a plan feeds one token and wants the next."""
    alike = plan.tokens == plan.rows > 0 and bool((np.diff(plan.query_start) == 1).all())
    return alike and bool(plan.sampled.all()) and not plan.drafts.any()


def bucket(rows: int, page_size: int) -> int:
    """How many rows a step of so many is padded to; by less than a page of rows.

    Powers of two below 16, or below a page if that is smaller, and multiples of it from there.
    """
    step = min(BUCKET, page_size)
    return 1 << (rows - 1).bit_length() if rows < step else -(-rows // step) * step


def padded(plan: StepPlan, rows: int, spare: int) -> StepPlan:
    """A plan that decodes, with more rows behind the others, so that there are so many.

    They are all of the slot `spare`, each at a position of its own in its only page.
    """
    more = rows - plan.rows
    if not more:
        return plan

    def longer(values: NDArray[Any], behind: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate((values, behind)).astype(values.dtype)

    return evolve(
        plan,
        slots=longer(plan.slots, np.full(more, spare)),
        query_start=np.arange(rows + 1, dtype=np.int32),
        token_ids=longer(plan.token_ids, np.zeros(more)),
        context_lens=longer(plan.context_lens, np.arange(more)),
        sampled=np.ones(rows, np.bool_),
        drafts=np.zeros(rows, np.int32),
    )


@final
@frozen(eq=False)
class _Recorded:
    """A recorded step: where it reads its inputs, its logits, and what fills these again."""

    inputs: Batch
    logits: Tensor
    replay: Replay


@final
class DecodeSteps:
    """The steps of one program, replayed where they were recorded.

    Args:
        step: the program.
        params: this rank's tensors, which stay where they are.
        pages: of the KV, which stay where they are.
        pages_max: of the longest request.
        recorder: of the device, if there is one.
    """

    def __init__(
        self,
        step: Step,
        params: Tree,
        pages: tuple[LayerKV, ...],
        pages_max: int,
        recorder: Recorder | None,
    ) -> None:
        self._step = step
        self._params = params
        self._pages = pages
        self._pages_max = pages_max
        self._recorder = recorder
        self._changes = kernels.registry.changes
        # By rows and threads: among how many threads work is shared out is recorded too. None: of
        # so many rows there is no recording.
        self._recorded: dict[tuple[int, int], _Recorded | None] = {}

    def __call__(self, plan: StepPlan, slots: Slots) -> Tensor:
        """The logits of a step, valid until the next one; the KV pages are written."""
        if self._changes != kernels.registry.changes:
            self._forget()
        rows = self._recorder.rows(plan.rows) if self._recorder and decodes(plan) else 0
        if not rows:
            return self._run(slots.batch(plan))
        key = rows, torch.get_num_threads()
        if key in self._recorded and self._recorded[key] is None:
            return self._run(slots.batch(plan))
        batch = slots.batch(padded(plan, rows, slots.spare))
        known = self._recorded.get(key)
        if known is None:
            return self._record(batch, key)[: plan.rows]
        fill(known.inputs, batch)
        known.replay()
        return known.logits[: plan.rows]

    def _forget(self) -> None:
        """Other kernels may run now."""
        self._changes = kernels.registry.changes
        self._recorded.clear()
        if self._recorder is not None:
            self._recorder.forget()

    def _run(self, batch: Batch) -> Tensor:
        return self._step(self._params, batch, KV(self._pages))[0]

    def _record(self, batch: Batch, key: tuple[int, int]) -> Tensor:
        assert self._recorder is not None
        inputs = lasting(batch, self._pages_max)
        logits, replay = self._recorder.record(lambda: self._run(underived(inputs)))
        self._recorded[key] = None if replay is None else _Recorded(inputs, logits, replay)
        return logits


def lasting(batch: Batch, pages_max: int) -> Batch:
    """A copy for other batches of as many rows too: page tables have room for every request."""

    def group(of: Paged) -> Paged:
        plan = of.attention
        table = plan.page_table.new_zeros((len(plan.page_table), pages_max))
        table[:, : plan.page_table.shape[1]] = plan.page_table
        attention = evolve(
            plan,
            query_start=plan.query_start.clone(),
            context_lens=plan.context_lens.clone(),
            page_table=table,
        )
        return Paged(of.locations.clone(), attention)

    return evolve(
        batch,
        token_ids=batch.token_ids.clone(),
        positions=batch.positions.clone(),
        sampled_rows=batch.sampled_rows.clone(),
        groups=tuple(map(group, batch.groups)),
    )


def underived(batch: Batch) -> Batch:
    """The same, of which no layer has derived anything yet: a recording must see that done."""
    groups = tuple(Paged(of.locations, evolve(of.attention)) for of in batch.groups)
    return evolve(batch, groups=groups)


def fill(inputs: Batch, batch: Batch) -> None:
    """Copy what differs between batches of as many rows."""
    inputs.token_ids.copy_(batch.token_ids)
    inputs.positions.copy_(batch.positions)
    for own, given in zip(inputs.groups, batch.groups, strict=True):
        own.locations.copy_(given.locations)
        own.attention.context_lens.copy_(given.attention.context_lens)
        table = given.attention.page_table
        own.attention.page_table[:, : table.shape[1]].copy_(table)
