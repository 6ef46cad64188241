"""Qwen3 with experts: attention as in llama.py, experts as in moe.py.

Rule: as in blocks.py. Written as the example of models/README.md: what a family is that has nothing
new but how known blocks go together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, final

import attrs
from attrs import frozen

from tokenspeed.errors import CheckpointError
from tokenspeed.kernels import Routing
from tokenspeed.models import llama
from tokenspeed.models.blocks import Cached, add_norm, embed, head, norm
from tokenspeed.models.config import (
    EXPERTS_MAX,
    LlamaConfig,
    ModelConfig,
    out_of_range,
    read_json,
    switch,
)
from tokenspeed.models.moe import moe, moe_parameters

__all__ = ["QwenMoeConfig", "cached", "forward", "parameters", "unused"]


@final
@frozen(kw_only=True)
class QwenMoeConfig(ModelConfig):
    """A Qwen3 whose layers all have experts.

    Attributes:
        dense: the same without experts: what its attention is.
        experts, expert_ffn: experts of a layer, and their width.
        routing: how they are chosen.
    """

    dense: LlamaConfig
    experts: int
    expert_ffn: int
    routing: Routing

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """See ModelConfig."""
        return self.dense.layer_windows

    @property
    def rotary_dim(self) -> int:
        """See ModelConfig."""
        return self.dense.rotary_dim

    @classmethod
    def from_hf(cls, path: Path) -> Self:
        """Read a Hugging Face `config.json`. Raises CheckpointError."""
        raw, dense = read_json(path), LlamaConfig.from_hf(path)
        if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
            raise CheckpointError(path, "layers without experts are not supported in qwen3_moe")
        values: dict[str, Any] = {
            "experts": raw.get("num_experts", raw.get("num_local_experts")),
            "expert_ffn": raw.get("moe_intermediate_size"),
            "chosen": raw.get("num_experts_per_tok"),
        }
        wrong = out_of_range(values, "expert_ffn", "chosen")
        wrong += out_of_range(values, "experts", high=EXPERTS_MAX)
        if not wrong and values["chosen"] > values["experts"]:
            wrong.append(f"{values['chosen']} of {values['experts']} experts are to be chosen")
        if wrong:
            raise CheckpointError(path, "bad configuration: " + "; ".join(wrong))
        return cls(
            **{field.name: getattr(dense, field.name) for field in attrs.fields(ModelConfig)},
            dense=dense,
            experts=values["experts"],
            expert_ffn=values["expert_ffn"],
            routing=Routing(
                scoring="softmax",
                chosen=values["chosen"],
                normalised=switch(path, raw, "norm_topk_prob"),
            ),
        )


def forward(params: Any, batch: Any, kv: Any, *, config: QwenMoeConfig) -> tuple[Any, Any]:
    """The model function: (params, batch, kv) -> (logits [sampled rows, vocab], kv)."""
    eps, cos_sin = config.norm_eps, params["cos_sin"]
    residual = embed(params["embed"], batch.token_ids)
    x = norm(params["layers"][0]["attention_norm"], residual, eps)
    for index, layer in enumerate(params["layers"]):
        if index:
            x, residual = add_norm(layer["attention_norm"], x, residual, eps)
        x = llama.attend(config.dense, index, layer, cos_sin, batch, kv[index], x)
        x, residual = add_norm(layer["mlp_norm"], x, residual, eps)
        x = moe(layer, config.routing, x, shared=False)
    return head(params["head"], x, residual, batch.sampled_rows, eps), kv


def parameters(config: QwenMoeConfig) -> dict[str, Any]:
    """The parameter tree: that of Llama, with experts where it has an MLP."""
    tree = llama.parameters(config.dense)
    for index, layer in enumerate(tree["layers"]):
        del layer["mlp"]
        at = f"model.layers.{index}.mlp"
        layer.update(moe_parameters(at, config.hidden, config.expert_ffn, config.experts))
    return tree


def cached(config: QwenMoeConfig) -> Cached:
    """What a layer keeps of a token."""
    return llama.cached(config.dense)


def unused(config: QwenMoeConfig, name: str) -> bool:
    """Whether a tensor is one that the model does without."""
    return llama.unused(config.dense, name)
