"""What a checkpoint of DeepSeek's family says about its shape.

Rule: as in config.py; what a router can be is one value, checked as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, final

from attrs import frozen

from tokenspeed.errors import CheckpointError
from tokenspeed.kernels import Routing
from tokenspeed.models.config import (
    EXPERTS_MAX,
    ModelConfig,
    common,
    common_out_of_range,
    is_integer,
    is_number,
    known_architecture,
    out_of_range,
    read_json,
    switch,
)

__all__ = ["DeepseekConfig"]


@final
@frozen(kw_only=True)
class DeepseekConfig(ModelConfig):
    """A model with latent attention and, from some layer on, experts: DeepSeek V2 and V3, and those
    that took their shape.

    Attributes:
        heads: of attention.
        q_rank: width that queries are compressed to; None: they are not.
        latent: width that keys and values are compressed to (kv_lora_rank).
        nope, rope: elements of a query and key without and with a position.
        value: elements of a head's value.
        interleaved: rotary pairs are neighbours, not halves.
        attention_bias: the projections into the latents and the output add a bias.
        ffn: width of the dense MLPs, which the first `dense_layers` have.
        dense_layers: layers before the first one with experts.
        experts, expert_ffn: experts of a layer, and their width.
        shared_experts: always chosen; together one MLP of so many times their width.
        routing: how experts are chosen.
        routing_bias: a learned bias is added to the scores for the choice alone.
        mtp_layers: further layers that predict tokens beyond the next one.
        prefix: before the names of all tensors, "language_model." say.
    """

    heads: int
    q_rank: int | None
    latent: int
    nope: int
    rope: int
    value: int
    interleaved: bool
    attention_bias: bool
    ffn: int
    dense_layers: int
    experts: int
    expert_ffn: int
    shared_experts: int
    routing: Routing
    routing_bias: bool
    mtp_layers: int = 0
    prefix: str = ""

    @property
    def rotary_dim(self) -> int:
        """See ModelConfig."""
        return self.rope

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        sharpness = self.rope_scaling.sharpness if self.rope_scaling else 1.0
        return float((self.nope + self.rope) ** -0.5) * sharpness

    @classmethod
    def from_hf(cls, path: Path) -> Self:
        """Read a Hugging Face `config.json`. Raises CheckpointError."""
        raw = read_json(path)
        prefix = ""
        if isinstance(raw.get("text_config"), dict):  # a model that also sees: its text half
            raw, prefix = {"model_type": "kimi_k2"} | raw["text_config"], "language_model."
            known_architecture(path, raw["model_type"], ("deepseek_v3", "kimi_k2"))
        if switch(path, raw, "mlp_bias"):
            raise CheckpointError(path, "mlp_bias is set; no MLP of this family adds a bias")
        values = common(path, raw) | {
            "heads": raw.get("num_attention_heads"),
            "q_rank": raw.get("q_lora_rank"),
            "latent": raw.get("kv_lora_rank"),
            "nope": raw.get("qk_nope_head_dim"),
            "rope": raw.get("qk_rope_head_dim"),
            "value": raw.get("v_head_dim"),
            "ffn": raw.get("intermediate_size"),
            "dense_layers": _dense_layers(path, raw),
            "experts": raw.get("n_routed_experts"),
            "expert_ffn": raw.get("moe_intermediate_size"),
            "shared_experts": 0 if (n := raw.get("n_shared_experts")) is None else n,
            "mtp_layers": raw.get("num_nextn_predict_layers", 0),
        }
        wrong = common_out_of_range(values)
        wrong += out_of_range(
            values, "heads", "latent", "nope", "rope", "value", "ffn", "expert_ffn"
        )
        wrong += out_of_range(values, "experts", high=EXPERTS_MAX)
        wrong += out_of_range(values, *(("q_rank",) if values["q_rank"] is not None else ()))
        wrong += out_of_range(values, "dense_layers", "shared_experts", "mtp_layers", low=0)
        if not wrong and values["rope"] % 2:
            wrong.append(f"rope is {values['rope']}: rotary embedding wants pairs")
        if wrong:
            raise CheckpointError(path, "bad configuration: " + "; ".join(wrong))
        routing = _routing(path, raw)
        return cls(
            **values,
            routing=routing,
            routing_bias=routing.scoring == "sigmoid",
            interleaved=switch(path, raw, "rope_interleave", default=True),
            attention_bias=switch(path, raw, "attention_bias"),
            prefix=prefix,
        )


def _routing(path: Path, raw: Mapping[str, Any]) -> Routing:
    second = raw["model_type"] == "deepseek_v2"
    scoring = raw.get("scoring_func", "softmax" if second else "sigmoid")
    method = raw.get("topk_method", "greedy" if second else "noaux_tc")
    known = {"softmax": ("greedy", "group_limited_greedy"), "sigmoid": ("noaux_tc",)}
    if not isinstance(scoring, str) or method not in known.get(scoring, ()):
        raise CheckpointError(
            path, f"routing by {scoring!r} and {method!r}; supported: softmax with greedy or "
            "group_limited_greedy, sigmoid with noaux_tc",
        )  # fmt: skip
    values: dict[str, Any] = {
        "experts": raw.get("n_routed_experts"),
        "chosen": raw.get("num_experts_per_tok"),
        "groups": 1 if method == "greedy" else raw.get("n_group") or 1,
        "groups_chosen": 1 if method == "greedy" else raw.get("topk_group") or 1,
    }
    scale = raw.get("routed_scaling_factor", 1.0)
    wrong = [
        f"{name} is {value!r}, expected an integer from 1"
        for name, value in values.items()
        if not is_integer(value) or value < 1
    ]
    if not is_number(scale) or scale <= 0:
        wrong.append(f"routed_scaling_factor is {scale!r}, expected a positive number")
    if not wrong and values["experts"] % values["groups"]:
        wrong.append(f"{values['experts']} experts do not stand in {values['groups']} groups")
    per_group = 0 if wrong else values["experts"] // values["groups"]
    if not wrong and not values["chosen"] <= per_group * values["groups_chosen"]:
        wrong.append(
            f"{values['chosen']} experts cannot be chosen from {values['groups_chosen']} groups "
            f"of {per_group}"
        )
    if not wrong and values["groups_chosen"] > values["groups"]:
        wrong.append(f"{values['groups_chosen']} of {values['groups']} groups are to be chosen")
    if wrong:
        raise CheckpointError(path, "bad configuration: " + "; ".join(wrong))
    del values["experts"]
    return Routing(
        **values,
        scoring=scoring,
        normalised=switch(path, raw, "norm_topk_prob", default=not second),
        scale=float(scale),
    )


def _dense_layers(path: Path, raw: Mapping[str, Any]) -> Any:
    """Layers before the first with experts; the others must all have experts."""
    if raw.get("moe_layer_freq", 1) != 1:
        raise CheckpointError(path, f"moe_layer_freq is {raw['moe_layer_freq']!r}; supported: 1")
    types = raw.get("mlp_layer_types")
    if types is None:
        return raw.get("first_k_dense_replace", 1 if raw["model_type"] == "glm4_moe_lite" else 0)
    named = types if isinstance(types, list) else []
    dense = named.count("dense")
    if types != ["dense"] * dense + ["sparse"] * (len(named) - dense):
        raise CheckpointError(
            path, f"mlp_layer_types is {types!r}; supported: dense layers, then sparse ones"
        )
    return dense
