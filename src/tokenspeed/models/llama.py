"""The Llama family (Llama, Mistral, Qwen2): grouped-query attention, rotary positions, gated MLP.

Rule: pure single-device functions on a rank's own slices. Boundaries say what a block takes and
gives (whole in, summands out); which collective joins them is the compiler's business.

    x = embed(ids)
    for each layer:  x, r = add_norm(x, r); x = attention(x)      Vaswani et al., 2017; Su et al.,
                     x, r = add_norm(x, r); x = mlp(x)            2021; Ainslie et al., 2023
    logits = head(x, r)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.models.config import ModelConfig
from tokenspeed.spmd.batch import Batch
from tokenspeed.spmd.kv import LayerKV
from tokenspeed.spmd.module import module
from tokenspeed.spmd.params import Constant, Parameter, Source
from tokenspeed.spmd.placement import REPLICATED, Partial, Shard, layout

__all__ = ["GGUF_NAMES", "forward", "parameters", "rope_table"]

Params = dict[str, Any]

WHOLE = REPLICATED
SUMMANDS = layout(tp=Partial())
ROWS = layout(tp=Shard(0))
COLUMNS = layout(tp=Shard(1))

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
"""GGUF's name (before .weight or .bias) -> the checkpoint's name in `parameters`."""


@module()
def embed(params: Params, ids: Tensor) -> Tensor:
    """ids[tokens] -> x[tokens, hidden]."""
    return kernels.embedding(ids, params["weight"])


@module(inputs={"x": WHOLE})
def norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019); x[tokens, hidden]."""
    return kernels.rms_norm(x, params["weight"], eps)


@module(inputs={"x": WHOLE, "residual": WHOLE}, outputs=(WHOLE, WHOLE))
def add_norm(params: Params, x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual); both [tokens, hidden]."""
    return kernels.add_rms_norm(x, residual, params["weight"], eps)


@module(
    inputs={"x": WHOLE},
    outputs=SUMMANDS,
    params={"qkv": ROWS, "qkv_bias": ROWS, "out": COLUMNS},
)
def attention(
    params: Params,
    x: Tensor,
    cos_sin: Tensor,
    batch: Batch,
    pages: LayerKV,
    *,
    head_dim: int,
    window: int | None,
) -> Tensor:
    """Causal attention of x[tokens, hidden] to itself and the cached context; writes its KV.

    With a window, to so many tokens, its own included (Jiang et al., 2023).
    """
    k_pages, v_pages = pages
    kv_heads = k_pages.shape[2]
    qkv = kernels.linear(x, params["qkv"], params.get("qkv_bias"))
    qkv = qkv.view(x.shape[0], -1, head_dim)
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    q, k = kernels.rope(q, k, batch.positions, cos_sin)
    kernels.kv_write(k_pages, v_pages, k, v, batch.locations)
    mixed = kernels.paged_attention(q, k_pages, v_pages, batch.attention, window)
    return kernels.linear(mixed.reshape(x.shape[0], -1), params["out"])


@module(
    inputs={"x": WHOLE},
    outputs=SUMMANDS,
    params={"gate_up": ROWS, "gate_up_bias": ROWS, "down": COLUMNS},
)
def mlp(params: Params, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020); x[tokens, hidden]."""
    wide = kernels.linear(x, params["gate_up"], params.get("gate_up_bias"))
    return kernels.linear(kernels.silu_mul(wide), params["down"])


@module(inputs={"x": WHOLE})
def add_bias(params: Params, x: Tensor) -> Tensor:
    """x + bias, once: after the summands have been added up."""
    total: Tensor = x + params["bias"]
    return total


@module(
    inputs={"x": WHOLE, "residual": WHOLE},
    outputs=layout(tp=Shard(1)),
    params={"weight": ROWS},
)
def head(params: Params, x: Tensor, residual: Tensor, rows: Tensor, eps: float) -> Tensor:
    """Logits [rows, vocab] of the given token rows; the other rows are never multiplied."""
    x, _ = kernels.add_rms_norm(x[rows], residual[rows], params["norm"], eps)
    return kernels.linear(x, params["weight"])


def forward(params: Any, batch: Any, kv: Any, *, config: ModelConfig) -> tuple[Any, Any]:
    """The model function: (params, batch, kv) -> (logits [sampled rows, vocab], kv)."""
    eps = config.norm_eps
    residual = embed(params["embed"], batch.token_ids)
    x = norm(params["layers"][0]["attention_norm"], residual, eps)
    for index, layer in enumerate(params["layers"]):
        if index:
            x, residual = add_norm(layer["attention_norm"], x, residual, eps)
        x = attention(
            layer["attention"],
            x,
            params["cos_sin"],
            batch,
            kv[index],
            head_dim=config.head_dim,
            window=config.window(index),
        )
        if config.o_bias:
            x = add_bias(layer["attention_out"], x)
        x, residual = add_norm(layer["mlp_norm"], x, residual, eps)
        x = mlp(layer["mlp"], x)
        if config.mlp_bias:
            x = add_bias(layer["mlp_out"], x)
    return head(params["head"], x, residual, batch.sampled_rows, eps), kv


def parameters(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree: what is read from the checkpoint, fused where one product serves all."""
    hidden, embedding = config.hidden, "model.embed_tokens.weight"
    shape = (config.vocab_size, hidden)
    output = embedding if config.tied else "lm_head.weight"
    return {
        "embed": {"weight": Parameter((Source(embedding, shape),))},
        "cos_sin": Constant(partial(rope_table, config)),
        "layers": [_layer(config, f"model.layers.{index}") for index in range(config.layers)],
        "head": {
            "norm": Parameter((Source("model.norm.weight", (hidden,)),)),
            "weight": Parameter((Source(output, shape),)),
        },
    }


def _layer(config: ModelConfig, at: str) -> dict[str, Any]:
    hidden, ffn, dim = config.hidden, config.ffn, config.head_dim
    q, kv = config.heads * dim, config.kv_heads * dim
    qkv = (
        (f"{at}.self_attn.q_proj", q),
        (f"{at}.self_attn.k_proj", kv),
        (f"{at}.self_attn.v_proj", kv),
    )
    gate_up = ((f"{at}.mlp.gate_proj", ffn), (f"{at}.mlp.up_proj", ffn))

    def one(name: str, *shape: int, granule: int = 1) -> Parameter:
        return Parameter((Source(name, shape, granule),))

    attention = {
        "qkv": Parameter(tuple(Source(f"{n}.weight", (rows, hidden), dim) for n, rows in qkv)),
        "out": one(f"{at}.self_attn.o_proj.weight", hidden, q, granule=dim),
    }
    if config.qkv_bias:
        sources = tuple(Source(f"{n}.bias", (rows,), dim) for n, rows in qkv)
        attention["qkv_bias"] = Parameter(sources)
    mlp = {
        "gate_up": Parameter(tuple(Source(f"{n}.weight", (rows, hidden)) for n, rows in gate_up)),
        "down": one(f"{at}.mlp.down_proj.weight", hidden, ffn),
    }
    if config.mlp_bias:
        mlp["gate_up_bias"] = Parameter(tuple(Source(f"{n}.bias", (r,)) for n, r in gate_up))
    layer = {
        "attention_norm": {"weight": one(f"{at}.input_layernorm.weight", hidden)},
        "attention": attention,
        "mlp_norm": {"weight": one(f"{at}.post_attention_layernorm.weight", hidden)},
        "mlp": mlp,
    }
    if config.o_bias:
        layer["attention_out"] = {"bias": one(f"{at}.self_attn.o_proj.bias", hidden)}
    if config.mlp_bias:
        layer["mlp_out"] = {"bias": one(f"{at}.mlp.down_proj.bias", hidden)}
    return layer


def rope_table(config: ModelConfig) -> Tensor:
    """float32[context_max, head_dim]: cosines, then sines, of position times frequency."""
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        wavelengths = 2 * math.pi / frequencies
        share = scaling.original_context / wavelengths
        blend = ((share - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequencies = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    angles = torch.outer(torch.arange(config.context_max, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1)
