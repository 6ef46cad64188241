"""KV in 8 bits: half the bytes, and schedules change ids as little as they do otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from serving import serves
from test_deepseek_serve import OUTPUT, PROMPTS
from test_models import fed, greedy_ids
from tokenspeed import models
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine
from tokenspeed.ranks import build_on_mesh
from tokenspeed.spmd import Mesh


@pytest.fixture(scope="module", params=["llama", "deepseek"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, Any] = tiny.DEEPSEEK if request.param == "deepseek" else {}
    return tiny.letters(tiny.write(tmp_path_factory.mktemp(request.param), **config))


def built(folder: Path, kv_dtype: str) -> models.Model:
    return models.build(models.open_checkpoint(folder), Mesh.single(), kv_dtype=kv_dtype)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """Greedy ids, each by a step that writes all keys before it and reads them."""
    model = built(folder, "float8")
    return [greedy_ids(model, prompt, OUTPUT) for prompt in PROMPTS]


def test_a_token_takes_a_byte_for_each_number_and_is_rounded(folder: Path) -> None:
    whole = built(folder, "auto")
    settings = EngineConfig(dtype="float32", kv_dtype="float8")
    eight, _ = build_on_mesh(models.open_checkpoint(folder), settings, lambda _done, _all: None)
    assert eight.kv.token_bytes * 4 == whole.kv.token_bytes
    assert {part.dtype for part in eight.kv.allocate(3, 4)[0]} == {torch.float8_e4m3fn}
    ids = torch.tensor(PROMPTS[0])
    rounded, exact = (fed(model, ids, chunk=len(ids)).softmax(-1) for model in (eight, whole))
    assert 1e-5 < float((rounded - exact).abs().max()) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": 1, "prefill_chunk": 7},
        {"pages": 16},
        {"host_pages": 64, "pages": 16},
        {"speculate": "ngram"},
    ],
    ids=str,
)
def test_every_way_to_serve_gives_the_same_ids(
    folder: Path, expected: list[list[int]], settings: dict[str, Any]
) -> None:
    sizes = {"pages": 48, "page_size": 4, "slots": 3, "prefill_chunk": 24} | settings
    with Engine.from_pretrained(folder, dtype="float32", kv_dtype="float8", **sizes) as engine:
        serves(engine, PROMPTS, expected, hosted="host_pages" in settings)
