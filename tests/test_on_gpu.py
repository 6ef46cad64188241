"""A GPU serves the ids of a CPU: with graphs and without, a host tier, guesses, KV of 8 bits.

Rule: skipped where there is no GPU. float32, so that nothing but the order of sums differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from serving import serves
from test_deepseek_serve import OUTPUT, PROMPTS
from test_models import greedy_ids
from tokenspeed import models
from tokenspeed.engine import Engine
from tokenspeed.spmd import Mesh, replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed"),
]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "deepseek": {**tiny.DEEPSEEK, **tiny.ON_TRITON},
}
Case = tuple[Path, str, list[list[int]]]


@pytest.fixture(scope="module", params=[(m, kv) for m in MODELS for kv in ("auto", "float8")])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint, the dtype of its KV, and a CPU's ids, each by a forward of all before it."""
    name, kv_dtype = request.param
    folder = tiny.letters(tiny.write(tmp_path_factory.mktemp(name), **MODELS[name]))
    model = models.build(models.open_checkpoint(folder), Mesh.single(), kv_dtype=kv_dtype)
    return folder, kv_dtype, [greedy_ids(model, prompt, OUTPUT) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [
        {"cuda_graphs": False},
        {"overlap": 0},
        {"overlap": 1, "prefill_chunk": 7},
        {"overlap": 1, "host_pages": 64, "pages": 16},
        {"speculate": "ngram"},
    ],
    ids=str,
)
def test_a_gpu_serves_the_ids_of_a_cpu(
    case: Case,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, kv_dtype, expected = case
    captured, capture = [], replay.capture

    def counted(*given: Any) -> Any:
        captured.append(given)
        return capture(*given)

    monkeypatch.setattr(replay, "capture", counted)
    sizes = {"pages": 48, "page_size": 4, "slots": 3, "prefill_chunk": 24} | settings
    with Engine.from_pretrained(
        folder, dtype="float32", device="cuda", kv_dtype=kv_dtype, **sizes
    ) as engine:
        if "speculate" not in settings:
            assert bool(captured) == settings.get("cuda_graphs", True), "while it starts"
        serves(engine, PROMPTS, expected, hosted="host_pages" in settings)
    assert "could not be captured" not in caplog.text
