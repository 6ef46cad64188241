"""DeepSeek's family against transformers: equal logits from equal safetensors, however fed.

Rule: chunks of one token are attended to absorbed, those of fifty expanded: both must come out, and
what would come out of another model must not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from models_here import DATA, needs_deepseek_tiny, with_tokenizer
from stepping import Stepper
from test_models import fed, logits
from test_spmd import logits_of, on_threads
from tokenspeed import models
from tokenspeed.errors import CheckpointError
from tokenspeed.kernels.latent import absorbs
from tokenspeed.spmd import Executor, Mesh

transformers = pytest.importorskip("transformers", reason="the referee is not installed")

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
GROUPS = {"topk_method": "group_limited_greedy"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("DeepseekV3", {}),
    "v3 whole queries": ("DeepseekV3", {"q_lora_rank": None, "n_shared_experts": 2}),
    "v3 halves": ("DeepseekV3", {"rope_interleave": False}),
    "v3 yarn": ("DeepseekV3", {"rope_parameters": YARN}),
    "v3 one group": ("DeepseekV3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "v3 biases": ("DeepseekV3", {"attention_bias": True, "tie_word_embeddings": True}),
    "v3 dense": ("DeepseekV3", {"first_k_dense_replace": 3}),
    "v2": ("DeepseekV2", {"q_lora_rank": None, "n_shared_experts": 2}),
    "v2 groups": ("DeepseekV2", {**GROUPS, "num_experts_per_tok": 3, "routed_scaling_factor": 3.0}),
    "v2 yarn": ("DeepseekV2", {"rope_parameters": YARN}),
    "glm": ("Glm4MoeLite", {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8}),
}


def save(name: str, folder: Path, **changed: Any) -> Any:
    """A random model of a case, saved; biases and norms are random too."""
    family, changes = CASES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes, **changed})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


def prompt(tokens: int = 50) -> Tensor:
    return torch.randint(0, 96, (tokens,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_absorbed_and_expanded(name: str, tmp_path: Path) -> None:
    peer, ids = save(name, tmp_path), prompt()
    with torch.inference_mode():
        wanted = peer(ids[None]).logits[0]
    assert wanted.std() > 0.3, "flat logits would hide errors"
    sizes = {"latent": 24, "nope": 8, "rope": 8, "value": 12}
    assert absorbs(1, **sizes)
    assert not absorbs(50, **sizes)
    for chunk in (1, 7, 50):
        got = logits(tmp_path, ids, chunk=chunk)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    """Absorbed and expanded; what rounding does to the choice of experts is in it too."""
    folder = tiny.write(tmp_path, **tiny.DEEPSEEK)
    ids = torch.arange(3, 60)
    wanted = logits(folder, ids, chunk=57)
    for chunk in (1, 57):
        got = logits(folder, ids, chunk=chunk, dtype="bfloat16")
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).abs().mean() < 0.02 < 0.1 * wanted.std()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("v3", {"rope_interleave": False}),
        ("v3 halves", {"rope_interleave": True}),
        ("v3", {"n_group": 1, "topk_group": 1}),
        ("v3", {"topk_group": 3}),
        ("v3", {"norm_topk_prob": False}),
        ("v3", {"routed_scaling_factor": 1.0}),
        ("v3", {"num_experts_per_tok": 1}),
        ("v3 yarn", {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}),
        ("v3 yarn", {"rope_parameters": {**YARN, "mscale": 0.7}}),
        ("v3 yarn", {"rope_parameters": {**YARN, "original_max_position_embeddings": 1024}}),
        ("v2 groups", {"topk_method": "greedy"}),
        ("v2", {"norm_topk_prob": True}),
        ("v2", {"routed_scaling_factor": 2.0}),
    ],
)
def test_what_a_configuration_says_makes_a_difference(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    save(name, tmp_path)
    ids = prompt()
    before = logits(tmp_path, ids, chunk=50)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    assert (logits(tmp_path, ids, chunk=50) - before).abs().max() > 0.01


def test_tensors_of_further_layers_and_of_eyes_are_left_out(tmp_path: Path) -> None:
    """A checkpoint with a layer that predicts further tokens; and one with an unknown tensor."""
    save("v3", tmp_path)
    ids = prompt(9)
    before = logits(tmp_path, ids, chunk=9)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {**tensors, "model.layers.3.eh_proj.weight": torch.zeros(32, 64)}
    save_file(more, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown: model\.layers\.3\.eh_proj\.weight"):
        logits(tmp_path, ids, chunk=9)
    raw = json.loads((tmp_path / "config.json").read_text())
    more_layers = {**raw, "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(more_layers))
    assert torch.equal(logits(tmp_path, ids, chunk=9), before)
    seeing = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file({**seeing, "vision_tower.x": torch.zeros(2)}, tmp_path / "model.safetensors")
    nested = {"model_type": "kimi_k25", "text_config": raw}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert torch.equal(logits(tmp_path, ids, chunk=9), before)


@pytest.mark.parametrize(
    "axes", [{"tp": 2}, {"ep": 4}, {"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}], ids=str
)
@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None, "n_shared_experts": 0, "attention_bias": True}], ids=str
)
def test_ranks_equal_one_rank(
    axes: dict[str, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path, **{**tiny.DEEPSEEK, **changes})
    alone = logits_of(folder, Mesh.single())
    for got in on_threads(Mesh.of(**axes), lambda c: logits_of(folder, c.mesh, c)):
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


def test_experts_are_dealt_out_and_latents_are_not(tmp_path: Path) -> None:
    checkpoint = models.open_checkpoint(tiny.write(tmp_path, **tiny.DEEPSEEK))
    whole = models.build(checkpoint, Mesh.single())
    part = models.build(checkpoint, Mesh.of(tp=2, ep=4, rank=5))  # the second of two, of four
    own, every = part.params["layers"][1]["experts"], whole.params["layers"][1]["experts"]
    assert every["gate_up"].shape == (8, 32, 32)
    assert own["gate_up"].shape == (2, 16, 32)
    gate, up = every["gate_up"][2:4, 8:16], every["gate_up"][2:4, 24:]
    assert torch.equal(own["gate_up"], torch.cat((gate, up), dim=1))
    assert torch.equal(own["down"], every["down"][2:4, :, 8:])
    assert part.kv == whole.kv


def stepper(folder: Path, slots: int) -> Stepper:
    model = models.build(models.open_checkpoint(folder), Mesh.single())
    executor = Executor(model, slots=slots, pages=slots * 20, page_size=16, context_max=320)
    return Stepper(executor, 20, 16)


@needs_deepseek_tiny
@pytest.mark.parametrize("name", ["deepseek_tiny", "deepseek_v2_tiny"])
def test_reference_logits_and_greedy_ids(name: str, tmp_path: Path) -> None:
    folder = with_tokenizer(DATA / name, tmp_path)
    records = json.loads((folder / "reference.json").read_text())["records"]
    model = models.build(models.open_checkpoint(folder), Mesh.single())
    for record in records:
        wanted, ids = torch.tensor(record["logits"]), torch.tensor(record["prompt_ids"])
        for chunk in (1000, 60):
            got = fed(model, ids, chunk)[record["positions"]]
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
    steps = stepper(folder, len(records))
    for slot, record in enumerate(records):  # all together, the long prompt in chunks
        steps.join(slot, record["prompt_ids"])
    steps.generate(list(range(len(records))), 32, chunk=48)
    assert [steps.output(slot) for slot in range(len(records))] == [
        record["greedy_ids"] for record in records
    ]
