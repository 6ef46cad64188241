"""Attention of other packages on our tensors, where they are installed: FlashInfer, FlashAttention
2 and 3, FlashMLA.

Rule: what they plan once a step is made before the clock runs, as ours is. Pages go to those that
take them; FlashAttention 2, whose pages are larger, has its keys in one piece.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenspeed.bench.report import Calls
from tokenspeed.kernels import AttentionPlan, MlaPlan

__all__ = ["Paged", "Peers", "attention", "latent"]

Peers = dict[str, Callable[[], Calls]]
"""By name, what makes the calls."""

Latent = tuple[Tensor, Tensor, MlaPlan]
"""Queries [T, H, C + E], pages and plan of `mla_decode`; rows of as many queries each."""

Paged = tuple[Tensor, Tensor, Tensor, AttentionPlan, tuple[Tensor, Tensor]]
"""Queries, pages and plan of `paged_attention`, rows of as many queries each; and the same keys and
values in one piece, [rows, length, K, d]."""

_Known = dict[str, tuple[str, Callable[[Any], Calls]]]
"""Peers by name: the package to import, and what makes the calls of it."""

WORKSPACE_BYTES = 1 << 28


def latent(given: Sequence[Latent], scale: float) -> Peers:
    """Who can be asked what `mla_decode` is."""
    known: _Known = {
        "flashinfer": ("flashinfer", partial(_flashinfer_latent, given, scale)),
        "flash_attn_3": ("flash_attn_interface", partial(_flash_3_latent, given, scale)),
        "flash_mla": ("flash_mla", partial(_flash_mla, given, scale)),
    }
    return _installed(known)


def attention(given: Sequence[Paged]) -> Peers:
    """Who can be asked what `paged_attention` is."""
    known: _Known = {
        "flashinfer": ("flashinfer", partial(_flashinfer, given)),
        "flash_attn_3": ("flash_attn_interface", partial(_flash_3, given)),
        "flash_attn_2": ("flash_attn", partial(_flash_2, given)),
    }
    return _installed(known)


def _installed(known: _Known) -> Peers:
    return {
        name: partial(_imported, package, make)
        for name, (package, make) in known.items()
        if importlib.util.find_spec(package) is not None
    }


def _imported(package: str, make: Callable[[Any], Calls]) -> Calls:
    return make(importlib.import_module(package))


def _rows(q: Tensor, query_start: Tensor) -> Tensor:
    """[T, H, d] as [rows, queries, H, d]."""
    return q.view(len(query_start) - 1, -1, *q.shape[1:])


def _listed(table: Tensor, lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all rows' pages one list, int32: where each row's begin, and the pages; and how many
    tokens a row's last page has."""
    counts = (lens + page_size - 1) // page_size
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32, device=lens.device)
    starts[1:] = counts.cumsum(0)
    used = torch.arange(table.shape[1], device=lens.device) < counts[:, None]
    return starts, table[used], lens - (counts - 1) * page_size


def _workspace(like: Tensor) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=like.device)


def _flashinfer_latent(given: Sequence[Latent], scale: float, package: Any) -> Calls:
    room, calls = _workspace(given[0][0]), []
    for q, pages, plan in given:
        starts, listed, _ = _listed(plan.page_table, plan.kv_lens, plan.page_size)
        wrapper = package.mla.BatchMLAPagedAttentionWrapper(room)
        wrapper.plan(
            plan.query_start, starts, listed, plan.kv_lens, plan.heads, plan.latent, plan.rope,
            plan.page_size, True, scale, q.dtype, pages.dtype,
        )  # fmt: skip
        parts = [part for x in (q, pages) for part in x.tensor_split([plan.latent], -1)]
        calls.append(partial(wrapper.run, *parts))
    return calls


def _flash_3_latent(given: Sequence[Latent], scale: float, package: Any) -> Calls:
    calls = []
    for q, pages, plan in given:
        own = _rows(q, plan.query_start)
        keys = pages[:, :, None]
        calls.append(
            partial(
                package.flash_attn_with_kvcache, own[..., plan.latent :], keys[..., plan.latent :],
                keys[..., : plan.latent], qv=own[..., : plan.latent], cache_seqlens=plan.kv_lens,
                page_table=plan.page_table, softmax_scale=scale, causal=True,
            )
        )  # fmt: skip
    return calls


def _flash_mla(given: Sequence[Latent], scale: float, package: Any) -> Calls:
    calls = []
    for q, pages, plan in given:
        own = _rows(q, plan.query_start)
        planned = package.get_mla_metadata(plan.kv_lens, own.shape[1] * plan.heads, 1)
        calls.append(
            partial(
                package.flash_mla_with_kvcache, own, pages[:, :, None], plan.page_table,
                plan.kv_lens, plan.latent, *planned, softmax_scale=scale, causal=True,
            )
        )  # fmt: skip
    return calls


def _flashinfer(given: Sequence[Paged], package: Any) -> Calls:
    room, calls = _workspace(given[0][0]), []
    for q, k, v, plan, _ in given:
        lens = plan.context_lens + plan.query_start.diff()
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(room, "NHD")
        wrapper.plan(
            plan.query_start, *_listed(plan.page_table, lens, plan.page_size), q.shape[1],
            k.shape[2], q.shape[2], plan.page_size, causal=True, q_data_type=q.dtype,
        )  # fmt: skip
        calls.append(partial(wrapper.run, q, (k, v)))
    return calls


def _flash_3(given: Sequence[Paged], package: Any) -> Calls:
    return [
        partial(
            package.flash_attn_with_kvcache, _rows(q, plan.query_start), k, v,
            cache_seqlens=plan.context_lens + plan.query_start.diff(), page_table=plan.page_table,
            causal=True,
        )
        for q, k, v, plan, _ in given
    ]  # fmt: skip


def _flash_2(given: Sequence[Paged], package: Any) -> Calls:
    return [
        partial(
            package.flash_attn_with_kvcache, _rows(q, plan.query_start), *pieces,
            cache_seqlens=plan.context_lens + plan.query_start.diff(), causal=True,
        )
        for q, _, _, plan, pieces in given
    ]  # fmt: skip
