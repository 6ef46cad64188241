"""Decode steps of a GPU as CUDA graphs, one for each bucket of rows.

Rule: what a step of one token a row launches depends on how many rows there are, on nothing else.
So such a step is padded to a bucket of rows, with rows of a slot that nobody has; the first of a
bucket runs as it is, the second is captured, and from then on inputs are put where the graph reads
them, and it is replayed. Programs of several ranks are not captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.kernels import AttentionPlan
from tokenspeed.plan import StepPlan
from tokenspeed.spmd.batch import Batch, Paged
from tokenspeed.spmd.compile import Program, Step
from tokenspeed.spmd.kv import KV, LayerKV
from tokenspeed.spmd.params import Tree

__all__ = ["Graphs", "bucket", "capturable", "decodes", "padded", "record"]

log = logging.getLogger("tokenspeed.spmd")

STEP = 16
"""From so many rows on, a bucket is a multiple of it."""


def capturable(program: Program, device: torch.device) -> bool:
    """Whether decode steps of a program can be captured: on one GPU, alone."""
    return device.type == "cuda" and program.mesh.ranks == 1


def decodes(plan: StepPlan) -> bool:
    """Whether every row of a plan feeds one token and wants the next."""
    alike = plan.tokens == plan.rows > 0 and bool((np.diff(plan.query_start) == 1).all())
    return alike and bool(plan.sampled.all()) and not plan.drafts.any()


def bucket(rows: int, page_size: int) -> int:
    """How many rows a step of so many is padded to; by less than a page of rows.

    Powers of two below 16, or below a page if that is smaller, and multiples of it from there.
    """
    step = min(STEP, page_size)
    return 1 << (rows - 1).bit_length() if rows < step else -(-rows // step) * step


def padded(plan: StepPlan, rows: int, spare: int) -> StepPlan:
    """A plan that decodes, with more rows behind the others, so that there are so many.

    They are all of the slot `spare`, each at a position of its own in its only page.
    """
    more = rows - plan.rows

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


def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Capture what `run` launches: its result, and what launches it all again.

    What other threads do meanwhile, on streams of their own, is not looked at.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return result, graph.replay


@final
@frozen(eq=False)
class _Recorded:
    """A captured step: where it reads its inputs, its logits, and what replays it."""

    inputs: Batch
    logits: Tensor
    replay: Callable[[], None]


def _parts(batch: Batch) -> list[Tensor]:
    """What differs between batches of one bucket."""
    groups = ((g.locations, g.attention.context_lens, g.attention.page_table) for g in batch.groups)
    return [batch.token_ids, batch.positions, *(part for group in groups for part in group)]


def _with(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same with every tensor changed; nothing has been derived from its plans yet."""

    def attention(plan: AttentionPlan) -> AttentionPlan:
        return evolve(
            plan,
            query_start=change(plan.query_start),
            context_lens=change(plan.context_lens),
            page_table=change(plan.page_table),
        )

    return evolve(
        batch,
        token_ids=change(batch.token_ids),
        positions=change(batch.positions),
        sampled_rows=change(batch.sampled_rows),
        groups=tuple(Paged(change(g.locations), attention(g.attention)) for g in batch.groups),
    )


@final
class Graphs:
    """The captured steps of one program, by how many rows they have.

    Args:
        step: the program.
        params: this rank's tensors, which stay where they are.
        pages: of the KV, which stay where they are.
    """

    def __init__(self, step: Step, params: Tree, pages: tuple[LayerKV, ...]) -> None:
        self._step = step
        self._params = params
        self._pages = pages
        self._recorded: dict[int, _Recorded | None] = {}
        self._failed = False

    def run(self, batch: Batch) -> Tensor:
        """The logits of a padded batch, valid until the next call; the KV pages are written."""
        rows = len(batch.token_ids)
        if rows in self._recorded and not self._failed:
            found = self._recorded[rows] or self._record(batch)
            if found is not None:
                for target, source in zip(_parts(found.inputs), _parts(batch), strict=True):
                    target.copy_(source)
                found.replay()
                return found.logits
        self._recorded.setdefault(rows, None)
        return self._run(batch)

    def _run(self, batch: Batch) -> Tensor:
        return self._step(self._params, batch, KV(self._pages))[0]

    def _record(self, batch: Batch) -> _Recorded | None:
        """A step captured; None, for good, if something in it cannot be."""
        inputs = _with(batch, Tensor.clone)
        try:
            logits, replay = record(lambda: self._run(_with(inputs, lambda own: own)))
        except Exception:  # a kernel of somebody else's, say, that waits for the device
            log.exception("a decode step could not be captured; steps run without CUDA graphs")
            self._failed = True
            return None
        recorded = self._recorded[len(batch.token_ids)] = _Recorded(inputs, logits, replay)
        return recorded
