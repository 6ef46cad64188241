"""A tiny random Llama, written as a Hugging Face directory without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenspeed.models import LlamaConfig, llama, read_config
from tokenspeed.spmd.params import Parameter, leaves

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2.0**-17,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint in float32 with weights large enough for logits that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "tokenizer.json").write_text("{}")
    config = read_config(folder / "config.json")
    assert isinstance(config, LlamaConfig)
    random = torch.Generator().manual_seed(seed)
    tensors = {
        source.name: torch.randn(source.shape, generator=random) * 0.2
        for _, leaf in leaves(llama.parameters(config))
        if isinstance(leaf, Parameter)
        for source in leaf.sources
    }
    save_file(tensors, folder / "model.safetensors")
    return folder
