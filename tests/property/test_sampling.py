"""A row's draw is its own: whoever else is in the batch, and however far its kept tokens reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import moved
from tokenspeed import kernels
from tokenspeed.kernels import Draws, registry
from tokenspeed.plan import Joined
from tokenspeed.request import SamplingParams
from tokenspeed.spmd.sampling import SamplerState, _edit, sample

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
        patch.setattr("tokenspeed.kernels.cpu.sampling.HEAD", head)
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
            patch.setattr("tokenspeed.kernels.cpu.sampling.HEAD", head)
            drawn.add(draw([row], logits)[0])
    assert len(drawn) == 1


ids = st.integers(0, VOCAB - 1)
editing = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 3.0]),
    logit_bias=st.dictionaries(ids, st.floats(-9, 9), max_size=3),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    min_tokens=st.integers(0, 4),
)


def edited(
    row: SamplingParams, logits: list[float], prompt: list[int], output: list[int], eos: int
) -> list[float]:
    """A token at a time, as `SamplingParams` says."""
    found = []
    for token, logit in enumerate(logits):
        score, times = logit + row.logit_bias.get(token, 0.0), output.count(token)
        if times or token in prompt:
            score = score / row.repetition_penalty if score > 0 else score * row.repetition_penalty
        score -= row.frequency_penalty * times + row.presence_penalty * bool(times)
        stops = token == eos or token in row.stop_token_ids
        found.append(-math.inf if stops and len(output) < row.min_tokens else score)
    return found


@given(
    st.lists(st.tuples(editing, st.lists(ids, max_size=6), st.lists(ids, max_size=4)), min_size=1),
    st.integers(0, 2**31),
    st.data(),
)
def test_all_rows_are_edited_at_once_as_each_is_by_itself(
    rows: list[tuple[SamplingParams, list[int], list[int]]], seed: int, data: st.DataObject
) -> None:
    """In slots of any order, over two steps: what the first one says counts in the second."""
    state = SamplerState(len(rows), VOCAB, torch.device("cpu"), (7,))
    slots = data.draw(st.permutations(range(len(rows))))
    for slot, (row, prompt, output) in zip(slots, rows, strict=True):
        state.join(
            Joined(slot=slot, params=row, prompt_ids=tuple(prompt), output_ids=tuple(output))
        )
    outputs = [list(output) for *_, output in rows]
    for step in (0, 1):
        logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed + step))
        own, at = logits.clone(), np.array(slots)
        got = _edit(state, logits, at, np.ones(len(rows), np.bool_)).tolist()
        assert torch.equal(logits, own), "the model's own stay as they are"
        for i, (row, prompt, _) in enumerate(rows):
            wanted = edited(row, logits[i].tolist(), prompt, outputs[i], 7)
            assert got[i] == pytest.approx(wanted, abs=1e-5)
        said = sample(state, logits, at).token_ids.tolist()
        for output, token in zip(outputs, said, strict=True):
            output.append(token)


def intervals(scores: list[float], how: list[float]) -> dict[int, tuple[float, float]]:
    """Token -> between which u it is drawn, by the definition, in float64."""
    _, temperature, top_k, top_p, min_p = how
    top = max(scores)
    powers = [math.exp((score - top) / temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    before, kept = 0.0, []
    for rank, token in enumerate(order):
        in_p = top_p >= 1 or before < top_p * math.fsum(powers)
        if (not top_k or rank < top_k) and in_p and powers[token] >= min_p:
            kept.append(token)
        before += powers[token]
    total, done, found = math.fsum(powers[token] for token in kept), 0.0, {}
    for token in sorted(kept):
        found[token] = done / total, (done + powers[token]) / total
        done += powers[token]
    return found


filters = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0.0, 1.0, 2.0, 7.0, 60.0]),
    st.sampled_from([0.13, 0.52, 0.91, 1.0]),
    st.sampled_from([0.0, 0.0101, 0.37]),
)


@pytest.mark.parametrize("backend", registry.offering("draw"))
@given(
    st.lists(filters, min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.integers(1, 50),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_a_token_is_drawn_where_the_definition_has_it(
    backend: str,
    rows: list[tuple[float, ...]],
    seed: int,
    vocab: int,
    dtype: torch.dtype,
    ties: bool,
) -> None:
    """Up to rounding of u; equal scores too, of which those with lower ids are kept."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(rows), vocab, generator=generator) * 2
    scores = (scores.round() if ties else scores).to(dtype)
    scores[:, seed % vocab] = 1.0
    if vocab > 1:
        scores[0, (seed + 1) % vocab] = float("-inf")
    draws = Draws(torch.tensor(rows, dtype=torch.float64).T.contiguous())
    with registry.using(draw=backend):
        got = kernels.draw(moved(scores, backend), Draws(moved(draws.table, backend))).tolist()
        last = Draws(moved(draws.table[:, -1:], backend))
        alone = kernels.draw(moved(scores[-1:], backend), last).tolist()
    assert alone == got[-1:], "a row is drawn by itself"
    for own, how, token in zip(scores.tolist(), rows, got, strict=True):
        low, high = intervals(own, list(how))[token]
        assert low - 1e-5 <= how[0] <= high + 1e-5


@pytest.mark.parametrize("backend", [name for name in registry.offering("draw") if name != "cpu"])
def test_a_wide_vocabulary_is_drawn_block_by_block(backend: str) -> None:
    """More tokens than a program takes at once; with filters and without."""
    scores = torch.randn(3, 4500, generator=torch.Generator().manual_seed(4)) * 3
    hows = [(0, 1, 0), (0, 0.9, 0), (700, 0.97, 0.001)]
    table = torch.tensor([(0.71, 1.3, *how) for how in hows], dtype=torch.float64)
    with registry.using(draw=backend):
        got = kernels.draw(moved(scores, backend), Draws(moved(table.T.contiguous(), backend)))
    for own, how, token in zip(scores.tolist(), table.tolist(), got.tolist(), strict=True):
        low, high = intervals(own, how)[token]
        assert low - 1e-5 <= how[0] <= high + 1e-5
