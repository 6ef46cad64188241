"""Models as steps for plans that people write: what a plan, a size and a machine must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from tokenspeed import models
from tokenspeed.errors import CheckpointError, ConfigError, ContractError
from tokenspeed.plan import StepPlan
from tokenspeed.spmd import Mesh


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    return models.build(str(tiny.write(tmp_path_factory.mktemp("small"))), Mesh.single())


ONE = np.zeros(1, np.int32)
WRITTEN = {
    "step": 0,
    "slots": ONE,
    "query_start": np.array([0, 3], np.int32),
    "token_ids": np.array([1, 2, 3], np.int32),
    "context_lens": ONE,
    "sampled": ONE == 0,
    "page_delta": np.array([[0, 0, 1]], np.int32),
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slots": ONE + 2}, "slots is 2 at 0; expected 0 to 1"),
        ({"slots": ONE - 1}, "slots is -1 at 0; expected 0 to 1"),
        ({"page_delta": np.array([[2, 0, 1]], np.int32)}, "page_delta's slot is 2 at 0"),
        ({"page_delta": np.array([[0, 4, 1]], np.int32)}, "page_delta's index is 4 at 0"),
        ({"page_delta": np.array([[0, 0, 4]], np.int32)}, "page_delta's page is 4 at 0; expec.* 3"),
        ({"page_delta": np.array([[0, 0, -2]], np.int32)}, "page_delta's page is -2 at 0"),
        ({"page_delta": np.array([0, 0, 1], np.int32)}, r"page_delta is int32\[3\]; expected"),
        ({"token_ids": np.array([1, 2, 96], np.int32)}, "token_ids is 96 at 2; expected 0 to 95"),
        ({"token_ids": np.array([1, -1, 3], np.int32)}, "token_ids is -1 at 1"),
        ({"token_ids": np.array([1.0, 2.0, 3.0])}, r"token_ids is float64\[3\]; expected int32"),
        ({"query_start": np.array([0, 4], np.int32)}, r"query_start is \[0, 4\]; expected 0, then"),
        ({"query_start": np.array([0], np.int32)}, r"query_start is int32\[1\]; expected .*\[2\]"),
        ({"context_lens": ONE + 14}, "context_lens is 14 at 0; expected 0 to 13"),
        ({"drafts": ONE + 3}, "drafts is 3 at 0; expected 0 to 2"),
        ({"sampled": ONE}, "sampled is int32"),
    ],
)
def test_a_written_plan_is_checked_and_the_kv_kept(
    small: models.Model, changes: dict[str, Any], reason: str
) -> None:
    kv = small.allocate(slots=2, pages=4, page_size=4)
    with pytest.raises(ContractError, match=f"a step: {reason}"):
        small(small.params, kv, StepPlan(**{**WRITTEN, **changes}))
    _, logits = small(small.params, kv, StepPlan(**WRITTEN))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["slots", "pages", "page_size"])
@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_there_is_something_to_allocate(small: models.Model, name: str, size: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got {size}; expected an integer from 1"):
        small.allocate(**{"slots": 2, "pages": 4, "page_size": 4, name: size})


def test_weights_beyond_the_memory_are_refused_before_it_is_taken() -> None:
    huge = models.open_model("deepseek-v3", "dummy")
    with pytest.raises(CheckpointError, match=r"take 2,684 GB, cpu has .* GB; share the model"):
        models.build(huge, Mesh.single())
    with pytest.raises(CheckpointError, match=r"take 1,342 GB"):
        models.build(huge, Mesh.single(), dtype="bfloat16")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mesh": "tp=2"}, "mesh: got 'tp=2'; expected a Mesh"),
        ({"kv_dtype": "int8"}, "kv_dtype: got 'int8'; expected one of auto, float8"),
        ({"quantize": "int3"}, "quantize: got 'int3'; expected one of none, auto, int8, int4"),
        ({"device": "tpu"}, "device: got 'tpu'; expected a torch device"),
        pytest.param(
            {"device": "cuda"},
            "device: got 'cuda'; expected cpu: torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        models.build(str(tiny.write(tmp_path)), **{"mesh": Mesh.single(), **given})
