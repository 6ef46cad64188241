"""A compiled model as a function of plans, without an engine: (params, kv, plan) -> (kv, logits).

Rule: what is handed on is gone. A `StepKV` has the pages and the page tables of all slots; a step
takes it and gives another one back, and who uses the old one again is told so.
"""

from __future__ import annotations

from typing import Any, Self, final

import numpy as np
import torch
from attrs import fields, frozen
from torch import Tensor

from tokenspeed.errors import ConfigError, ContractError
from tokenspeed.plan import StepPlan
from tokenspeed.spmd.batch import Slots
from tokenspeed.spmd.compile import Program
from tokenspeed.spmd.kv import KV, KVSpec
from tokenspeed.spmd.params import Tree

__all__ = ["StepKV"]


_SIZE_MAX = 1 << 30


@final
@frozen(kw_only=True)
class _Sizes:
    """What a plan may name. A scheduler keeps to it by itself; here people write plans.

    Attributes:
        slots, pages, page_size: as of `StepKV.allocate`.
        groups: cache groups, which take turns in a page table.
        vocab_size: token ids there are.
    """

    slots: int
    pages: int
    page_size: int
    groups: int
    vocab_size: int

    def __attrs_post_init__(self) -> None:
        for one in fields(_Sizes):
            size = getattr(self, one.name)
            if not isinstance(size, int) or not 1 <= size <= _SIZE_MAX:
                raise ConfigError(one.name, size, f"an integer from 1 to {_SIZE_MAX:,}")

    def check(self, plan: StepPlan) -> None:
        """Raise ContractError for what would be read or written beside these sizes."""
        rows = (plan.rows,)
        shapes = {"slots": rows, "context_lens": rows, "sampled": rows, "drafts": rows}
        shapes |= {"query_start": (plan.rows + 1,), "token_ids": (plan.tokens,)}
        for name, shape in (shapes | {"page_delta": (len(plan.page_delta), 3)}).items():
            given, kind = getattr(plan, name), "b" if name == "sampled" else "i"
            self._must(
                given.shape == shape and given.dtype.kind == kind,
                name,
                f"{given.dtype}{list(given.shape)}",
                f"{'bool' if kind == 'b' else 'int32'}{list(shape)}",
            )
        starts, lengths = plan.query_start, np.diff(plan.query_start)
        self._must(
            starts[0] == 0 and starts[-1] == plan.tokens and (lengths > 0).all(),
            "query_start",
            str(starts.tolist()),
            f"0, then greater and greater numbers up to the {plan.tokens} token ids",
        )
        slots = plan.slots.tolist()
        self._must(len(set(slots)) == plan.rows, "slots", str(slots), "distinct numbers")
        slot, index, page = plan.page_delta.T
        entries = self.pages * self.groups
        self._within("slots", plan.slots, self.slots)
        self._within("page_delta's slot", slot, self.slots)
        self._within("page_delta's index", index, entries)
        self._within("page_delta's page", page, self.pages)
        self._within("token_ids", plan.token_ids, self.vocab_size)
        self._within("drafts", plan.drafts, lengths)
        self._within("context_lens", plan.context_lens, self.pages * self.page_size - lengths + 1)

    def _within(self, argument: str, numbers: Any, below: Any) -> None:
        wrong = np.flatnonzero((numbers < 0) | (numbers >= below))
        if wrong.size:
            most = np.broadcast_to(below, numbers.shape)[wrong[0]] - 1
            self._must(False, argument, f"{numbers[wrong[0]]} at {wrong[0]}", f"0 to {most}")

    def _must(self, holds: Any, argument: str, given: str, expected: str) -> None:
        if not holds:
            raise ContractError("a step", argument, given, f"{expected} ({self})")


@final
class StepKV:
    """Pages of KV, and which slot has which of them. Made by `allocate`, or given by `run`."""

    def __init__(self, kv: KV, slots: Slots, sizes: _Sizes) -> None:
        self._kv = kv
        self._slots = slots
        self._sizes = sizes

    @classmethod
    def allocate(
        cls, spec: KVSpec, *, slots: int, pages: int, page_size: int, vocab_size: int
    ) -> Self:
        """Empty pages of `page_size` tokens, shared by so many slots.

        Raises:
            ConfigError: a size is none.
        """
        sizes = _Sizes(
            slots=slots,
            pages=pages,
            page_size=page_size,
            groups=len(spec.groups.windows),
            vocab_size=vocab_size,
        )
        return cls(spec.allocate(pages, page_size), Slots(slots, pages, page_size, spec), sizes)

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
            ContractError: the plan names a slot, page or token that is not there, or its arrays do
                not fit each other. This KV is then as it was.
        """
        self._sizes.check(plan)
        kv = self._kv.donate()
        self._slots.patch(plan)
        logits, after = program(params, self._slots.batch(plan), kv)
        return StepKV(after, self._slots, self._sizes), logits
