"""What attention kernels share: tiles of query tokens, and how scores become a weighted mean.

Rule: which tokens a tile has is found on the device, so that the CPU waits for nothing and a CUDA
graph finds anew what its tensors hold. There are as many tiles as there could be; those beyond the
last do nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

__all__ = ["Tiles", "cores", "fold", "merge", "shared_bytes", "tiled"]

NOWHERE = 1 << 30
"""The first query of a tile that has none."""


@frozen(eq=False)
class Tiles:
    """rows int32[tiles]: whose; firsts int32[tiles]: its first query, counted in the row."""

    rows: Tensor
    firsts: Tensor


def tiled(query_start: Tensor, tokens: int, each: int) -> Tiles:
    """Tiles of at most `each` query tokens of one row.

    Args:
        query_start: int32[R + 1]; row i has the queries [query_start[i], query_start[i + 1]).
        tokens: at least query_start[R].
        each: at least 1.
    """
    rows = len(query_start) - 1
    wanted = (query_start.diff() + (each - 1)) // each
    before = wanted.cumsum(0)
    tile = torch.arange(min(tokens, tokens // each + rows), device=query_start.device)
    found = torch.searchsorted(before, tile, right=True)
    row = found.clamp(max=rows - 1)
    first = (tile - before[row] + wanted[row]) * each
    first = torch.where(found < rows, first, NOWHERE)
    return Tiles(row.to(torch.int32), first.to(torch.int32))


def cores(like: Tensor) -> int:
    """Multiprocessors of the device that a tensor is on; 1 of a CPU."""
    if not like.is_cuda:
        return 1
    return int(torch.cuda.get_device_properties(like.device).multi_processor_count)


def shared_bytes(like: Tensor) -> int:
    """Shared memory that a program may ask for on the device that a tensor is on."""
    if not like.is_cuda:
        return 1 << 30
    properties = torch.cuda.get_device_properties(like.device)
    # torch gives a block's default; what it may ask for is the multiprocessor's, less 1 KB.
    return int(properties.shared_memory_per_multiprocessor) - 1024


@triton.jit
def fold(
    scores, values, best, total, mixed, scale, PRECISION: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """Some keys more: the maximum, the sum of weights and the weighted sum of values with them.

    What is folded are scores times `scale`, which is above 0: one multiplication and the
    difference to the maximum are one instruction then.
    """
    higher = tl.maximum(best, tl.max(scores, axis=1) * scale)
    # Where nothing is seen yet the difference would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - base[:, None])
    fade = tl.exp2(best - base)
    rounded = weights.to(values.dtype)
    if WIDEN:
        rounded, values = rounded.to(tl.float32), values.to(tl.float32)
    mixed = tl.dot(rounded, values, mixed * fade[:, None], input_precision=PRECISION)
    return higher, total * fade + tl.sum(weights, axis=1), mixed


@triton.jit
def _merge(
    part_out, part_lse, out, lse, rows, parts, width,
    PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lane < width
    part = tl.arange(0, PARTS)
    there = part < parts
    sums = tl.load(part_lse + part * rows + row, mask=there, other=float("-inf"))
    best = tl.max(sums, axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp2(sums - base)
    total = tl.sum(weights, axis=0)
    # What a part without keys has left is not read.
    some = (there & (sums > float("-inf")))[:, None] & inside[None, :]
    from_part = part_out + (part[:, None] * rows + row) * width + lane[None, :]
    values = tl.load(from_part, mask=some, other=0.0)
    mixed = tl.sum(values * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * width + lane, mixed, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(lse + row, (base + tl.log2(total)) * 0.6931471805599453)


def merge(part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Put what parts of the keys gave together, by the sums of their weights (Dao et al., 2023).

    Args:
        part_out: float32[parts, rows, width]; the weighted mean of each part.
        part_lse: float32[parts, rows]; the logarithm to the base of 2 of its sum, -inf for none.
        out: [rows, width], contiguous; written.
        lse: float32[rows]; written: the natural logarithm of the whole sum.
    """
    parts, rows, width = part_out.shape
    padded = triton.next_power_of_2(parts)
    # Many rows fill the device whatever a program takes of them.
    lanes = min(8192 // padded, 128 if rows < 512 else 512, triton.next_power_of_2(width))
    _merge[(rows, triton.cdiv(width, lanes))](
        part_out, part_lse, out, lse, rows, parts, width, PARTS=padded, LANES=lanes
    )
