"""From logits to tokens, for every row of a step at once.

Rule: what a row draws depends on its own logits, parameters, seed and position in the sequence, on
nothing else: not on its neighbours, its slot, a preemption, or the device. So each row takes one
uniform number, the hash of (seed, position), and inverts the cumulative distribution with it.

In this order: logit bias, penalties, ban of stop tokens before `min_tokens`, temperature, then
top-k, top-p and min-p, each judged on the tempered distribution; a token must pass all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.plan import Joined
from tokenspeed.request import SamplingParams

__all__ = ["Logprobs", "Sampled", "SamplerState", "sample", "uniforms"]

Slots = NDArray[np.int64]
Logprobs = tuple[float, tuple[int, ...], tuple[float, ...]]
"""Of the chosen token; then the most probable ids, best first, and theirs."""

_U64 = 2**64 - 1


@final
@frozen(eq=False)
class Sampled:
    """What `sample` chose.

    Attributes:
        token_ids: int64[rows], on the device of the logits.
        logprobs: row -> of the model's own distribution, for the rows that asked.
    """

    token_ids: Tensor
    logprobs: Mapping[int, Logprobs]


@final
class SamplerState:
    """What the sampler keeps of every slot.

    Args:
        slots: requests that run at once.
        vocab: width of the logits.
        device: of the logits.
        eos_ids: the model's own end tokens.
    """

    def __init__(
        self, slots: int, vocab: int, device: torch.device, eos_ids: Sequence[int] = ()
    ) -> None:
        self.device = device
        self.shape = (slots, vocab)
        self.eos_ids = tuple(eos_ids)
        self.params: list[SamplingParams] = [SamplingParams(temperature=0.0)] * slots
        self.seed = np.zeros(slots, np.uint64)
        self.position = np.zeros(slots, np.int64)
        self.generated = np.zeros(slots, np.int64)
        self.greedy = np.ones(slots, np.bool_)
        self.filters = np.ones((4, slots))
        self.penalised = np.zeros(slots, np.bool_)
        self.penalties = np.zeros((3, slots))
        self.edited = np.zeros(slots, np.bool_)
        self.wants_logprobs = np.zeros(slots, np.bool_)
        self.bias: dict[int, tuple[Slots, NDArray[np.float32]]] = {}
        self.banned: dict[int, Slots] = {}
        self._counts: tuple[Tensor, Tensor] | None = None

    def counts(self) -> tuple[Tensor, Tensor]:
        """(in prompt bool, times in the output int32), both [slots, vocab], made when needed."""
        if self._counts is None:
            self._counts = (
                torch.zeros(self.shape, dtype=torch.bool, device=self.device),
                torch.zeros(self.shape, dtype=torch.int32, device=self.device),
            )
        return self._counts

    def join(self, joined: Joined) -> None:
        """Set a slot up anew. A preempted request brings its output and goes on where it was.

        Raises:
            IndexError: a token id of the request is outside of the vocabulary.
        """
        slot, params = joined.slot, joined.params
        self.params[slot] = params
        self.seed[slot] = (params.seed or 0) & _U64
        self.position[slot] = len(joined.prompt_ids) + len(joined.output_ids)
        self.generated[slot] = len(joined.output_ids)
        self.greedy[slot] = params.temperature == 0
        self.filters[:, slot] = params.temperature, params.top_k, params.top_p, params.min_p
        self.wants_logprobs[slot] = params.logprobs is not None
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self.penalties[:, slot] = penalties
        self.penalised[slot] = penalties != (1, 0, 0)
        stops = (*params.stop_token_ids, *(() if params.ignore_eos else self.eos_ids))
        self.bias.pop(slot, None)
        self.banned.pop(slot, None)
        if params.logit_bias:
            ids = self._checked(tuple(params.logit_bias))
            self.bias[slot] = ids, np.array(list(params.logit_bias.values()), np.float32)
        if params.min_tokens and stops:
            self.banned[slot] = self._checked(stops)
        self.edited[slot] = self.penalised[slot] or slot in self.bias or slot in self.banned
        if self.penalised[slot]:
            prompt, output = self.counts()
            prompt[slot] = False
            prompt[slot, self._ids(joined.prompt_ids)] = True
            output[slot] = torch.bincount(self._ids(joined.output_ids), minlength=self.shape[1])

    def _checked(self, ids: Sequence[int]) -> Slots:
        strange = [i for i in ids if not 0 <= i < self.shape[1]]
        if strange:
            raise IndexError(f"token {strange[0]}: expected an id below {self.shape[1]}")
        return np.array(ids, np.int64)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._checked(ids)).to(self.device)


def uniforms(seed: NDArray[np.uint64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), with 52 random bits.

    SplitMix64's finaliser over a Weyl sequence (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), which starts at the mixed seed.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(_mix(seed + gamma) + (position.astype(np.uint64) + np.uint64(1)) * gamma)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(state: SamplerState, logits: Tensor, slots: Slots) -> Sampled:
    """Choose a token for each row, and count it in the state.

    Args:
        state: of all slots; positions and penalties advance by the tokens chosen.
        logits: float32 or bfloat16 [rows, vocab], finite.
        slots: int64[rows], distinct.
    """
    edited, greedy = state.edited[slots], state.greedy[slots]
    scores = _edit(state, logits, slots, edited) if edited.any() else logits
    token_ids = kernels.argmax(scores) if greedy.any() else _empty(logits)
    if not greedy.all():
        rows = np.flatnonzero(~greedy)
        at = torch.from_numpy(rows).to(logits.device)
        draws = _draws(state, slots[rows])
        every = len(rows) == len(slots)
        token_ids[at] = kernels.draw(scores if every else scores[at], draws)
    penalised = np.flatnonzero(state.penalised[slots])
    if len(penalised):
        at = torch.from_numpy(penalised).to(logits.device)
        where = torch.from_numpy(slots[penalised]).to(logits.device)
        state.counts()[1][where, token_ids[at]] += 1
    state.position[slots] += 1
    state.generated[slots] += 1
    return Sampled(token_ids, _logprobs(state, logits, slots, token_ids))


def _empty(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)


def _draws(state: SamplerState, slots: Slots) -> kernels.Draws:
    u = uniforms(state.seed[slots], state.position[slots])
    table = np.concatenate((u[None], state.filters[:, slots]))
    return kernels.Draws(torch.from_numpy(table).to(state.device))


def _edit(state: SamplerState, logits: Tensor, slots: Slots, edited: NDArray[np.bool_]) -> Tensor:
    """Logits with bias, penalties and bans, in float32; the model's own stay as they are."""
    scores = logits.to(torch.float32, copy=True)
    rows = np.flatnonzero(edited)
    biased = [(row, *state.bias[slot]) for row, slot in _of(rows, slots) if slot in state.bias]
    if biased:
        at = _places(state, [(row, ids) for row, ids, _ in biased])
        bias = np.concatenate([values for *_, values in biased])
        scores[at] += torch.from_numpy(bias).to(state.device)
    penalised = rows[state.penalised[slots[rows]]]
    if len(penalised):
        _penalise(state, scores, penalised, slots[penalised])
    banned = [
        (row, state.banned[slot])
        for row, slot in _of(rows, slots)
        if slot in state.banned and state.generated[slot] < state.params[slot].min_tokens
    ]
    if banned:
        scores[_places(state, banned)] = float("-inf")
    return scores


def _of(rows: Slots, slots: Slots) -> list[tuple[int, int]]:
    """Rows with their slots."""
    return list(zip(rows.tolist(), slots[rows].tolist(), strict=True))


def _places(state: SamplerState, ids: list[tuple[int, Slots]]) -> tuple[Tensor, Tensor]:
    """Rows and columns of (row, ids), as an index."""
    rows = np.repeat([row for row, _ in ids], [len(own) for _, own in ids])
    columns = np.concatenate([own for _, own in ids])
    both = torch.from_numpy(np.stack((rows, columns))).to(state.device)
    return both[0], both[1]


def _penalise(state: SamplerState, scores: Tensor, rows: Slots, slots: Slots) -> None:
    """Change these rows, of these slots: repetition as in Keskar et al., 2019, then frequency and
    presence as in the API of OpenAI."""
    at, where = torch.from_numpy(np.stack((rows, slots))).to(state.device)
    penalties = torch.from_numpy(state.penalties[:, slots]).to(state.device, torch.float32)
    repetition, frequency, presence = penalties[:, :, None]
    prompt, output = (table[where] for table in state.counts())
    said, own = output > 0, scores[at]
    scaled = torch.where(own > 0, own / repetition, own * repetition)
    own = torch.where(prompt | said, scaled, own)
    scores[at] = own - output * frequency - said * presence


def _logprobs(
    state: SamplerState, logits: Tensor, slots: Slots, token_ids: Tensor
) -> dict[int, Logprobs]:
    rows = np.flatnonzero(state.wants_logprobs[slots])
    if not len(rows):
        return {}
    at = torch.from_numpy(rows).to(logits.device)
    own = logits[at].to(torch.float32).log_softmax(dim=-1)
    chosen = own.gather(1, token_ids[at][:, None]).squeeze(1).tolist()
    wanted = [state.params[slot].logprobs or 0 for slot in slots[rows]]
    best = own.topk(min(max(wanted), own.shape[1]), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return {
        row: (chosen[i], tuple(ids[i][: wanted[i]]), tuple(values[i][: wanted[i]]))
        for i, row in enumerate(rows.tolist())
    }
