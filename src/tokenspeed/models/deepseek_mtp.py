"""DeepSeek's further layers, each of which predicts a token beyond the next one.

Rule: as in blocks.py. A layer sees of each position what the model made of it and the token that
came after it (DeepSeek-AI, 2024, "V3", section 2.2); embedding and output matrix are the model's.

    h = hidden(ids)                                          of the model itself
    logits of the token after the next = predict(h, ids[1:] and the next one)

Nothing serves with them yet: no drafter asks for their guesses.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.models import deepseek
from tokenspeed.models.blocks import TOKENS, Params, add_norm, embed, head, norm, one, rope_table
from tokenspeed.models.deepseek_config import DeepseekConfig
from tokenspeed.models.families import Family
from tokenspeed.spmd.batch import Paged
from tokenspeed.spmd.module import module
from tokenspeed.spmd.params import Constant

__all__ = ["HIDDEN", "PREDICT", "Behind"]


@final
@frozen(eq=False)
class Behind:
    """What PREDICT reads of a step.

    Attributes:
        token_ids: int64[tokens]; the token that came after each position.
        hidden: [tokens, hidden]; what the model, or the layer before, made of each position.
        positions, sampled_rows, groups, places: as of a Batch.
    """

    token_ids: Tensor
    hidden: Tensor
    positions: Tensor
    sampled_rows: Tensor
    groups: tuple[Paged, ...]
    places: tuple[tuple[int, int], ...]


@module(inputs={"token": TOKENS, "hidden": TOKENS}, outputs=TOKENS)
def join(params: Params, token: Tensor, hidden: Tensor, eps: float) -> Tensor:
    """Both normed, side by side, then back to one width; each [tokens, hidden]."""
    token = kernels.rms_norm(token, params["token_norm"], eps)
    hidden = kernels.rms_norm(hidden, params["hidden_norm"], eps)
    return kernels.linear(torch.cat((token, hidden), dim=-1), params["weight"])


def hidden(params: Any, batch: Any, kv: Any, *, config: DeepseekConfig) -> tuple[Any, Any]:
    """(params, batch, kv) -> ([tokens, hidden] behind the last norm, kv)."""
    x, residual = deepseek.trunk(params, batch, kv, config=config)
    x, _ = add_norm(params["last"], x, residual, config.norm_eps)
    return x, kv


def predict(params: Any, batch: Any, kv: Any, *, config: DeepseekConfig) -> tuple[Any, Any]:
    """(params, Behind, kv of one layer) -> (logits [sampled rows, vocab], kv)."""
    eps, layer = config.norm_eps, params["layers"][0]
    residual = join(params["join"], embed(params["embed"], batch.token_ids), batch.hidden, eps)
    x = norm(layer["attention_norm"], residual, eps)
    x = deepseek.attend(config, layer, params["cos_sin"], batch, kv[0], x)
    x, residual = add_norm(layer["mlp_norm"], x, residual, eps)
    x = deepseek.experts(config, layer, x)
    return head(params["head"], x, residual, batch.sampled_rows, eps), kv


def _of_hidden(config: DeepseekConfig) -> dict[str, Any]:
    tree = deepseek.parameters(config)
    del tree["head"]
    return tree | {"last": {"weight": one(f"{config.prefix}model.norm.weight", config.hidden)}}


def _of_predict(config: DeepseekConfig) -> dict[str, Any]:
    width, at = config.hidden, f"{config.prefix}model.layers.{config.layers}"
    whole = deepseek.parameters(config)
    return {
        "embed": whole["embed"],
        "cos_sin": Constant(partial(rope_table, config)),
        "join": {
            "token_norm": one(f"{at}.enorm.weight", width),
            "hidden_norm": one(f"{at}.hnorm.weight", width),
            "weight": one(f"{at}.eh_proj.weight", width, 2 * width),
        },
        "layers": [deepseek.layer_parameters(config, at, dense=False)],
        "head": {
            "norm": one(f"{at}.shared_head.norm.weight", width),
            "weight": whole["head"]["weight"],
        },
    }


def _all_others(_config: DeepseekConfig, _name: str) -> bool:
    return True


HIDDEN = Family(hidden, _of_hidden, deepseek.cached, _all_others)
"""The model up to its last norm."""

PREDICT = Family(predict, _of_predict, deepseek.cached, _all_others, lambda _config: 1)
"""The first further layer, as a model of its own."""
