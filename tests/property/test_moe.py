"""Experts: routing as its definition says, a token at a time; and every backend the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strategies import ON_GPU, TOLERANCE, dtypes, moved, seeds, tensor
from tokenspeed import kernels
from tokenspeed.kernels import Routing, registry


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """A way to choose, and how many experts there are."""
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 7), (2, 4), (4, 2), (4, 5), (3, 1)]))
    kept = draw(st.integers(1, groups))
    routing = Routing(
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        chosen=draw(st.integers(1, kept * per_group)),
        groups=groups,
        groups_chosen=kept,
        normalised=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )
    return routing, groups * per_group


def by_definition(logits: Tensor, own_bias: Tensor | None, how: Routing) -> dict[int, float]:
    """Expert -> weight of one token."""
    wide, bias = logits.double(), None if own_bias is None else own_bias.tolist()
    scores = (wide.sigmoid() if how.scoring == "sigmoid" else wide.softmax(0)).tolist()
    choice = [score + (bias[e] if bias else 0.0) for e, score in enumerate(scores)]
    size = len(logits) // how.groups
    members = [range(g * size, (g + 1) * size) for g in range(how.groups)]
    worth = [sum(sorted((choice[e] for e in m), reverse=True)[: 2 if bias else 1]) for m in members]
    best = sorted(range(how.groups), key=lambda g: -worth[g])[: how.groups_chosen]
    open_ = [e for g in best for e in members[g]]
    chosen = sorted(open_, key=lambda e: -choice[e])[: how.chosen]
    total = sum(scores[e] for e in chosen) if how.normalised else 1.0
    return {e: scores[e] / total * how.scale for e in chosen}


@pytest.mark.parametrize("backend", registry.offering("moe_route"))
@given(routings(), seeds, st.integers(1, 5), st.booleans())
def test_routing_is_its_definition(
    backend: str, how: tuple[Routing, int], seed: int, tokens: int, biased: bool
) -> None:
    routing, count = how
    logits = tensor(seed, tokens, count, dtype=torch.float32)
    bias = tensor(seed + 1, count, dtype=torch.float32) if biased else None
    given_ = [moved(value, backend) for value in (logits, bias, routing)]
    with registry.using(moe_route=backend):
        experts, weights = kernels.moe_route(*given_)
    assert experts.shape == weights.shape == (tokens, routing.chosen)
    assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
    for row in range(tokens):
        wanted = by_definition(logits[row], bias, routing)
        got = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert got == pytest.approx(wanted, abs=1e-5)


def test_each_part_of_a_routing_makes_a_difference() -> None:
    logits = tensor(0, 40, 8, dtype=torch.float32)
    bias = tensor(1, 8, dtype=torch.float32)

    def chosen(bias: Tensor | None, **changes: Any) -> Tensor:
        plain: dict[str, Any] = {"scoring": "sigmoid", "chosen": 2, "groups": 4, "groups_chosen": 2}
        experts, weights = kernels.moe_route(logits, bias, Routing(**(plain | changes)))
        return torch.zeros(40, 8).scatter_(1, experts, weights)

    variants = [
        chosen(bias),
        chosen(None),
        chosen(bias, scoring="softmax"),
        chosen(bias, groups=1, groups_chosen=1),
        chosen(bias, groups_chosen=3),
        chosen(bias, normalised=True),
        chosen(bias, scale=2.5),
        chosen(bias, chosen=3),
    ]
    for i, one in enumerate(variants):
        for other in variants[:i]:
            assert (one - other).abs().max() > 0.1


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tokens with their experts, some of which are nobody's, and the experts' matrices."""
    tokens, chosen, held = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    width, ffn = draw(st.sampled_from([(4, 6), (16, 8), (33, 17)]))
    dtype, seed = draw(dtypes), draw(seeds)
    # A token has an expert once; what lies beyond those held is held by somebody else.
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(held + 4, generator=random)[:chosen] for _ in range(tokens)]
    experts = torch.stack(rows)
    return {
        "x": tensor(seed, tokens, width, dtype=dtype),
        "experts": torch.where(experts < held, experts, -1),
        "weights": tensor(seed + 1, tokens, chosen, dtype=torch.float32),
        "gate_up": tensor(seed + 2, held, 2 * ffn, width, dtype=dtype) / width**0.5,
        "down": tensor(seed + 3, held, width, ffn, dtype=dtype) / ffn**0.5,
    }


def run(backend: str, given_: dict[str, Tensor]) -> Tensor:
    with registry.using(moe_mlp=backend):
        return kernels.moe_mlp(
            **{name: moved(value, backend) for name, value in given_.items()}
        ).cpu()


@given(mixtures())
def test_the_reference_is_each_token_by_itself(given_: dict[str, Tensor]) -> None:
    wanted = torch.zeros(given_["x"].shape, dtype=torch.float64)
    for row, own in enumerate(given_["experts"].tolist()):
        for place, expert in enumerate(own):
            if expert >= 0:
                wide = given_["gate_up"][expert].double() @ given_["x"][row].double()
                gate, up = wide.chunk(2)
                out = given_["down"][expert].double() @ (torch.nn.functional.silu(gate) * up)
                wanted[row] += float(given_["weights"][row, place]) * out
    limit = TOLERANCE[given_["x"].dtype]
    got = run("reference", given_)
    assert got.dtype == given_["x"].dtype
    torch.testing.assert_close(got.double(), wanted, atol=2 * limit, rtol=2 * limit)


@pytest.mark.parametrize(
    "backend", [name for name in registry.offering("moe_mlp") if name != "reference"]
)
@given(mixtures())
def test_experts(backend: str, given_: dict[str, Tensor]) -> None:
    """Few choices, which Triton multiplies one by one, and as if they were many."""
    limit = 2 * TOLERANCE[given_["x"].dtype]
    wanted = run("reference", given_)
    for most in (64, 0) if backend == "triton" else (None,):
        with pytest.MonkeyPatch.context() as patch:
            if most is not None:
                patch.setattr("tokenspeed.kernels.triton.moe.CHOICES_MAX", most)
            got = run(backend, given_)
        assert got.dtype == given_["x"].dtype
        torch.testing.assert_close(got, wanted, atol=limit, rtol=limit)


@pytest.mark.parametrize(
    "backend", [name for name in registry.offering("moe_route") if name != "reference"]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
@given(seeds, st.booleans(), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_whatever_the_logits_are_what_is_chosen_is_an_expert(
    backend: str, seed: int, grouped: bool, odd: float
) -> None:
    logits = tensor(seed, 2, 6, dtype=torch.float32)
    logits[0, seed % 6] = odd
    how = Routing(scoring="softmax", chosen=3, groups=2 if grouped else 1, groups_chosen=1)
    with registry.using(moe_route=backend):
        experts, _ = kernels.moe_route(moved(logits, backend), None, how)
    assert bool(((experts >= 0) & (experts < 6)).all())


@pytest.mark.skipif(bool(ON_GPU), reason="a law of the op, whichever machine runs it")
@given(mixtures(), st.data())
def test_experts_may_be_held_apart(given_: dict[str, Tensor], data: st.DataObject) -> None:
    """What two holders of the experts make of the same tokens adds up to the whole."""
    held = len(given_["gate_up"])
    cut = data.draw(st.integers(0, held))
    total = torch.zeros(given_["x"].shape)
    for low, high in ((0, cut), (cut, held)):
        own = given_["experts"] - low
        part = given_ | {
            "experts": torch.where((own >= 0) & (own < high - low), own, -1),
            "gate_up": given_["gate_up"][low:high],
            "down": given_["down"][low:high],
        }
        if high > low:
            total += run("cpu", part).float()
    limit = 3 * TOLERANCE[given_["x"].dtype]
    torch.testing.assert_close(total, run("cpu", given_).float(), atol=limit, rtol=limit)
