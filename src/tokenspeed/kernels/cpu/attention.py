"""Rotary positions, KV pages and attention on the CPU.

Rule: rows of one query (decode) are attended together, over one padded gather of their pages; rows
of many (prefill) one by one. The query heads that share a key head are folded into the query dim,
so that keys are never repeated. What is behind a window is not gathered.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.contract import AttentionPlan
from tokenspeed.kernels.pages import gathered, scatter

__all__ = ["attend_row", "kv_write", "long_rows", "paged_attention", "rope"]


def rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    heads = torch.cat((q, k), dim=1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    if interleaved:
        a, b = heads.float().view(*heads.shape[:-1], -1, 2).unbind(-1)
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        turned = pairs.flatten(-2).to(q.dtype)
    else:
        a, b = heads.float().chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(q.dtype)
    return turned[:, : q.shape[1]], turned[:, q.shape[1] :]


def kv_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """See contract.py."""
    scatter(k_pages, locations, k)
    scatter(v_pages, locations, v)


@frozen(eq=False)
class _Decode:
    """Rows of one query. where: int64[B * L] locations; unseen: bool[B, L] padding."""

    tokens: Tensor
    where: Tensor
    unseen: Tensor


@frozen(eq=False)
class _Prefill:
    """One row of many queries. where: int64[L] locations; unseen: bool[n, L], later positions, and
    those behind the window."""

    start: int
    end: int
    where: Tensor
    unseen: Tensor


def _rows(plan: AttentionPlan, window: int | None) -> tuple[_Decode | None, list[_Prefill]]:
    starts, contexts = plan.query_start.to(torch.int64), plan.context_lens.to(torch.int64)
    counts = starts.diff()
    size = plan.page_size
    single = (counts == 1).nonzero().flatten()
    decode = None
    if len(single):
        ends = contexts[single] + 1
        first = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
        at = first[:, None] + torch.arange(int((ends - first).max()))
        unseen = at >= ends[:, None]
        at.masked_fill_(unseen, 0)
        where = plan.page_table[single].gather(1, at // size).to(torch.int64) * size + at % size
        decode = _Decode(starts[single], where.masked_fill_(unseen, 0).flatten(), unseen)
    return decode, long_rows(plan, window, 1)


def long_rows(plan: AttentionPlan, window: int | None, most: int) -> list[_Prefill]:
    """The rows of more than `most` queries."""
    starts, contexts = plan.query_start.to(torch.int64), plan.context_lens.to(torch.int64)
    counts, size = starts.diff(), plan.page_size
    rows = []
    for row in (counts > most).nonzero().flatten().tolist():
        start, context = int(starts[row]), int(contexts[row])
        end = context + int(counts[row])
        at = torch.arange(0 if window is None else max(0, context + 1 - window), end)
        where = plan.page_table[row, at // size].to(torch.int64) * size + at % size
        own = torch.arange(context, end)[:, None]
        unseen = (at > own) if window is None else (at > own) | (at <= own - window)
        rows.append(_Prefill(start, start + int(counts[row]), where, unseen))
    return rows


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, window: int | None
) -> Tensor:
    """See contract.py."""
    decode, prefills = plan.once(_rows, window)
    bias = plan.once(_decode_bias, window, q.dtype)
    if decode is not None and not prefills:
        return _decode(q, k_pages, v_pages, decode, bias)
    out = torch.empty(q.shape, dtype=q.dtype)
    if decode is not None:
        out[decode.tokens] = _decode(q[decode.tokens], k_pages, v_pages, decode, bias)
    for row in prefills:
        attend_row(q, k_pages, v_pages, row, out)
    return out


def attend_row(q: Tensor, k_pages: Tensor, v_pages: Tensor, row: _Prefill, out: Tensor) -> None:
    """Write the attention of a long row's queries into out[T, H, d]."""
    out[row.start : row.end] = _prefill(q[row.start : row.end], k_pages, v_pages, row)


def _bias(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, float("-inf"))


def _decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, rows: _Decode, bias: Tensor | None
) -> Tensor:
    batch, heads, dim = q.shape
    kv_heads, length = k_pages.shape[2], rows.unseen.shape[1]
    k, v = (
        gathered(pages, rows.where, q.dtype).view(batch, length, kv_heads, dim).transpose(1, 2)
        for pages in (k_pages, v_pages)
    )
    folded = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    return functional.scaled_dot_product_attention(folded, k, v, attn_mask=bias).reshape(q.shape)


def _decode_bias(plan: AttentionPlan, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """None where there is nothing to hide: no row of one query, or only one."""
    decode, _ = plan.once(_rows, window)
    if decode is None or len(decode.tokens) == 1:
        return None
    return _bias(decode.unseen, dtype)[:, None, None, :]


def _prefill(q: Tensor, k_pages: Tensor, v_pages: Tensor, row: _Prefill) -> Tensor:
    count, heads, dim = q.shape
    kv_heads = k_pages.shape[2]
    k, v = (
        gathered(pages, row.where, q.dtype).transpose(0, 1)[None] for pages in (k_pages, v_pages)
    )
    groups = heads // kv_heads
    folded = q.view(count, kv_heads, groups, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
    bias = _bias(row.unseen, q.dtype).repeat(groups, 1)
    mixed = functional.scaled_dot_product_attention(folded, k, v, attn_mask=bias)
    return mixed.view(kv_heads, groups, count, dim).permute(2, 0, 1, 3).reshape(q.shape)
