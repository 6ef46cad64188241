"""Rotary positions, KV pages and attention.

Rule: a program of attention serves one token and one key head with all query heads that share it,
so that keys are read once for the group; scores are folded into a running maximum and sum (Milakov
and Gimelshein, 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from tokenspeed.kernels.contract import AttentionPlan

__all__ = ["kv_write", "paged_attention", "rope"]


_ALL = 2**31 - 1
"""A window that hides nothing."""


@triton.jit
def _rope(
    x, out, positions, cos_sin, heads, dim, stride, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF)
    half = dim // 2
    inside = at < half
    angle = cos_sin + tl.load(positions + token) * dim + at
    cos = tl.load(angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(angle + half, mask=inside, other=0.0).to(tl.float32)
    first = 2 * at if INTERLEAVED else at
    second = first + 1 if INTERLEAVED else at + half
    source = x + token * stride + head * dim
    a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
    target = out + (token * heads + head) * dim
    tl.store(target + first, a * cos - b * sin, mask=inside)
    tl.store(target + second, b * cos + a * sin, mask=inside)


def rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    return (
        _turned(q, positions, cos_sin, interleaved),
        _turned(k, positions, cos_sin, interleaved),
    )


def _turned(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    tokens, heads, dim = x.shape
    if x.stride()[1:] != (dim, 1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = triton.next_power_of_2(dim // 2)
    _rope[(tokens, heads)](
        x, out, positions, cos_sin, heads, dim, x.stride(0), HALF=half, INTERLEAVED=interleaved
    )
    return out


def kv_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """See contract.py."""
    k_pages.flatten(0, 1).index_copy_(0, locations, k)
    v_pages.flatten(0, 1).index_copy_(0, locations, v)


@frozen(eq=False)
class _Tokens:
    """rows int32[T]: whose token; lengths int32[T]: positions that it sees, its own included."""

    rows: Tensor
    lengths: Tensor


def _tokens(plan: AttentionPlan, count: int) -> _Tokens:
    index = torch.arange(count, dtype=torch.int32, device=plan.query_start.device)
    rows = torch.searchsorted(plan.query_start[1:], index, right=True)  # which end before
    lengths = plan.context_lens[rows] + (index - plan.query_start[rows]) + 1
    return _Tokens(rows.to(torch.int32), lengths.to(torch.int32))


@triton.jit
def _attend(
    q, k_pages, v_pages, out, table, rows, lengths,
    columns, groups, kv_heads, dim, page_size, window, scale,
    GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    row = tl.load(rows + token).to(tl.int64)
    length = tl.load(lengths + token)
    group = tl.arange(0, GROUPS)
    lane = tl.arange(0, DIM)
    in_dim = lane < dim
    heads = (token * kv_heads + kv_head) * groups + group
    q_at = heads[:, None] * dim + lane[None, :]
    q_in = (group < groups)[:, None] & in_dim[None, :]
    query = tl.load(q + q_at, mask=q_in, other=0.0).to(tl.float32) * scale
    best = tl.full((GROUPS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    mixed = tl.zeros((GROUPS, DIM), tl.float32)
    for start in range(tl.maximum(length - window, 0), length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = at < length
        page = tl.load(table + row * columns + at // page_size, mask=seen, other=0).to(tl.int64)
        place = ((page * page_size + at % page_size) * kv_heads + kv_head) * dim
        inside = seen[:, None] & in_dim[None, :]
        keys = tl.load(k_pages + place[:, None] + lane[None, :], mask=inside, other=0.0)
        scores = tl.sum(query[:, None, :] * keys.to(tl.float32)[None, :, :], axis=2)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(best - higher)
        values = tl.load(v_pages + place[:, None] + lane[None, :], mask=inside, other=0.0)
        part = tl.sum(weights[:, :, None] * values.to(tl.float32)[None, :, :], axis=1)
        mixed = mixed * fade[:, None] + part
        total = total * fade + tl.sum(weights, axis=1)
        best = higher
    tl.store(out + q_at, mixed / total[:, None], mask=q_in)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, window: int | None
) -> Tensor:
    """See contract.py."""
    tokens, heads, dim = q.shape
    kv_heads = k_pages.shape[2]
    each = plan.once(_tokens, tokens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _attend[(tokens, kv_heads)](
        q.contiguous(),
        k_pages,
        v_pages,
        out,
        plan.page_table,
        each.rows,
        each.lengths,
        plan.page_table.shape[1],
        heads // kv_heads,
        kv_heads,
        dim,
        plan.page_size,
        _ALL if window is None else window,
        dim**-0.5,
        GROUPS=triton.next_power_of_2(heads // kv_heads),
        DIM=triton.next_power_of_2(dim),
        BLOCK=32,
    )
    return out
