"""A token of each row. Rule: a row is sorted whole only if what its filters keep reaches far.

Rows without a filter are not looked through for the largest at all, and of the others the most
probable tokens mostly suffice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.contract import Draws
from tokenspeed.kernels.reference.sampling import draw as draw_sorted
from tokenspeed.kernels.reference.sampling import invert, kept, powers

__all__ = ["draw"]

HEAD = 1024
"""Tokens, most probable first, among which the filters look before a row is sorted."""


def draw(scores: Tensor, draws: Draws) -> Tensor:
    """See contract.py."""
    filtered = (draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0)
    if not bool(filtered.any()):
        return invert(powers(scores, draws), draws.u)
    if bool(filtered.all()):
        return _filtered(scores, draws)
    out = torch.empty(len(scores), dtype=torch.int64)
    for run, own in ((_filtered, filtered), (draw, ~filtered)):
        out[own] = run(scores[own], draws.of(own))
    return out


def _filtered(scores: Tensor, draws: Draws) -> Tensor:
    mass = powers(scores, draws)
    total = mass.sum(dim=-1, keepdim=True, dtype=torch.float64)
    size = min(HEAD, scores.shape[1])
    best = scores.float().topk(size, dim=-1)
    keep = kept(mass.gather(1, best.indices), total, draws)
    # In the order of ids, those that are not kept last.
    ids = torch.where(keep, best.indices, scores.shape[1]).sort(dim=-1).values
    there = ids < scores.shape[1]
    ids = torch.where(there, ids, 0)
    out = ids.gather(1, invert(mass.gather(1, ids) * there, draws.u)[:, None]).squeeze(1)
    whole = _reaches_far(best.values, keep, scores)
    if bool(whole.any()):
        out[whole] = draw_sorted(scores[whole], draws.of(whole))
    return out


def _reaches_far(best: Tensor, keep: Tensor, scores: Tensor) -> Tensor:
    """Rows of which more might be kept than the best that were looked at, or whose last kept one
    has an equal that is not: which of the two is kept depends on their order. bool[R]."""
    count = keep.sum(dim=-1, keepdim=True)
    last = best.gather(1, count - 1)
    beyond = best.shape[1] < scores.shape[1]
    behind = best.gather(1, count.clamp(max=best.shape[1] - 1))
    inside = count < best.shape[1]
    return torch.where(inside, behind == last, torch.tensor(beyond)).squeeze(1)
