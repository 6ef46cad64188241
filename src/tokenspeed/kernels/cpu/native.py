"""The CPU kernels of `cpp/cpu`, called through their C interface.

Rule: what the C functions take for granted (dtypes, strides, sizes) is made sure of here. A call
costs a few microseconds, which is what an op of a decode step costs. Long rows of attention are
matrix products and stay with torch where the machine has no tiles for them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenspeed.kernels.contract import AttentionPlan, Backend, Problem
from tokenspeed.kernels.cpu import attention as composed
from tokenspeed.kernels.cpu import dense
from tokenspeed.kernels.cpu.library import attends_long, call, library_path, product_tokens
from tokenspeed.kernels.packing import PackedWeight
from tokenspeed.kernels.pages import EIGHT_BITS, NARROW, scatter

__all__ = ["BACKEND"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, EIGHT_BITS: 2}
_DIM_MAX = 256
_QUERIES_MAX = 8
"""Of a row: with more it is products of matrices, by a kernel of its own or, where the machine has
none, by torch's fused attention over gathered pages."""


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """See contract.py."""
    weight, ids = weight.contiguous(), ids.contiguous()
    rows, width = weight.shape
    out = torch.empty((ids.shape[0], width), dtype=weight.dtype)
    call(
        "take", _DTYPES[weight.dtype], weight.data_ptr(), rows, width, ids.data_ptr(),
        ids.shape[0], out.data_ptr(),
    )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See contract.py."""
    alike = x.dtype == weight.dtype and x.stride(-1) == 1 and weight.is_contiguous()
    if not alike or len(x) > product_tokens(_DTYPES[x.dtype]):
        return dense.linear(x, weight, bias)
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    rows, columns = weight.shape
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    call(
        "product", _DTYPES[x.dtype], x.data_ptr(), x.stride(0), x.shape[0], columns,
        weight.data_ptr(), rows, None if bias is None else bias.data_ptr(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """See contract.py."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    out = torch.empty((x.shape[0], weight.rows), dtype=x.dtype)
    call(
        "linear", _DTYPES[x.dtype], x.data_ptr(), x.stride(0), x.shape[0], weight.columns,
        weight.data.data_ptr(), weight.rows, weight.bits,
        None if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See contract.py."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm(x, None, weight, eps, out, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    x = x.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _norm(x, residual.contiguous(), weight, eps, out, total)
    return out, total


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor | None,
) -> None:
    weight = weight.contiguous()
    dim = x.shape[-1]
    call(
        "rms_norm", _DTYPES[x.dtype], x.data_ptr(),
        None if residual is None else residual.data_ptr(), weight.data_ptr(), x.numel() // dim, dim,
        eps, out.data_ptr(), None if total is None else total.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def silu_mul(x: Tensor) -> Tensor:
    """See contract.py."""
    x = x.contiguous()
    tokens, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, width), dtype=x.dtype)
    call(
        "silu_mul", _DTYPES[x.dtype], x.data_ptr(), tokens, width, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def argmax(x: Tensor) -> Tensor:
    """See contract.py."""
    return _of_rows("argmax", x, torch.int64)


def finite(x: Tensor) -> Tensor:
    """See contract.py."""
    return _of_rows("finite", x, torch.bool)


def _of_rows(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty(rows, dtype=dtype)
    call(name, _DTYPES[x.dtype], x.data_ptr(), rows, width, out.data_ptr(), torch.get_num_threads())
    return out


def rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    positions, cos_sin = positions.contiguous(), cos_sin.contiguous()
    return (
        _turned(q, positions, cos_sin, interleaved),
        _turned(k, positions, cos_sin, interleaved),
    )


def _turned(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, heads, dim = x.shape
    out = torch.empty((tokens, heads, dim), dtype=x.dtype)
    call(
        "rope", _DTYPES[x.dtype], x.data_ptr(), x.stride(0), x.stride(1), tokens, heads, dim,
        positions.data_ptr(), cos_sin.data_ptr(), out.data_ptr(), interleaved,
    )  # fmt: skip
    return out


def kv_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """See contract.py."""
    locations = locations.contiguous()
    _write(k_pages, k, locations)
    _write(v_pages, v, locations)


def _write(pages: Tensor, x: Tensor, locations: Tensor) -> None:
    if not pages.is_contiguous():  # columns of wider pages: a latent, and its rotary key
        scatter(pages, locations, x)
        return
    tokens, heads, dim = x.shape
    if x.stride()[1:] != (dim, 1):
        x = x.contiguous()
    call(
        "kv_write", _DTYPES[x.dtype], x.data_ptr(), x.stride(0), tokens, heads * dim,
        locations.data_ptr(), pages.data_ptr(), _DTYPES[pages.dtype],
    )  # fmt: skip


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, window: int | None
) -> Tensor:
    """See contract.py."""
    heads, dim = q.shape[1:]
    if dim > _DIM_MAX or not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        return composed.paged_attention(q, k_pages, v_pages, plan, window)
    q = q.contiguous()
    out = torch.empty_like(q)
    table = plan.page_table
    call(
        "attention", _DTYPES[q.dtype], q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(),
        table.shape[0], plan.query_start.data_ptr(), plan.context_lens.data_ptr(), table.data_ptr(),
        table.stride(0), plan.page_size, heads, k_pages.shape[2], dim, window or 0, _QUERIES_MAX,
        out.data_ptr(), _DTYPES[k_pages.dtype], torch.get_num_threads(),
    )  # fmt: skip
    ours = attends_long(_DTYPES[q.dtype], _DTYPES[k_pages.dtype], dim)
    if plan.once(_longest) > _QUERIES_MAX and not ours:
        for row in plan.once(composed.long_rows, window, _QUERIES_MAX):
            composed.attend_row(q, k_pages, v_pages, row, out)
    return out


def _longest(plan: AttentionPlan) -> int:
    """Queries of the longest row."""
    return int(np.diff(plan.query_start.numpy()).max(initial=0))


def _supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.dtype not in ("float32", "bfloat16"):
        return f"computes in float32 or bfloat16, not {problem.dtype}"
    if library_path() is None:
        return "is not built"
    return None


BACKEND = Backend(
    name="native",
    priority=20,
    functions={
        "embedding": embedding,
        "linear": linear,
        "linear_packed": linear_packed,
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rope": rope,
        "silu_mul": silu_mul,
        "argmax": argmax,
        "finite": finite,
        "kv_write": kv_write,
        "paged_attention": paged_attention,
    },
    supports=_supports,
    kv_dtypes=NARROW,
)
