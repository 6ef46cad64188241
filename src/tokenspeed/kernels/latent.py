"""Latent attention of a whole step: rows of few queries absorbed, rows of many expanded.

Rule: which of the two forms a row takes is arithmetic, and both give the same. Absorbing turns each
query into the latent space, where all heads share a key; expanding gives each key to every head,
and is paid for once a key, however many queries there are (DeepSeek-AI, 2024, appendix C).
"""

from __future__ import annotations

from typing import final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.kernels.contract import AttentionPlan, MlaPlan
from tokenspeed.kernels.mla import mla_decode, mla_decode_plan, mla_prefill

__all__ = ["absorbs", "latent_attention"]


def absorbs(queries: int, *, latent: int, nope: int, rope: int, value: int) -> bool:
    """Whether a row of so many queries multiplies less if absorbed.

    For each head and key, a query costs 2 latent + rope multiplications absorbed, and
    nope + rope + value expanded, to which latent (nope + value) come once.
    """
    absorbed = queries * (2 * latent + rope)
    return absorbed <= queries * (nope + rope + value) + latent * (nope + value)


@final
@frozen(eq=False)
class _Part:
    """Rows of a step that take one form. tokens: int64 indices of theirs; None: all tokens."""

    plan: MlaPlan
    tokens: Tensor | None


Parts = tuple[_Part | None, _Part | None]
"""Those absorbed, and those expanded."""


def _parts(plan: AttentionPlan, heads: int, latent: int, nope: int, rope: int, value: int) -> Parts:
    known = plan.query_start.diff().tolist() if plan.counts is None else plan.counts
    kinds = [absorbs(n, latent=latent, nope=nope, rope=rope, value=value) for n in known]
    sizes = {"page_size": plan.page_size, "heads": heads, "latent": latent, "rope": rope}

    def part(kind: bool) -> _Part | None:
        rows = [row for row, own in enumerate(kinds) if own == kind]
        if not rows:
            return None
        sizes["q_len_max"] = max(1, *(known[row] for row in rows))
        return _whole(plan, sizes) if len(rows) == len(kinds) else _some(plan, rows, sizes)

    return part(True), part(False)


def _whole(plan: AttentionPlan, sizes: dict[str, int]) -> _Part:
    """All rows; the CPU sends nothing for it and waits for nothing."""
    lens = plan.context_lens + plan.query_start.diff()
    return _Part(mla_decode_plan(plan.query_start, lens, plan.page_table, **sizes), None)


def _some(plan: AttentionPlan, rows: list[int], sizes: dict[str, int]) -> _Part:
    counts = plan.query_start.diff()
    at = torch.tensor(rows, device=counts.device)
    own = counts[at]
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32, device=counts.device)
    starts[1:] = own.cumsum(0)
    made = mla_decode_plan(starts, plan.context_lens[at] + own, plan.page_table[at], **sizes)
    first = torch.repeat_interleave(plan.query_start[at] - starts[:-1], own)
    return _Part(made, first + torch.arange(len(first), device=counts.device))


def latent_attention(
    q: Tensor, kv_pages: Tensor, up: Tensor, plan: AttentionPlan, *, latent: int, scale: float
) -> Tensor:
    """Causal multi-head latent attention of a step over paged latents.

    Args:
        q: [T, H, N + E], of a head the elements without a position, then those with one.
        kv_pages: [pages, page_size, C + E], latents and rotary columns, those of the step included.
        up: [H, N + V, C]; from a latent to a head's key without position, and to its value.
        plan: of the step.
        latent: C.
        scale: of the scores.

    Returns:
        [T, H, V].
    """
    heads, rope = q.shape[1], kv_pages.shape[2] - latent
    nope = q.shape[2] - rope
    value = up.shape[1] - nope
    absorbed, expanded = plan.once(_parts, heads, latent, nope, rope, value)
    if absorbed is not None and expanded is None:
        return _absorbed(q, kv_pages, up, absorbed, nope, scale)
    if expanded is not None and absorbed is None:
        return mla_prefill(q, kv_pages, up, expanded.plan, scale)
    # Tokens that no row covers, which pad a step, come out as 0.
    out = torch.zeros(*q.shape[:2], value, dtype=q.dtype, device=q.device)
    if absorbed is not None and expanded is not None:
        own = absorbed.tokens
        out[own] = _absorbed(q[own], kv_pages, up, absorbed, nope, scale)
        own = expanded.tokens
        out[own] = mla_prefill(q[own], kv_pages, up, expanded.plan, scale)
    return out


def _absorbed(
    q: Tensor, kv_pages: Tensor, up: Tensor, part: _Part, nope: int, scale: float
) -> Tensor:
    """Each head's query goes through its key matrix, and what comes back through its values'."""
    turned = torch.bmm(q[..., :nope].transpose(0, 1), up[:, :nope]).transpose(0, 1)
    mixed, _ = mla_decode(torch.cat((turned, q[..., nope:]), dim=-1), kv_pages, part.plan, scale)
    return torch.bmm(mixed.transpose(0, 1), up[:, nope:].transpose(1, 2)).transpose(0, 1)
