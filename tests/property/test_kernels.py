"""Every backend keeps the contract: it equals the reference on whatever a step can look like."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise

import pytest
import torch
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from strategies import ON_GPU, TOLERANCE, dtypes, moved, seeds, steps, tensor
from tokenspeed import kernels
from tokenspeed.kernels import AttentionPlan, registry
from tokenspeed.kernels.cpu.library import attends_long, product_tokens
from tokenspeed.kernels.packing import unpack
from tokenspeed.kernels.pages import EIGHT_BITS, rounded


def backends(op: str) -> list[str]:
    """Those that have the op, beside the reference."""
    return [name for name in registry.offering(op) if name != "reference"]


def agree(op: str, backend: str, *args: object) -> None:
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    args = tuple(moved(arg, backend) for arg in args)
    results = []
    for name in ("reference", backend):
        with registry.using(**{op: name}):
            out = getattr(kernels, op.removesuffix("_packed"))(*args)
        results.append(out if isinstance(out, tuple) else (out,))
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype == dtype
        torch.testing.assert_close(
            got.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("backend", backends("rms_norm"))
@given(dtypes, seeds, st.integers(1, 7), st.sampled_from([1, 2, 8, 33]))
def test_dense_ops(backend: str, dtype: torch.dtype, seed: int, tokens: int, width: int) -> None:
    x = tensor(seed, tokens, 2 * width, dtype=dtype)
    residual = tensor(seed + 1, tokens, 2 * width, dtype=dtype)
    weight = tensor(seed + 2, 2 * width, dtype=dtype)
    agree("rms_norm", backend, x, weight, 1e-5)
    agree("add_rms_norm", backend, x, residual, weight, 1e-5)
    agree("silu_mul", backend, x)
    matrix = tensor(seed + 3, 5, 2 * width, dtype=dtype) / (2 * width) ** 0.5
    if backend in registry.offering("linear"):
        agree("linear", backend, x, matrix, None)
        agree("linear", backend, x, matrix, tensor(seed + 4, 5, dtype=dtype))
        ids = torch.randint(tokens, (6,), generator=torch.Generator().manual_seed(seed))
        agree("embedding", backend, ids, x)


@pytest.mark.parametrize("backend", backends("argmax"))
@given(dtypes, seeds, st.integers(1, 4), st.integers(1, 70), st.floats(0.5, 50), st.data())
def test_what_sampling_looks_at(
    backend: str,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    width: int,
    spread: float,
    data: st.DataObject,
) -> None:
    """Few distinct values, so that there are ties: the first one is meant."""
    x = (tensor(seed, rows, width, dtype=torch.float32) * spread).round().to(dtype)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))
    x[row, column] = data.draw(st.sampled_from([0.0, 1e30, float("-inf"), float("inf")]))
    with registry.using(argmax=backend, finite=backend):
        assert kernels.argmax(moved(x, backend)).tolist() == [
            own.index(max(own)) for own in x.tolist()
        ]
        x[row, column] = data.draw(
            st.sampled_from([0.0, 1e30, *map(float, ("nan", "inf", "-inf"))])
        )
        wanted = [all(map(math.isfinite, own)) for own in x.tolist()]
        assert kernels.finite(moved(x, backend)).tolist() == wanted


@given(seeds, st.sampled_from([4, 8]), st.integers(1, 40), st.integers(1, 5))
def test_packing_rounds_to_the_nearest_and_a_second_time_changes_nothing(
    seed: int, bits: int, rows: int, groups: int
) -> None:
    weight = tensor(seed, rows, 32 * groups, dtype=torch.float32)
    packed = kernels.pack(weight, bits)
    got = unpack(packed)
    low, high = weight.view(rows, groups, 32).aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # Half a step, and what float16 takes from the step (2^bits of them) and from the offset.
    bound = step / 2 + 2**-11 * (high - low) + 2**-11 * low.abs() + 2**-24 * 2**bits
    assert bool(((got - weight).view(rows, groups, 32).abs() <= bound).all())
    assert torch.equal(unpack(kernels.pack(got, bits)), got)


@pytest.mark.parametrize("backend", backends("linear_packed"))
@given(
    dtypes, seeds, st.sampled_from([4, 8]), st.integers(0, 19), st.integers(1, 40), st.booleans()
)
def test_linear_packed(
    backend: str, dtype: torch.dtype, seed: int, bits: int, tokens: int, rows: int, biased: bool
) -> None:
    """Exact where the numbers of x are whole and of 8 bits; a token alone is as among others."""
    x = torch.randint(-127, 128, (tokens, 96), generator=torch.Generator().manual_seed(seed))
    x[:, ::32] = 127
    weight = kernels.pack(tensor(seed + 1, rows, 96, dtype=torch.float32), bits)
    bias = tensor(seed + 2, rows, dtype=dtype) if biased else None
    agree("linear_packed", backend, x.to(dtype) / 512, weight, bias)
    with registry.using(linear_packed=backend):
        whole = kernels.linear(x.to(dtype), weight, bias)
        alone = kernels.linear(x[-1:].to(dtype), weight, bias)
    assert torch.equal(whole[-1:], alone)


@pytest.mark.skipif("native" not in backends("linear_packed"), reason="_cpu is not built")
@given(
    dtypes,
    seeds,
    st.integers(0, 40),
    st.integers(1, 70),
    st.integers(1, 100) | st.sampled_from([576, 17000]),
    st.integers(0, 5),
    st.booleans(),
)
@example(torch.bfloat16, 0, 49, 40, 576, 0, True)
@example(torch.bfloat16, 0, 70, 33, 9000, 0, False)
def test_native_products(
    dtype: torch.dtype,
    seed: int,
    tokens: int,
    rows: int,
    columns: int,
    apart: int,
    biased: bool,
) -> None:
    """A token alone is as among others: of as many as the kernel is meant for."""
    x = tensor(seed, tokens, columns + apart, dtype=dtype)[:, apart:]
    matrix = tensor(seed + 1, rows, columns, dtype=dtype) / columns**0.5
    bias = tensor(seed + 2, rows, dtype=dtype) if biased else None
    agree("linear", "native", x, matrix, bias)
    few = x[: product_tokens(1 if dtype == torch.bfloat16 else 0)]
    with registry.using(linear="native"):
        together = kernels.linear(few, matrix, bias)
        alone = [kernels.linear(few[at : at + 1], matrix, bias) for at in range(len(few))]
    assert torch.equal(together, torch.cat((together[:0], *alone)))


@given(dtypes, seeds, st.sampled_from([4, 8]))
def test_what_rounding_the_activations_costs(dtype: torch.dtype, seed: int, bits: int) -> None:
    """Half of 1/127 of a group's largest number each: 1 % of the result, in the mean over rows."""
    x = tensor(seed, 4, 576, dtype=dtype)
    weight = kernels.pack(tensor(seed + 1, 64, 576, dtype=torch.float32), bits)
    results = []
    for name in ("reference", "native"):
        with registry.using(linear_packed=name):
            results.append(kernels.linear(x, weight).float())
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 0.012


@pytest.mark.parametrize("backend", backends("rope"))
@given(
    dtypes,
    seeds,
    st.integers(1, 6),
    st.sampled_from([(1, 1), (4, 1), (9, 3), (4, 4)]),
    st.booleans(),
)
def test_rope(
    backend: str,
    dtype: torch.dtype,
    seed: int,
    tokens: int,
    heads: tuple[int, int],
    interleaved: bool,
) -> None:
    dim = 8
    q = tensor(seed, tokens, heads[0], dim, dtype=dtype)
    k = tensor(seed + 1, tokens, heads[1], dim, dtype=dtype)
    angles = torch.outer(torch.arange(32.0), 1.0 / 100.0 ** (torch.arange(0, dim, 2) / dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(32, (tokens,), generator=torch.Generator().manual_seed(seed))
    agree("rope", backend, q, k, positions, cos_sin, interleaved)


@given(seeds, st.sampled_from([2, 4, 8, 64]))
def test_neighbours_turn_like_halves_in_another_order(seed: int, dim: int) -> None:
    """And not like halves in the same order, unless there is one pair."""
    q, k = (tensor(seed + i, 3, 2, dim, dtype=torch.float32) for i in range(2))
    angles = tensor(seed + 2, 5, dim // 2, dtype=torch.float32)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([4, 1, 2])
    order = torch.arange(dim).view(-1, 2).T.flatten()
    turned = kernels.rope(q, k, positions, cos_sin, True)
    halves = kernels.rope(q[..., order], k[..., order], positions, cos_sin, False)
    for one, other in zip(turned, halves, strict=True):
        torch.testing.assert_close(one[..., order], other)
    same = kernels.rope(q, k, positions, cos_sin, False)
    assert torch.allclose(turned[0], same[0], atol=1e-3) == (dim == 2)


@pytest.mark.parametrize("backend", backends("paged_attention"))
@given(
    dtypes,
    seeds,
    steps(),
    st.sampled_from([(1, 1), (4, 1), (9, 3), (4, 4)]),
    st.none() | st.integers(1, 50),
    st.sampled_from([8, 16, 64]),
    st.booleans(),
)
def test_paged_attention(
    backend: str,
    dtype: torch.dtype,
    seed: int,
    step: tuple[AttentionPlan, int, int],
    heads: tuple[int, int],
    window: int | None,
    dim: int,
    eight: bool,
) -> None:
    plan, pages, tokens = step
    q = tensor(seed, tokens, heads[0], dim, dtype=dtype)
    k = tensor(seed + 1, pages, plan.page_size, heads[1], dim, dtype=dtype)
    v = tensor(seed + 2, pages, plan.page_size, heads[1], dim, dtype=dtype)
    k, v = (held(x, eight) for x in (k, v))
    agree("paged_attention", backend, q, k, v, plan, window)


@pytest.mark.skipif("native" not in backends("paged_attention"), reason="_cpu is not built")
@given(
    dtypes,
    seeds,
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.sampled_from([0, 1, 63, 64, 200]),
    st.sampled_from([(1, 1), (9, 3), (10, 1)]),
    st.sampled_from([24, 32, 64, 96]),
    st.none() | st.integers(1, 100),
    st.sampled_from([1, 16, 48]),
    st.booleans(),
)
@example(torch.bfloat16, 0, [70], 64, (9, 3), 64, None, 16, True)
def test_native_attention_of_long_rows(
    dtype: torch.dtype,
    seed: int,
    counts: list[int],
    context: int,
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    page: int,
    eight: bool,
) -> None:
    """Pages behind the window may be anybody's; what long rows have more of changes nothing."""
    wide = -(-(context + max(counts)) // page)
    hole = len(counts) * wide
    order = torch.randperm(hole, generator=torch.Generator().manual_seed(seed))
    plan = AttentionPlan(
        query_start=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        context_lens=torch.full((len(counts),), context, dtype=torch.int32),
        page_table=order.to(torch.int32).view(len(counts), wide),
        page_size=page,
    )
    q = tensor(seed, sum(counts), heads[0], dim, dtype=dtype)
    k, v = (tensor(seed + i, hole + 1, page, heads[1], dim, dtype=dtype) for i in (1, 2))
    with registry.using(paged_attention="reference"):
        wanted = kernels.paged_attention(q, held(k, eight), held(v, eight), plan, window)
    k[hole], v[hole] = torch.nan, torch.nan
    k, v = held(k, eight), held(v, eight)
    if window is not None:
        behind_is_nan(plan, window, hole)
    with registry.using(paged_attention="native"):
        got = kernels.paged_attention(q, k, v, plan, window)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), atol=tolerance, rtol=tolerance)
    first = counts[0] - 20
    number = int(dtype == torch.bfloat16)
    if first < 9 or not attends_long(number, 2 if eight else number, dim):
        return
    less = AttentionPlan(
        query_start=torch.tensor([0, first], dtype=torch.int32),
        context_lens=plan.context_lens[:1],
        page_table=plan.page_table[:1],
        page_size=page,
    )
    more = evolve(
        less, query_start=torch.tensor([0, 20]).int(), context_lens=less.context_lens + first
    )
    with registry.using(paged_attention="native"):
        parts = [
            kernels.paged_attention(q[:first], k, v, less, window),
            kernels.paged_attention(q[first : first + 20], k, v, more, window),
        ]
    assert torch.equal(torch.cat(parts), got[: counts[0]])


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 40), st.integers(0, 9))
def test_triton_tiles_have_every_query_once(counts: list[int], each: int, padding: int) -> None:
    """Behind the last query of a row a tile has none, and tokens that no row has are in no tile."""
    tiles = importlib.import_module("tokenspeed.kernels.triton.tiles")
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    made = tiles.tiled(starts, sum(counts) + padding, each)
    found = [
        (row, query)
        for row, first in zip(made.rows.tolist(), made.firsts.tolist(), strict=True)
        for query in range(first, min(first + each, counts[row]))
    ]
    assert found == [(row, query) for row, count in enumerate(counts) for query in range(count)]


def held(x: Tensor, eight: bool) -> Tensor:
    """As pages hold it."""
    return rounded(x, EIGHT_BITS) if eight else x


def behind_is_nan(plan: AttentionPlan, window: int, hole: int) -> None:
    """Puts a page into the table wherever no query of the row sees anything."""
    for row, context in enumerate(plan.context_lens.tolist()):
        plan.page_table[row, : max(0, context + 1 - window) // plan.page_size] = hole


@pytest.mark.parametrize("backend", registry.offering("paged_attention"))
@given(seeds, steps(), st.sampled_from([(1, 1), (9, 3)]), st.integers(1, 50), st.booleans())
def test_a_window_hides_what_is_behind_it(
    backend: str,
    seed: int,
    step: tuple[AttentionPlan, int, int],
    heads: tuple[int, int],
    window: int,
    eight: bool,
) -> None:
    """Against a full matrix; where nothing is seen, pages may be anybody's."""
    plan, pages, tokens = step
    q = tensor(seed, tokens, heads[0], 8, dtype=torch.float32)
    k, v = (
        held(tensor(seed + i, pages + 1, plan.page_size, heads[1], 8, dtype=q.dtype), eight).float()
        for i in (1, 2)
    )
    wanted = full_matrix(q, k, v, plan, window)
    k[pages], v[pages] = torch.nan, torch.nan
    k, v = (held(x, eight) for x in (k, v))
    behind_is_nan(plan, window, hole=pages)
    with registry.using(paged_attention=backend):
        got = kernels.paged_attention(*(moved(x, backend) for x in (q, k, v, plan)), window)
    torch.testing.assert_close(got.cpu(), wanted, atol=2e-5, rtol=2e-5)


def full_matrix(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int) -> Tensor:
    """A head and a query at a time, over the positions it sees, as the definition says."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[2]
    starts = plan.query_start.tolist()
    for row, context in enumerate(plan.context_lens.tolist()):
        for query in range(starts[row], starts[row + 1]):
            own = context + query - starts[row]
            seen = [
                (int(plan.page_table[row, at // plan.page_size]), at % plan.page_size)
                for at in range(own + 1)
                if own - at < window
            ]
            for head in range(q.shape[1]):
                keys = torch.stack([k[page, offset, head // group] for page, offset in seen])
                values = torch.stack([v[page, offset, head // group] for page, offset in seen])
                out[query, head] = (keys @ q[query, head] / 8**0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("backend", registry.offering("kv_write"))
@given(dtypes, seeds, st.integers(1, 8))
def test_kv_write_puts_each_token_in_its_place(
    backend: str, dtype: torch.dtype, seed: int, tokens: int
) -> None:
    device = "cuda" if backend in ON_GPU else "cpu"
    k_pages, v_pages = (torch.zeros(4, 4, 2, 8, dtype=dtype, device=device) for _ in range(2))
    k, v = (tensor(seed + i, tokens, 2, 8, dtype=dtype).to(device) for i in range(2))
    where = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:tokens].to(device)
    with registry.using(kv_write=backend):
        kernels.kv_write(k_pages, v_pages, k, v, where)
    assert torch.equal(k_pages.flatten(0, 1)[where], k)
    assert torch.equal(v_pages.flatten(0, 1)[where], v)
    assert int((k_pages != 0).any(-1).any(-1).sum()) <= tokens


@pytest.mark.parametrize("backend", registry.offering("kv_write"))
@given(dtypes, seeds, st.integers(1, 8))
def test_kv_write_fills_columns_of_wider_pages(
    backend: str, dtype: torch.dtype, seed: int, tokens: int
) -> None:
    """As latent attention has them: a latent and a shorter rotary key beside it."""
    pages = torch.zeros(4, 4, 12, dtype=dtype)
    wide = tensor(seed, tokens, 1, 12, dtype=dtype)
    where = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:tokens]
    pages, wide, where = (moved(value, backend) for value in (pages, wide, where))
    each = pages[:, :, None]
    with registry.using(kv_write=backend):
        kernels.kv_write(each[..., :8], each[..., 8:], wide[..., :8], wide[..., 8:], where)
    assert torch.equal(pages.flatten(0, 1)[where], wide[:, 0])
    assert int((pages != 0).any(-1).sum()) <= tokens


ALL_EIGHT_BITS = torch.arange(256, dtype=torch.uint8).view(EIGHT_BITS)


def eight_bits() -> st.SearchStrategy[float]:
    """Numbers that 8 bits hold, those halfway between two, and their neighbours; any others."""
    held = sorted(x for x in ALL_EIGHT_BITS.tolist() if x >= 0)
    halves = [(a + b) / 2 for a, b in pairwise([*held, 512.0])]
    edges = st.sampled_from(held + halves + [math.inf, math.nan, 464.0, 1e30])
    close = st.sampled_from([1.0, 1 - 2**-20, 1 + 2**-20])
    return st.builds(lambda x, y, sign: x * y * sign, edges, close, st.sampled_from([1.0, -1.0]))


def nearest(x: float) -> int:
    """The 8 bits of the number that is the closest to one; of two, the even."""
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    if math.isnan(x):
        return 0x7F
    held = ALL_EIGHT_BITS[:127].tolist()
    size = min(abs(x), 448.0)
    return sign | min(range(127), key=lambda code: (abs(held[code] - size), code % 2))


@pytest.mark.parametrize("backend", registry.offering("kv_write"))
@given(dtypes, st.lists(eight_bits(), min_size=16, max_size=16))
def test_pages_of_8_bits_hold_the_nearest_numbers(
    backend: str, dtype: torch.dtype, values: list[float]
) -> None:
    """Found among all of them; in whole pages and in columns of wider ones."""
    x = torch.tensor(values).to(dtype).view(2, 1, 8)
    where = torch.tensor([5, 2])
    pages = torch.zeros(3, 2, 1, 16).to(EIGHT_BITS)
    wide, x, where = (moved(value, backend) for value in (pages, x, where))
    keys, values_ = (torch.zeros_like(wide[..., :8]) for _ in range(2))
    with registry.using(kv_write=backend):
        kernels.kv_write(keys, values_, x, x, where)
        kernels.kv_write(wide[..., :8], wide[..., 8:], x, x, where)
    for got in (keys, values_, wide[..., :8], wide[..., 8:]):
        codes = got.flatten(0, 2).contiguous().view(torch.uint8)[where].flatten().tolist()
        for value, code in zip(x.double().flatten().tolist(), codes, strict=True):
            assert code == nearest(value) or (math.isnan(value) and code & 0x7F == 0x7F), value


# Triton's interpreter takes it for 480; a GPU does not.
READING_NAN = set(registry.offering("paged_attention")) - ({"triton"} - ON_GPU)


@pytest.mark.parametrize("backend", sorted(READING_NAN))
@pytest.mark.parametrize("column", [3, 21])
def test_a_nan_in_pages_of_8_bits_is_read_as_one(backend: str, column: int) -> None:
    """In the middle of a vector, and behind the last whole one."""
    q, k, v = (tensor(i, 3, 2, 24, dtype=torch.float32) for i in range(3))
    k[1, 1, column] = torch.nan
    plan = AttentionPlan(
        query_start=torch.tensor([0, 1]).int(),
        context_lens=torch.tensor([2]).int(),
        page_table=torch.tensor([[0]]).int(),
        page_size=3,
    )
    pages = (held(x, True)[None] for x in (k, v))
    with registry.using(paged_attention=backend):
        got = kernels.paged_attention(*(moved(x, backend) for x in (q[:1], *pages, plan)))
    assert got.isnan().all(dim=-1).tolist() == [[False, True]]
