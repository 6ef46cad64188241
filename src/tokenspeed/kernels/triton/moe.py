"""Routing, and experts: a product for each expert's rows, sorted, or for each choice of few tokens.

Rule: which rows an expert has is found on the device, so that the CPU waits for nothing. There are
as many programs as tiles there could be, and those beyond the last do nothing. Where tokens are
few, hardly two of them choose the same expert: then each choice is a product of its own, a matrix
is read as fast as memory allows, and nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from tokenspeed.kernels.contract import Routing
from tokenspeed.kernels.triton.dense import silu_mul
from tokenspeed.kernels.triton.mla import INTERPRETED, precision

__all__ = ["moe_mlp", "moe_route"]

CHOICES_MAX = 64
"""Choices of a step, up to which each is a product of its own."""


@triton.jit
def _route(
    logits, bias, experts, weights, count, per, groups, groups_chosen, chosen, scale,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISED: tl.constexpr,
    GROUPS: tl.constexpr, PER: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    place = tl.arange(0, PER)
    at = group[:, None] * per + place[None, :]
    inside = (group < groups)[:, None] & (place < per)[None, :]
    own = tl.load(logits + token * count + at, mask=inside, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(own)
    else:
        powers = tl.exp(own - tl.max(tl.max(own, axis=1), axis=0))
        scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    choice = scores
    if BIAS:
        choice += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(inside, choice, float("-inf"))
    if groups > 1:
        worth = tl.max(choice, axis=1)
        if BIAS and per > 1:
            first = tl.argmax(choice, axis=1)
            rest = tl.where(place[None, :] == first[:, None], float("-inf"), choice)
            worth += tl.max(rest, axis=1)
        is_open = group < 0
        for _ in range(groups_chosen):
            best = tl.argmax(worth, axis=0)
            is_open = is_open | (group == best)
            worth = tl.where(group == best, float("-inf"), worth)
        choice = tl.where(is_open[:, None], choice, float("-inf"))
    rank = tl.arange(0, CHOSEN)
    found = tl.zeros((CHOSEN,), tl.int32)
    shares = tl.zeros((CHOSEN,), tl.float32)
    for i in range(chosen):
        in_group = tl.argmax(tl.max(choice, axis=1), axis=0)
        row = tl.max(tl.where(group[:, None] == in_group, choice, float("-inf")), axis=0)
        # Whatever the logits are, even NaN, what is handed on is an expert.
        best = tl.minimum(in_group * per + tl.argmax(row, axis=0), count - 1)
        share = tl.sum(tl.sum(tl.where(at == best, tl.where(inside, scores, 0.0), 0.0), 1), 0)
        found = tl.where(rank == i, best, found)
        shares = tl.where(rank == i, share, shares)
        choice = tl.where(at == best, float("-inf"), choice)
    if NORMALISED:
        # No more than keeps 0 / 0 from being NaN, as in DeepSeek's own code.
        shares = shares / (tl.sum(shares, axis=0) + 1e-20)
    to = token * chosen + rank
    tl.store(experts + to, found.to(tl.int64), mask=rank < chosen)
    tl.store(weights + to, shares * scale, mask=rank < chosen)


def moe_route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    logits = logits.contiguous()
    tokens, count = logits.shape
    shape = (tokens, routing.chosen)
    experts = torch.empty(shape, dtype=torch.int64, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    per = count // routing.groups
    if tokens:
        _route[(tokens,)](
            logits, logits if bias is None else bias.contiguous(), experts, weights, count, per,
            routing.groups, routing.groups_chosen, routing.chosen, routing.scale,
            SIGMOID=routing.scoring == "sigmoid", BIAS=bias is not None,
            NORMALISED=routing.normalised, GROUPS=triton.next_power_of_2(routing.groups),
            PER=triton.next_power_of_2(per), CHOSEN=triton.next_power_of_2(routing.chosen),
            num_warps=1 if count <= 128 else 2,
        )  # fmt: skip
    return experts, weights


@triton.jit
def _gated(
    x, gate_up, out, experts, held, chosen, width, ffn, x_token,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One choice: silu(gate x) * (up x), some of its columns."""
    choice = tl.program_id(0)
    expert = tl.load(experts + choice)
    expert = tl.where(expert < held, expert, -1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_column = column < ffn
    source = x + (choice // chosen).to(tl.int64) * x_token
    gates = gate_up + (tl.maximum(expert, 0) * 2 * ffn + column)[:, None] * width
    gate = tl.zeros((COLUMNS, WIDTH), tl.float32)
    up = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for start in range(0, tl.where(expert < 0, 0, width), WIDTH):
        at = start + tl.arange(0, WIDTH)
        there = in_column[:, None] & (at < width)[None, :]
        values = tl.load(source + at, mask=at < width, other=0.0).to(tl.float32)[None, :]
        one = tl.load(gates + at[None, :], mask=there, other=0.0)
        other = tl.load(gates + ffn * width + at[None, :], mask=there, other=0.0)
        gate += one.to(tl.float32) * values
        up += other.to(tl.float32) * values
    sums = tl.sum(gate, axis=1)
    made = sums * tl.sigmoid(sums) * tl.sum(up, axis=1)
    tl.store(out + choice.to(tl.int64) * ffn + column, made, mask=in_column)


@triton.jit
def _mixed(
    h, down, out, experts, weights, held, chosen, width, ffn,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token: the weighted sum of what its experts make, some of its columns."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_column = column < width
    total = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for place in range(chosen):
        choice = token * chosen + place
        expert = tl.load(experts + choice)
        expert = tl.where(expert < held, expert, -1)
        weight = tl.load(weights + choice).to(tl.float32)
        source = h + choice.to(tl.int64) * ffn
        matrix = down + (tl.maximum(expert, 0) * width + column)[:, None] * ffn
        for start in range(0, tl.where(expert < 0, 0, ffn), WIDTH):
            at = start + tl.arange(0, WIDTH)
            there = in_column[:, None] & (at < ffn)[None, :]
            values = tl.load(source + at, mask=at < ffn, other=0.0).to(tl.float32)
            one = tl.load(matrix + at[None, :], mask=there, other=0.0).to(tl.float32)
            total += one * (weight * values)[None, :]
    place = out + token.to(tl.int64) * width + column
    tl.store(place, tl.sum(total, axis=1), mask=in_column)


def _by_choice(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Each choice multiplies by itself."""
    tokens, chosen = experts.shape
    width, ffn = down.shape[1:]
    experts = experts.contiguous()
    h = torch.empty(tokens * chosen, ffn, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    columns = 8
    _gated[(tokens * chosen, triton.cdiv(ffn, columns))](
        x, gate_up, h, experts, len(gate_up), chosen, width, ffn, x.stride(0),
        COLUMNS=columns, WIDTH=min(256, max(16, triton.next_power_of_2(width))),
    )  # fmt: skip
    _mixed[(tokens, triton.cdiv(width, columns))](
        h, down, out, experts, weights.contiguous(), len(gate_up), chosen, width, ffn,
        COLUMNS=columns, WIDTH=min(256, max(16, triton.next_power_of_2(ffn))),
    )  # fmt: skip
    return out


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
    wide = 128 if rows == 128 and x.element_size() == 2 else 64 if columns > 32 else 16
    _grouped[(len(tiles.end), triton.cdiv(columns, wide))](
        x, weight, out, sources, tiles.expert, tiles.first, tiles.end, width, columns,
        ROWS=rows, COLUMNS=wide, WIDTH=64 if width > 32 else 16,
        PRECISION=precision(x), WIDEN=INTERPRETED, num_warps=8 if rows == 128 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _summed(made, out, places, experts, weights, chosen, width, COLUMNS: tl.constexpr):
    """One token: what its experts made, from where it lies, weighted and added up."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for place in range(chosen):
        choice = token * chosen + place
        expert = tl.load(experts + choice)
        held = tl.where(column < width, expert, -1) >= 0
        source = made + tl.load(places + choice) * width + column
        value = tl.load(source, mask=held, other=0.0).to(tl.float32)
        total += tl.load(weights + choice).to(tl.float32) * value
    place = out + token.to(tl.int64) * width + column
    tl.store(place, total, mask=column < width)


def _sorted(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The rows of an expert multiply together."""
    tokens, chosen = experts.shape
    held, width = gate_up.shape[0], down.shape[1]
    experts = experts.contiguous()
    ordered, order = experts.flatten().sort(stable=True)
    mean = tokens * chosen // held
    rows = 16 if mean <= 32 else 64 if mean <= 256 else 128
    tiles = _tiles(ordered, held, rows)
    wide = _product(x, gate_up, order // chosen, tiles, rows)
    itself = torch.arange(len(order), device=x.device)
    made = _product(silu_mul(wide), down, itself, tiles, rows)
    places = torch.empty_like(order).index_copy_(0, order, itself)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = min(1024, triton.next_power_of_2(width))
    _summed[(tokens, triton.cdiv(width, columns))](
        made, out, places, experts, weights.contiguous(), chosen, width, COLUMNS=columns
    )
    return out


def moe_mlp(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See contract.py."""
    if not experts.numel():
        return torch.zeros_like(x)
    few = experts.numel() <= CHOICES_MAX
    run = _by_choice if few else _sorted
    return run(x.contiguous(), experts, weights, gate_up.contiguous(), down.contiguous())
