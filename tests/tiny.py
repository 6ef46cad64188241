"""Tiny random models, written as Hugging Face directories without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from tokenspeed.models import read_config
from tokenspeed.models.families import Family
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

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
"""What makes the same a DeepSeek: absorbed up to 17 queries, expanded from there on."""

ON_TRITON = {"kv_lora_rank": 32, "qk_rope_head_dim": 16}
"""Sizes that its latent attention takes: the reference waits for the GPU, so it is in no graph."""


def write(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint in float32 with weights large enough for logits that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "tokenizer.json").write_text("{}")
    config = read_config(folder / "config.json")
    random = torch.Generator().manual_seed(seed)
    tensors = {
        source.name: torch.randn(source.shape, generator=random) * 0.2
        for _, leaf in leaves(Family.of(config).parameters(config))
        if isinstance(leaf, Parameter)
        for source in leaf.sources
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def letters(folder: Path) -> Path:
    """The same checkpoint, with a tokenizer of single characters."""
    vocab = {chr(33 + i): i for i in range(94)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).save(str(folder / "tokenizer.json"))
    return folder
