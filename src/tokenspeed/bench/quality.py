"""What few bits cost: perplexity of a fixed text, by how weights and KV are kept.

Rule: the same tokens, cut into the same windows, through the model that is served. A window begins
with nothing cached; each of its tokens but the first is predicted from those before it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen
from rich.table import Table

from tokenspeed import models
from tokenspeed.bench.machine import machine
from tokenspeed.errors import ConfigError
from tokenspeed.plan import StepPlan
from tokenspeed.spmd.batch import Slots
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.text.tokenizer import Tokenizer

__all__ = ["KINDS", "Report", "measure"]

KINDS = (
    ("float32", "none", "auto"), ("bfloat16", "none", "auto"), ("bfloat16", "none", "float8"),
    ("bfloat16", "int8", "auto"), ("bfloat16", "int4", "auto"), ("bfloat16", "auto", "auto"),
    ("bfloat16", "auto", "float8"),
)  # fmt: skip
"""(dtype, quantize, kv_dtype), the exact one first."""

_PAGE = 16


@frozen
class Row:
    """One way to keep weights and KV: the weights' bytes, and the perplexity of the text."""

    dtype: str
    quantize: str
    kv_dtype: str
    weights_mb: float
    perplexity: float


@frozen
class Report:
    """All rows; of the text its name, the tokens that were predicted and a digest of them."""

    model: str
    machine: str
    text: str
    tokens: int
    digest: str
    rows: tuple[Row, ...]

    def table(self) -> Table:
        """For people."""
        title = f"{self.model}: {self.tokens:,} tokens of {self.text} ({self.digest})"
        table = Table("dtype", "--quantize", "--kv-dtype", "weights", "perplexity", "", title=title)
        exact = self.rows[0].perplexity
        for row in self.rows:
            more = f"{(row.perplexity / exact - 1) * 100:+.2f} %"
            cells = (f"{row.weights_mb:.0f} MB", f"{row.perplexity:.3f}", more)
            table.add_row(row.dtype, row.quantize, row.kv_dtype, *cells)
        return table

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return attrs.asdict(self)


def measure(
    model: str,
    text: str | None,
    tokens: int,
    window: int,
    progress: Callable[[str, int, int], None],
) -> Report:
    """The perplexity of a text, for each of KINDS.

    Args:
        model: as for `serve`.
        text: a file in UTF-8; None: this project's own README.
        tokens: of the text that are read, at most.
        window: tokens that see each other.
        progress: called with (kind, windows done, windows in all).

    Raises:
        ConfigError: the file is no text, or holds less than one window.
    """
    checkpoint = models.open_checkpoint(models.resolve_model(model))
    tokenizer = Tokenizer.from_source(checkpoint.tokenizer)
    if not 2 <= window <= checkpoint.config.context_max:
        expected = f"2 to {checkpoint.config.context_max}, the model's context"
        raise ConfigError("window", window, expected)
    ids = tokenizer.encode(_read(text), special=False)[:tokens]
    windows = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]
    if not windows:
        raise ConfigError("text", text, f"at least {window} tokens; it has {len(ids)}")
    rows = []
    for dtype, quantize, kv_dtype in KINDS:
        built = models.build(
            checkpoint, Mesh.single(), dtype=dtype, quantize=quantize, kv_dtype=kv_dtype
        )
        total = 0.0
        for done, own in enumerate(windows):
            progress(f"{dtype}, {quantize}, KV {kv_dtype}", done, len(windows))
            total += _surprise(built, own)
        mean = total / (len(windows) * (window - 1))
        rows.append(Row(dtype, quantize, kv_dtype, built.weights_bytes / 1e6, math.exp(mean)))
    digest = hashlib.sha256(np.array(windows, np.int32).tobytes()).hexdigest()[:12]
    predicted = len(windows) * (window - 1)
    return Report(model, machine(), text or "README.md", predicted, digest, tuple(rows))


def _read(path: str | None) -> str:
    if path is None:
        return str(importlib.metadata.metadata("tokenspeed").json["description"])
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", path, f"a file in UTF-8: {error}") from error


@torch.inference_mode()
def _surprise(model: models.Model, ids: Sequence[int]) -> float:
    """-log of the probability of each token but the first, summed, in one step.

    The plan asks for logits everywhere by taking all tokens but the first for guesses.
    """
    pages = -(-len(ids) // _PAGE)
    slots = Slots(1, pages, _PAGE, model.kv)
    one = np.zeros(1, np.int32)
    plan = StepPlan(
        step=0,
        slots=one,
        query_start=np.array([0, len(ids)], np.int32),
        token_ids=np.array(ids, np.int32),
        context_lens=one,
        sampled=np.ones(1, np.bool_),
        drafts=np.array([len(ids) - 1], np.int32),
        page_delta=np.array([(0, index, index) for index in range(pages)], np.int32),
        joined=(),
    )
    slots.patch(plan)
    logits, _ = model.step(model.params, slots.batch(plan), model.kv.allocate(pages, _PAGE))
    wanted = torch.tensor(ids[1:], dtype=torch.int64)[:, None]
    return -float(logits[:-1].float().log_softmax(dim=-1).gather(1, wanted).double().sum())
