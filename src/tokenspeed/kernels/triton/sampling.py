"""What sampling looks at, and a token of each row; a program a row.

Rule: nothing is sorted. The least score that is kept is found by cutting the range of scores, as
whole numbers in the same order, into quarters, and counting what lies above; so what a row draws
depends on its own scores alone, and nothing waits for the CPU.
"""

from __future__ import annotations

from typing import Any

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
    return min(8192, int(triton.next_power_of_2(width)))


def _of_rows(kernel: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    out = torch.empty(rows, dtype=dtype, device=x.device)
    if rows:
        kernel[(rows,)](x, out, width, x.stride(0), BLOCK=_block(width), num_warps=16)
    return out


def argmax(x: Tensor) -> Tensor:
    """See contract.py."""
    return _of_rows(_argmax, x, torch.int64)


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
    return _of_rows(_finite, x, torch.bool)


@triton.jit
def _ordered(value, SHIFT: tl.constexpr):
    """Whole numbers in the order of float32 values; 0.0 and -0.0 are one. What was 16 bits wide
    differs in its upper half alone, and is shifted."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def _power(order, top, temperature, SHIFT: tl.constexpr):
    """exp((score - top) / temperature) of the score with this place in the order."""
    wide = (order << SHIFT) | tl.where(order < 0, (1 << SHIFT) - 1, 0)
    bits = tl.where(wide < 0, wide ^ 0x7FFFFFFF, wide).to(tl.int32)
    return tl.exp((bits.to(tl.float32, bitcast=True) - top) / temperature)


@triton.jit
def _top(source, width, BLOCK: tl.constexpr):
    """The largest score of a row."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, value)
    return tl.max(best, axis=0)


@triton.jit
def _above(
    source, width, a, b, c, top, temperature, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many scores of a row are above each of three, and their masses."""
    a_count = tl.zeros((BLOCK,), tl.int32)
    b_count = tl.zeros((BLOCK,), tl.int32)
    c_count = tl.zeros((BLOCK,), tl.int32)
    a_mass = tl.zeros((BLOCK,), tl.float32)
    b_mass = tl.zeros((BLOCK,), tl.float32)
    c_mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        order = tl.where(at < width, _ordered(value, SHIFT), -2147483648)
        power = tl.exp((value - top) / temperature)
        a_count += (order > a).to(tl.int32)
        b_count += (order > b).to(tl.int32)
        c_count += (order > c).to(tl.int32)
        a_mass += tl.where(order > a, power, 0.0)
        b_mass += tl.where(order > b, power, 0.0)
        c_mass += tl.where(order > c, power, 0.0)
    return (
        tl.sum(a_count, axis=0), tl.sum(b_count, axis=0), tl.sum(c_count, axis=0),
        tl.sum(a_mass, axis=0), tl.sum(b_mass, axis=0), tl.sum(c_mass, axis=0),
    )  # fmt: skip


@triton.jit
def _least(
    source, width, top, temperature, top_k, mass_max, min_p, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The place of the least score that passes: three places a time, a quarter apart."""
    low = _ordered(float("-inf") + 0.0 * top, SHIFT)
    high = _ordered(top, SHIFT)
    while low < high:
        apart = high.to(tl.int64) - low
        a = (low + apart // 4).to(tl.int32)
        b = (low + apart // 2).to(tl.int32)
        c = (low + 3 * apart // 4).to(tl.int32)
        a_count, b_count, c_count, a_mass, b_mass, c_mass = _above(
            source, width, a, b, c, top, temperature, SHIFT, BLOCK
        )
        in_a = (a_count < top_k) & (a_mass < mass_max)
        in_b = (b_count < top_k) & (b_mass < mass_max)
        in_c = (c_count < top_k) & (c_mass < mass_max)
        in_a = in_a & (_power(a, top, temperature, SHIFT) >= min_p)
        in_b = in_b & (_power(b, top, temperature, SHIFT) >= min_p)
        in_c = in_c & (_power(c, top, temperature, SHIFT) >= min_p)
        high = tl.where(in_a, a, tl.where(in_b, b, tl.where(in_c, c, high)))
        low = tl.where(in_a, low, tl.where(in_b, a + 1, tl.where(in_c, b + 1, c + 1)))
    return high


@triton.jit
def _kept(
    source, at, width, least, equals, limited, seen, top, temperature, SHIFT: tl.constexpr
):  # fmt: skip
    """Of some tokens what is kept of their mass, and how many equals of the least there are."""
    value = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
    order = tl.where(at < width, _ordered(value, SHIFT), -2147483648)
    same = ((order == least) & (at < width)).to(tl.int32)
    keep = order >= least
    count = 0
    if limited:
        keep = keep & ((same == 0) | (seen + tl.cumsum(same, axis=0) <= equals))
        count = tl.sum(same, axis=0)
    return tl.where(keep, tl.exp((value - top) / temperature), 0.0), count


@triton.jit
def _draw(
    scores, how, out, width, row_stride, rows, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    source = scores + row.to(tl.int64) * row_stride
    u = tl.load(how + row)
    temperature = tl.load(how + rows + row).to(tl.float32)
    top_k = tl.load(how + 2 * rows + row)
    top_p = tl.load(how + 3 * rows + row)
    min_p = tl.load(how + 4 * rows + row).to(tl.float32)
    top = _top(source, width, BLOCK)
    none = tl.full((), -2147483648, tl.int32)
    _, _, _, total, _, _ = _above(source, width, none, none, none, top, temperature, SHIFT, BLOCK)
    least = none
    equals = 0
    limited = 0
    mass = total.to(tl.float64)
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        k = tl.where(top_k > 0, top_k, 2147483647.0)
        mass_max = tl.where(top_p < 1, top_p, 2.0) * mass  # twice the whole is more than there is
        least = _least(source, width, top, temperature, k, mass_max, min_p, SHIFT, BLOCK)
        count, with_equals, _, above, _, _ = _above(
            source, width, least, least - 1, least - 1, top, temperature, SHIFT, BLOCK
        )
        power = _power(least, top, temperature, SHIFT).to(tl.float64)
        room = tl.ceil((mass_max - above) / tl.maximum(power, 1e-300))
        room = tl.minimum(tl.minimum(room, k - count), 2147483647.0)
        there = with_equals - count
        equals = tl.minimum(tl.maximum(room, 1).to(tl.int32), there)
        limited = (equals < there).to(tl.int32)
        mass = above.to(tl.float64) + equals * power
    # Block by block up to the one in which the sum exceeds what was asked for; by rounding the
    # whole may end just below it, and then it is the last one with any.
    target = u * mass
    done = tl.zeros((), tl.float64)
    before = tl.zeros((), tl.float64)
    seen = 0
    seen_before = 0
    from_token = 0
    start = 0
    while (start < width) & (done <= target):
        at = start + tl.arange(0, BLOCK)
        kept, count = _kept(
            source, at, width, least, equals, limited, seen, top, temperature, SHIFT
        )
        some = tl.sum(kept, axis=0)
        before = tl.where(some > 0, done, before)
        seen_before = tl.where(some > 0, seen, seen_before)
        from_token = tl.where(some > 0, start, from_token)
        done += some.to(tl.float64)
        seen += count
        start += BLOCK
    at = from_token + tl.arange(0, BLOCK)
    kept, _ = _kept(source, at, width, least, equals, limited, seen_before, top, temperature, SHIFT)
    sums = before + tl.cumsum(kept.to(tl.float64), axis=0)
    found = tl.min(tl.where((kept > 0) & (sums > target), at, 2147483647), axis=0)
    last = tl.max(tl.where(kept > 0, at, 0), axis=0)
    tl.store(out + row, tl.minimum(found, last).to(tl.int64))


def draw(scores: Tensor, draws: Draws) -> Tensor:
    """See contract.py."""
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    rows, width = scores.shape
    out = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if rows:
        _draw[(rows,)](
            scores, draws.table.contiguous(), out, width, scores.stride(0), rows,
            SHIFT=16 if scores.dtype == torch.bfloat16 else 0, BLOCK=_block(width), num_warps=16,
        )  # fmt: skip
    return out
