"""A row's draw is its own: whoever else is in the batch, and however far its kept tokens reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.plan import Joined
from tokenspeed.request import SamplingParams
from tokenspeed.spmd import sampling
from tokenspeed.spmd.sampling import SamplerState, sample

VOCAB = 40

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.2, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 30]),
    min_p=st.sampled_from([0.0, 0.001, 0.3]),
    seed=st.integers(0, 2**40),
)


def draw(rows: list[SamplingParams], logits: torch.Tensor) -> list[int]:
    state = SamplerState(len(rows), VOCAB, torch.device("cpu"))
    for slot, row in enumerate(rows):
        state.join(Joined(slot=slot, params=row, prompt_ids=(1, 2)))
    return sample(state, logits, np.arange(len(rows))).token_ids.tolist()


def kept(row: SamplingParams, logits: torch.Tensor) -> set[int]:
    """The tokens that may be drawn, by sorting everything in float64."""
    probs = (logits.double() / row.temperature).softmax(dim=-1)
    order = probs.argsort(descending=True, stable=True).tolist()
    out: set[int] = set()
    before = 0.0
    for rank, token in enumerate(order):
        share = float(probs[token])
        close = 1e-6
        in_p = row.top_p == 1 or before < row.top_p + close
        if (
            in_p
            and (not row.top_k or rank < row.top_k)
            and share >= row.min_p * probs.max() - close
        ):
            out.add(token)
        before += share
    return out


@pytest.mark.parametrize("head", [2, 8, 1024])
@given(st.lists(params, min_size=1, max_size=5), st.integers(0, 2**31))
def test_company_changes_nothing(head: int, rows: list[SamplingParams], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "HEAD", head)
        together = draw(rows, logits)
        alone = [draw([row], logits[at : at + 1])[0] for at, row in enumerate(rows)]
    assert together == alone
    for row, own, token in zip(rows, logits, together, strict=True):
        if row.temperature == 0:
            assert token == int(own.argmax())
        else:
            assert token in kept(row, own)


@given(params.filter(lambda p: p.temperature > 0), st.integers(0, 2**31))
def test_the_head_is_only_a_short_cut(row: SamplingParams, seed: int) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    drawn = set()
    for head in (1, 3, 16, 1024):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "HEAD", head)
            drawn.add(draw([row], logits)[0])
    assert len(drawn) == 1
