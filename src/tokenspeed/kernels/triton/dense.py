"""Norms and gates, a program a row; embedding and products are the vendor's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

__all__ = ["add_rms_norm", "embedding", "linear", "rms_norm", "silu_mul"]


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """See contract.py."""
    return functional.embedding(ids, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See contract.py."""
    return functional.linear(x, weight, bias)


@triton.jit
def _rms_norm(x, residual, weight, out, total, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    row = tl.program_id(0).to(tl.int64) * width
    values = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
        # The sum that is handed on is rounded; what is normed is that one.
        values = values.to(total.dtype.element_ty)
        tl.store(total + row + at, values, mask=inside)
        values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, values * scale * gain, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See contract.py."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _rms_norm[(x.shape[0],)](x, x, weight, out, out, width, eps, ADD=False, BLOCK=block)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _rms_norm[(x.shape[0],)](x, residual, weight, out, total, width, eps, ADD=True, BLOCK=block)
    return out, total


@triton.jit
def _silu_mul(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(x: Tensor) -> Tensor:
    """See contract.py."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(x.shape[0], triton.cdiv(width, block))](x, out, width, BLOCK=block)
    return out
