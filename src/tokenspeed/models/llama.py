"""The Llama family (Llama, Mistral, Qwen2, Qwen3): grouped-query attention, rotary positions.

Rule: as in blocks.py.

    x = embed(ids)
    for each layer:  x, r = add_norm(x, r); x = attention(x)      Vaswani et al., 2017; Su et al.,
                     x, r = add_norm(x, r); x = mlp(x)            2021; Ainslie et al., 2023
    logits = head(x, r)
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tokenspeed import kernels
from tokenspeed.models.blocks import (
    BATCH,
    COLUMNS,
    ROWS,
    Cached,
    Params,
    add_bias,
    add_norm,
    embed,
    gated,
    head,
    mlp,
    norm,
    one,
    rope_table,
)
from tokenspeed.models.config import LlamaConfig
from tokenspeed.spmd.batch import Batch
from tokenspeed.spmd.kv import LayerKV
from tokenspeed.spmd.module import module
from tokenspeed.spmd.params import Constant, Parameter, Source
from tokenspeed.spmd.placement import REPLICATED, Partial, as_batch

__all__ = [
    "GGUF_NAMES",
    "attend",
    "attention_parameters",
    "cached",
    "forward",
    "parameters",
    "unused",
]

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


@module(
    inputs={"x": BATCH},
    outputs=as_batch(tp=Partial()),
    params={
        "qkv": ROWS,
        "qkv_bias": ROWS,
        "q_norm": REPLICATED,
        "k_norm": REPLICATED,
        "out": COLUMNS,
    },
)
def attention(
    params: Params,
    x: Tensor,
    cos_sin: Tensor,
    batch: Batch,
    pages: LayerKV,
    *,
    head_dim: int,
    layer: int,
    window: int | None,
    eps: float,
) -> Tensor:
    """Causal attention of x[tokens, hidden] to itself and the cached context; writes its KV.

    With a window, to so many tokens, its own included (Jiang et al., 2023).
    """
    k_pages, v_pages = pages
    paged = batch.of(layer)
    kv_heads = k_pages.shape[2]
    qkv = kernels.linear(x, params["qkv"], params.get("qkv_bias"))
    qkv = qkv.view(x.shape[0], -1, head_dim)
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    if "q_norm" in params:
        q = kernels.rms_norm(q.reshape(-1, head_dim), params["q_norm"], eps).view(q.shape)
        k = kernels.rms_norm(k.reshape(-1, head_dim), params["k_norm"], eps).view(k.shape)
    q, k = kernels.rope(q, k, batch.positions, cos_sin)
    kernels.kv_write(k_pages, v_pages, k, v, paged.locations)
    mixed = kernels.paged_attention(q, k_pages, v_pages, paged.attention, window)
    return kernels.linear(mixed.reshape(x.shape[0], -1), params["out"])


def forward(params: Any, batch: Any, kv: Any, *, config: LlamaConfig) -> tuple[Any, Any]:
    """The model function: (params, batch, kv) -> (logits [sampled rows, vocab], kv)."""
    eps = config.norm_eps
    residual = embed(params["embed"], batch.token_ids)
    x = norm(params["layers"][0]["attention_norm"], residual, eps)
    for index, layer in enumerate(params["layers"]):
        if index:
            x, residual = add_norm(layer["attention_norm"], x, residual, eps)
        x = attend(config, index, layer, params["cos_sin"], batch, kv[index], x)
        x, residual = add_norm(layer["mlp_norm"], x, residual, eps)
        x = mlp(layer["mlp"], x)
        if config.mlp_bias:
            x = add_bias(layer["mlp_out"], x)
    return head(params["head"], x, residual, batch.sampled_rows, eps), kv


def attend(
    config: LlamaConfig, index: int, layer: Any, cos_sin: Any, batch: Any, pages: Any, x: Any
) -> Any:
    """A layer's attention, as the configuration has it."""
    x = attention(
        layer["attention"],
        x,
        cos_sin,
        batch,
        pages,
        head_dim=config.head_dim,
        layer=index,
        window=config.window(index),
        eps=config.norm_eps,
    )
    return add_bias(layer["attention_out"], x) if config.o_bias else x


def cached(config: LlamaConfig) -> Cached:
    """What a layer keeps of a token: a key and a value of each head."""
    return (((config.kv_heads, config.head_dim), ROWS),) * 2


def unused(config: LlamaConfig, name: str) -> bool:
    """Whether a tensor is one that the model does without: what it computes, or has twice."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def parameters(config: LlamaConfig) -> dict[str, Any]:
    """The parameter tree: what is read from the checkpoint, fused where one product serves all."""
    hidden, embedding = config.hidden, "model.embed_tokens.weight"
    shape = (config.vocab_size, hidden)
    output = embedding if config.tied else "lm_head.weight"
    return {
        "embed": {"weight": Parameter((Source(embedding, shape),))},
        "cos_sin": Constant(partial(rope_table, config)),
        "layers": [
            attention_parameters(config, at) | _mlp_parameters(config, f"{at}.mlp")
            for at in (f"model.layers.{index}" for index in range(config.layers))
        ],
        "head": {
            "norm": Parameter((Source("model.norm.weight", (hidden,)),)),
            "weight": Parameter((Source(output, shape),), bits_min=8),
        },
    }


def attention_parameters(config: LlamaConfig, at: str) -> dict[str, Any]:
    """A layer's part of the tree but for its MLP, by its name in the checkpoint."""
    hidden, dim = config.hidden, config.head_dim
    q, kv = config.heads * dim, config.kv_heads * dim
    qkv = tuple((f"{at}.self_attn.{n}_proj", rows) for n, rows in (("q", q), ("k", kv), ("v", kv)))
    attention = {
        "qkv": Parameter(
            tuple(Source(f"{n}.weight", (rows, hidden), dim) for n, rows in qkv), bits_min=4
        ),
        "out": one(f"{at}.self_attn.o_proj.weight", hidden, q, granule=dim, bits_min=4),
    }
    if config.qkv_bias:
        sources = tuple(Source(f"{n}.bias", (rows,), dim) for n, rows in qkv)
        attention["qkv_bias"] = Parameter(sources)
    if config.qk_norm:
        attention["q_norm"] = one(f"{at}.self_attn.q_norm.weight", dim)
        attention["k_norm"] = one(f"{at}.self_attn.k_norm.weight", dim)
    layer = {
        "attention_norm": {"weight": one(f"{at}.input_layernorm.weight", hidden)},
        "attention": attention,
        "mlp_norm": {"weight": one(f"{at}.post_attention_layernorm.weight", hidden)},
    }
    if config.o_bias:
        layer["attention_out"] = {"bias": one(f"{at}.self_attn.o_proj.bias", hidden)}
    return layer


def _mlp_parameters(config: LlamaConfig, at: str) -> dict[str, Any]:
    layer = {"mlp": gated(at, config.ffn, config.hidden)}
    if config.mlp_bias:
        names = (f"{at}.{n}_proj.bias" for n in ("gate", "up"))
        layer["mlp"]["gate_up_bias"] = Parameter(tuple(Source(n, (config.ffn,)) for n in names))
        layer["mlp_out"] = {"bias": one(f"{at}.down_proj.bias", config.hidden)}
    return layer
