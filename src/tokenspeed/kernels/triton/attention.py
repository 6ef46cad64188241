"""Rotary positions, KV pages and attention.

Rule: query tokens of a row and the query heads that share a key head are rows of one tile, so that
a key is read once for all of them; a program takes one tile and one part of the keys (Dao et al.,
2023), whose scores are folded into a running maximum and sum (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from tokenspeed.kernels.contract import AttentionPlan
from tokenspeed.kernels.pages import EIGHT_BITS, as_bytes
from tokenspeed.kernels.triton.mla import INTERPRETED, LOG2_E, precision
from tokenspeed.kernels.triton.tiles import Tiles, cores, fold, merge, shared_bytes, tiled

__all__ = ["kv_write", "paged_attention", "rope"]

_ALL = 2**31 - 1
"""A window that hides nothing."""

KEYS_MIN = 256
"""A part of fewer keys costs more to merge than it saves."""

PARTS_MAX = 64


@triton.jit
def _turn(
    x, out, cos, sin, head, heads, half, token, x_token, x_head, HEADS: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    source = x + token * x_token + head[:, None] * x_head
    target = out + (token * heads + head[:, None]) * 2 * half
    there = (head < heads)[:, None]
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(source + pair, mask=there & (pair < 2 * half), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (HEADS, HALF, 2)))
        turned = tl.join(a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :])
        turned = tl.reshape(turned, (HEADS, 2 * HALF))
        tl.store(target + pair, turned, mask=there & (pair < 2 * half))
    else:
        at = tl.arange(0, HALF)[None, :]
        inside = there & (at < half)
        a = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + half + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + at, a * cos[None, :] - b * sin[None, :], mask=inside)
        tl.store(target + half + at, b * cos[None, :] + a * sin[None, :], mask=inside)


@triton.jit
def _rope(
    q, k, q_out, k_out, positions, cos_sin, contexts, heads, kv_heads, dim,
    q_token, q_head, k_token, k_head, q_blocks,
    HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some heads of a token: of its queries, or behind all of these of its keys."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = tl.arange(0, HALF)
    half = dim // 2
    position = tl.minimum(tl.maximum(tl.load(positions + token), 0), contexts - 1)
    angle = cos_sin + position * dim + at
    cos = tl.load(angle, mask=at < half, other=0.0).to(tl.float32)
    sin = tl.load(angle + half, mask=at < half, other=0.0).to(tl.float32)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        _turn(q, q_out, cos, sin, head, heads, half, token, q_token, q_head, HEADS, HALF,
              INTERLEAVED)  # fmt: skip
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        _turn(k, k_out, cos, sin, head, kv_heads, half, token, k_token, k_head, HEADS, HALF,
              INTERLEAVED)  # fmt: skip


def rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    positions, cos_sin = positions.contiguous(), cos_sin.contiguous()
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    half = triton.next_power_of_2(dim // 2)
    block = min(max(1, 1024 // half), triton.next_power_of_2(heads))
    q_blocks = triton.cdiv(heads, block)
    if tokens:
        _rope[(tokens, q_blocks + triton.cdiv(kv_heads, block))](
            q, k, q_out, k_out, positions, cos_sin, len(cos_sin), heads, kv_heads, dim,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), q_blocks,
            HEADS=block, HALF=half, INTERLEAVED=interleaved,
        )  # fmt: skip
    return q_out, k_out


@triton.jit
def _eight_bits(x):
    """float32 as the bits of float8_e4m3fn: to the nearest, ties to even, at most 448.

    By whole numbers: what a conversion does beyond 448, and below 2^-6, is not the same everywhere.
    """
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    own = size.to(tl.uint32, bitcast=True)
    code = ((own + 0x7FFFF + ((own >> 20) & 1)) >> 20) - (120 << 3)
    # The last bit of a sum with 2^14 is worth 2^-9, as that of what has no exponent is.
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, code)
    code = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _put(x, pages, token, at, room, heads, dim, x_token, x_head, p_page, p_key, p_head, size,
         HEADS: tl.constexpr, DIM: tl.constexpr, EIGHT_BITS: tl.constexpr):  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, DIM)[None, :]
    # A place that does not exist is not written.
    inside = (head < tl.where((at >= 0) & (at < room), heads, 0)) & (lane < dim)
    values = tl.load(x + token * x_token + head * x_head + lane, mask=inside, other=0.0)
    place = (at // size) * p_page + (at % size) * p_key
    if EIGHT_BITS:
        values = _eight_bits(values.to(tl.float32))
    tl.store(pages + place + head * p_head + lane, values, mask=inside)


@triton.jit
def _write(
    k, v, k_pages, v_pages, locations, room, heads, k_dim, v_dim, size,
    k_token, k_head, v_token, v_head, kp_page, kp_key, kp_head, vp_page, vp_key, vp_head,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, EIGHT_BITS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(locations + token)
    _put(k, k_pages, token, at, room, heads, k_dim, k_token, k_head, kp_page, kp_key, kp_head, size,
         HEADS, K_DIM, EIGHT_BITS)  # fmt: skip
    _put(v, v_pages, token, at, room, heads, v_dim, v_token, v_head, vp_page, vp_key, vp_head, size,
         HEADS, V_DIM, EIGHT_BITS)  # fmt: skip


def kv_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """See contract.py."""
    tokens, heads, dim = k.shape
    locations = locations.contiguous()
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    eight_bits = k_pages.dtype == EIGHT_BITS
    if eight_bits:
        k_pages, v_pages = as_bytes(k_pages), as_bytes(v_pages)
    if tokens:
        _write[(tokens,)](
            k, v, k_pages, v_pages, locations, k_pages.shape[0] * k_pages.shape[1], heads, dim,
            v.shape[2], k_pages.shape[1],
            *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            HEADS=triton.next_power_of_2(heads), K_DIM=triton.next_power_of_2(dim),
            V_DIM=triton.next_power_of_2(v.shape[2]), EIGHT_BITS=eight_bits,
        )  # fmt: skip


@triton.jit
def _pages_at(own_table, from_key, stop, pages, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """The pages of some keys; whatever the table says, of those there are."""
    lane = tl.arange(0, KEYS)
    at = from_key // PAGE + lane // PAGE if KEYS % PAGE == 0 else (from_key + lane) // PAGE
    page = tl.load(own_table + at, mask=from_key + lane < stop, other=0)
    return tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)


@triton.jit
def _over_keys(
    query, k_from, v_from, own_table, pages, context_at, most, token, begin, stop, sure, seen_from,
    k_page, k_key, v_page, v_key, window, scale,
    PAGE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The keys [begin, stop) of a row, folded; `begin` is where a page begins, or a step."""
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, LANES), tl.float32)
    lane = tl.arange(0, LANES)
    page = _pages_at(own_table, begin, stop, pages, KEYS, PAGE)
    for from_key in tl.range(begin, stop, KEYS):
        at = from_key + tl.arange(0, KEYS)
        there = (at < stop)[:, None]
        if LANES > DIM:
            there = there & (lane < DIM)[None, :]
        # Where steps are whole pages it is known beforehand where in its page a key lies.
        within = tl.arange(0, KEYS) % PAGE if KEYS % PAGE == 0 else at % PAGE
        key = k_from + ((within * k_key)[:, None] + lane[None, :]) + (page * k_page)[:, None]
        value = v_from + ((within * v_key)[:, None] + lane[None, :]) + (page * v_page)[:, None]
        keys = tl.load(key, mask=there, other=0.0).to(query.dtype)
        values = tl.load(value, mask=there, other=0.0).to(query.dtype)
        # A step ahead, so that loads need not wait for what tells where from.
        page = _pages_at(own_table, from_key + KEYS, stop, pages, KEYS, PAGE)
        if WIDEN:
            scores = tl.dot(query.to(tl.float32), tl.trans(keys.to(tl.float32)))
        else:
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if (from_key + KEYS > sure) | (from_key < seen_from):
            # Loaded again: a branch without a load would become selections in every step.
            limit = tl.minimum(tl.maximum(tl.load(context_at), 0), most) + token + 1
            seen = (at[None, :] < limit[:, None]) & (at[None, :] >= (limit - window)[:, None])
            scores = tl.where(seen & (at < stop)[None, :], scores, float("-inf"))
        best, total, mixed = fold(scores, values, best, total, mixed, scale, PRECISION, WIDEN)
    return best, total, mixed


@triton.jit
def _attend(
    q, k_pages, v_pages, out, lse, query_start, context_lens, table, rows, firsts,
    columns, pages, all_rows, heads, groups, each, q_token, q_head,
    k_page, k_key, k_head, v_page, v_key, v_head, window, parts, least, scale,
    PAGE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # The tiles that see most keys begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    row = tl.load(rows + tile).to(tl.int64)
    first = tl.load(firsts + tile)
    # Whatever the plan says, nothing is beyond the queries, the table or the pages.
    start = tl.minimum(tl.maximum(tl.load(query_start + row), 0), all_rows // heads)
    count = tl.minimum(tl.load(query_start + row + 1), all_rows // heads) - start
    context = tl.minimum(tl.maximum(tl.load(context_lens + row), 0), columns * PAGE)
    mine = tl.arange(0, ROWS)
    token = first + mine // groups
    inside = (mine < each * groups) & (token < count)
    head = kv_head * groups + mine % groups
    lane = tl.arange(0, LANES)
    in_dim = lane < DIM
    place = (start + token).to(tl.int64) * q_token + head * q_head
    q_in = inside[:, None] & in_dim[None, :]
    query = tl.load(q + place[:, None] + lane[None, :], mask=q_in, other=0.0)
    # What the first query sees no more, and the last one sees not yet, is not read.
    low = tl.maximum(context + first + 1 - window, 0) // PAGE * PAGE
    high = tl.where(first < count, context + tl.minimum(first + each, count), 0)
    high = tl.minimum(high, columns * PAGE)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), KEYS), parts) * KEYS
    share = tl.maximum(share, least)
    begin = low + part * share
    stop = tl.minimum(begin + share, high)
    # Keys from `seen_from` on and before `sure` every query sees: they need no mask.
    best, total, mixed = _over_keys(
        query, k_pages + kv_head * k_head, v_pages + kv_head * v_head, table + row * columns, pages,
        context_lens + row, columns * PAGE, token, begin, stop,
        tl.minimum(context + first + 1, stop), context + tl.minimum(first + each, count) - window,
        k_page, k_key, v_page, v_key, window, scale, PAGE, DIM, ROWS, LANES, KEYS, PRECISION, WIDEN,
    )  # fmt: skip
    some = total > 0
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    to = part.to(tl.int64) * all_rows + (start + token).to(tl.int64) * heads + head
    tl.store(out + to[:, None] * DIM + lane[None, :], mixed, mask=q_in)
    if parts > 1:
        sums = tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(lse + to, sums, mask=inside)


@frozen
class Cut:
    """How a step is cut: rows of a tile, query tokens of it, keys of a step of the loop, parts.

    stages: steps of keys that have room in shared memory; Triton asks for the next ones behind the
    products of a step, so that with two of them it waits for the whole way of each.
    """

    rows: int
    each: int
    keys: int
    parts: int
    warps: int
    stages: int


def cut(plan: AttentionPlan, q: Tensor, pages: Tensor, window: int | None) -> Cut:
    """By the mean of queries a row, which alone is known without waiting for the device."""
    tokens, heads, dim = q.shape
    kv_heads, size = pages.shape[2], q.element_size()
    groups = heads // kv_heads
    mean = triton.cdiv(tokens, max(1, len(plan.context_lens)))
    most = 128 if size == 2 and dim <= 128 else 64
    rows = max(16, min(most, triton.next_power_of_2(mean * groups)), triton.next_power_of_2(groups))
    each = rows // groups
    lanes = max(16, triton.next_power_of_2(dim))
    keys = max(16, min(64, 8192 * 2 // (lanes * size)))
    if rows == 16:
        # Small steps, so that many programs run at once: 8 KB of keys.
        keys = max(min(32, keys), min(64, 8192 // (lanes * pages.element_size())))
    programs = 1 if rows >= 128 else 2 if rows > 16 or keys * lanes > 4096 else 4
    # Three steps have room where that leaves it to as many programs, of 128 keys in large tiles.
    room = (shared_bytes(q) + 1024) // programs - 1024
    wanted = [(2 * keys, 3)] if rows == 128 else []
    keys, stages = next(
        (k, s)
        for k, s in (*wanted, (keys, 3), (keys, 2))
        if s == 2 or (rows + 2 * k * s) * lanes * size <= room
    )
    tiles = len(plan.context_lens) * triton.cdiv(mean, each) * kv_heads
    keys_max = plan.page_table.shape[1] * plan.page_size
    if window is not None:
        keys_max = min(keys_max, window + each)
    parts = min(PARTS_MAX, keys_max // KEYS_MIN, programs * cores(q) // max(1, tiles))
    return Cut(rows, each, keys, max(1, parts), 8 if rows >= 128 else 4, stages)


def _tiles(plan: AttentionPlan, tokens: int, each: int) -> Tiles:
    return tiled(plan.query_start, tokens, each)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, window: int | None
) -> Tensor:
    """See contract.py."""
    tokens, heads, dim = q.shape
    kv_heads = k_pages.shape[2]
    q, k_pages, v_pages = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_pages, v_pages)
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    how = cut(plan, q, k_pages, window)
    tiles = plan.once(_tiles, tokens, how.each)
    rows = tokens * heads
    part_out, part_lse = out, out
    if how.parts > 1:
        wide = (how.parts, rows, dim)
        part_out = torch.empty(wide, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(wide[:2], dtype=torch.float32, device=q.device)
    _attend[(len(tiles.rows), kv_heads, how.parts)](
        q, k_pages, v_pages, part_out, part_lse, plan.query_start, plan.context_lens,
        plan.page_table, tiles.rows, tiles.firsts, plan.page_table.shape[1], len(k_pages),
        rows, heads, heads // kv_heads, how.each, q.stride(0), q.stride(1),
        *k_pages.stride()[:3], *v_pages.stride()[:3],
        _ALL if window is None else window, how.parts, KEYS_MIN if how.parts > 1 else 1,
        dim**-0.5 * LOG2_E,
        PAGE=plan.page_size, DIM=dim, ROWS=how.rows, LANES=max(16, triton.next_power_of_2(dim)),
        KEYS=how.keys, PRECISION=precision(q), WIDEN=INTERPRETED, num_warps=how.warps,
        num_stages=how.stages,
    )  # fmt: skip
    if how.parts > 1:
        lse = torch.empty(rows, dtype=torch.float32, device=q.device)
        merge(part_out, part_lse, out, lse)
    return out
