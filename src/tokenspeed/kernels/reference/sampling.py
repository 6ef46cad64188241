"""A token of each row, by sorting all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.contract import Draws

__all__ = ["draw", "invert", "kept", "powers"]


def powers(scores: Tensor, draws: Draws) -> Tensor:
    """exp((score - largest) / temperature), float32[R, V]."""
    wide = scores.float()
    wide = wide - wide.amax(dim=-1, keepdim=True)
    return (wide / draws.temperature.to(torch.float32)[:, None]).exp_()


def kept(ordered: Tensor, total: Tensor, draws: Draws) -> Tensor:
    """Which of a row's tokens, best first, pass every filter.

    Args:
        ordered: of `powers`, the largest first; [R, n].
        total: of all of a row's, float64[R, 1].
        draws: of the rows.
    """
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    unfiltered = float("inf")
    top_k = torch.where(draws.top_k > 0, draws.top_k, unfiltered)
    top_p = torch.where(draws.top_p < 1, draws.top_p, unfiltered)
    keep = (rank < top_k[:, None]) & (before < top_p[:, None] * total)
    return keep & (ordered >= draws.min_p.to(ordered.dtype)[:, None])


def invert(mass: Tensor, u: Tensor) -> Tensor:
    """The first index of each row at which the sum up to it exceeds u of the whole; int64[R]."""
    sums = mass.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True).squeeze(1)


def draw(scores: Tensor, draws: Draws) -> Tensor:
    """See contract.py."""
    mass = powers(scores, draws)
    ids = scores.float().argsort(dim=-1, descending=True, stable=True)
    total = mass.sum(dim=-1, keepdim=True, dtype=torch.float64)
    keep = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    keep.scatter_(1, ids, kept(mass.gather(1, ids), total, draws))
    return invert(mass * keep, draws.u)
