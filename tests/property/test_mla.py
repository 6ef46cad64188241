"""Latent attention: the reference equals one query at a time, and every backend the reference."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strategies import ROPE, SCALE, problems, random, rel
from tokenspeed.kernels import MlaPlan, mla_decode, mla_decode_plan, registry
from tokenspeed.kernels.listing import parse
from tokenspeed.kernels.mla import mla_problem
from tokenspeed.kernels.pages import EIGHT_BITS, rounded

ON_GPU = torch.cuda.is_available()

kinds = st.sampled_from(
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
        (torch.float32, EIGHT_BITS), (torch.bfloat16, EIGHT_BITS),
    ]
)  # fmt: skip
"""Dtypes of queries and of pages."""


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


def moved(plan: MlaPlan) -> MlaPlan:
    """The plan where backends want it."""
    return mla_decode_plan(
        there(plan.query_start),
        there(plan.kv_lens),
        there(plan.page_table),
        page_size=plan.page_size,
        heads=plan.heads,
        q_len_max=plan.q_len_max,
        latent=plan.latent,
        rope=plan.rope,
    )


def reference(
    q: Tensor, pages: Tensor, plan: MlaPlan, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    """In float64, not rounded to the dtype of `q`."""
    with registry.using(mla_decode="reference"):
        return mla_decode(q.double(), pages.double(), plan, scale)


def agree(
    backend: str,
    q: Tensor,
    pages: Tensor,
    plan: MlaPlan,
    error_max: float | None = None,
    scale: float = SCALE,
) -> None:
    """A backend equals the reference, twice bit for bit; strided inputs change nothing.

    In bfloat16 a few keys, or a few columns, may all be rounded the same way.
    """
    error_max = error_max or (1e-5 if q.dtype == torch.float32 else 8e-3)
    plan, q, pages = moved(plan), there(q), there(pages)
    wanted, wanted_lse = reference(q, pages, plan, scale)
    apart = torch.cat((q, q + 1), dim=1)[:, : plan.heads]
    with registry.using(mla_decode=backend):
        # What is allocated next lies where this lay.
        torch.full_like(wanted, math.nan, dtype=q.dtype)
        out, lse = mla_decode(q, pages, plan, scale)
        again = mla_decode(apart, pages, plan, scale)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    if bool(wanted.any()):
        assert rel(out, wanted) <= error_max
    assert not bool(out[wanted_lse == -math.inf].any())
    torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=1e-3)


@given(problems(), kinds)
def test_the_cpu_keeps_the_contract(
    problem: tuple[Tensor, Tensor, MlaPlan], kind: tuple[torch.dtype, torch.dtype]
) -> None:
    q, pages, plan = problem
    if not ON_GPU:
        agree("cpu", q.to(kind[0]), rounded(pages, kind[1]), plan)


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
@given(problems(), kinds)
def test_triton_keeps_the_contract(
    problem: tuple[Tensor, Tensor, MlaPlan], kind: tuple[torch.dtype, torch.dtype]
) -> None:
    q, pages, plan = problem
    agree("triton", q.to(kind[0]), rounded(pages, kind[1]), plan)


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
def test_triton_merges_parts_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has programs for them; the short row stays whole."""
    lengths = torch.tensor([1100, 3], dtype=torch.int32)
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    table = torch.randperm(2 * 18, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    sizes = {"page_size": 64, "heads": 2, "q_len_max": 2, "latent": 16, "rope": ROPE}
    plan = mla_decode_plan(starts, lengths, table.view(2, 18), **sizes)
    q, pages = random(0, 3, 2, 32), random(0, 1, 16, 32)
    assert mla_problem(q, pages, plan).q_len == 2
    if not ON_GPU:
        monkeypatch.setattr("tokenspeed.kernels.triton.mla.cores", lambda _: 8)
    kernel = importlib.import_module("tokenspeed.kernels.triton.mla")
    shares = plan.once(kernel._shared_out, plan.once(kernel._shape, False))
    assert shares.rows[:, :2].tolist() == [[0, 5], [5, 1]] or ON_GPU
    agree("triton", random(2, 3, 2, 32), random(3, 36, 64, 32), plan)


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
@pytest.mark.skipif(
    bool(ON_GPU) and torch.cuda.get_device_capability()[0] != 9, reason="of capability 9.0 alone"
)
@given(
    problems(
        latent=512 if ON_GPU else 16,
        rope=64 if ON_GPU else 16,
        sizes=(32, 64, 128) if ON_GPU else (64,),
        heads_of=(3, 16, 40, 128) if ON_GPU else (1, 9),
    )
)
def test_triton_takes_pages_as_boxes(problem: tuple[Tensor, Tensor, MlaPlan]) -> None:
    """Small tiles and full ones; what lies behind the last key of a page is NaN."""
    q, pages, plan = problem
    kernel = importlib.import_module("tokenspeed.kernels.triton.mla")
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setattr(kernel, "_boxable", lambda pages: pages.element_size() == 2)
        agree("triton", q.to(torch.bfloat16), pages.to(torch.bfloat16), plan)


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
@pytest.mark.parametrize(
    ("capability", "room", "rows", "keys"),
    [
        (80, 166912, 16, 64),
        (80, 166912, 64, 32),
        (89, 101376, 64, 16),
        (90, 232448, 16, 32),
        (90, 232448, 32, 64),
        (90, 232448, 64, 64),
        (100, 232448, 16, 64),
        (100, 232448, 64, 32),
    ],
)
def test_triton_steps_have_room(
    capability: int, room: int, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What DeepSeek's sizes were compiled to fit into, on devices with so much shared memory."""
    kernel = importlib.import_module("tokenspeed.kernels.triton.mla")
    monkeypatch.setattr(kernel, "_major", lambda _: capability // 10)
    monkeypatch.setattr(kernel, "shared_bytes", lambda _: room)
    plan = of_lengths([4096], 16, rows // 16, 64, 0)
    assert kernel._shape(plan, capability == 90).keys == keys


HOPPER = "cuda_sm90"
needs_hopper = pytest.mark.skipif(
    not ON_GPU or registry.refusal(parse("mla_decode dtype=bf16 device=cuda"), HOPPER) is not None,
    reason="a GPU of capability 9.0, and nvcc",
)


held = st.sampled_from([torch.bfloat16, EIGHT_BITS])
both_widths = pytest.mark.parametrize("pages_of", [torch.bfloat16, EIGHT_BITS])


@needs_hopper
@given(problems(latent=512, rope=64, sizes=(64,), heads_of=(1, 5, 16, 40, 128)), held)
def test_hopper_keeps_the_contract(
    problem: tuple[Tensor, Tensor, MlaPlan], pages_of: torch.dtype
) -> None:
    q, pages, plan = problem
    agree(HOPPER, q.to(torch.bfloat16), rounded(pages, pages_of), plan)


@needs_hopper
@given(st.sampled_from([1e-30, 1e-6, 1e5, 1e30]), st.integers(0, 9))
def test_hopper_takes_queries_of_any_size(size: float, seed: int) -> None:
    """In half precision, where pages have 8 bits, they would be zeros or infinite."""
    plan = of_lengths([300, 70], 16, 1, 16, seed)
    q, pages = random(seed, 2, 16, 576) * size, rounded(random(seed, 16, 64, 576), EIGHT_BITS)
    q[0, 3], q[1, 5, 7] = 0.0, size * 1000
    agree(HOPPER, q.to(torch.bfloat16), pages, plan, scale=SCALE / size)


@needs_hopper
@pytest.mark.parametrize("heads", [16, 32, 64])
@both_widths
def test_hopper_keeps_up_with_scores_that_grow(heads: int, pages_of: torch.dtype) -> None:
    """Each page has a larger maximum than all before it, so that weights are made anew."""
    lens, pages = [40 * 64 - 7], random(1, 40, 64, 576) * torch.linspace(0.1, 6, 40)[:, None, None]
    plan = of_lengths(lens, heads, 1, 40, 1)
    plan.page_table.copy_(torch.arange(40)[None])
    q = random(2, 1, heads, 576).to(torch.bfloat16)
    agree(HOPPER, q, rounded(pages, pages_of), plan, error_max=3e-3)


@needs_hopper
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("nats", [8, 14, 17])
def test_hopper_hears_what_lies_under_a_sink(heads: int, nats: int) -> None:
    """One key that all look at and that says nothing; the others' weights are as small as that."""
    plan = of_lengths([16384], heads, 1, 256, 1)
    q, pages = random(2, 1, heads, 576), random(1, 256, 64, 576) / 8
    q[..., -1], pages[..., -1] = 16, 0
    sink = pages[int(plan.page_table[0, 0]), 0]
    sink.zero_()
    sink[-1] = nats / (16 * SCALE)
    q, pages = q.to(torch.bfloat16), rounded(pages, EIGHT_BITS)
    # The sink's own score, of which the rest is a share, is a sum cut off behind 13 bits.
    agree(HOPPER, q, pages, plan, error_max=2e-2)


@needs_hopper
@both_widths
def test_hopper_says_nan_where_queries_are(pages_of: torch.dtype) -> None:
    """And where they are infinite, as their scores are; what lies beside them is as without."""
    plan = of_lengths([9000, 70], 16, 1, 300, 1)
    q, pages = random(2, 2, 16, 576), rounded(random(1, 300, 64, 576), pages_of)
    whole = q.clone()
    q[0, 3, 5], q[1, 2, 7] = math.nan, math.inf
    with registry.using(mla_decode=HOPPER):
        kind = [there(x.to(torch.bfloat16)) for x in (q, whole)]
        (out, lse), (fine, _) = (mla_decode(one, there(pages), plan, SCALE) for one in kind)
    strange = torch.zeros(2, 16, dtype=torch.bool)
    strange[0, 3] = strange[1, 2] = True
    assert torch.equal(out.isnan().any(dim=-1).cpu(), strange)
    assert torch.equal(lse.isnan().cpu(), strange)
    torch.testing.assert_close(out[~strange], fine[~strange], rtol=2e-2, atol=1e-3)


def of_lengths(lens: list[int], heads: int, q_len: int, pool: int, seed: int) -> MlaPlan:
    """A plan of rows of these lengths on pages drawn from a pool of so many."""
    wide = -(-max(lens) // 64)
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    plan = mla_decode_plan(
        torch.arange(len(lens) + 1, dtype=torch.int32) * q_len,
        torch.tensor(lens, dtype=torch.int32),
        order[: wide * len(lens)].view(len(lens), wide),
        page_size=64,
        heads=heads,
        q_len_max=q_len,
    )
    return moved(plan)


@needs_hopper
@both_widths
@pytest.mark.parametrize(
    ("lens", "heads", "q_len"),
    [
        ([65536], 16, 4),
        ([65536, 30011, 12001, 4097, 1023], 16, 4),
        ([16384, 5], 128, 2),
        ([777 + i for i in range(300)], 16, 1),
        ([333], 16, 300),
    ],
)
def test_hopper_splits_long_rows_and_packs_short_ones(
    lens: list[int], heads: int, q_len: int, pages_of: torch.dtype
) -> None:
    pages = rounded(random(1, 5200, 64, 576), pages_of)
    q = random(2, len(lens) * q_len, heads, 576).to(torch.bfloat16)
    agree(HOPPER, q, pages, of_lengths(lens, heads, q_len, 5200, 3), error_max=3e-3)


@needs_hopper
@both_widths
@pytest.mark.parametrize(
    ("lens", "shared", "heads", "q_len"),
    [
        ([16384] * 8, [256] * 8, 16, 1),
        ([9000 + 70 * i for i in range(20)], [140] * 20, 16, 3),
        ([6000] * 9, [0, 90, 90, 3, 90, 90, 0, 93, 93], 5, 2),
        ([1000] * 300, [0, 15, 15] * 100, 16, 1),
        ([129 + 64 * i for i in range(60)], [60] * 60, 1, 5),
        ([2300, 2200, 2100], [0, 32, 32], 128, 1),
    ],
)
def test_hopper_reads_once_what_rows_share(
    lens: list[int], shared: list[int], heads: int, q_len: int, pages_of: torch.dtype
) -> None:
    """shared: pages that a row begins with like the one before it."""
    pages = rounded(random(1, 5200, 64, 576), pages_of)
    q = random(2, len(lens) * q_len, heads, 576).to(torch.bfloat16)
    plan = of_lengths(lens, heads, q_len, 5200, 3)
    for row in range(1, len(lens)):
        plan.page_table[row, : shared[row]] = plan.page_table[row - 1, : shared[row]]
    agree(HOPPER, q, pages, plan, error_max=3e-3)


@needs_hopper
@both_widths
def test_hopper_launches_do_not_disturb_each_other(pages_of: torch.dtype) -> None:
    """Back to back, with other pages and lengths each time, on one stream and without waiting."""
    pages = there(rounded(random(1, 2200, 64, 576), pages_of))
    q = there(random(2, 8, 16, 576).to(torch.bfloat16))
    plans = [of_lengths([9000 + 900 * i, 70 + i, 64 * i, 1], 16, 2, 2200, i) for i in range(8)]
    wanted = [reference(q, pages, plan) for plan in plans]
    with registry.using(mla_decode=HOPPER):
        got = [mla_decode(q, pages, plan, SCALE)[0] for plan in plans * 4]
    for (out, _), found in zip(wanted * 4, got, strict=True):
        assert rel(found, out) <= 3e-3


@needs_hopper
def test_hopper_plans_anew_at_each_replay_of_a_graph() -> None:
    pages = there(random(1, 500, 64, 576).to(torch.bfloat16))
    q = there(random(2, 2, 16, 576).to(torch.bfloat16))
    plan = of_lengths([9000, 9000], 16, 1, 500, 1)

    def step() -> Tensor:
        sizes = {"page_size": 64, "heads": 16, "q_len_max": 1}
        again = mla_decode_plan(plan.query_start, plan.kv_lens, plan.page_table, **sizes)
        with registry.using(mla_decode=HOPPER):
            return mla_decode(q, pages, again, SCALE)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    apart = plan.page_table.clone()
    for shared, lens in (
        *((0, [9000, 9000]), (0, [1, 8999]), (0, [4097, 0])),
        *((60, [9000, 8000]), (141, [9000, 9000]), (0, [9000, 9000])),
    ):
        plan.kv_lens.copy_(torch.tensor(lens))
        plan.page_table.copy_(apart)
        plan.page_table[1, :shared] = apart[0, :shared]
        graph.replay()
        assert rel(out, reference(q, pages, plan)[0]) <= 3e-3
