"""Latent attention: a query row at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.contract import MlaPlan

__all__ = ["mla_decode"]


def mla_decode(q: Tensor, kv_pages: Tensor, plan: MlaPlan, scale: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    out = torch.zeros(*q.shape[:2], plan.latent, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    starts = plan.query_start.tolist()
    for row, length in enumerate(plan.kv_lens.tolist()):
        queries = slice(starts[row], starts[row + 1])
        count = queries.stop - queries.start
        if not count or not length:
            continue
        table = plan.page_table[row, : -(-length // plan.page_size)]
        keys = kv_pages[table].flatten(0, 1)[:length].double()
        scores = torch.einsum("qhd,kd->qhk", q[queries].double(), keys) * scale
        own = torch.arange(length - count, length, device=q.device)[:, None, None]
        unseen = torch.arange(length, device=q.device)[None, None, :] > own
        scores = scores.masked_fill(unseen, float("-inf"))
        sums = scores.logsumexp(dim=-1)
        # A query that sees nothing has only -inf, whose softmax would be NaN.
        weights = (scores - sums.nan_to_num(neginf=0.0)[..., None]).exp()
        mixed = torch.einsum("qhk,kc->qhc", weights, keys[:, : plan.latent])
        out[queries], lse[queries] = mixed.to(q.dtype), sums.float()
    return out, lse


def mla_prefill(q: Tensor, kv_pages: Tensor, up: Tensor, plan: MlaPlan, scale: float) -> Tensor:
    """See contract.py."""
    nope = q.shape[-1] - plan.rope
    out = torch.zeros(*q.shape[:2], up.shape[1] - nope, dtype=q.dtype, device=q.device)
    starts = plan.query_start.tolist()
    for row, length in enumerate(plan.kv_lens.tolist()):
        queries = slice(starts[row], starts[row + 1])
        count = queries.stop - queries.start
        if not count or not length:
            continue
        table = plan.page_table[row, : -(-length // plan.page_size)]
        cached = kv_pages[table].flatten(0, 1)[:length].double()
        latent, turned = cached[:, : plan.latent], cached[:, plan.latent :]
        wide = torch.einsum("kc,hwc->khw", latent, up.double())
        keys, values = wide[..., :nope], wide[..., nope:]
        own_q = q[queries].double()
        scores = torch.einsum("qhn,khn->qhk", own_q[..., :nope], keys)
        scores = (scores + torch.einsum("qhe,ke->qhk", own_q[..., nope:], turned)) * scale
        own = torch.arange(length - count, length, device=q.device)[:, None, None]
        unseen = torch.arange(length, device=q.device)[None, None, :] > own
        weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1).nan_to_num()
        out[queries] = torch.einsum("qhk,khv->qhv", weights, values).to(q.dtype)
    return out
