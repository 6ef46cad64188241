"""Decode steps that are recorded once and made again.

Rule: a step of one token a row differs from the one before in what its batch holds, in nothing
else. So the first one of each number of rows runs on a batch that stays where it is, and is written
down; later ones are copied into that batch, and what was written down is done again, as one call.
A model that does anything but call recorded kernels runs as it is.
"""

from __future__ import annotations

import logging
from typing import final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.spmd.batch import Batch, Paged
from tokenspeed.spmd.compile import Step
from tokenspeed.spmd.kv import KV, LayerKV
from tokenspeed.spmd.params import Tree

__all__ = ["DecodeSteps"]

log = logging.getLogger("tokenspeed.executor")

ROWS_MAX = 16
"""With more, the calls of a step are little beside its work."""


@final
@frozen(eq=False)
class _Recorded:
    """A step on a batch of its own: what it says of `logits` is there once it was replayed."""

    batch: Batch
    logits: Tensor
    recording: kernels.Recording
    pages: tuple[LayerKV, ...]
    threads: int


@final
class DecodeSteps:
    """The steps of a compiled model, those of one token a row from a recording where there is one.

    Args:
        step: of the model.
        params: its tensors, which stay where they are.
        pages_max: of the longest request.
        device: of the tensors.
    """

    def __init__(self, step: Step, params: Tree, pages_max: int, device: torch.device) -> None:
        self._step = step
        self._params = params
        self._pages_max = pages_max
        self._recorded: dict[int, _Recorded] = {}
        self._workspace: kernels.Workspace | None = None
        self._on_cpu = device.type == "cpu"
        self._changes = kernels.registry.changes
        self.refused = None if device.type == "cpu" else f"runs on {device}, not on a CPU"
        """Why no step can be recorded; of a CPU's it is known once one was tried."""

    def __call__(self, batch: Batch, kv: KV) -> tuple[Tensor, KV]:
        """(logits, kv) of a step; `kv` is donated. The logits may be gone with the next step."""
        if self._on_cpu and self._changes != kernels.registry.changes:
            self._forget()
        rows = len(batch.token_ids)
        one_each = len(batch.groups[0].attention.context_lens) == len(batch.sampled_rows) == rows
        if self.refused is not None or not one_each or not 0 < rows <= ROWS_MAX:
            return self._step(self._params, batch, kv)
        known = self._recorded.get(rows)
        if known is None or known.pages is not kv.pages or known.threads != _threads():
            return self._record(batch, kv)
        _fill(known.batch, batch)
        known.recording.replay()
        return known.logits, kv.donate()

    def _forget(self) -> None:
        """Other kernels may run now."""
        self._changes, self.refused = kernels.registry.changes, None
        self._recorded.clear()

    def _record(self, batch: Batch, kv: KV) -> tuple[Tensor, KV]:
        if self._workspace is None:
            self._workspace = kernels.Workspace()
        pages, own = kv.pages, _alike(batch, self._pages_max)
        _fill(own, batch)
        (logits, after), found = kernels.record(
            lambda: self._step(self._params, own, kv), self._workspace
        )
        if isinstance(found, str):
            log.debug("decode steps are not recorded: %s", found)
            self.refused, self._workspace = found, None
        else:
            threads = _threads()
            self._recorded[len(own.token_ids)] = _Recorded(own, logits, found, pages, threads)
        return logits, after


def _threads() -> int:
    return torch.get_num_threads()


def _alike(batch: Batch, pages_max: int) -> Batch:
    """Memory for batches of as many rows as this one."""
    groups = tuple(
        Paged(
            torch.empty_like(group.locations),
            kernels.AttentionPlan(
                query_start=torch.empty_like(group.attention.query_start),
                context_lens=torch.empty_like(group.attention.context_lens),
                page_table=torch.zeros(
                    (len(group.attention.page_table), pages_max), dtype=torch.int32
                ),
                page_size=group.attention.page_size,
            ),
        )
        for group in batch.groups
    )
    return Batch(
        token_ids=torch.empty_like(batch.token_ids),
        positions=torch.empty_like(batch.positions),
        sampled_rows=torch.empty_like(batch.sampled_rows),
        groups=groups,
        places=batch.places,
    )


def _fill(own: Batch, batch: Batch) -> None:
    own.token_ids.copy_(batch.token_ids)
    own.positions.copy_(batch.positions)
    own.sampled_rows.copy_(batch.sampled_rows)
    for mine, given in zip(own.groups, batch.groups, strict=True):
        mine.locations.copy_(given.locations)
        mine.attention.query_start.copy_(given.attention.query_start)
        mine.attention.context_lens.copy_(given.attention.context_lens)
        table = given.attention.page_table
        mine.attention.page_table[:, : table.shape[1]].copy_(table)
