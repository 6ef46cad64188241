"""Model files against transformers: equal logits from equal safetensors, prefilled and cached."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from models_here import needs_reference, needs_smollm2, reference
from tokenspeed import models
from tokenspeed.config import DEFAULT_MODEL, EngineConfig
from tokenspeed.plan import StepPlan
from tokenspeed.spmd import KV, Mesh
from tokenspeed.spmd.batch import Slots

transformers = pytest.importorskip("transformers", reason="the referee is not installed")

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("Llama", {"head_dim": 16}),
    "all heads": ("Llama", {"num_key_value_heads": 4}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "yarn": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0}
            | {"original_max_position_embeddings": 32, "beta_fast": 8.0},
        },
    ),
    "qwen3 moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3 moe tied": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2 with a window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
}


def save(name: str, folder: Path, **kind: Any) -> Any:
    """A random model of a case, saved; biases and norms are random too."""
    family, changes = CASES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **kind)
    (folder / "tokenizer.json").write_text("{}")
    return model


def logits(folder: Path, ids: Tensor, *, chunk: int, dtype: str = "float32") -> Tensor:
    """Logits of every position, the context fed in chunks over pages of 8."""
    built = models.build(models.open_checkpoint(folder), Mesh.single(), dtype=dtype)
    return fed(models.in_cache_groups(built, EngineConfig()), ids, chunk)


def slots_of(model: models.Model, tokens: int) -> tuple[Slots, KV]:
    """One slot with pages of 8 for so many tokens, which run backwards, and their KV."""
    longest = -(-tokens // 8)
    pages = longest * len(model.kv.groups.windows)
    slots = Slots(1, longest, 8, model.kv)
    delta = np.array([(0, index, pages - index) for index in range(pages)], np.int32)
    slots.patch(attrs.evolve(plan_of(torch.zeros(1), 0), page_delta=delta))
    return slots, model.kv.allocate(pages + 1, 8)


def plan_of(piece: Tensor, start: int) -> StepPlan:
    """A step that feeds these ids from a position on, and wants the logits of each."""
    return StepPlan(
        step=0,
        slots=np.zeros(1, np.int32),
        query_start=np.array([0, len(piece)], np.int32),
        token_ids=piece.numpy().astype(np.int32),
        context_lens=np.array([start], np.int32),
        sampled=np.ones(1, np.bool_),
        page_delta=np.empty((0, 3), np.int32),
        drafts=np.array([len(piece) - 1], np.int32),
    )


def fed(model: models.Model, ids: Tensor, chunk: int) -> Tensor:
    slots, kv = slots_of(model, len(ids))
    rows = []
    with torch.inference_mode():
        for start in range(0, len(ids), chunk):
            plan = plan_of(ids[start : start + chunk], start)
            out, kv = model.step(model.params, slots.batch(plan), kv)
            rows.append(out)
    return torch.cat(rows)


def greedy_ids(model: models.Model, prompt: list[int], count: int) -> list[int]:
    """What comes next, each by a forward over all that is before it, with nothing cached."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(fed(model, torch.tensor(ids), chunk=len(ids))[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1, 50])
def test_logits_equal_transformers(name: str, chunk: int, tmp_path: Path) -> None:
    peer = save(name, tmp_path)
    ids = torch.randint(0, 96, (50,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        wanted = peer(ids[None]).logits[0]
    assert wanted.std() > 0.3, "flat logits would hide errors"
    torch.testing.assert_close(logits(tmp_path, ids, chunk=chunk), wanted, atol=1e-4, rtol=1e-4)


@needs_smollm2
@needs_reference
def test_logits_of_the_default_model_equal_transformers() -> None:
    """The best five of the first step, which the reference has to four digits."""
    path = models.resolve_model(DEFAULT_MODEL)
    model = models.build(models.open_checkpoint(path), Mesh.single())
    for record in reference():
        best = fed(model, torch.tensor(record["prompt_ids"]), chunk=10**6)[-1].topk(5)
        ids, wanted = zip(*record["first_step_top5"], strict=True)
        assert best.indices.tolist() == list(ids)
        torch.testing.assert_close(best.values, torch.tensor(wanted), atol=1e-4, rtol=0)


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    save("llama", tmp_path / "one")
    save("llama", tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    ids = torch.arange(20)
    one, many = (logits(tmp_path / kind, ids, chunk=20) for kind in ("one", "many"))
    assert torch.equal(one, many)


def test_the_example_of_a_new_family_is_short() -> None:
    """models/README.md says what it takes, and that it is under 200 lines."""
    example = Path(models.__file__).parent / "qwen_moe.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 200


def test_model_files_know_no_rank_and_no_collective() -> None:
    """Reading a checkpoint places tensors on the mesh; a model's own files never speak of it."""
    reading = {"__init__", "build", "checkpoint", "gguf_file", "hub"}
    files = [f for f in Path(models.__file__).parent.glob("*.py") if f.stem not in reading]
    assert {f.stem for f in files} >= {"blocks", "llama", "config"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        word = re.search(
            r"all_reduce|all_gather|reduce_scatter|all_to_all|torch\.distributed|process_group|"
            r"\b(rank|coordinate|peers)\b\(|Mesh|Communicator|collectives",
            text,
        )
        assert word is None, f"{file.name} says {word.group()}: boundaries say how values lie"
