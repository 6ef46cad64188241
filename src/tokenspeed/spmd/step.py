"""A compiled model as a function of plans, without an engine: (params, kv, plan) -> (kv, logits).

Rule: what is handed on is gone. A `StepKV` has the pages and the page tables of all slots; a step
takes it and gives another one back, and who uses the old one again is told so.
"""

from __future__ import annotations

from typing import Self, final

import torch
from torch import Tensor

from tokenspeed.plan import StepPlan
from tokenspeed.spmd.batch import Slots
from tokenspeed.spmd.compile import Program
from tokenspeed.spmd.kv import KV, KVSpec
from tokenspeed.spmd.params import Tree

__all__ = ["StepKV"]


@final
class StepKV:
    """Pages of KV, and which slot has which of them. Made by `allocate`, or given by `run`."""

    def __init__(self, kv: KV, slots: Slots) -> None:
        self._kv = kv
        self._slots = slots

    @classmethod
    def allocate(cls, spec: KVSpec, *, slots: int, pages: int, page_size: int) -> Self:
        """Empty pages of `page_size` tokens, shared by so many slots."""
        return cls(spec.allocate(pages, page_size), Slots(slots, pages, page_size, spec))

    @torch.inference_mode()
    def run(self, program: Program, params: Tree, plan: StepPlan) -> tuple[StepKV, Tensor]:
        """Run a step. This KV is donated: use the one that is returned.

        Args:
            program: compiled.
            params: this rank's tensors.
            plan: with all token ids known.

        Returns:
            The KV after the step, and the logits [sampled rows + drafts, vocab].

        Raises:
            StepError: this KV was donated before.
        """
        kv = self._kv.donate()
        self._slots.patch(plan)
        logits, after = program(params, self._slots.batch(plan), kv)
        return StepKV(after, self._slots), logits
