"""A StepPlan on the device: flat token arrays, and the page tables that plans only patch.

Rule: the page table and the last token of every slot live here from step to step; a plan carries
what changed. Tokens that the CPU has not seen yet are filled in on the device.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.errors import ContractError
from tokenspeed.kernels import AttentionPlan
from tokenspeed.plan import FROM_DEVICE, StepPlan
from tokenspeed.spmd.kv import KVSpec

__all__ = ["Batch", "Paged", "Slots"]


@final
@frozen(eq=False)
class Paged:
    """Where the KV of a step lies, for the layers of a cache group.

    Attributes:
        locations: int64[tokens]; page * page_size + offset where each token's KV is written.
        attention: the kernel's plan of the step.
    """

    locations: Tensor
    attention: AttentionPlan


@final
@frozen(eq=False)
class Batch:
    """What a model function reads of a step.

    Attributes:
        token_ids: int64[tokens].
        positions: int64[tokens]; of each token in its sequence.
        sampled_rows: int64[sampled + drafts]; indices of the tokens whose logits are wanted: of a
            sampled row the last one, and before it those that its drafts follow.
        groups: of each cache group, where the KV lies.
        places: of each layer, its group and its row: see CacheGroups.
    """

    token_ids: Tensor
    positions: Tensor
    sampled_rows: Tensor
    groups: tuple[Paged, ...]
    places: tuple[tuple[int, int], ...]

    def of(self, layer: int) -> Paged:
        """Where a layer's KV lies."""
        return self.groups[self.places[layer][0]]

    def padded(self, tokens: int, spare: Tensor) -> Batch:
        """The same with one more row behind the others, so long that there are so many tokens.

        Nobody asks for its logits: see README.md, "The batch, and tokens of unequal number".

        Args:
            tokens: that there are to be.
            spare: int32[n] pages that no request has, enough for the row.

        Raises:
            ContractError: there are more tokens already, or the pages do not suffice.
        """
        page_size = self.groups[0].attention.page_size
        have, room = len(self.token_ids), len(spare) * page_size
        more = tokens - have
        if not more:
            return self
        if not 0 < more <= room:
            raise ContractError("Batch.padded", "tokens", str(tokens), f"{have} to {have + room}")
        places = torch.arange(more, device=self.token_ids.device)
        pages = spare[: -(-more // page_size)]
        locations = pages.long()[places // page_size] * page_size + places % page_size
        return evolve(
            self,
            token_ids=torch.cat((self.token_ids, torch.zeros_like(places))),
            positions=torch.cat((self.positions, places)),
            groups=tuple(
                Paged(
                    torch.cat((group.locations, locations)), _with_row(group.attention, more, pages)
                )
                for group in self.groups
            ),
        )


def _with_row(plan: AttentionPlan, tokens: int, pages: Tensor) -> AttentionPlan:
    """A plan with one more row of so many tokens, which has nothing cached."""
    starts, contexts, table = plan.query_start, plan.context_lens, plan.page_table
    wide = table.new_zeros(len(table) + 1, max(table.shape[1], len(pages)))
    wide[:-1, : table.shape[1]] = table
    wide[-1, : len(pages)] = pages
    return AttentionPlan(
        query_start=torch.cat((starts, starts[-1:] + tokens)),
        context_lens=torch.cat((contexts, contexts.new_zeros(1))),
        page_table=wide,
        page_size=plan.page_size,
        counts=None if plan.counts is None else (*plan.counts, tokens),
    )


@final
class Slots:
    """What the device keeps of the running requests: their pages and their last tokens.

    Args:
        slots: requests that run at once.
        pages_max: pages of the longest request.
        page_size: tokens in a page.
        kv: what the model caches, and on which device.
        spare: a page that no request has: there is one slot more then, the last, with it alone.
    """

    def __init__(
        self, slots: int, pages_max: int, page_size: int, kv: KVSpec, spare: int | None = None
    ) -> None:
        self._page_size = page_size
        self._device = kv.device
        self._groups = kv.groups
        self.spare = slots
        slots += spare is not None
        self._pages = np.zeros((slots, pages_max * len(kv.groups.windows)), np.int32)
        if spare is not None:
            self._pages[self.spare] = spare
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
        token_ids = self._to_device(plan.token_ids.astype(np.int64))
        if (plan.token_ids == FROM_DEVICE).any():
            known = self._last_token[self._to_device(slots.astype(np.int64))]
            token_ids = torch.where(token_ids == FROM_DEVICE, known, token_ids)
        return Batch(
            token_ids=token_ids,
            positions=self._to_device(positions),
            sampled_rows=self._to_device(_wanted(plan)),
            groups=self._paged(plan, slots, positions),
            places=self._groups.places,
        )

    def _paged(
        self, plan: StepPlan, slots: NDArray[Any], positions: NDArray[Any]
    ) -> tuple[Paged, ...]:
        """By group; in the table of a slot the groups take turns."""
        page, offset = np.divmod(positions, self._page_size)
        lengths = plan.context_lens + np.diff(plan.query_start)
        widest = -(-int(lengths.max(initial=0)) // self._page_size)  # a rank may have no row
        starts, contexts = map(self._to_device, (plan.query_start, plan.context_lens))
        counts = tuple(np.diff(plan.query_start).tolist())
        groups = len(self._groups.windows)
        paged = []
        for group in range(groups):
            table = self._pages[:, group::groups]
            plan_of_group = AttentionPlan(
                query_start=starts,
                context_lens=contexts,
                page_table=self._to_device(table[plan.slots, :widest]),
                page_size=self._page_size,
                counts=counts,
            )
            locations = table[slots, page] * np.int64(self._page_size) + offset
            paged.append(Paged(self._to_device(locations), plan_of_group))
        return tuple(paged)

    def remember(self, slots: Tensor, token_ids: Tensor) -> None:
        """Keep the sampled tokens int64[sampled] of these slots for FROM_DEVICE."""
        self._last_token.index_copy_(0, slots, token_ids)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _wanted(plan: StepPlan) -> NDArray[np.int64]:
    """Indices of the tokens whose logits are wanted, in row order."""
    counts = plan.drafts[plan.sampled] + 1
    ends = plan.query_start[1:][plan.sampled].astype(np.int64)
    before = np.cumsum(counts) - counts  # the wanted ones of the rows before
    return np.repeat(ends - counts - before, counts) + np.arange(counts.sum())
