"""Latent attention on the CPU.

Rule: decode rows of as many queries are attended together, over one padded gather of their pages;
prefill goes row by row, and by as many heads at once as keep the expanded keys in bounds. It is
torch's own attention, which runs on any device.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.contract import MlaPlan
from tokenspeed.kernels.pages import gathered

__all__ = ["mla_decode", "mla_prefill"]

EXPANDED_MAX = 1 << 26
"""Elements of expanded keys and values that a row may take at once."""


@frozen(eq=False)
class _Rows:
    """Rows with n queries each. tokens: int64[B, n]; where: int64[B, L] locations of their keys;
    unseen: bool[B, n, 1, L]; blind: whether some query sees nothing."""

    tokens: Tensor
    where: Tensor
    unseen: Tensor
    blind: bool


def _rows(plan: MlaPlan) -> list[_Rows]:
    """The rows of a step, by how many queries they have."""
    starts, lens = plan.query_start.to(torch.int64), plan.kv_lens.to(torch.int64)
    counts = starts.diff()
    found = []
    for count in sorted(set(counts[lens > 0].tolist())):
        rows = ((counts == count) & (lens > 0)).nonzero().flatten()
        if not count:
            continue
        at = torch.arange(int(lens[rows].max()))
        pages = plan.page_table[rows][:, at // plan.page_size].to(torch.int64)
        where = pages * plan.page_size + at % plan.page_size
        # A short row is filled up with its first key, under a mask: what is elsewhere may be NaN.
        where = torch.where(at < lens[rows, None], where, where[:, :1])
        each = torch.arange(count)
        last = (lens[rows, None] - count + each)[..., None, None]
        found.append(_Rows(starts[rows, None] + each, where, at > last, bool((last < 0).any())))
    return found


def mla_decode(q: Tensor, kv_pages: Tensor, plan: MlaPlan, scale: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    out = torch.zeros(*q.shape[:2], plan.latent, dtype=q.dtype)
    lse = torch.full(q.shape[:2], float("-inf"))
    for rows in plan.once(_rows):
        batch, count = rows.tokens.shape
        width = q.shape[2]
        keys = gathered(kv_pages, rows.where.flatten(), torch.float32)
        keys = keys.view(batch, -1, width)
        folded = q[rows.tokens.flatten()].view(batch, -1, width).float()
        scores = torch.bmm(folded, keys.transpose(1, 2)).mul_(scale)
        scores = scores.view(batch, count, plan.heads, -1).masked_fill_(rows.unseen, float("-inf"))
        sums = scores.logsumexp(dim=-1)
        if rows.blind:
            weights = (scores - sums.nan_to_num(neginf=0.0)[..., None]).exp_()
        else:
            weights = scores.sub_(sums[..., None]).exp_()
        weights = weights.view(batch, -1, keys.shape[1])
        mixed = torch.bmm(weights, keys[..., : plan.latent]).to(q.dtype)
        out[rows.tokens.flatten()] = mixed.view(-1, plan.heads, plan.latent)
        lse[rows.tokens.flatten()] = sums.view(-1, plan.heads)
    return out, lse


@frozen(eq=False)
class _Prefill:
    """A row. queries: its slice; where: int64[L] locations; unseen: bool[n, L]; blind: its first
    queries, which see nothing."""

    queries: slice
    where: Tensor
    unseen: Tensor
    blind: int


def _prefills(plan: MlaPlan) -> list[_Prefill]:
    starts, found, device = plan.query_start.tolist(), [], plan.page_table.device
    for row, length in enumerate(plan.kv_lens.tolist()):
        count = starts[row + 1] - starts[row]
        if not count or not length:
            continue
        at = torch.arange(length, device=device)
        pages = plan.page_table[row, at // plan.page_size].to(torch.int64)
        where = pages * plan.page_size + at % plan.page_size
        unseen = at > torch.arange(length - count, length, device=device)[:, None]
        queries = slice(starts[row], starts[row + 1])
        found.append(_Prefill(queries, where, unseen, max(0, count - length)))
    return found


def mla_prefill(q: Tensor, kv_pages: Tensor, up: Tensor, plan: MlaPlan, scale: float) -> Tensor:
    """See contract.py."""
    heads, nope = plan.heads, q.shape[-1] - plan.rope
    out = torch.zeros(*q.shape[:2], up.shape[1] - nope, dtype=q.dtype, device=q.device)
    for row in plan.once(_prefills):
        keys = gathered(kv_pages, row.where, q.dtype)
        turned = keys[None, :, plan.latent :]
        bias = torch.zeros(row.unseen.shape, dtype=q.dtype, device=q.device)
        bias.masked_fill_(row.unseen, float("-inf"))
        bias[: row.blind] = 0  # anything but NaN; what comes out is set to 0 below
        step = max(1, EXPANDED_MAX // (up.shape[1] * len(keys)))
        for first in range(0, heads, step):
            some = slice(first, min(first + step, heads))
            wide = torch.matmul(keys[:, : plan.latent], up[some].transpose(1, 2))
            k = torch.cat((wide[..., :nope], turned.expand(len(wide), -1, -1)), dim=-1)
            mixed = functional.scaled_dot_product_attention(
                q[row.queries, some].transpose(0, 1), k, wide[..., nope:], bias, scale=scale
            )
            out[row.queries, some] = mixed.transpose(0, 1)
        out[row.queries][: row.blind] = 0
    return out
