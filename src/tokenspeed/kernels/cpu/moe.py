"""Routing and experts on the CPU.

Rule: work goes by expert, never by token: tokens are sorted by their expert, and each expert that
has any multiplies them together. Results go back to their own places before they are added up, so
that a token's sum does not depend on who else is in the step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.cpu.dense import silu_mul

__all__ = ["moe_mlp"]


def moe_mlp(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See contract.py."""
    tokens, chosen = experts.shape
    if tokens == 1:
        return _one_token(x, experts, weights, gate_up, down)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    # Those of nobody here (-1) come first.
    counts = torch.bincount(flat + 1, minlength=gate_up.shape[0] + 1).tolist()
    sources = x.index_select(0, order // chosen)
    sorted_out = torch.zeros_like(sources)
    start = counts[0]
    for expert, count in enumerate(counts[1:]):
        if count:
            wide = functional.linear(sources[start : start + count], gate_up[expert])
            sorted_out[start : start + count] = functional.linear(silu_mul(wide), down[expert])
            start += count
    out = torch.empty_like(sources).index_copy_(0, order, sorted_out)
    return _summed(out.view(tokens, chosen, down.shape[1]), weights)


def _one_token(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """A decode step of one row: nothing to sort."""
    out = torch.zeros(1, experts.shape[1], x.shape[1], dtype=x.dtype)
    for place, expert in enumerate(experts[0].tolist()):
        if expert >= 0:
            wide = functional.linear(x, gate_up[expert])
            out[:, place] = functional.linear(silu_mul(wide), down[expert])
    return _summed(out, weights)


def _summed(out: Tensor, weights: Tensor) -> Tensor:
    """[tokens, chosen, D] times [tokens, chosen], summed over the chosen."""
    return torch.bmm(weights.float()[:, None], out.float()).squeeze(1).to(out.dtype)
