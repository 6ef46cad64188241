"""Weights of few bits: how they are rounded, and how they lie in memory.

Rule: 32 columns of a row are a group: d * u + m, u unsigned, d and m float16. This is the one place
that knows the bytes, beside the kernels that read them:

    weight  = blocks of 16 rows; a block = its groups, one after the other
    group   = numbers, then d[16], then m[16]; 16 rows at a time, so that a load feeds 16 sums
    numbers = 8 bits: [8][16 rows][4 columns]
              4 bits: [4][16 rows][4 columns], columns 8 j .. 8 j + 3 low, 8 j + 4 .. 8 j + 7 high

Missing rows of the last block are zeros.
"""

from __future__ import annotations

from typing import final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.errors import KernelError

__all__ = ["GROUP", "PackedWeight", "pack", "unpack"]

GROUP = 32
_LANES = 16
_TAIL = 4 * _LANES
_SERIAL = 32768
"""Numbers that torch does not share among threads: which costs more than such small operations."""


@final
@frozen(eq=False)
class PackedWeight:
    """A weight[rows, columns] of 4 or 8 bits. `data`: uint8, as above."""

    data: Tensor
    rows: int
    columns: int
    bits: int

    @property
    def size_bytes(self) -> int:
        """Of `data`, if it is what the others say."""
        groups = -(-self.rows // _LANES) * (self.columns // GROUP)
        return groups * (_LANES * GROUP * self.bits // 8 + _TAIL)


def pack(weight: Tensor, bits: int) -> PackedWeight:
    """Round a weight[rows, columns] to `bits`, 4 or 8.

    A group of 2^bits equally spaced values at most, both ends among them, as in a GGUF of type
    Q4_1, comes back as it was, up to what float16 makes of its d and m.

    Raises:
        KernelError: the columns are no whole groups.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise KernelError(
            f"a weight of {columns} columns cannot be packed: expected a multiple of {GROUP}"
        )
    at_once = max(1, _SERIAL // (columns * _LANES)) * _LANES
    parts = [_packed(weight[at : at + at_once], bits) for at in range(0, rows, at_once)]
    return PackedWeight(torch.cat(parts), rows, columns, bits)


def _packed(weight: Tensor, bits: int) -> Tensor:
    """The bytes of some blocks of rows."""
    blocks, groups = -(-weight.shape[0] // _LANES), weight.shape[1] // GROUP
    whole = torch.zeros((blocks * _LANES, groups, GROUP), dtype=torch.float32)
    whole[: weight.shape[0]].copy_(weight.view(-1, groups, GROUP))
    low, high = whole.amin(dim=-1), whole.amax(dim=-1)
    d, m = ((high - low) / (2**bits - 1)).half(), low.half()
    per_step = 1 / d.float().clamp(min=2**-24)
    whole.sub_(m.float()[:, :, None]).mul_(per_step[:, :, None])
    # Conversion cuts off: with a half more, that is rounding.
    whole.add_(0.5).clamp_(0, 2**bits - 0.5)
    # Four numbers of a row are one to move about.
    fours = whole.to(torch.uint8).view(torch.int32).view(blocks, _LANES, groups, GROUP // 4)
    fours = fours.permute(0, 2, 3, 1)
    if bits == 4:
        fours = fours[:, :, 0::2] | fours[:, :, 1::2] << 4
    tail = torch.stack((d, m)).view(2, blocks, _LANES, groups).permute(1, 3, 0, 2).contiguous()
    numbers = fours.contiguous().flatten(2).view(torch.uint8)
    return torch.cat((numbers, tail.flatten(2).view(torch.uint8)), dim=2).flatten()


def unpack(weight: PackedWeight) -> Tensor:
    """What the numbers stand for: float32[rows, columns]."""
    numbers = _LANES * GROUP * weight.bits // 8
    groups = weight.data.view(-1, weight.columns // GROUP, numbers + _TAIL)
    fours = groups[:, :, :numbers].reshape(*groups.shape[:2], -1, _LANES, 4)
    if weight.bits == 4:
        fours = torch.stack((fours & 15, fours >> 4), dim=3).flatten(2, 3)
    u = fours.transpose(2, 3).flatten(3).float()
    tail = groups[:, :, numbers:].contiguous().view(torch.float16).float()
    d, m = tail[:, :, :_LANES, None], tail[:, :, _LANES:, None]
    whole: Tensor = (u * d + m).transpose(1, 2).reshape(-1, weight.columns)
    return whole[: weight.rows]
