"""Latent attention: the reference equals one query at a time, and every backend the reference."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenspeed.kernels import MlaPlan, mla_decode, mla_decode_plan, registry
from tokenspeed.kernels.mla import mla_problem

settings.register_profile(
    "few", parent=settings.default, max_examples=int(os.environ.get("EXAMPLES", "60"))
)
settings.load_profile("few")

ON_GPU = torch.cuda.is_available()
ROPE = 16


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def problems(draw: st.DrawFn, latent: int = 16) -> tuple[Tensor, Tensor, MlaPlan]:
    """Queries, pages of which what no row has is NaN, and a plan; on the CPU, in float32."""
    size = draw(st.sampled_from([1, 4, 16]))
    edges = [0, 1, size - 1, size, size + 1, 3 * size]
    keys = st.sampled_from(edges) | st.integers(0, 40)
    rows = draw(st.lists(st.tuples(st.integers(0, 6), keys), min_size=1, max_size=4))
    heads = draw(st.sampled_from([1, 3, 5, 16]))
    wide = max(1, *(-(-length // size) for _, length in rows))
    order = draw(st.permutations(range(wide * len(rows) + 2)))
    table = torch.tensor(order[: wide * len(rows)], dtype=torch.int32).view(len(rows), wide)
    seed = draw(st.integers(0, 2**31))
    pages = torch.full((len(order), size, latent + ROPE), math.nan)
    for row, (_, length) in enumerate(rows):
        at = torch.arange(length)
        pages[table[row, at // size], at % size] = random(seed + row, length, latent + ROPE)
    counts = [count for count, _ in rows]
    plan = mla_decode_plan(
        torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        torch.tensor([length for _, length in rows], dtype=torch.int32),
        table,
        page_size=size,
        heads=heads,
        q_len_max=max(1, *counts) + draw(st.integers(0, 2)),
        latent=latent,
        rope=ROPE,
    )
    return random(seed + len(rows), sum(counts), heads, latent + ROPE), pages, plan


SCALE = 0.2


@given(problems())
def test_the_reference_is_attention_of_each_query_by_itself(
    problem: tuple[Tensor, Tensor, MlaPlan],
) -> None:
    q, pages, plan = problem
    with registry.using(mla_decode="reference"):
        out, lse = mla_decode(q, pages, plan, SCALE)
    starts = plan.query_start.tolist()
    for row, length in enumerate(plan.kv_lens.tolist()):
        count = starts[row + 1] - starts[row]
        for j in range(count):
            seen = length - count + j + 1
            at = torch.arange(max(0, seen))
            keys = pages[plan.page_table[row, at // plan.page_size], at % plan.page_size]
            for head in range(plan.heads):
                token = starts[row] + j
                scores = [SCALE * float(q[token, head].dot(key)) for key in keys]
                total = math.fsum(math.exp(score) for score in scores)
                wanted = torch.zeros(plan.latent)
                for score, key in zip(scores, keys, strict=True):
                    wanted += math.exp(score) / total * key[: plan.latent]
                torch.testing.assert_close(out[token, head], wanted, atol=2e-5, rtol=2e-5)
                log = math.log(total) if total else -math.inf
                assert math.isclose(float(lse[token, head]), log, abs_tol=2e-5)


def there(value: Tensor) -> Tensor:
    return value.cuda() if ON_GPU else value


def rel(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||, in float64; NaN for a NaN."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def agree(backend: str, q: Tensor, pages: Tensor, plan: MlaPlan) -> None:
    """A backend equals the reference, twice bit for bit; strided inputs change nothing."""
    plan = mla_decode_plan(
        there(plan.query_start),
        there(plan.kv_lens),
        there(plan.page_table),
        page_size=plan.page_size,
        heads=plan.heads,
        q_len_max=plan.q_len_max,
        latent=plan.latent,
        rope=plan.rope,
    )
    q, pages = there(q), there(pages)
    with registry.using(mla_decode="reference"):
        wanted, wanted_lse = mla_decode(q, pages, plan, SCALE)
    apart = torch.cat((q, q + 1), dim=1)[:, : plan.heads]
    with registry.using(mla_decode=backend):
        out, lse = mla_decode(q, pages, plan, SCALE)
        again = mla_decode(apart, pages, plan, SCALE)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    if out.numel() and bool(wanted.any()):
        assert rel(out, wanted) <= (1e-5 if q.dtype == torch.float32 else 5e-3)
    assert not bool(out[wanted_lse == -math.inf].any())
    torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_triton_keeps_the_contract(
    problem: tuple[Tensor, Tensor, MlaPlan], dtype: torch.dtype
) -> None:
    q, pages, plan = problem
    agree("triton", q.to(dtype), pages.to(dtype), plan)


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
def test_triton_merges_parts_of_the_keys() -> None:
    lengths = torch.tensor([1100, 3], dtype=torch.int32)
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    table = torch.randperm(2 * 18, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    sizes = {"page_size": 64, "heads": 2, "q_len_max": 2, "latent": 16, "rope": ROPE}
    plan = mla_decode_plan(starts, lengths, table.view(2, 18), **sizes)
    assert mla_problem(random(0, 3, 2, 32), plan).q_len == 2
    agree("triton", random(2, 3, 2, 32), random(3, 36, 64, 32), plan)
