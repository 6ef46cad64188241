"""StepPlan and StepResult: the only two values that cross between scheduler and executor.

Rule: a plan says what to compute and where its KV lies; it says nothing about why. Rows are in
plan order everywhere; a *slot* is a running request's index in the executor's persistent state.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from tokenspeed.request import SamplingParams

__all__ = ["FROM_DEVICE", "PLANNED", "Joined", "StepPlan", "StepResult"]

Ints = NDArray[np.int32]
Copies = NDArray[np.int64]

FROM_DEVICE = -1
"""In `StepPlan.token_ids`: the token that an earlier step sampled for this slot, on the device."""


@frozen(kw_only=True)
class Joined:
    """A request that takes a slot with this step: what the sampler must know about it.

    Attributes:
        slot: index in [0, slots).
        params: with `seed` resolved (never None) and `max_tokens` resolved.
        prompt_ids: the prompt, for the repetition penalty.
        output_ids: ids generated before a preemption; empty at first.
    """

    slot: int
    params: SamplingParams
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...] = ()


@frozen(kw_only=True, eq=False)
class StepPlan:
    """One forward step over `rows` sequences and `tokens` input tokens (prefill and decode mixed).

    Attributes:
        step: number of the step, from 0; the result echoes it.
        slots: int32[rows], distinct.
        query_start: int32[rows + 1]; row i feeds tokens [query_start[i], query_start[i + 1]).
        token_ids: int32[tokens]; FROM_DEVICE where the CPU does not know the token yet.
        context_lens: int32[rows]; KV tokens that precede the row's first input token. Input token j
            of the row has position context_lens[i] + j and its KV is written there.
        sampled: bool[rows]; the row's last logits are sampled (false within a prompt).
        drafts: int32[rows]; so many of the row's last tokens are guesses: its last drafts + 1
            logits are sampled, one after the other, as long as they say what was guessed.
        page_delta: int32[changes, 3]; (slot, index, page): page-table entries that changed since
            the last plan, to be applied in order before the step. Position p of a slot lies in
            page table[slot, p // page_size] at offset p % page_size. With several cache groups
            these take turns: in page table[slot, p // page_size * groups + group] for its layers.
        joined: requests that take a slot with this step; the slot's sampler state starts anew.
        stores: int64[copies, 3]; (ticket, device page, host page): pages to copy to the host.
        loads: int64[copies, 3]; likewise: pages to copy back. Copies are made beside the steps, in
            any order; until its ticket is acknowledged, nobody else touches either page. A plan
            without rows has copies alone.
    """

    step: int
    slots: Ints
    query_start: Ints
    token_ids: Ints
    context_lens: Ints
    sampled: NDArray[np.bool_]
    page_delta: Ints
    joined: tuple[Joined, ...] = ()
    drafts: Ints = field(
        default=attrs.Factory(lambda self: np.zeros(self.rows, np.int32), takes_self=True)
    )
    stores: Copies = field(factory=lambda: np.empty((0, 3), np.int64))
    loads: Copies = field(factory=lambda: np.empty((0, 3), np.int64))

    @property
    def rows(self) -> int:
        """Sequences in the step."""
        return len(self.slots)

    @property
    def run_start(self) -> Ints:
        """int32[rows + 1]; row i has the results [run_start[i], run_start[i + 1]) of the step."""
        return np.concatenate(([0], np.cumsum(self.drafts + 1))).astype(np.int32)

    @property
    def tokens(self) -> int:
        """Input tokens in the step."""
        return len(self.token_ids)


PLANNED = tuple(a.name for a in attrs.fields(StepPlan) if a.name != "joined")
"""What a scheduler's plan has under the same names; of `joined` it knows numbers alone."""


@frozen(kw_only=True, eq=False)
class StepResult:
    """What a step computed.

    Attributes:
        step: the plan's number.
        token_ids: int32[rows + drafts]; of a row with n drafts a run of n + 1: the drafts that are
            what is sampled, the token sampled after them, and -1 from there on. -1 for a row that
            was not sampled.
        logprobs: index in token_ids -> (log-probability of the token, its top ids, their
            log-probabilities), for sampled rows that asked for them.
        failed: row -> reason, for rows whose logits were not finite; the other rows are good.
    """

    step: int
    token_ids: Ints
    logprobs: Mapping[int, tuple[float, tuple[int, ...], tuple[float, ...]]] = field(factory=dict)
    failed: Mapping[int, str] = field(factory=dict)

    @classmethod
    def failing(cls, plan: StepPlan, why: str) -> StepResult:
        """Of a step that raised: every row has failed."""
        none = np.zeros(plan.rows + int(plan.drafts.sum()), np.int32)
        return cls(step=plan.step, token_ids=none, failed=dict.fromkeys(range(plan.rows), why))
