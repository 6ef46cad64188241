"""DeepSeek V2 and V3, and what has their shape (Kimi K2, GLM-4.7-Flash): latent attention, experts.

Rule: as in blocks.py.

    x = embed(ids)
    for each layer:  x, r = add_norm(x, r); x = attention(x)            DeepSeek-AI, 2024, "V2"
                     x, r = add_norm(x, r)
                     x = mlp(x), or experts(x, route(x)) + mlp(x)       DeepSeek-AI, 2024, "V3"
    logits = head(x, r)

Of a token a layer keeps one latent, from which every head's key and value are made, and one rotary
key that all heads share.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
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
from tokenspeed.models.deepseek_config import DeepseekConfig
from tokenspeed.models.moe import moe, moe_parameters
from tokenspeed.spmd.batch import Batch
from tokenspeed.spmd.kv import LayerKV
from tokenspeed.spmd.module import module
from tokenspeed.spmd.params import Constant, Parameter, Source
from tokenspeed.spmd.placement import (
    REPLICATED,
    Partial,
    as_batch,
)

__all__ = [
    "attend",
    "cached",
    "experts",
    "forward",
    "layer_parameters",
    "parameters",
    "trunk",
    "unused",
]

LATENT_EPS = 1e-6
"""Of the norms on latents, whatever `rms_norm_eps` says of the others."""


@module(
    inputs={"x": BATCH},
    outputs=as_batch(tp=Partial()),
    params={
        "down": REPLICATED,
        "down_bias": REPLICATED,
        "q_norm": REPLICATED,
        "kv_norm": REPLICATED,
        "q": ROWS,
        "q_up": ROWS,
        "kv_up": ROWS,
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
    nope: int,
    rope: int,
    value: int,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """Latent attention of x[tokens, hidden] to itself and the context; writes its latents."""
    (kv_pages,) = pages
    latent = params["kv_norm"].shape[0]
    down = kernels.linear(x, params["down"], params.get("down_bias"))
    compressed, turning = down[:, -latent - rope : -rope], down[:, None, -rope:]
    if "q_up" in params:
        low = kernels.rms_norm(down[:, : -latent - rope], params["q_norm"], LATENT_EPS)
        q = kernels.linear(low, params["q_up"])
    else:
        q = kernels.linear(x, params["q"])
    q = q.view(x.shape[0], -1, nope + rope)
    turned, key = kernels.rope(q[..., nope:], turning, batch.positions, cos_sin, interleaved)
    c = kernels.rms_norm(compressed, params["kv_norm"], LATENT_EPS)
    each = kv_pages[:, :, None]
    (paged,) = batch.groups  # all layers see all
    kernels.kv_write(each[..., :latent], each[..., latent:], c[:, None], key, paged.locations)
    mixed = kernels.latent_attention(
        torch.cat((q[..., :nope], turned), dim=-1),
        kv_pages,
        params["kv_up"].view(-1, nope + value, latent),
        paged.attention,
        latent=latent,
        scale=scale,
    )
    return kernels.linear(mixed.reshape(x.shape[0], -1), params["out"])


def forward(params: Any, batch: Any, kv: Any, *, config: DeepseekConfig) -> tuple[Any, Any]:
    """The model function: (params, batch, kv) -> (logits [sampled rows, vocab], kv)."""
    x, residual = trunk(params, batch, kv, config=config)
    return head(params["head"], x, residual, batch.sampled_rows, config.norm_eps), kv


def trunk(params: Any, batch: Any, kv: Any, *, config: DeepseekConfig) -> tuple[Any, Any]:
    """All layers: (what the last one adds to the residual, the residual), [tokens, hidden]."""
    eps = config.norm_eps
    residual = embed(params["embed"], batch.token_ids)
    x = norm(params["layers"][0]["attention_norm"], residual, eps)
    for index, layer in enumerate(params["layers"]):
        if index:
            x, residual = add_norm(layer["attention_norm"], x, residual, eps)
        x = attend(config, layer, params["cos_sin"], batch, kv[index], x)
        x, residual = add_norm(layer["mlp_norm"], x, residual, eps)
        x = mlp(layer["mlp"], x) if index < config.dense_layers else experts(config, layer, x)
    return x, residual


def attend(config: DeepseekConfig, layer: Any, cos_sin: Any, batch: Any, pages: Any, x: Any) -> Any:
    """A layer's attention, as the configuration has it."""
    x = attention(
        layer["attention"],
        x,
        cos_sin,
        batch,
        pages,
        nope=config.nope,
        rope=config.rope,
        value=config.value,
        scale=config.score_scale,
        interleaved=config.interleaved,
    )
    return add_bias(layer["attention_out"], x) if config.attention_bias else x


def experts(config: DeepseekConfig, layer: Any, x: Any) -> Any:
    """A layer's experts, as the configuration has them."""
    return moe(layer, config.routing, x, shared=bool(config.shared_experts))


def unused(config: DeepseekConfig, name: str) -> bool:
    """Whether a tensor is one that the model does without: what it computes or has twice, what
    sees, and layers beyond the last.
    """
    if not name.startswith(config.prefix) or name.endswith("rotary_emb.inv_freq"):
        return True
    if config.tied and name == f"{config.prefix}lm_head.weight":
        return True
    found = re.match(r"model\.layers\.(\d+)\.", name.removeprefix(config.prefix))
    return found is not None and int(found.group(1)) in range(
        config.layers, config.layers + config.mtp_layers
    )


def cached(config: DeepseekConfig) -> Cached:
    """What a layer keeps of a token: the latent and the rotary key, on every rank."""
    return (((config.latent + config.rope,), REPLICATED),)


def parameters(config: DeepseekConfig) -> dict[str, Any]:
    """The parameter tree: what is read from the checkpoint, fused where one product serves all."""
    at, shape = config.prefix, (config.vocab_size, config.hidden)
    embedding = f"{at}model.embed_tokens.weight"
    layers = [
        layer_parameters(config, f"{at}model.layers.{index}", dense=index < config.dense_layers)
        for index in range(config.layers)
    ]
    return {
        "embed": {"weight": one(embedding, *shape)},
        "cos_sin": Constant(partial(rope_table, config)),
        "layers": layers,
        "head": {
            "norm": one(f"{at}model.norm.weight", config.hidden),
            "weight": one(embedding if config.tied else f"{at}lm_head.weight", *shape),
        },
    }


def layer_parameters(config: DeepseekConfig, at: str, dense: bool) -> dict[str, Any]:
    """A layer's part of the tree, by its name in the checkpoint."""
    hidden = config.hidden
    layer = {
        "attention_norm": {"weight": one(f"{at}.input_layernorm.weight", hidden)},
        "attention": _attention(config, f"{at}.self_attn"),
        "mlp_norm": {"weight": one(f"{at}.post_attention_layernorm.weight", hidden)},
    }
    if config.attention_bias:
        layer["attention_out"] = {"bias": one(f"{at}.self_attn.o_proj.bias", hidden)}
    if dense:
        return layer | {"mlp": gated(f"{at}.mlp", config.ffn, hidden)}
    return layer | moe_parameters(
        f"{at}.mlp",
        hidden,
        config.expert_ffn,
        config.experts,
        shared=config.shared_experts,
        bias=config.routing_bias,
    )


def _attention(config: DeepseekConfig, at: str) -> dict[str, Parameter]:
    hidden, heads = config.hidden, config.heads
    q_head, kv_head = config.nope + config.rope, config.nope + config.value
    kv_down = (f"{at}.kv_a_proj_with_mqa", config.latent + config.rope)
    down: tuple[tuple[str, int], ...]
    if config.q_rank is None:
        down = (kv_down,)
        own = {"q": one(f"{at}.q_proj.weight", heads * q_head, hidden, granule=q_head)}
    else:
        down = ((f"{at}.q_a_proj", config.q_rank), kv_down)
        own = {
            "q_norm": one(f"{at}.q_a_layernorm.weight", config.q_rank),
            "q_up": one(f"{at}.q_b_proj.weight", heads * q_head, config.q_rank, granule=q_head),
        }
    if config.attention_bias:
        own["down_bias"] = Parameter(tuple(Source(f"{n}.bias", (rows,)) for n, rows in down))
    return own | {
        "down": Parameter(tuple(Source(f"{n}.weight", (rows, hidden)) for n, rows in down)),
        "kv_norm": one(f"{at}.kv_a_layernorm.weight", config.latent),
        "kv_up": one(f"{at}.kv_b_proj.weight", heads * kv_head, config.latent, granule=kv_head),
        "out": one(f"{at}.o_proj.weight", hidden, heads * config.value, granule=config.value),
    }
