"""The blocks that families share: embedding, norms, gated MLP, head, rotary positions.

Rule: pure single-device functions on a rank's own slices. Boundaries say what a block takes and
gives (each token for itself, or whole in and summands out); which collective joins them is the
compiler's business.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.models.config import ModelConfig, RopeScaling
from tokenspeed.spmd.module import module
from tokenspeed.spmd.params import Parameter, Source
from tokenspeed.spmd.placement import (
    Layout,
    Partial,
    Replicate,
    Shard,
    as_batch,
    layout,
    tokens,
)

__all__ = [
    "BATCH",
    "COLUMNS",
    "ROWS",
    "SUMMANDS",
    "TOKENS",
    "WHOLE",
    "Cached",
    "Params",
    "add_bias",
    "add_norm",
    "embed",
    "gated",
    "head",
    "mlp",
    "norm",
    "one",
    "rope_table",
]

Params = dict[str, Any]

Cached = tuple[tuple[tuple[int, ...], Layout], ...]
"""What a layer keeps of a token: the shape of each part, and how it lies."""

TOKENS = tokens()
"""Each token for itself, wherever the compiler wants it."""
WHOLE = tokens(tp=Replicate())
SUMMANDS = tokens(tp=Partial())
BATCH = as_batch(tp=Replicate())
"""Rows as the step's batch counts them."""
ROWS = layout(tp=Shard(0))
COLUMNS = layout(tp=Shard(1))


def _embedded(params: Params, ids: Tensor) -> Tensor:
    weight: Tensor = params["weight"]
    return weight.new_empty(ids.shape[0], weight.shape[1])


@module(inputs={"ids": TOKENS}, outputs=TOKENS, meta=_embedded)
def embed(params: Params, ids: Tensor) -> Tensor:
    """ids[tokens] -> x[tokens, hidden]."""
    return kernels.embedding(ids, params["weight"])


@module(inputs={"x": TOKENS}, outputs=TOKENS)
def norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019); x[tokens, hidden]."""
    return kernels.rms_norm(x, params["weight"], eps)


@module(inputs={"x": TOKENS, "residual": TOKENS}, outputs=(TOKENS, TOKENS))
def add_norm(params: Params, x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual); both [tokens, hidden]."""
    return kernels.add_rms_norm(x, residual, params["weight"], eps)


@module(
    inputs={"x": WHOLE},
    outputs=SUMMANDS,
    params={"gate_up": ROWS, "gate_up_bias": ROWS, "down": COLUMNS},
)
def mlp(params: Params, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020); x[tokens, hidden]."""
    wide = kernels.linear(x, params["gate_up"], params.get("gate_up_bias"))
    return kernels.linear(kernels.silu_mul(wide), params["down"])


@module(inputs={"x": TOKENS}, outputs=TOKENS)
def add_bias(params: Params, x: Tensor) -> Tensor:
    """x + bias, once: after the summands have been added up."""
    total: Tensor = x + params["bias"]
    return total


def _scored(params: Params, x: Tensor, residual: Tensor, rows: Tensor, eps: float) -> Tensor:
    return x.new_empty(rows.shape[0], params["weight"].shape[0])


@module(
    inputs={"x": BATCH, "residual": BATCH},
    outputs=as_batch(tp=Shard(1)),
    params={"weight": ROWS},
    meta=_scored,
)
def head(params: Params, x: Tensor, residual: Tensor, rows: Tensor, eps: float) -> Tensor:
    """Logits [rows, vocab] of the given token rows; the other rows are never multiplied."""
    x, residual = kernels.embedding(rows, x), kernels.embedding(rows, residual)
    x, _ = kernels.add_rms_norm(x, residual, params["norm"], eps)
    return kernels.linear(x, params["weight"])


def one(name: str, *shape: int, granule: int = 1, bits_min: int | None = None) -> Parameter:
    """A parameter that is one tensor of the checkpoint."""
    return Parameter((Source(name, shape, granule),), bits_min=bits_min)


def gated(at: str, ffn: int, hidden: int) -> dict[str, Parameter]:
    """The weights of `mlp` under a name in the checkpoint, gate and up in one product."""
    gate_up = tuple(Source(f"{at}.{n}_proj.weight", (ffn, hidden)) for n in ("gate", "up"))
    return {
        "gate_up": Parameter(gate_up, bits_min=4),
        "down": one(f"{at}.down_proj.weight", hidden, ffn, bits_min=4),
    }


def rope_table(config: ModelConfig) -> Tensor:
    """float32[context_max, rotary_dim]: cosines, then sines, of position times frequency."""
    dim, scaling = config.rotary_dim, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / config.rope_theta**exponents
    if scaling is not None:
        kept = _kept(config, scaling, frequencies)
        frequencies = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    angles = torch.outer(torch.arange(config.context_max, dtype=torch.float32), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    return table if scaling is None else table * scaling.amplitude


def _kept(config: ModelConfig, scaling: RopeScaling, frequencies: Tensor) -> Tensor:
    """How far each frequency is kept as it is, from 0 (divided by the factor) to 1."""
    if scaling.kind == "linear":
        return torch.zeros_like(frequencies)
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequencies / (2 * math.pi)
        return ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    dim = config.rotary_dim

    def where(turns: float) -> float:
        """The index of the frequency that turns so many times in the original context."""
        share = scaling.original_context / (turns * 2 * math.pi)
        return dim * math.log(share) / (2 * math.log(config.rope_theta))

    first, last = math.floor(where(scaling.high)), math.ceil(where(scaling.low))
    first, last = max(first, 0), min(last, dim - 1)
    at = torch.arange(dim // 2, dtype=torch.float32)
    return 1 - ((at - first) / (max(last - first, 0) or 0.001)).clamp(0, 1)
