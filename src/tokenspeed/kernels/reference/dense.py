"""Embedding, products, norms and gates: one formula each."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.packing import PackedWeight, unpack

__all__ = [
    "add_rms_norm",
    "argmax",
    "embedding",
    "finite",
    "linear",
    "linear_packed",
    "rms_norm",
    "silu_mul",
]


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """See contract.py."""
    return weight[ids]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See contract.py."""
    product = x.float() @ weight.float().T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """See contract.py."""
    return linear(x, unpack(weight), bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See contract.py."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(x: Tensor) -> Tensor:
    """See contract.py."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def argmax(x: Tensor) -> Tensor:
    """See contract.py."""
    # On a CPU, argmax of bfloat16 is slower than conversion and argmax together.
    return x.float().argmax(dim=-1)


def finite(x: Tensor) -> Tensor:
    """See contract.py."""
    return x.isfinite().all(dim=-1)
