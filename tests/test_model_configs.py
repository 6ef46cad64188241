"""Configurations: shipped shapes are what their papers say, and what is not known is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny
from tokenspeed import models
from tokenspeed.errors import CheckpointError
from tokenspeed.spmd.params import Parameter, leaves

V3 = json.loads((Path(models.__file__).parent / "shapes" / "deepseek-v3.json").read_text())


def read(folder: Path, **changes: Any) -> models.DeepseekConfig:
    """DeepSeek-V3's configuration with changes; None takes a key out."""
    raw = {key: value for key, value in {**V3, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    config = models.find_config(folder)
    assert isinstance(config, models.DeepseekConfig)
    return config


def test_shipped_shapes_are_known_by_name() -> None:
    v3, k2, lite = (
        models.find_config(name) for name in ("deepseek-v3", "kimi-k2", "deepseek-v2-lite")
    )
    for config in (v3, k2, lite):
        assert isinstance(config, models.DeepseekConfig)
        assert (config.latent, config.rope, config.nope, config.value) == (512, 64, 128, 128)
        assert config.interleaved
    assert isinstance(v3, models.DeepseekConfig)
    assert (v3.layers, v3.heads, v3.dense_layers, v3.experts, v3.mtp_layers) == (61, 128, 3, 256, 1)
    assert (v3.routing.scoring, v3.routing.groups, v3.routing.groups_chosen) == ("sigmoid", 8, 4)
    assert isinstance(k2, models.DeepseekConfig)
    assert (k2.layers, k2.heads, k2.dense_layers, k2.experts, k2.q_rank) == (61, 64, 1, 384, 1536)
    assert (k2.routing.groups, k2.routing.scale) == (1, 2.827)
    assert isinstance(lite, models.DeepseekConfig)
    assert (lite.layers, lite.heads, lite.q_rank, lite.shared_experts) == (27, 16, None, 2)
    assert (lite.routing.scoring, lite.routing_bias) == ("softmax", False)
    small = models.find_config("smollm2")
    assert isinstance(small, models.LlamaConfig)
    assert (small.layers, small.heads, small.kv_heads, small.tied) == (30, 9, 3, True)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v3", 671.0),  # DeepSeek-AI, 2024, "V3", abstract
        ("deepseek-v2-lite", 15.7),  # DeepSeek-AI, 2024, "V2", appendix B
        ("kimi-k2", 1026.4),  # counted by hand; Moonshot AI, 2025, says 1.04 trillion
        ("smollm2", 0.134515),
    ],
)
def test_shapes_have_as_many_parameters_as_their_papers_say(name: str, billions: float) -> None:
    config = models.find_config(name)
    tree = models.Family.of(config).parameters(config)
    sizes = {
        source.name: math.prod(source.shape)
        for _, leaf in leaves(tree)
        if isinstance(leaf, Parameter)
        for source in leaf.sources
    }
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_yarn_scales_scores_as_the_paper_says(tmp_path: Path) -> None:
    """DeepSeek-V2, section 3.1.4: sqrt(t) = 0.0707 ln s + 1; V3: 0.1 ln s + 1."""
    for name, weight in (("deepseek-v3", 0.1), ("deepseek-v2-lite", 0.0707)):
        config = models.find_config(name)
        assert isinstance(config, models.DeepseekConfig)
        assert config.rope_scaling is not None
        assert config.rope_scaling.amplitude == 1.0
        root = weight * math.log(40) + 1
        assert config.score_scale == pytest.approx(root**2 / math.sqrt(192))
    assert read(tmp_path, rope_scaling=None).score_scale == pytest.approx(1 / math.sqrt(192))


@pytest.mark.parametrize(
    ("kind", "changes", "wanted"),
    [
        ("deepseek_v3", {"scoring_func": None, "topk_method": None}, ("sigmoid", True, 8)),
        ("deepseek_v2", {"scoring_func": None, "topk_method": None}, ("softmax", False, 1)),
        (
            "deepseek_v2",
            {"scoring_func": "softmax", "topk_method": "group_limited_greedy"},
            ("softmax", False, 8),
        ),
        ("glm4_moe_lite", {"n_group": 1, "topk_group": 1}, ("sigmoid", True, 1)),
        ("kimi_k2", {"n_group": 1, "topk_group": 1}, ("sigmoid", True, 1)),
    ],
)
def test_routing_by_architecture(
    kind: str, changes: dict[str, Any], wanted: tuple[str, bool, int], tmp_path: Path
) -> None:
    config = read(tmp_path, model_type=kind, **changes)
    assert (config.routing.scoring, config.routing_bias, config.routing.groups) == wanted


def test_a_model_that_also_sees_is_read_by_its_text_half(tmp_path: Path) -> None:
    text = {**V3, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1}
    raw = {"model_type": "kimi_k25", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = models.find_config(tmp_path / "config.json")
    assert isinstance(config, models.DeepseekConfig)
    assert (config.prefix, config.layers, config.architecture) == ("language_model.", 61, "kimi_k2")


def test_dense_layers_may_be_listed(tmp_path: Path) -> None:
    types = ["dense"] * 2 + ["sparse"] * 59
    assert read(tmp_path, mlp_layer_types=types).dense_layers == 2
    assert read(tmp_path).dense_layers == 3


def test_blocks_of_fp8_are_read(tmp_path: Path) -> None:
    quant = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    assert read(tmp_path, quantization_config=quant).fp8_block == (128, 128)
    assert read(tmp_path).fp8_block is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": None}, "latent is None"),
        ({"q_lora_rank": "1536"}, "q_rank is '1536'"),
        ({"qk_rope_head_dim": 63}, "rope is 63"),
        ({"first_k_dense_replace": -1}, "dense_layers is -1"),
        ({"scoring_func": "softmax"}, "'softmax' and 'noaux_tc'"),
        ({"topk_method": "random"}, "'sigmoid' and 'random'"),
        ({"n_group": 7}, "256 experts do not stand in 7 groups"),
        ({"topk_group": 9}, "9 of 8 groups"),
        ({"num_experts_per_tok": 129}, "129 experts cannot be chosen from 4 groups of 32"),
        ({"num_experts_per_tok": 8.0}, "chosen is 8.0"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "dense layers, then sparse"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "yarn", "truncate": False}}, "truncate is False"),
        ({"vocab_size": 0, "rms_norm_eps": 0}, "vocab_size is 0.*norm_eps is 0"),
        ({"num_hidden_layers": 2**31}, "layers is 2147483648, expected an integer from 1 to 1,024"),
        ({"n_routed_experts": 10**6}, "experts is 1000000, expected an integer from 1 to 4,096"),
        ({"max_position_embeddings": 2**40}, "context_max is 1099511627776"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings is 'false'",
        ),
        ({"norm_topk_prob": 0}, "norm_topk_prob is 0, expected true or false"),
        ({"attention_bias": []}, "attention_bias is \\[\\], expected true or false"),
        ({"n_shared_experts": False}, "shared_experts is False"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0, expected a number above 1"),
        ({"rope_scaling": {"factor": 4.0}}, "has a factor and no rope_type"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1e-300}},
            "factor is 1e-300",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 0.5}},
            "blends from 1.0 to 0.5",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1e300}}, "mscale is 1e\\+300"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder_sparse_step": 2}, "layers without experts"),
        ({"mlp_only_layers": [0]}, "layers without experts"),
        ({"num_experts": None}, "experts is None"),
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
    ],
)
def test_qwen_with_experts_is_checked(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    raw = {**tiny.CONFIG, "model_type": "qwen3_moe", **experts, **changes}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=reason):
        models.find_config(tmp_path)


def test_a_name_that_is_none_lists_the_shapes() -> None:
    with pytest.raises(CheckpointError, match="none of deepseek-v2-lite, deepseek-v3, kimi-k2, sm"):
        models.find_config("deepseek-v9")
