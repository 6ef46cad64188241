"""A `config.json` says anything at all: it is read, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed import models
from tokenspeed.errors import CheckpointError
from tokenspeed.models.blocks import rope_table
from tokenspeed.models.config import LAYERS_MAX
from tokenspeed.models.families import SHAPES

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 80),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.sampled_from(["", "1", "default", "linear", "llama3", "yarn", "silu", "softmax", "greedy"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.just({}),
)
ROPE = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast",
        "mscale", "mscale_all_dim", "attention_factor", "original_max_position_embeddings",
        "rope_theta")  # fmt: skip
SCALING = st.dictionaries(st.sampled_from(ROPE), VALUES, max_size=4)
NAMES = ("rope_scaling", "rope_parameters")


@pytest.mark.parametrize("shape", sorted(file.stem for file in SHAPES.glob("*.json")))
@settings(max_examples=100)
@given(data=st.data())
def test_any_configuration_is_read_or_refused(
    shape: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw: dict[str, Any] = json.loads((SHAPES / f"{shape}.json").read_text())
    changed = st.dictionaries(st.sampled_from(sorted(raw)), VALUES, max_size=2)
    raw |= data.draw(changed)
    if data.draw(st.booleans()):
        raw[data.draw(st.sampled_from(NAMES))] = data.draw(SCALING)
    file = tmp_path_factory.getbasetemp() / f"{shape}.json"
    file.write_text(json.dumps(raw))
    try:
        config = models.find_config(file)
    except CheckpointError:
        return
    assert config.layers <= LAYERS_MAX
    short = attrs.evolve(config, context_max=min(config.context_max, 64))
    if short.rotary_dim <= 4096:
        assert torch.isfinite(rope_table(short)).all()
