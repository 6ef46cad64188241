"""What sampling looks at, and a token of each row; a program a row.

Rule: nothing is sorted. The least score that is kept is found by halving the range of scores, as
whole numbers in the same order, and counting what lies above; so what a row draws depends on its
own scores alone, and nothing waits for the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.contract import Draws

__all__ = ["argmax", "draw", "finite"]


@triton.jit
def _argmax(x, out, width, row_stride, BLOCK: tl.constexpr):
    source = x + tl.program_id(0).to(tl.int64) * row_stride
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, width, BLOCK):
        at = start + lane
        value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        # A row of -inf alone has its first index too.
        better = (value > best) | ((where == 2147483647) & (at < width))
        best = tl.where(better, value, best)
        where = tl.where(better, at, where)
    top = tl.max(best, axis=0)
    first = tl.min(tl.where(best == top, where, 2147483647), axis=0)
    tl.store(out + tl.program_id(0), first.to(tl.int64))


def _block(width: int) -> int:
    return min(4096, int(triton.next_power_of_2(width)))


def argmax(x: Tensor) -> Tensor:
    """See contract.py."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if len(x):
        _argmax[(len(x),)](x, out, x.shape[1], x.stride(0), BLOCK=_block(x.shape[1]), num_warps=8)
    return out


@triton.jit
def _finite(x, out, width, row_stride, BLOCK: tl.constexpr):
    source = x + tl.program_id(0).to(tl.int64) * row_stride
    lane = tl.arange(0, BLOCK)
    odd = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        at = start + lane
        value = tl.load(source + at, mask=at < width, other=0.0).to(tl.float32)
        # Of a NaN and of both infinities the exponent is full.
        bits = value.to(tl.int32, bitcast=True)
        odd = tl.maximum(odd, ((bits & 0x7F800000) == 0x7F800000).to(tl.int32))
    tl.store(out + tl.program_id(0), tl.max(odd, axis=0) == 0)


def finite(x: Tensor) -> Tensor:
    """See contract.py."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(len(x), dtype=torch.bool, device=x.device)
    if len(x):
        _finite[(len(x),)](x, out, x.shape[1], x.stride(0), BLOCK=_block(x.shape[1]), num_warps=8)
    return out


@triton.jit
def _ordered(value):
    """Whole numbers in the order of float32 values; 0.0 and -0.0 are one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _above(source, width, least, top, temperature, BLOCK: tl.constexpr):
    """How many scores of a row are above one, and their mass."""
    count = 0
    mass = tl.zeros((), tl.float64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        over = (_ordered(value) > least) & (at < width)
        count += tl.sum(over.to(tl.int32), axis=0)
        power = tl.where(over, tl.exp((value - top) / temperature), 0.0)
        mass += tl.sum(power, axis=0).to(tl.float64)
    return count, mass


@triton.jit
def _least(source, width, top, temperature, total, top_k, top_p, BLOCK: tl.constexpr):
    """The least score that top-k and top-p keep, and how many equals of it they keep."""
    low = tl.full((), -2139095041, tl.int64)  # of -inf
    high = _ordered(top).to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        count, mass = _above(source, width, middle.to(tl.int32), top, temperature, BLOCK)
        holds = (count < top_k) & (mass < top_p * total)
        high = tl.where(holds, middle, high)
        low = tl.where(holds, low, middle + 1)
    least = high.to(tl.int32)
    count, mass = _above(source, width, least, top, temperature, BLOCK)
    bits = tl.where(least < 0, least ^ 0x7FFFFFFF, least)
    power = tl.exp((bits.to(tl.float32, bitcast=True) - top) / temperature).to(tl.float64)
    room = (top_p * total - mass) / tl.maximum(power, 1e-300)
    equals = tl.minimum(top_k.to(tl.int64) - count, tl.ceil(tl.minimum(room, 1e9)).to(tl.int64))
    return least, tl.maximum(equals, 1).to(tl.int32)


@triton.jit
def _mass(value, at, width, least, equals, seen, top, temperature, min_p):
    """Of some tokens what is kept of their mass, and how many equals of the least there were."""
    order = _ordered(value)
    same = ((order == least) & (at < width)).to(tl.int32)
    number = seen + tl.cumsum(same, axis=0)
    keep = ((order > least) | ((same == 1) & (number <= equals))) & (at < width)
    power = tl.exp((value - top) / temperature)
    return tl.where(keep & (power >= min_p), power, 0.0), seen + tl.sum(same, axis=0)


@triton.jit
def _draw(scores, how, out, width, row_stride, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    source = scores + row.to(tl.int64) * row_stride
    u = tl.load(how + row)
    temperature = tl.load(how + rows + row).to(tl.float32)
    top_k = tl.load(how + 2 * rows + row)
    top_p = tl.load(how + 3 * rows + row)
    min_p = tl.load(how + 4 * rows + row).to(tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, value)
    top = tl.max(best, axis=0)
    least = tl.full((), -2147483648, tl.int32)
    equals = 0
    _, total = _above(source, width, least, top, temperature, BLOCK)
    if (top_k > 0) | (top_p < 1):
        k = tl.where(top_k > 0, top_k, 2147483647.0)
        p = tl.where(top_p < 1, top_p, 2.0)  # more than there is
        least, equals = _least(source, width, top, temperature, total, k, p, BLOCK)
    total = tl.zeros((), tl.float64)
    seen = 0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        mass, seen = _mass(value, at, width, least, equals, seen, top, temperature, min_p)
        total += tl.sum(mass, axis=0).to(tl.float64)
    target = u * total
    done = tl.zeros((), tl.float64)
    found = 2147483647
    last = 0
    seen = 0
    start = 0
    while (start < width) & (found == 2147483647):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        mass, seen = _mass(value, at, width, least, equals, seen, top, temperature, min_p)
        sums = done + tl.cumsum(mass.to(tl.float64), axis=0)
        some = mass > 0
        found = tl.min(tl.where(some & (sums > target), at, 2147483647), axis=0)
        last = tl.maximum(last, tl.max(tl.where(some, at, 0), axis=0))
        done += tl.sum(mass, axis=0).to(tl.float64)
        start += BLOCK
    # By rounding the sum may end just below what was asked for.
    tl.store(out + row, tl.where(found == 2147483647, last, found).to(tl.int64))


def draw(scores: Tensor, draws: Draws) -> Tensor:
    """See contract.py."""
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    rows, width = scores.shape
    out = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if rows:
        how = draws.table.contiguous()
        _draw[(rows,)](
            scores, how, out, width, scores.stride(0), rows, BLOCK=_block(width),
            num_warps=16,
        )  # fmt: skip
    return out
