"""Rotary positions, KV pages and attention: a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.contract import AttentionPlan
from tokenspeed.kernels.pages import scatter

__all__ = ["kv_write", "paged_attention", "rope"]


def rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    cos, sin = cos_sin[positions].float()[:, None, :].chunk(2, dim=-1)

    def turn(x: Tensor) -> Tensor:
        wide = x.float()
        if interleaved:
            a, b = wide[..., 0::2], wide[..., 1::2]
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(q), turn(k)


def kv_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """See contract.py."""
    scatter(k_pages, locations, k)
    scatter(v_pages, locations, v)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, window: int | None
) -> Tensor:
    """See contract.py."""
    out = torch.empty_like(q)
    groups = q.shape[1] // k_pages.shape[2]
    starts = plan.query_start.tolist()
    for row, context in enumerate(plan.context_lens.tolist()):
        if starts[row] == starts[row + 1]:
            continue
        queries = slice(starts[row], starts[row + 1])
        length = context + starts[row + 1] - starts[row]
        behind = 0 if window is None else max(0, context + 1 - window) // plan.page_size
        first = behind * plan.page_size
        table = plan.page_table[row, behind : -(-length // plan.page_size)]
        keys, values = (
            pages[table].flatten(0, 1)[: length - first].float().repeat_interleave(groups, dim=1)
            for pages in (k_pages, v_pages)
        )
        scores = torch.einsum("qhd,khd->hqk", q[queries].float(), keys) * q.shape[-1] ** -0.5
        own = torch.arange(context, length, device=q.device)[:, None]
        at = torch.arange(first, length, device=q.device)[None, :]
        seen = (at <= own) if window is None else (at <= own) & (at > own - window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        out[queries] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
