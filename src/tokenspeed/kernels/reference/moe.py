"""Routing and experts: one formula, one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.contract import Routing
from tokenspeed.kernels.reference.dense import linear, silu_mul

__all__ = ["moe_mlp", "moe_route"]


def moe_route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = choice.view(len(choice), routing.groups, -1)
        best = grouped.topk(1 if bias is None else min(2, grouped.shape[-1]), dim=-1).values
        kept = best.sum(dim=-1).topk(routing.groups_chosen, dim=-1).indices
        closed = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=logits.device)
        closed.scatter_(-1, kept, False)
        choice = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    experts = choice.topk(routing.chosen, dim=-1).indices
    weights = scores.gather(-1, experts)
    if routing.normalised:
        # No more than keeps 0 / 0 from being NaN, as in DeepSeek's own code.
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * routing.scale


def moe_mlp(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See contract.py."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.shape[0]):
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        wide = linear(x[tokens], gate_up[expert], None)
        out = linear(silu_mul(wide), down[expert], None)
        total[tokens] += out.float() * weights[tokens, place, None].float()
    return total.to(x.dtype)
