"""Latent attention, split over the keys.

Rule: the query tokens of a row and its heads are rows of one tile, so that a key is read once for
all of them; a program takes one tile and one part of the keys (Dao et al., 2023), and a second
kernel merges the parts by their log-sum-exp. Scores are kept in powers of two. Rows of many queries
have their keys expanded, some heads at a time, and a program takes a tile of one head's queries.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenspeed.kernels.contract import MlaPlan, Problem, capability
from tokenspeed.kernels.pages import gathered
from tokenspeed.kernels.triton.tiles import Tiles, cores, fold, shared_bytes, tiled

__all__ = ["cost_us", "mla_decode", "mla_prefill", "precision", "unsupported"]

LOG2_E = 1.4426950408889634
# The interpreter multiplies bfloat16 as if its bits were whole numbers.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KEYS_MIN = 256
"""A part of fewer keys costs more to merge than it saves."""

PARTS_MAX = 128

EXPANDED_MAX = 1 << 27
"""Elements of expanded keys and values that a step may take at once."""


def precision(x: Tensor) -> str:
    """Of products with tensors like `x`: float32 is not to be rounded to fewer bits."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def unsupported(problem: Problem) -> str | None:
    """Why this kernel cannot run an `mla_decode`, or None."""
    for name, size in (("latent", problem.latent), ("rope", problem.rope)):
        if size is not None and (size < 16 or size & (size - 1)):
            return f"takes a {name} that is a power of two and at least 16, not {size}"
    return None


def cost_us(problem: Problem) -> float | None:
    """See Backend; as measured on an H200, so that no other capability has one."""
    rows = (problem.q_len or 1) * (problem.heads or 1)
    if problem.capability != (9, 0) or problem.dtype != "bfloat16":
        return None
    return 51 if rows <= 16 else 12 + 45 * triton.cdiv(rows, 64)


@triton.jit
def _step(
    latent, rope, start, limit, least, q_latent, q_rope, best, total, mixed, scale,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The scores of some keys, folded into what came before; all see those before `least`."""
    keys, turned = latent, rope
    if WIDEN:
        keys, turned = latent.to(tl.float32), rope.to(tl.float32)
    scores = tl.dot(q_latent, tl.trans(keys), input_precision=PRECISION) * scale
    scores += tl.dot(q_rope, turned, input_precision=PRECISION) * scale
    if start + KEYS > least:
        at = start + tl.arange(0, KEYS)
        scores = tl.where(at[None, :] < limit[:, None], scores, float("-inf"))
    return fold(scores, latent, best, total, mixed, 1.0, PRECISION, WIDEN)


@triton.jit
def _over_boxes(
    boxes, rope_boxes, own_table, begin, whole, pages_count, limit, least, q_latent, q_rope,
    best, total, mixed, scale, PAGE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Full steps of keys, which the copy engine brings."""
    page = tl.load(own_table + begin // PAGE, mask=begin < whole, other=-1)
    for start in tl.range(begin, whole, KEYS, num_stages=2):
        latent = boxes.load([page, start % PAGE, 0]).reshape([KEYS, LATENT])
        rope = rope_boxes.load([page, start % PAGE, LATENT]).reshape([KEYS, ROPE])
        rope = tl.trans(rope)
        # Triton asks for the next keys before a branch, but behind products outside of one, when
        # nothing is left to do meanwhile. What no branch held would wait for all of each step.
        if (page >= 0) & (page < pages_count):
            best, total, mixed = _step(
                latent, rope, start, limit, least, q_latent, q_rope, best, total, mixed,
                scale, KEYS, PRECISION, WIDEN,
            )  # fmt: skip
        following = start + KEYS
        page = tl.load(own_table + following // PAGE, mask=following < whole, other=-1)
    return best, total, mixed


@triton.jit
def _over_pages(
    pages, own_table, begin, stop, pages_count, page_stride, key_stride, limit, least, q_latent,
    q_rope, best, total, mixed, scale, DTYPE: tl.constexpr, PAGE: tl.constexpr,
    LATENT: tl.constexpr, ROPE: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Any keys, by their addresses; behind boxes one step at most, as these leave no room."""
    lane = tl.arange(0, LATENT)
    rope_lane = LATENT + tl.arange(0, ROPE)
    at = begin + tl.arange(0, KEYS)
    page = tl.load(own_table + at // PAGE, mask=at < stop, other=-1)
    for start in tl.range(begin, stop, KEYS, num_stages=STAGES):
        at = start + tl.arange(0, KEYS)
        there = (page >= 0) & (page < pages_count)
        key = page.to(tl.int64) * page_stride + (at % PAGE) * key_stride
        latent = tl.load(pages + key[:, None] + lane[None, :], mask=there[:, None], other=0.0)
        rope = tl.load(pages + key[:, None] + rope_lane[None, :], mask=there[:, None], other=0.0)
        best, total, mixed = _step(
            latent.to(DTYPE), tl.trans(rope.to(DTYPE)), start, limit, least, q_latent, q_rope, best,
            total, mixed, scale, KEYS, PRECISION, WIDEN,
        )  # fmt: skip
        following = at + KEYS
        page = tl.load(own_table + following // PAGE, mask=following < stop, other=-1)
    return best, total, mixed


@triton.jit
def _attend(
    q, pages, boxes, rope_boxes, table, slots, out, lse, columns, pages_count, heads, tiles, rows,
    q_token, q_head, page_stride, key_stride, scale,
    PAGE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) // tiles
    row = tl.load(slots + slot * 8)
    begin = tl.load(slots + slot * 8 + 1)
    stop = tl.load(slots + slot * 8 + 2)
    length = tl.load(slots + slot * 8 + 3)
    # Whatever the plan says, nothing is beyond the queries, the table or the pages.
    first = tl.minimum(tl.load(slots + slot * 8 + 4), rows // heads)
    count = tl.minimum(tl.load(slots + slot * 8 + 5), rows // heads - first)
    mine = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    inside = mine < count * heads
    limit = tl.minimum(length - count + mine // heads + 1, length)
    lane = tl.arange(0, LATENT)
    rope_lane = LATENT + tl.arange(0, ROPE)
    place = (first + mine // heads).to(tl.int64) * q_token + (mine % heads) * q_head
    q_latent = tl.load(q + place[:, None] + lane[None, :], mask=inside[:, None], other=0.0)
    q_rope = tl.load(q + place[:, None] + rope_lane[None, :], mask=inside[:, None], other=0.0)
    if WIDEN:
        q_latent, q_rope = q_latent.to(tl.float32), q_rope.to(tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, LATENT), tl.float32)
    # A tile that the row does not fill has no work.
    stop = tl.where((tl.program_id(0) % tiles) * ROWS < count * heads, stop, 0)
    least = tl.minimum(length - count + 1, length)
    own_table = table + row * columns
    if BOXES:
        # Keys behind the last one may be NaN: only what is full comes in boxes.
        whole = begin + tl.maximum(stop - begin, 0) // KEYS * KEYS
        best, total, mixed = _over_boxes(
            boxes, rope_boxes, own_table, begin, whole, pages_count, limit, least, q_latent, q_rope,
            best, total, mixed, scale, PAGE, LATENT, ROPE, KEYS, PRECISION, WIDEN,
        )  # fmt: skip
        begin = whole
    best, total, mixed = _over_pages(
        pages, own_table, begin, stop, pages_count, page_stride, key_stride, limit, least, q_latent,
        q_rope, best, total, mixed, scale, q.dtype.element_ty, PAGE, LATENT, ROPE, KEYS,
        1 if BOXES else 2, PRECISION, WIDEN,
    )  # fmt: skip
    some = total > 0
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    sums = tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    # Of parts each slot has rows of its own, of whole rows each query its own.
    if CUT:
        to = slot.to(tl.int64) * tiles * ROWS + mine
    else:
        sums *= 0.6931471805599453
        to = (first * heads + mine).to(tl.int64)
    tl.store(out + to[:, None] * LATENT + lane[None, :], mixed, mask=inside[:, None])
    tl.store(lse + to, sums, mask=inside)


@triton.jit
def _collect(
    part_out, part_lse, out, lse, parts, wide, heads, rows,
    LATENT: tl.constexpr, PARTS: tl.constexpr, SOME: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Put the parts of a row together, some at a time; see `tiles.merge`.

    A part without keys has the weight 0, and has left zeros.
    """
    own = parts + tl.program_id(0) // wide * 4
    slot = tl.load(own).to(tl.int64)
    there = tl.load(own + 1)
    first = tl.minimum(tl.load(own + 2), rows // heads)
    count = tl.minimum(tl.load(own + 3), rows // heads - first)
    mine = tl.program_id(0) % wide
    if mine < count * heads:
        lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
        part = tl.arange(0, PARTS)
        at = (slot + part) * wide + mine
        sums = tl.load(part_lse + at, mask=part < there, other=float("-inf"))
        best = tl.max(sums, axis=0)
        base = tl.where(best == float("-inf"), 0.0, best)
        total = tl.sum(tl.exp2(sums - base), axis=0)
        mixed = tl.zeros((LANES,), tl.float32)
        for start in range(0, there, SOME):
            one = start + tl.arange(0, SOME)
            place = (slot + one) * wide + mine
            weight = tl.load(part_lse + place, mask=one < there, other=float("-inf"))
            values = tl.load(
                part_out + place[:, None] * LATENT + lane[None, :],
                mask=(one < there)[:, None], other=0.0,
            )  # fmt: skip
            mixed += tl.sum(values * tl.exp2(weight - base)[:, None], axis=0)
        to = (first * heads + mine).to(tl.int64)
        tl.store(out + to * LATENT + lane, mixed / tl.where(total > 0, total, 1.0))
        if tl.program_id(1) == 0:
            whole = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), best)
            tl.store(lse + to, whole * 0.6931471805599453)


@frozen
class _Shape:
    """How a plan is cut: rows of a tile, tiles of a row, keys of a step, warps.

    slots: programs of each tile that rows divide among themselves; as many as rows: none is cut.
    boxes: keys come as boxes, by the copy engine of capability 9.0.
    """

    rows: int
    tiles: int
    keys: int
    slots: int
    warps: int
    boxes: bool


def _major(like: Tensor) -> int:
    """Of the capability of the device that a tensor is on; 0 of a CPU."""
    return (capability(like.device) or (0, 0))[0]


def _shape(plan: MlaPlan, boxable: bool) -> _Shape:
    wanted = plan.q_len_max * plan.heads
    rows = min(64, max(16, triton.next_power_of_2(wanted)))
    room = shared_bytes(plan.kv_lens)
    columns = 2 * (plan.latent + plan.rope)

    def fits(rows: int, keys: int) -> bool:
        """Two steps of keys and the queries, in 16 bits. Where these are full tiles, the weights of
        a step too, and as Triton 3.6 compiles them for capability 10, a third step."""
        steps = 3 if rows == 64 and _major(plan.kv_lens) == 10 else 2
        weights = 2 * rows * keys if rows == 64 else 0
        return columns * (steps * keys + rows) + weights <= room

    keys = next((k for k in (64, 32) if fits(rows, k)), 16)
    warps, programs, boxes = 8 if rows > 32 else 4, 2, False
    if boxable:
        # What fills a multiprocessor: two programs of 32 keys and few rows, or one of 64 keys.
        at_once, most = (2, 16) if rows == 16 else (1, 64)
        step = 64 // at_once
        boxes = plan.page_size % step == 0 and fits(most, step)
        if boxes:
            rows, keys, warps, programs = most, step, 8 // at_once, at_once
    tiles, count = triton.cdiv(wanted, rows), len(plan.kv_lens)
    slots = min(programs * cores(plan.kv_lens) // tiles, PARTS_MAX * count)
    # With few more than rows, merging costs more than it saves.
    slots = slots if slots >= 2 * count else count
    return _Shape(rows, tiles, keys, slots, warps, boxes)


@frozen(eq=False)
class _Shares:
    """Which keys of which row a slot has. What a program asks for lies together.

    slots: int32[slots, 8]; the row, its first key and the end of its keys here, the row's length,
    its first query and how many it has, 0 in a slot without a row.
    rows: int32[R, 4]; its first slot and how many it has, its first query and how many it has.
    """

    slots: Tensor
    rows: Tensor


@triton.jit
def _share(
    kv_lens, query_start, to_slots, to_rows, rows, slots, longest, least,
    KEYS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See _Shares. Each slot about as many steps of keys, whatever the lengths are; one program."""
    row = tl.arange(0, ROWS)
    there = row < rows
    length = tl.load(kv_lens + row, mask=there, other=0)
    length = tl.minimum(tl.maximum(length, 0), longest)
    start = tl.load(query_start + row, mask=there, other=0)
    asked = tl.maximum(tl.load(query_start + row + 1, mask=there, other=0) - start, 0)
    start = tl.maximum(start, 0)
    steps = (length + KEYS - 1) // KEYS
    counts = there.to(tl.int32)
    if slots > rows:
        # A row's last part may be short: so many that all rows together have at most `slots`.
        share = tl.maximum(tl.sum(steps, axis=0) // (slots - rows) + 1, least)
        parts = tl.minimum(tl.maximum((steps + share - 1) // share, 1), MOST)
        counts = tl.where(there, parts, 0)
    each = (steps + counts - 1) // tl.maximum(counts, 1) * KEYS
    ends = tl.cumsum(counts, 0)
    tl.store(to_rows + row * 4, ends - counts, mask=there)
    tl.store(to_rows + row * 4 + 1, counts, mask=there)
    tl.store(to_rows + row * 4 + 2, start, mask=there)
    tl.store(to_rows + row * 4 + 3, asked, mask=there)
    for part in range(0, tl.max(counts, axis=0)):
        to = to_slots + (ends - counts + part) * 8
        mine = part < counts
        tl.store(to, row, mask=mine)
        tl.store(to + 1, part * each, mask=mine)
        tl.store(to + 2, tl.minimum((part + 1) * each, length), mask=mine)
        tl.store(to + 3, length, mask=mine)
        tl.store(to + 4, start, mask=mine)
        tl.store(to + 5, asked, mask=mine)
    for slot in range(tl.sum(counts, axis=0), slots, ROWS):
        for column in range(0, 6):
            tl.store(to_slots + (slot + row) * 8 + column, 0, mask=slot + row < slots)


def _shared_out(plan: MlaPlan, shape: _Shape) -> _Shares:
    """Found on the device, which nobody waits for."""
    rows, lens = len(plan.kv_lens), plan.kv_lens
    slots = torch.empty(shape.slots, 8, dtype=torch.int32, device=lens.device)
    of_rows = torch.empty(rows, 4, dtype=torch.int32, device=lens.device)
    _share[(1,)](
        lens, plan.query_start, slots, of_rows, rows, shape.slots,
        plan.page_table.shape[1] * plan.page_size, triton.cdiv(KEYS_MIN, shape.keys),
        KEYS=shape.keys, MOST=PARTS_MAX, ROWS=triton.next_power_of_2(rows),
    )  # fmt: skip
    return _Shares(slots, of_rows)


def _boxable(kv_pages: Tensor) -> bool:
    """Whether the copy engine of capability 9.0 can bring pages."""
    if not kv_pages.is_cuda or torch.version.hip is not None or kv_pages.element_size() != 2:
        return False
    aligned = kv_pages.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in kv_pages.stride()[:2])
    return aligned and _major(kv_pages) == 9


def _in_boxes(kv_pages: Tensor, shape: _Shape, columns: int) -> TensorDescriptor | None:
    """Pages as boxes of a step's keys and so many columns; None where they do not come so."""
    if not shape.boxes:
        return None
    box = [1, shape.keys, columns]
    return TensorDescriptor(kv_pages, list(kv_pages.shape), list(kv_pages.stride()), box)


def mla_decode(q: Tensor, kv_pages: Tensor, plan: MlaPlan, scale: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    if q.stride(2) != 1:
        q = q.contiguous()
    if kv_pages.stride(2) != 1:
        kv_pages = kv_pages.contiguous()
    shape = plan.once(_shape, _boxable(kv_pages))
    rows = q.shape[0] * plan.heads
    out = torch.empty(*q.shape[:2], plan.latent, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not rows:
        return out, lse
    shares = plan.once(_shared_out, shape)
    cut, wide = shape.slots > len(plan.kv_lens), shape.tiles * shape.rows
    part_out, part_lse = out, lse
    if cut:
        place = (shape.slots, wide, plan.latent)
        part_out = torch.empty(place, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(place[:2], dtype=torch.float32, device=q.device)
    boxes = _in_boxes(kv_pages, shape, plan.latent)
    _attend[(shape.slots * shape.tiles,)](
        q, kv_pages, boxes, _in_boxes(kv_pages, shape, plan.rope), plan.page_table, shares.slots,
        part_out, part_lse, plan.page_table.shape[1], kv_pages.shape[0], plan.heads, shape.tiles,
        rows, q.stride(0), q.stride(1), kv_pages.stride(0), kv_pages.stride(1), scale * LOG2_E,
        PAGE=plan.page_size, LATENT=plan.latent, ROPE=plan.rope, ROWS=shape.rows,
        KEYS=shape.keys, BOXES=boxes is not None, num_warps=shape.warps, num_stages=2,
        PRECISION=precision(q), WIDEN=INTERPRETED, CUT=cut,
    )  # fmt: skip
    if cut:
        # At once, as many parts as a row has on average.
        some = min(PARTS_MAX, triton.next_power_of_2(shape.slots // len(plan.kv_lens)))
        lanes = 128 if rows < 512 else 512
        lanes = min(8192 // some, lanes, plan.latent)
        _collect[(len(plan.kv_lens) * wide, plan.latent // lanes)](
            part_out, part_lse, out, lse, shares.rows, wide, plan.heads, rows,
            LATENT=plan.latent, SOME=some, LANES=lanes,
            PARTS=triton.next_power_of_2(min(PARTS_MAX, shape.slots)),
        )  # fmt: skip
    return out, lse


@triton.jit
def _expanded(
    q, keys, wide, out, query_start, kv_starts, rows, firsts, tokens, heads_from, each,
    q_token, q_head, key_stride, wide_head, wide_key, out_token, out_head, scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, LATENT: tl.constexpr,
    NOPE_LANES: tl.constexpr, ROPE_LANES: tl.constexpr, VALUE_LANES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # The tiles that see most keys begin first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0)
    row = tl.load(rows + tile)
    first = tl.load(firsts + tile)
    start = tl.minimum(tl.maximum(tl.load(query_start + row), 0), tokens)
    count = tl.minimum(tl.load(query_start + row + 1), tokens) - start
    origin = tl.load(kv_starts + row).to(tl.int64)
    length = (tl.load(kv_starts + row + 1) - origin).to(tl.int32)
    token = first + tl.arange(0, ROWS)
    inside = token < count
    nope = tl.arange(0, NOPE_LANES)
    rope = tl.arange(0, ROPE_LANES)
    value = tl.arange(0, VALUE_LANES)
    place = (start + token).to(tl.int64)[:, None] * q_token + (heads_from + head) * q_head
    q_nope = tl.load(q + place + nope[None, :], mask=inside[:, None] & (nope < NOPE)[None, :],
                     other=0.0)  # fmt: skip
    q_rope = tl.load(q + place + NOPE + rope[None, :],
                     mask=inside[:, None] & (rope < ROPE)[None, :], other=0.0)  # fmt: skip
    if WIDEN:
        q_nope, q_rope = q_nope.to(tl.float32), q_rope.to(tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, VALUE_LANES), tl.float32)
    stop = tl.where(first < count, length - count + tl.minimum(first + each, count), 0)
    # Every query sees the keys before this one.
    sure = tl.minimum(length - count + first + 1, stop)
    own = wide + head.to(tl.int64) * wide_head + origin * wide_key
    turned = keys + origin * key_stride + LATENT
    for begin in tl.range(0, stop, KEYS):
        at = begin + tl.arange(0, KEYS)
        there = (at < stop)[:, None]
        key = own + at[:, None].to(tl.int64) * wide_key
        k_nope = tl.load(key + nope[None, :], mask=there & (nope < NOPE)[None, :], other=0.0)
        k_rope = tl.load(turned + at[:, None].to(tl.int64) * key_stride + rope[None, :],
                         mask=there & (rope < ROPE)[None, :], other=0.0)  # fmt: skip
        v = tl.load(key + NOPE + value[None, :], mask=there & (value < VALUE)[None, :], other=0.0)
        if WIDEN:
            k_nope, k_rope = k_nope.to(tl.float32), k_rope.to(tl.float32)
        scores = tl.dot(q_nope, tl.trans(k_nope), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision=PRECISION)
        if begin + KEYS > sure:
            # Loaded again: a branch without a load would become selections in every step.
            limit = tl.load(kv_starts + row + 1) - origin.to(tl.int32) - count + token + 1
            scores = tl.where(at[None, :] < limit[:, None], scores, float("-inf"))
        best, total, mixed = fold(scores, v, best, total, mixed, scale, PRECISION, WIDEN)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    to = (start + token).to(tl.int64)[:, None] * out_token + (heads_from + head) * out_head
    tl.store(out + to + value[None, :], mixed, mask=inside[:, None] & (value < VALUE)[None, :])


@frozen(eq=False)
class _Keys:
    """Keys of all rows one after the other. where: int64[K] locations; starts: int32[R + 1]."""

    where: Tensor
    starts: Tensor


def _keys(plan: MlaPlan, pages_count: int) -> _Keys:
    """Waits for the device, once a step: how many keys there are says how much they take."""
    device, size = plan.kv_lens.device, plan.page_size
    lens = plan.kv_lens.clamp(0, plan.page_table.shape[1] * size)
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32, device=device)
    starts[1:] = lens.cumsum(0)
    count = int(starts[-1])
    every = torch.arange(len(lens), device=device)
    row = torch.repeat_interleave(every, lens, output_size=count)
    at = torch.arange(count, device=device) - starts[row]
    page = plan.page_table[row, at // size].to(torch.int64).clamp(0, pages_count - 1)
    return _Keys(page * size + at % size, starts)


def _row_tiles(plan: MlaPlan, tokens: int, each: int) -> Tiles:
    return tiled(plan.query_start, tokens, each)


def mla_prefill(q: Tensor, kv_pages: Tensor, up: Tensor, plan: MlaPlan, scale: float) -> Tensor:
    """See contract.py."""
    tokens, heads, width = q.shape
    nope, latent = width - plan.rope, plan.latent
    value = up.shape[1] - nope
    # Tokens that no row covers, which pad a step, come out as 0.
    out = torch.zeros(tokens, heads, value, dtype=q.dtype, device=q.device)
    found = plan.once(_keys, kv_pages.shape[0])
    if not tokens or not len(found.where):
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    keys = gathered(kv_pages, found.where, q.dtype)
    lanes = [max(16, triton.next_power_of_2(size)) for size in (nope, plan.rope, value)]
    narrow = q.element_size() == 2
    rows = 128 if narrow and sum(lanes) <= 320 else 64
    tiles = plan.once(_row_tiles, tokens, rows)
    keys_each = 64 if narrow else 32
    # What is on its way while other keys are multiplied takes a third of three places.
    taken = rows * sum(lanes[:2]) + 3 * keys_each * sum(lanes)
    stages = 3 if taken * q.element_size() <= shared_bytes(q) else 2
    step = max(1, EXPANDED_MAX // (up.shape[1] * len(keys)))
    for first in range(0, heads, step):
        some = up[first : first + step]
        wide = torch.matmul(keys[:, :latent], some.transpose(1, 2))
        _expanded[(len(some), len(tiles.rows))](
            q, keys, wide, out, plan.query_start, found.starts, tiles.rows, tiles.firsts, tokens,
            first, rows, q.stride(0), q.stride(1), keys.stride(0), wide.stride(0), wide.stride(1),
            out.stride(0), out.stride(1), scale * LOG2_E,
            NOPE=nope, ROPE=plan.rope, VALUE=value, LATENT=latent,
            NOPE_LANES=lanes[0], ROPE_LANES=lanes[1], VALUE_LANES=lanes[2],
            ROWS=rows, KEYS=keys_each, PRECISION=precision(q), WIDEN=INTERPRETED,
            num_warps=8 if rows == 128 else 4, num_stages=stages,
        )  # fmt: skip
    return out
