"""Latent attention, split over the keys.

Rule: the query tokens of a row and its heads are rows of one tile, so that a key is read once for
all of them; a program takes one tile and one part of the keys (Dao et al., 2023), and a second
kernel merges the parts by their log-sum-exp. Scores are kept in powers of two.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenspeed.kernels.contract import MlaPlan, Problem

__all__ = ["cost_us", "mla_decode", "unsupported"]

LOG2_E = 1.4426950408889634
# The interpreter multiplies bfloat16 as if its bits were whole numbers.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KEYS_MIN = 256
"""A part of fewer keys costs more to merge than it saves."""

PARTS_MAX = 128


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
    return 54 if rows <= 16 else 10 + 70 * triton.cdiv(rows, 64)


@triton.jit
def _step(
    latent, rope, at, limit, q_latent, q_rope, best, total, mixed, scale,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Some keys more: the maximum, the sum of weights and the weighted sum with them."""
    weights_dtype: tl.constexpr = latent.dtype
    if WIDEN:
        latent, rope = latent.to(tl.float32), rope.to(tl.float32)
    scores = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
    scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision=PRECISION) * scale
    scores = tl.where(at[None, :] < limit[:, None], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1))
    # Where nothing is seen yet the difference would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(best - base)
    mixed = mixed * fade[:, None]
    rounded = weights.to(weights_dtype).to(latent.dtype)
    mixed = tl.dot(rounded, latent, mixed, input_precision=PRECISION)
    return higher, total * fade + tl.sum(weights, axis=1), mixed


@triton.jit
def _attend(
    q, pages, boxes, rope_boxes, table, query_start, kv_lens, out, lse, parts,
    columns, pages_count, heads, tiles, rows, q_token, q_head, page_stride, key_stride, scale,
    PAGE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // tiles
    part = tl.program_id(1)
    first = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - first
    length = tl.minimum(tl.load(kv_lens + row), columns * PAGE)
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
    each = tl.cdiv(tl.cdiv(length, KEYS), parts) * KEYS
    begin = part * each
    stop = tl.minimum(begin + each, length)
    # A tile that the row does not fill has no work.
    stop = tl.where((tl.program_id(0) % tiles) * ROWS < count * heads, stop, 0)
    if BOXES:
        # Keys behind the last one may be NaN: only what is full comes in boxes.
        whole = begin + tl.maximum(stop - begin, 0) // KEYS * KEYS
        for start in range(begin, whole, KEYS):
            page = tl.load(table + row * columns + start // PAGE)
            latent = boxes.load([page, start % PAGE, 0]).reshape([KEYS, LATENT])
            rope = rope_boxes.load([page, start % PAGE, LATENT]).reshape([KEYS, ROPE])
            at = start + tl.arange(0, KEYS)
            best, total, mixed = _step(
                latent, rope, at, limit, q_latent, q_rope, best, total, mixed, scale,
                PRECISION, WIDEN,
            )  # fmt: skip
        begin = whole
    # One step at most behind boxes, which leave no room for two.
    for start in tl.range(begin, stop, KEYS, num_stages=1 if BOXES else 2):
        at = start + tl.arange(0, KEYS)
        page = tl.load(table + row * columns + at // PAGE, mask=at < stop, other=-1)
        there = (page >= 0) & (page < pages_count)
        key = page.to(tl.int64) * page_stride + (at % PAGE) * key_stride
        latent = tl.load(pages + key[:, None] + lane[None, :], mask=there[:, None], other=0.0)
        rope = tl.load(pages + key[:, None] + rope_lane[None, :], mask=there[:, None], other=0.0)
        best, total, mixed = _step(
            latent, rope, at, limit, q_latent, q_rope, best, total, mixed, scale,
            PRECISION, WIDEN,
        )  # fmt: skip
    some = total > 0
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    sums = tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    sums *= tl.where(parts == 1, 0.6931471805599453, 1.0)
    to = part.to(tl.int64) * rows + first * heads + mine
    tl.store(out + to[:, None] * LATENT + lane[None, :], mixed, mask=inside[:, None])
    tl.store(lse + to, sums, mask=inside)


@triton.jit
def _merge(part_out, part_lse, out, lse, rows, parts,
           PARTS: tl.constexpr, WIDTH: tl.constexpr, LATENT: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, PARTS)
    there = part < parts
    sums = tl.load(part_lse + part * rows + row, mask=there, other=float("-inf"))
    best = tl.max(sums, axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp2(sums - base)
    total = tl.sum(weights, axis=0)
    from_part = part_out + (part[:, None] * rows + row) * LATENT + lane[None, :]
    values = tl.load(from_part, mask=there[:, None], other=0.0)
    mixed = tl.sum(values * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * LATENT + lane, mixed)
    if tl.program_id(1) == 0:
        tl.store(lse + row, (base + tl.log2(total)) * 0.6931471805599453)


@frozen
class _Shape:
    """How a plan is cut: rows of a tile, tiles of a row, keys of a step, parts, warps.

    boxes: keys may come as boxes, by the copy engine of capability 9.0 and later.
    """

    rows: int
    tiles: int
    keys: int
    parts: int
    warps: int
    boxes: bool


def _shape(plan: MlaPlan) -> _Shape:
    wanted = plan.q_len_max * plan.heads
    rows = min(64, max(16, triton.next_power_of_2(wanted)))
    tiles = triton.cdiv(wanted, rows)
    keys_max = plan.page_table.shape[1] * plan.page_size
    cores, shared, boxes = 1, 1 << 30, False
    if plan.kv_lens.is_cuda:
        properties = torch.cuda.get_device_properties(plan.kv_lens.device)
        # Two programs of full tiles follow each other: rows may differ in length.
        cores = 2 * properties.multi_processor_count
        # torch gives a block's default; what it may ask for is the multiprocessor's, less 1 KB.
        shared = properties.shared_memory_per_multiprocessor - 1024
        boxes = torch.version.hip is None and properties.major >= 9
    # Two steps of keys and the queries, in 16 bits.
    columns = 2 * (plan.latent + plan.rope)
    keys = next((k for k in (64, 32) if columns * (2 * k + rows) <= shared), 16)
    most = min(PARTS_MAX, max(1, keys_max // KEYS_MIN))
    parts = max(1, min(most, cores // max(1, len(plan.kv_lens) * tiles)))
    # Smaller tiles are quicker without.
    boxes = boxes and rows == 64 and keys == 64 and plan.page_size % keys == 0
    return _Shape(rows, tiles, keys, parts, 8 if rows > 32 else 4, boxes)


def _in_boxes(kv_pages: Tensor, shape: _Shape, columns: int) -> TensorDescriptor | None:
    """Pages as boxes of a step's keys and so many columns; None where they cannot be."""
    strides = kv_pages.stride()[:2]
    aligned = kv_pages.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    if not shape.boxes or not aligned or kv_pages.element_size() != 2:
        return None
    box = [1, shape.keys, columns]
    return TensorDescriptor(kv_pages, list(kv_pages.shape), list(kv_pages.stride()), box)


def mla_decode(q: Tensor, kv_pages: Tensor, plan: MlaPlan, scale: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    shape = plan.once(_shape)
    if q.stride(2) != 1:
        q = q.contiguous()
    if kv_pages.stride(2) != 1:
        kv_pages = kv_pages.contiguous()
    rows = q.shape[0] * plan.heads
    out = torch.empty(*q.shape[:2], plan.latent, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not rows:
        return out, lse
    part_out, part_lse = out, lse
    if shape.parts > 1:
        wide = (shape.parts, rows, plan.latent)
        part_out = torch.empty(wide, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(wide[:2], dtype=torch.float32, device=q.device)
    boxes = _in_boxes(kv_pages, shape, plan.latent)
    _attend[(len(plan.kv_lens) * shape.tiles, shape.parts)](
        q, kv_pages, boxes, _in_boxes(kv_pages, shape, plan.rope), plan.page_table,
        plan.query_start, plan.kv_lens, part_out, part_lse, shape.parts,
        plan.page_table.shape[1], kv_pages.shape[0], plan.heads, shape.tiles, rows,
        q.stride(0), q.stride(1), kv_pages.stride(0), kv_pages.stride(1), scale * LOG2_E,
        PAGE=plan.page_size, LATENT=plan.latent, ROPE=plan.rope, ROWS=shape.rows,
        KEYS=shape.keys, BOXES=boxes is not None, num_warps=shape.warps, num_stages=2,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        WIDEN=INTERPRETED,
    )  # fmt: skip
    if shape.parts > 1:
        padded = triton.next_power_of_2(shape.parts)
        width = min(8192 // padded, 128, plan.latent)
        _merge[(rows, plan.latent // width)](
            part_out, part_lse, out, lse, rows, shape.parts,
            PARTS=padded, WIDTH=width, LATENT=plan.latent,
        )  # fmt: skip
    return out, lse
