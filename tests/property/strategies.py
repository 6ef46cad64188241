"""What properties of kernels draw from: tensors, plans of steps, problems of latent attention."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenspeed.kernels import AttentionPlan, Draws, MlaPlan, mla_decode_plan

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


# Triton runs on a GPU where there is one, and under its interpreter elsewhere.
ON_GPU = {"triton"} if torch.cuda.is_available() else set()


ROPE = 16
SCALE = 0.2

dtypes = st.sampled_from(sorted(TOLERANCE, key=str))
seeds = st.integers(0, 2**31)


def tensor(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(value: Any, backend: str) -> Any:
    """A tensor, or a plan, where the backend wants it."""
    if backend not in ON_GPU:
        return value
    if isinstance(value, AttentionPlan | MlaPlan):
        fields = {a.name: getattr(value, a.name) for a in attrs.fields(type(value)) if a.init}
        return type(value)(**{name: moved(own, backend) for name, own in fields.items()})
    if isinstance(value, Draws):
        return Draws(moved(value.table, backend))
    return lying(value, "cuda") if isinstance(value, Tensor) else value


def lying(x: Tensor, device: str) -> Tensor:
    """A copy that lies in its memory as x does, among copies of all that lies there."""
    memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).to(device, copy=True)
    own = torch.empty(0, dtype=x.dtype, device=device)
    return own.set_(memory.untyped_storage(), x.storage_offset(), x.size(), x.stride())


@st.composite
def steps(draw: st.DrawFn) -> tuple[AttentionPlan, int, int]:
    """A plan of prefill and decode rows on shuffled pages; its page and token counts."""
    size = draw(st.sampled_from([1, 2, 4, 16]))
    rows = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=5))
    lengths = [queries + context for queries, context in rows]
    wide = max(-(-length // size) for length in lengths)
    pages = wide * len(rows) + 2
    order = draw(st.permutations(range(pages)))
    table = torch.tensor(order[: wide * len(rows)], dtype=torch.int32).view(len(rows), wide)
    starts = torch.tensor([0, *(queries for queries, _ in rows)]).cumsum(0).to(torch.int32)
    plan = AttentionPlan(
        query_start=starts,
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
        page_table=table,
        page_size=size,
    )
    return plan, pages, int(starts[-1])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def problems(
    draw: st.DrawFn,
    latent: int = 16,
    rope: int = 16,
    sizes: tuple[int, ...] = (1, 4, 16),
    heads_of: tuple[int, ...] = (1, 3, 5, 16),
) -> tuple[Tensor, Tensor, MlaPlan]:
    """Queries, pages of which what no row has is NaN, and a plan; on the CPU, in float32."""
    size = draw(st.sampled_from(sizes))
    edges = [0, 1, size - 1, size, size + 1, 3 * size]
    keys = st.sampled_from(edges) | st.integers(0, 40 if size < 64 else 2000)
    rows = draw(st.lists(st.tuples(st.integers(0, 8), keys), min_size=1, max_size=4))
    heads = draw(st.sampled_from(heads_of))
    wide = max(1, *(-(-length // size) for _, length in rows))
    order = draw(st.permutations(range(wide * len(rows) + 2)))
    table = torch.tensor(order[: wide * len(rows)], dtype=torch.int32).view(len(rows), wide)
    for row in range(1, len(rows)):
        # Rows may begin with the pages of the row before, whole or not.
        shared = draw(st.sampled_from([0, 0, 1, wide]) | st.integers(0, wide))
        table[row, :shared] = table[row - 1, :shared]
    seed = draw(st.integers(0, 2**31))
    pages = torch.full((len(order), size, latent + rope), math.nan)
    for row, (_, length) in enumerate(rows):
        at = torch.arange(length)
        pages[table[row, at // size], at % size] = random(seed + row, length, latent + rope)
    counts = [count for count, _ in rows]
    plan = mla_decode_plan(
        torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        torch.tensor([length for _, length in rows], dtype=torch.int32),
        table,
        page_size=size,
        heads=heads,
        q_len_max=max(1, *counts) + draw(st.integers(0, 2)),
        latent=latent,
        rope=rope,
    )
    return random(seed + len(rows), sum(counts), heads, latent + rope), pages, plan


def rel(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||, in float64; NaN for a NaN."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
