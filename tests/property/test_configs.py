"""Configurations: whatever a `config.json` says, it is read or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tokenspeed import models
from tokenspeed.errors import CheckpointError

SHAPES = Path(models.__file__).parent / "shapes"
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GOOD: list[dict[str, Any]] = [
    *(json.loads(file.read_text()) for file in sorted(SHAPES.glob("*.json"))),
    {**tiny.CONFIG, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
    {**tiny.CONFIG, "model_type": "qwen3_moe", **EXPERTS},
    {"model_type": "kimi_k25", "text_config": json.loads((SHAPES / "kimi-k2.json").read_text())},
]
MORE = (
    "rope_parameters", "rope_scaling", "quantization_config", "layer_types", "mlp_layer_types",
    "max_window_layers", "attention_bias", "mlp_bias", "head_dim", "scoring_func", "topk_method",
    "moe_layer_freq", "text_config", "mlp_only_layers", "partial_rotary_factor",
)  # fmt: skip
INNER = ("type", "rope_type", "factor", "beta_fast", "mscale", "weight_block_size", "quant_method")

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, 0.5, -1.0, "yarn", "linear", "llama3", "fp8", "softmax", "x"])
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@given(st.data())
def test_a_configuration_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    raw = dict(data.draw(st.sampled_from(GOOD)))
    half = raw.get("text_config", raw)
    keys = st.sampled_from(sorted({*half, *MORE}))
    changed = {**half, **data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))}
    raw = {**raw, "text_config": changed} if half is not raw else changed
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        config = models.find_config(folder)
    except CheckpointError as error:
        said = str(error)
    else:
        said = f"{folder / 'config.json'}: good" if config.layers >= 1 else "no layers"
    assert said.startswith(f"{folder / 'config.json'}: ")
