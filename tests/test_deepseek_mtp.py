"""The further layer of DeepSeek-V3 against transformers': equal logits, however it is fed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_deepseek import prompt, save
from test_models import plan_of, slots_of
from tokenspeed import models
from tokenspeed.errors import CheckpointError
from tokenspeed.models.deepseek_mtp import HIDDEN, PREDICT, Behind
from tokenspeed.spmd import Mesh

layers_of_transformers = pytest.importorskip(
    "transformers.modeling_layers", reason="the referee is not installed"
)


def published(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint for one of transformers' own."""
    name = key.removeprefix("mtp_block.")
    if name == "mlp.experts.gate_up_proj":
        for expert, both in enumerate(tensor):
            for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                yield f"mlp.experts.{expert}.{part}_proj.weight", half.clone()
    elif name == "mlp.experts.down_proj":
        for expert, down in enumerate(tensor):
            yield f"mlp.experts.{expert}.down_proj.weight", down.clone()
    else:
        own = "shared_head.norm.weight" if name == "post_norm.weight" else name
        yield own, tensor.clone()


def save_with_a_further_layer(folder: Path, name: str) -> tuple[Any, Any]:
    """transformers' model and its further layer, random, in one checkpoint."""
    main = save(name, folder, num_mtp_layers=1)
    further = layers_of_transformers.MtpModel(main, 1).eval()
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for key, tensor in further.layers[0].state_dict().items():
            tensor.copy_(torch.empty_like(tensor).normal_(std=0.3) + float(tensor.dim() == 1))
            tensors |= {f"model.layers.3.{name}": part for name, part in published(key, tensor)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return main, further


def ours(folder: Path, ids: Tensor, hidden: Tensor, chunk: int) -> Tensor:
    """Logits of the further layer at every position but the last."""
    checkpoint = models.open_checkpoint(folder)
    fields = {"hidden": torch.empty(1, 32, device="meta")}
    model = models.build(checkpoint, Mesh.single(), family=PREDICT, fields=fields)
    assert model.kv.layers == 1
    slots, kv = slots_of(model, len(ids))
    rows = []
    for start in range(0, len(ids) - 1, chunk):
        end = min(start + chunk, len(ids) - 1)
        plan = plan_of(ids[start + 1 : end + 1], start)
        batch = slots.batch(plan)
        behind = Behind(
            token_ids=batch.token_ids,
            hidden=hidden[start:end],
            positions=batch.positions,
            sampled_rows=batch.sampled_rows,
            groups=batch.groups,
            places=batch.places,
        )
        out, kv = model.step(model.params, behind, kv)
        rows.append(out)
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["v3", "v3 yarn", "v3 whole queries"])
def test_a_further_layer_equals_transformers(name: str, tmp_path: Path) -> None:
    main, further = save_with_a_further_layer(tmp_path, name)
    ids = prompt()
    with torch.inference_mode():
        last = main.model(ids[None]).last_hidden_state
        positions = torch.arange(1, len(ids))[None]
        made = further.forward_layer(0, last[:, :-1], positions, None, input_ids=ids[None, 1:])
        wanted = main.lm_head(made)[0]
        model = models.build(models.open_checkpoint(tmp_path), Mesh.single(), family=HIDDEN)
        slots, kv = slots_of(model, len(ids))
        own, _ = model.step(model.params, slots.batch(plan_of(ids, 0)), kv)
        torch.testing.assert_close(own, last[0], atol=1e-4, rtol=1e-4)
        assert wanted.std() > 0.3, "flat logits would hide errors"
        for chunk in (1, 7, 50):
            got = ours(tmp_path, ids, own, chunk)
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_without_it_says_what_is_missing(tmp_path: Path) -> None:
    save("v3", tmp_path, num_mtp_layers=1)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.3\.enorm\.weight \[32\]"):
        models.build(models.open_checkpoint(tmp_path), Mesh.single(), family=PREDICT)
