"""Experts: rows sorted by expert, and a product for each group of them.

Rule: a program makes one tile of one expert's rows; which rows those are is found on the device, so
that the CPU waits for nothing. There are as many programs as tiles there could be, and those beyond
the last do nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from tokenspeed.kernels.triton.dense import silu_mul
from tokenspeed.kernels.triton.mla import INTERPRETED

__all__ = ["moe_mlp"]


@frozen(eq=False)
class _Tiles:
    """Tiles of sorted rows. expert, first, end int32[tiles]: whose, from which row, and up to which
    the expert has any; a tile without work has the end 0."""

    expert: Tensor
    first: Tensor
    end: Tensor


def _tiles(experts: Tensor, count: int, rows: int) -> _Tiles:
    """The tiles of at most `rows` rows for experts int64[S] in order, -1 first."""
    each = torch.arange(count, device=experts.device)
    starts = torch.searchsorted(experts, each)
    ends = torch.searchsorted(experts, each, right=True)
    wanted = (ends - starts + rows - 1) // rows
    before = wanted.cumsum(0)
    most = min(len(experts), len(experts) // rows + count)
    tile = torch.arange(most, device=experts.device)
    whose = torch.searchsorted(before, tile, right=True)
    own = whose.clamp(max=count - 1)
    first = starts[own] + (tile - before[own] + wanted[own]) * rows
    end = torch.where(whose < count, ends[own], 0)
    return _Tiles(own.to(torch.int32), first.to(torch.int32), end.to(torch.int32))


@triton.jit
def _grouped(
    x, weight, out, sources, expert, first, end, width, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    last = tl.load(end + tile)
    row = tl.load(first + tile) + tl.arange(0, ROWS)
    in_row = row < last
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_column = column < columns
    source = tl.load(sources + row, mask=in_row, other=0)
    mine = tl.load(expert + tile).to(tl.int64) * columns + column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.where(last > 0, width, 0), WIDTH):
        at = start + tl.arange(0, WIDTH)
        in_width = at < width
        a_in = in_row[:, None] & in_width[None, :]
        a = tl.load(x + source[:, None] * width + at[None, :], mask=a_in, other=0.0)
        b_in = in_width[:, None] & in_column[None, :]
        b = tl.load(weight + mine[None, :] * width + at[:, None], mask=b_in, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + place, total, mask=in_row[:, None] & in_column[None, :])


def _product(x: Tensor, weight: Tensor, sources: Tensor, tiles: _Tiles, rows: int) -> Tensor:
    """x[sources[i]] @ weight[expert of row i].T for each sorted row; 0 for rows of nobody here."""
    columns, width = weight.shape[1:]
    out = torch.zeros(len(sources), columns, dtype=x.dtype, device=x.device)
    wide = 64 if columns > 32 else 16
    _grouped[(len(tiles.end), triton.cdiv(columns, wide))](
        x,
        weight,
        out,
        sources,
        tiles.expert,
        tiles.first,
        tiles.end,
        width,
        columns,
        ROWS=rows,
        COLUMNS=wide,
        WIDTH=64 if width > 32 else 16,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        WIDEN=INTERPRETED,
    )
    return out


def moe_mlp(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See contract.py."""
    tokens, chosen = experts.shape
    ordered, order = experts.flatten().sort(stable=True)
    rows = 16 if tokens * chosen <= 32 * gate_up.shape[0] else 64
    tiles = _tiles(ordered, gate_up.shape[0], rows)
    wide = _product(x.contiguous(), gate_up.contiguous(), order // chosen, tiles, rows)
    itself = torch.arange(len(order), device=x.device)
    made = _product(silu_mul(wide), down.contiguous(), itself, tiles, rows)
    out = torch.empty_like(made).index_copy_(0, order, made).view(tokens, chosen, -1)
    return torch.bmm(weights.float()[:, None], out.float()).squeeze(1).to(x.dtype)
