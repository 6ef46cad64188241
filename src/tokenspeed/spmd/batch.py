"""A StepPlan on the device: flat token arrays, and the page tables that plans only patch.

Rule: the page table and the last token of every slot live here from step to step; a plan carries
what changed. Tokens that the CPU has not seen yet are filled in on the device.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.kernels import AttentionPlan
from tokenspeed.plan import FROM_DEVICE, StepPlan
from tokenspeed.spmd.kv import KVSpec

__all__ = ["Batch", "Slots"]


@final
@frozen(eq=False)
class Batch:
    """What a model function reads of a step.

    Attributes:
        token_ids: int64[tokens].
        positions: int64[tokens]; of each token in its sequence.
        locations: int64[tokens]; page * page_size + offset where its KV is written.
        sampled_rows: int64[sampled + drafts]; indices of the tokens whose logits are wanted: of a
            sampled row the last one, and before it those that its drafts follow.
        attention: the kernel's plan of the step.
    """

    token_ids: Tensor
    positions: Tensor
    locations: Tensor
    sampled_rows: Tensor
    attention: AttentionPlan


@final
class Slots:
    """What the device keeps of the running requests: their pages and their last tokens.

    Args:
        slots: requests that run at once.
        pages_max: pages of the longest request.
        page_size: tokens in a page.
        kv: what the model caches, and on which device.
    """

    def __init__(self, slots: int, pages_max: int, page_size: int, kv: KVSpec) -> None:
        self._page_size = page_size
        self._device = kv.device
        self._pages = np.zeros((slots, pages_max), np.int32)
        self._last_token = torch.zeros(slots, dtype=torch.int64, device=kv.device)

    def patch(self, plan: StepPlan) -> None:
        """Apply the plan's page-table changes, in order."""
        slot, index, page = plan.page_delta.T
        self._pages[slot, index] = page

    def batch(self, plan: StepPlan) -> Batch:
        """The plan's tokens, each with its position and its place in the KV."""
        starts, contexts = plan.query_start, plan.context_lens
        lengths = np.diff(starts)
        rows = np.repeat(np.arange(plan.rows), lengths)
        positions = np.arange(plan.tokens, dtype=np.int64) + (contexts - starts[:-1])[rows]
        slots = plan.slots[rows]
        page, offset = np.divmod(positions, self._page_size)
        locations = self._pages[slots, page] * np.int64(self._page_size) + offset
        contexts_after = contexts + lengths
        widest = -(-int(contexts_after.max()) // self._page_size)
        token_ids = self._to_device(plan.token_ids.astype(np.int64))
        if (plan.token_ids == FROM_DEVICE).any():
            known = self._last_token[self._to_device(slots.astype(np.int64))]
            token_ids = torch.where(token_ids == FROM_DEVICE, known, token_ids)
        return Batch(
            token_ids=token_ids,
            positions=self._to_device(positions),
            locations=self._to_device(locations),
            sampled_rows=self._to_device(_wanted(plan)),
            attention=AttentionPlan(
                query_start=self._to_device(starts),
                context_lens=self._to_device(contexts),
                page_table=self._to_device(self._pages[plan.slots, :widest]),
                page_size=self._page_size,
            ),
        )

    def remember(self, slots: Tensor, token_ids: Tensor) -> None:
        """Keep the sampled tokens int64[sampled] of these slots for FROM_DEVICE."""
        self._last_token[slots] = token_ids

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _wanted(plan: StepPlan) -> NDArray[np.int64]:
    """Indices of the tokens whose logits are wanted, in row order."""
    counts = plan.drafts[plan.sampled] + 1
    ends = plan.query_start[1:][plan.sampled].astype(np.int64)
    before = np.cumsum(counts) - counts  # the wanted ones of the rows before
    return np.repeat(ends - counts - before, counts) + np.arange(counts.sum())
