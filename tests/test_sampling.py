"""The sampler chooses what its parameters say, and a row's company changes nothing."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenspeed.plan import Joined
from tokenspeed.request import SamplingParams
from tokenspeed.spmd.sampling import Sampled, SamplerState, sample, uniforms

VOCAB = 50
CPU = torch.device("cpu")


def state_of(
    *params: SamplingParams, prompt: tuple[int, ...] = (1, 2), eos: int = 7
) -> SamplerState:
    state = SamplerState(len(params), VOCAB, CPU, (eos,))
    for slot, each in enumerate(params):
        state.join(Joined(slot=slot, params=each, prompt_ids=prompt))
    return state


def step(state: SamplerState, logits: Tensor, *slots: int) -> Sampled:
    return sample(state, logits, np.array(slots, np.int64))


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(params: SamplingParams, logits: Tensor, count: int) -> Counter[int]:
    """Tokens of `count` steps over the same logits."""
    state = state_of(params)
    return Counter(int(step(state, logits, 0).token_ids) for _ in range(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_the_argmax(dtype: torch.dtype) -> None:
    logits = logits_of(4).to(dtype)
    state = state_of(*[SamplingParams(temperature=0)] * 4)
    assert torch.equal(step(state, logits, 0, 1, 2, 3).token_ids, logits.argmax(-1))


def test_a_draw_does_not_depend_on_company_slot_or_preemption() -> None:
    mine = SamplingParams(seed=-5, top_p=0.9, frequency_penalty=0.5)
    others = [
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=3),
    ]
    steps = [logits_of(1, seed) for seed in range(20)]
    alone = state_of(mine)
    expected = [int(step(alone, logits, 0).token_ids) for logits in steps]
    batched = state_of(*others, mine)
    found = [
        int(step(batched, torch.cat([logits_of(3, 99), logits]), 0, 1, 2, 3).token_ids[3])
        for logits in steps[:10]
    ]
    resumed = state_of(SamplingParams(temperature=0), others[1])
    resumed.join(Joined(slot=1, params=mine, prompt_ids=(1, 2), output_ids=tuple(found)))
    found += [int(step(resumed, logits, 1).token_ids) for logits in steps[10:]]
    assert found == expected
    assert len(set(expected)) > 3


def test_frequencies_follow_the_tempered_softmax() -> None:
    logits, count = logits_of(1), 4000
    found = drawn(SamplingParams(seed=3, temperature=1.7), logits, count)
    expected = (logits[0].double() / 1.7).softmax(-1) * count
    common = [i for i in range(VOCAB) if expected[i] >= 5]
    chi2 = sum((found[i] - float(expected[i])) ** 2 / float(expected[i]) for i in common)
    degrees = len(common)
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1, temperature=2.0, top_k=4),
        SamplingParams(seed=1, temperature=2.0, top_p=0.6),
        SamplingParams(seed=1, temperature=2.0, min_p=0.2),
        SamplingParams(seed=1, temperature=2.0, top_k=9, top_p=0.8, min_p=0.1),
    ],
)
def test_filters_keep_exactly_their_support(params: SamplingParams) -> None:
    logits = logits_of(1) / 2
    probs = np.exp(logits[0].double().numpy() / params.temperature)
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    kept, mass = set(), 0.0
    for rank, token in enumerate(order.tolist()):
        enough = params.top_p < 1 and mass >= params.top_p
        if enough or (params.top_k and rank >= params.top_k):
            break
        if probs[token] >= params.min_p * probs.max():
            kept.add(token)
        mass += probs[token]
    assert 1 < len(kept) < VOCAB
    assert set(drawn(params, logits, 2000)) == kept


def test_penalties_follow_their_formulas() -> None:
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0
    )
    state = state_of(params, prompt=(3, 4))
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, 3], logits[0, 5], logits[0, 6] = 10.0, 6.0, 3.0
    # 3 was in the prompt: 10 / 2 = 5 < 6. Then 5 is out: 6 / 2 - 0.25 - 0.5 = 2.25 < 5, and so on.
    assert [int(step(state, logits, 0).token_ids) for _ in range(4)] == [5, 3, 3, 3]
    assert state.counts()[1][0, 3] == 3


def test_bias_and_bans_come_before_the_choice() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 5.0
    state = state_of(
        SamplingParams(temperature=0, logit_bias={9: 6.0}),
        SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(0,)),
    )
    assert step(state, logits, 0, 1).token_ids.tolist() == [9, 1]
    assert [int(step(state, logits[1:], 1).token_ids) for _ in range(2)] == [1, 7]


def test_a_slot_starts_anew() -> None:
    heavy = SamplingParams(temperature=0, logit_bias={9: 99.0}, min_tokens=9, presence_penalty=1)
    state = state_of(heavy)
    logits = logits_of(1)
    step(state, logits, 0)
    state.join(Joined(slot=0, params=SamplingParams(temperature=0), prompt_ids=(1,)))
    assert torch.equal(step(state, logits, 0).token_ids, logits.argmax(-1))


def test_what_another_request_said_in_a_slot_is_forgotten() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=10.0, frequency_penalty=2.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4], logits[0, 5] = 9.0, 8.0, 7.0
    state = state_of(params, prompt=(3,))
    assert int(step(state, logits, 0).token_ids) == 4
    state.join(Joined(slot=0, params=params, prompt_ids=(5,)))
    assert [int(step(state, logits, 0).token_ids) for _ in range(2)] == [3, 4]


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(3)
    params = SamplingParams(temperature=0, logit_bias={9: 99.0}, logprobs=2)
    bare = SamplingParams(temperature=0, logprobs=0)
    found = step(state_of(params, SamplingParams(seed=0), bare), logits, 0, 1, 2).logprobs
    own = logits.log_softmax(-1)
    assert sorted(found) == [0, 2]
    logprob, ids, values = found[0]
    assert logprob == pytest.approx(float(own[0, 9]))
    assert ids == tuple(own[0].topk(2).indices.tolist())
    assert values == pytest.approx(own[0].topk(2).values.tolist())
    assert found[2] == (pytest.approx(float(own[2].max())), (), ())


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError, match=f"token {VOCAB}: expected an id below {VOCAB}"):
        state_of(SamplingParams(logit_bias={VOCAB: 1.0}))


def splitmix64(state: int, count: int) -> list[int]:
    """The first outputs, as Steele, Lea and Flood write it."""
    found = []
    for i in range(1, count + 1):
        z = (state + i * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**64 - 1])
def test_a_seed_gives_the_same_numbers_for_ever(seed: int) -> None:
    """Those of SplitMix64, from its first output on."""
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973], "as published"
    wanted = [(z >> 12) * 2.0**-52 for z in splitmix64(splitmix64(seed, 1)[0], 5)]
    assert uniforms(np.full(5, seed, np.uint64), np.arange(5)).tolist() == wanted


def test_uniforms_are_uniform_and_distinct() -> None:
    seeds, positions = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(100))
    found = uniforms(seeds.ravel(), positions.ravel())
    assert ((found >= 0) & (found < 1)).all()
    assert len(np.unique(found)) == 10_000
    counts = np.histogram(found, 20, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 4 * math.sqrt(38)
