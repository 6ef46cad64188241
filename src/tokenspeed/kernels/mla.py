"""The public side of latent attention. Rule: what breaks the contract is refused in its words.

Values that lie on a GPU are not read, for that would wait for it: see contract.py for what is done
there instead.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tokenspeed.errors import ContractError
from tokenspeed.kernels.checks import alike, holding, known_pages, queries
from tokenspeed.kernels.contract import MlaPlan, Problem, capability
from tokenspeed.kernels.pages import kv_dtype
from tokenspeed.kernels.registry import registry

__all__ = ["mla_decode", "mla_decode_plan", "mla_prefill", "mla_problem"]


def mla_decode_plan(
    query_start: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    *,
    page_size: int,
    heads: int,
    q_len_max: int,
    latent: int = 512,
    rope: int = 64,
) -> MlaPlan:
    """What `mla_decode` needs of a step; see MlaPlan for the arguments.

    Raises:
        ContractError: a shape, a dtype or, on the CPU, a value is none that MlaPlan allows.
    """
    given = {"query_start": query_start, "kv_lens": kv_lens, "page_table": page_table}
    for name, value in given.items():
        if value.dtype != torch.int32 or value.device != kv_lens.device:
            found = f"{value.dtype} on {value.device}"
            raise ContractError("mla_decode_plan", name, found, f"int32 on {kv_lens.device}")
    rows = len(kv_lens)
    for name, dims in {"query_start": (rows + 1,), "kv_lens": (rows,)}.items():
        if tuple(given[name].shape) != dims:
            found = str(list(given[name].shape))
            raise ContractError("mla_decode_plan", name, found, f"shape {list(dims)}")
    if page_table.dim() != 2 or len(page_table) != rows:
        found = str(list(page_table.shape))
        raise ContractError("mla_decode_plan", "page_table", found, f"shape [{rows}, pages]")
    sizes = {"page_size": page_size, "heads": heads, "latent": latent, "rope": rope}
    for name, size in {**sizes, "q_len_max": q_len_max}.items():
        if size < 1:
            raise ContractError("mla_decode_plan", name, str(size), "at least 1")
    if kv_lens.device.type == "cpu":
        _check_values(query_start, kv_lens, page_table.shape[1] * page_size, q_len_max)
    return MlaPlan(
        query_start=query_start,
        kv_lens=kv_lens,
        page_table=page_table,
        q_len_max=q_len_max,
        **sizes,
    )


def _check_values(starts: Tensor, lens: Tensor, keys_max: int, q_len_max: int) -> None:
    counts = starts.diff()
    if int(starts[0]) != 0 or bool((counts < 0).any()) or bool((counts > q_len_max).any()):
        wanted = f"0 first, then steps of 0 to q_len_max = {q_len_max}"
        raise ContractError("mla_decode_plan", "query_start", str(starts.tolist()), wanted)
    if bool((lens < 0).any()) or bool((lens > keys_max).any()):
        wanted = f"0 to {keys_max}, what a row of page_table can hold"
        raise ContractError("mla_decode_plan", "kv_lens", str(lens.tolist()), wanted)


def mla_problem(q: Tensor, kv_pages: Tensor, plan: MlaPlan, op: str = "mla_decode") -> Problem:
    """What selection looks at for queries like `q`, and pages, under a plan like this."""
    return Problem(
        op,
        q.device.type,
        str(q.dtype).removeprefix("torch."),
        capability=capability(q.device),
        heads=plan.heads,
        q_len=1 << (plan.q_len_max - 1).bit_length(),
        page_size=plan.page_size,
        latent=plan.latent,
        rope=plan.rope,
        kv_dtype=kv_dtype(q.dtype, kv_pages.dtype),
    )


def mla_decode(q: Tensor, kv_pages: Tensor, plan: MlaPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Latent attention of q[T, H, C + E] over each row's pages[pages, page_size, C + E].

    Returns:
        out[T, H, C] in the dtype of `q`, and lse float32[T, H]; see contract.py.

    Raises:
        ContractError: shapes, dtypes or devices do not fit each other or the plan, or scale is not
            above 0.
        KernelError: no backend supports the problem.
    """
    width = plan.latent + plan.rope
    if q.dim() != 3 or tuple(q.shape[1:]) != (plan.heads, width):
        wanted = f"shape [tokens, {plan.heads}, {width}]"
        raise ContractError("mla_decode", "q", str(list(q.shape)), wanted)
    _check_pages("mla_decode", kv_pages, plan)
    _check_kinds("mla_decode", q, kv_pages, plan)
    _check_scale("mla_decode", scale)
    run = registry.find(mla_problem(q, kv_pages, plan))
    return cast(tuple[Tensor, Tensor], run(q, kv_pages, plan, scale))


def mla_prefill(q: Tensor, kv_pages: Tensor, up: Tensor, plan: MlaPlan, scale: float) -> Tensor:
    """Latent attention of q[T, H, N + E], each key expanded for each head by up[H, N + V, C].

    Returns:
        out[T, H, V] in the dtype of `q`; see contract.py.

    Raises:
        ContractError: shapes, dtypes or devices do not fit each other or the plan, or scale is not
            above 0.
        KernelError: no backend supports the problem.
    """
    if q.dim() != 3 or q.shape[1] != plan.heads or q.shape[2] <= plan.rope:
        wanted = f"shape [tokens, {plan.heads}, more than {plan.rope}]"
        raise ContractError("mla_prefill", "q", str(list(q.shape)), wanted)
    nope = q.shape[2] - plan.rope
    fits = up.dim() == 3 and (up.shape[0], up.shape[2]) == (plan.heads, plan.latent)
    if not fits or up.shape[1] <= nope:
        wanted = f"shape [{plan.heads}, more than {nope}, {plan.latent}]"
        raise ContractError("mla_prefill", "up", str(list(up.shape)), wanted)
    _check_pages("mla_prefill", kv_pages, plan)
    _check_kinds("mla_prefill", q, kv_pages, plan, up=up)
    _check_scale("mla_prefill", scale)
    run = registry.find(mla_problem(q, kv_pages, plan, "mla_prefill"))
    return cast(Tensor, run(q, kv_pages, up, plan, scale))


def _check_pages(op: str, kv_pages: Tensor, plan: MlaPlan) -> None:
    width = plan.latent + plan.rope
    if kv_pages.dim() != 3 or tuple(kv_pages.shape[1:]) != (plan.page_size, width):
        wanted = f"shape [pages, {plan.page_size}, {width}]"
        raise ContractError(op, "kv_pages", str(list(kv_pages.shape)), wanted)


def _check_scale(op: str, scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ContractError(op, "scale", str(scale), "a number above 0")


def _check_kinds(op: str, q: Tensor, kv_pages: Tensor, plan: MlaPlan, **others: Tensor) -> None:
    if q.device != plan.kv_lens.device:
        raise ContractError(op, "q", f"on {q.device}", f"on {plan.kv_lens.device}, as the plan")
    holding(op, q, kv_pages=kv_pages)
    alike(op, q, q.dtype, **others)
    if q.device.type == "cpu":
        plan.once(_check_places, op, len(q), len(kv_pages))


def _check_places(plan: MlaPlan, op: str, tokens: int, pages: int) -> None:
    counts = queries(op, plan.query_start, tokens)
    # Without queries no key is seen.
    lens = np.where(counts > 0, plan.kv_lens.numpy().astype(np.int64), 0)
    known_pages(op, plan.page_table, np.zeros_like(lens), -(-lens // plan.page_size), pages)
