"""Latent attention expanded equals latent attention absorbed, row by row and in a mixed step."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strategies import ROPE, SCALE, dtypes, moved, problems, random, rel, steps
from tokenspeed.errors import ContractError
from tokenspeed.kernels import (
    AttentionPlan,
    MlaPlan,
    latent_attention,
    mla_decode,
    mla_decode_plan,
    mla_prefill,
    registry,
)
from tokenspeed.kernels import latent as latent_file
from tokenspeed.kernels.pages import EIGHT_BITS, rounded

NOPE, VALUE = 6, 10


def widened(q: Tensor, heads: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries [T, H, N + E] and a matrix up [H, N + V, C] for a problem of mla_decode."""
    tokens, latent = len(q), q.shape[2] - ROPE
    return random(seed, tokens, heads, NOPE + ROPE), random(
        seed + 1, heads, NOPE + VALUE, latent
    ) / 4


def absorbed(q: Tensor, pages: Tensor, up: Tensor, plan: MlaPlan) -> Tensor:
    """What the definition of absorbing says, by mla_decode's reference in float64."""
    q, pages, up = q.double(), pages.double(), up.double()
    turned = torch.einsum("thn,hnc->thc", q[..., :NOPE], up[:, :NOPE])
    with registry.using(mla_decode="reference"):
        mixed, _ = mla_decode(torch.cat((turned, q[..., NOPE:]), -1), pages, plan, SCALE)
    return torch.einsum("thc,hvc->thv", mixed, up[:, NOPE:])


@pytest.mark.parametrize("backend", registry.offering("mla_prefill"))
@given(problems(), st.integers(0, 99), dtypes, st.booleans())
def test_expanding_equals_absorbing(
    backend: str,
    problem: tuple[Tensor, Tensor, MlaPlan],
    seed: int,
    dtype: torch.dtype,
    eight: bool,
) -> None:
    q, pages, plan = problem
    pages = rounded(pages, EIGHT_BITS if eight else dtype)
    wide, up = (x.to(dtype) for x in widened(q, plan.heads, seed))
    wanted = absorbed(wide, pages, up, plan)
    given_ = [moved(value, backend) for value in (wide, pages, up, plan)]
    with registry.using(mla_prefill=backend):
        got = mla_prefill(*given_, SCALE).cpu()
    assert got.dtype == dtype
    assert rel(got, wanted) <= (1e-5 if dtype == torch.float32 else 3e-2)


@given(steps(), st.integers(0, 99), st.sampled_from([1, 4]), st.integers(0, 3), st.booleans())
def test_a_step_takes_both_forms(
    step: tuple[AttentionPlan, int, int], seed: int, heads: int, padding: int, known: bool
) -> None:
    """Rows of up to five queries are absorbed here, longer ones expanded, and padding is 0."""
    plan, pages_max, tokens = step
    if known:
        plan = attrs.evolve(plan, counts=tuple(plan.query_start.diff().tolist()))
    pages = random(seed, pages_max, plan.page_size, 16 + ROPE)
    q = random(seed + 1, tokens + padding, heads, 4 + ROPE)
    up = random(seed + 2, heads, 8, 16) / 4
    counts = plan.query_start.diff()
    forms = {
        latent_file.absorbs(count, latent=16, nope=4, rope=ROPE, value=4)
        for count in counts.tolist()
    }
    assert forms == {count <= 5 for count in counts.tolist()}
    every = mla_decode_plan(
        plan.query_start,
        plan.context_lens + counts,
        plan.page_table,
        page_size=plan.page_size,
        heads=heads,
        q_len_max=int(counts.max()),
        latent=16,
        rope=ROPE,
    )
    with registry.using(mla_prefill="reference"):
        wanted = mla_prefill(q, pages, up, every, SCALE)
    got = latent_attention(q, pages, up, plan, latent=16, scale=SCALE)
    assert rel(got, wanted) <= 1e-5
    assert not got[tokens:].any()


@pytest.mark.parametrize("count", [1, 5])
def test_a_plan_whose_counts_are_known_is_read_on_the_device_alone(count: int) -> None:
    """Tensors without values stand for a GPU that nobody may wait for, as while a graph is made."""
    ints = {"dtype": torch.int32, "device": "meta"}
    plan = AttentionPlan(
        query_start=torch.empty(4, **ints),
        context_lens=torch.empty(3, **ints),
        page_table=torch.empty(3, 2, **ints),
        page_size=4,
        counts=(count,) * 3,
    )
    sizes = {"heads": 2, "latent": 16, "nope": 4, "rope": ROPE, "value": 4}
    absorbed, expanded = latent_file._parts(plan, **sizes)
    assert expanded is None
    assert absorbed is not None
    assert (absorbed.tokens, absorbed.plan.q_len_max) == (None, count)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        latent_file._parts(attrs.evolve(plan, counts=None), **sizes)


def test_heads_are_expanded_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = mla_decode_plan(
        torch.tensor([0, 9], dtype=torch.int32),
        torch.tensor([40], dtype=torch.int32),
        torch.arange(10, dtype=torch.int32)[None],
        **{"page_size": 4, "heads": 5, "q_len_max": 9, "latent": 16, "rope": ROPE},
    )
    pages, q, up = random(1, 10, 4, 16 + ROPE), random(2, 9, 5, 6 + ROPE), random(3, 5, 16, 16)
    whole = mla_prefill(q, pages, up, plan, SCALE)
    monkeypatch.setattr("tokenspeed.kernels.cpu.mla.EXPANDED_MAX", 2 * 16 * 40)
    torch.testing.assert_close(mla_prefill(q, pages, up, plan, SCALE), whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"q": torch.zeros(2, 5, ROPE)},
            rf"q is \[2, 5, {ROPE}\]; expected shape \[tok",
        ),
        (
            {"up": torch.zeros(5, 6, 16)},
            r"up is \[5, 6, 16\]; .* \[5, more than 6, 16\]",
        ),
        ({"up": torch.zeros(4, 16, 16)}, "up"),
        ({"kv_pages": torch.zeros(1, 4, 16)}, "kv_pages"),
        ({"up": torch.zeros(5, 16, 16, dtype=torch.bfloat16)}, "up is torch.bfloat16"),
    ],
)
def test_what_breaks_the_contract_is_refused(change: dict[str, Tensor], named: str) -> None:
    plan = mla_decode_plan(
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        **{"page_size": 4, "heads": 5, "q_len_max": 2, "latent": 16, "rope": ROPE},
    )
    given_ = {
        "q": torch.zeros(2, 5, 6 + ROPE),
        "kv_pages": torch.zeros(1, 4, 16 + ROPE),
        "up": torch.zeros(5, 16, 16),
    } | change
    with pytest.raises(ContractError, match=named):
        mla_prefill(**given_, plan=plan, scale=1.0)
