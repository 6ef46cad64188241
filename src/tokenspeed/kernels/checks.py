"""What ops are given, checked: what breaks the contract is refused in its words.

Rule: shapes, dtypes and devices always, values where reading them waits for nobody, on a CPU. What
a step says once (its plan) is looked at once. On a GPU a backend reads and writes nothing out of
bounds whatever the values are: see contract.py. A check makes no operation of torch, so that
recording a step does not see it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.errors import ContractError
from tokenspeed.kernels.contract import AttentionPlan, Draws, Routing
from tokenspeed.kernels.packing import PackedWeight
from tokenspeed.kernels.pages import EIGHT_BITS

__all__ = [
    "alike",
    "attends",
    "distinct",
    "draws",
    "embeds",
    "holding",
    "known_pages",
    "mixes",
    "multiplies",
    "norms",
    "queries",
    "routes",
    "rows",
    "shaped",
    "turns",
    "within",
    "writes",
]

_BELOW_1, _ABOVE_0 = float(np.nextafter(1, 0)), float(np.nextafter(0, 1))
_INT32, _INT64, _FLOAT32 = torch.int32, torch.int64, torch.float32


def shaped(op: str, name: str, x: Tensor, *dims: int | str) -> None:
    """Refuse another shape; a dim that is a word may have any size."""
    own = x.shape
    if len(own) == len(dims):
        for dim, size in zip(dims, own, strict=True):
            if dim != size and type(dim) is int:
                break
        else:
            return
    raise ContractError(op, name, str(list(own)), f"shape [{', '.join(map(str, dims))}]")


def alike(op: str, x: Tensor, dtype: torch.dtype, **others: Tensor) -> None:
    """Refuse tensors that are not of this dtype, or not where `x` is."""
    device = x.device
    for name, other in others.items():
        if other.dtype != dtype or other.device != device:
            raise ContractError(
                op, name, f"{other.dtype} on {other.device}", f"{dtype} on {device}"
            )


def holding(op: str, x: Tensor, **pages: Tensor) -> None:
    """Refuse pages that hold neither numbers like those of `x` nor eight bits of each."""
    first = next(iter(pages.values())).dtype
    if first in (x.dtype, EIGHT_BITS):
        alike(op, x, first, **pages)
        return
    raise ContractError(op, next(iter(pages)), str(first), f"{x.dtype} or {EIGHT_BITS}")


def within(op: str, name: str, x: Tensor, low: int, end: int) -> None:
    """Refuse numbers int64 outside of [low, end), on a CPU."""
    if x.device.type != "cpu" or not x.numel():
        return
    numbers = x.numpy()
    # Below 0 is beyond every other number without a sign: one look for both ends.
    if int((numbers - low).view(np.uint64).max()) >= end - low:
        least = int(numbers.min())
        found = str(least if least < low else int(numbers.max()))
        raise ContractError(op, name, f"{found} somewhere", f"{low} to {end - 1}")


def distinct(op: str, name: str, x: Tensor) -> None:
    """Refuse numbers of which two are equal, on a CPU."""
    if x.device.type != "cpu":
        return
    numbers = np.sort(x.numpy())
    again = numbers[1:][numbers[1:] == numbers[:-1]]
    if len(again):
        raise ContractError(op, name, f"{again[0]} more than once", "distinct numbers")


def _floats(op: str, name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ContractError(op, name, str(x.dtype), "floating-point numbers")


def embeds(ids: Tensor, weight: Tensor) -> None:
    """embedding(ids int64[T], weight[V, D])."""
    shaped("embedding", "ids", ids, "T")
    shaped("embedding", "weight", weight, "V", "D")
    alike("embedding", weight, _INT64, ids=ids)
    within("embedding", "ids", ids, 0, weight.shape[0])


def multiplies(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> None:
    """linear(x[T, I], weight[O, I], bias[O] | None), and the same with a packed weight."""
    if isinstance(weight, PackedWeight):
        op, outputs, inputs, data = "linear_packed", weight.rows, weight.columns, weight.data
        shaped(op, "weight.data", data, weight.size_bytes)
        alike(op, x, torch.uint8, **{"weight.data": data})
    else:
        op = "linear"
        shaped(op, "weight", weight, "O", "I")
        outputs, inputs = weight.shape
        alike(op, x, x.dtype, weight=weight)
    _floats(op, "x", x)
    shaped(op, "x", x, "T", inputs)
    if bias is not None:
        shaped(op, "bias", bias, outputs)
        alike(op, x, x.dtype, bias=bias)


def norms(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """rms_norm(x[T, D], weight[D], eps) and add_rms_norm(x, residual[T, D], weight, eps)."""
    op = "rms_norm" if residual is None else "add_rms_norm"
    _floats(op, "x", x)
    shaped(op, "x", x, "T", "D")
    shaped(op, "weight", weight, x.shape[1])
    alike(op, x, x.dtype, weight=weight)
    if not x.shape[1]:
        raise ContractError(op, "x", str(list(x.shape)), "at least one column")
    if residual is not None:
        shaped(op, "residual", residual, *x.shape)
        alike(op, x, x.dtype, residual=residual)


def turns(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """rope(q[T, H, d], k[T, K, d], positions int64[T], cos_sin float32[context, d], ...)."""
    _floats("rope", "q", q)
    shaped("rope", "q", q, "T", "H", "d")
    tokens, _, dim = q.shape
    if dim % 2:
        raise ContractError("rope", "q", str(list(q.shape)), "an even head dim")
    shaped("rope", "k", k, tokens, "K", dim)
    shaped("rope", "positions", positions, tokens)
    shaped("rope", "cos_sin", cos_sin, "context", dim)
    alike("rope", q, q.dtype, k=k)
    alike("rope", q, _INT64, positions=positions)
    alike("rope", q, _FLOAT32, cos_sin=cos_sin)
    within("rope", "positions", positions, 0, cos_sin.shape[0])


def rows(op: str, x: Tensor) -> None:
    """argmax(x[R, V]), finite(x[R, V]); silu_mul(x[T, 2F])."""
    _floats(op, "x", x)
    shaped(op, "x", x, "R", "V")
    if op == "silu_mul" and x.shape[1] % 2:
        raise ContractError(op, "x", str(list(x.shape)), "an even number of columns")
    if op == "argmax" and not x.shape[1]:
        raise ContractError(op, "x", str(list(x.shape)), "at least one column")


def draws(scores: Tensor, how: Draws) -> None:
    """draw(scores[R, V], draws)."""
    rows("draw", scores)
    if not scores.shape[1]:
        raise ContractError("draw", "scores", str(list(scores.shape)), "at least one column")
    shaped("draw", "draws.table", how.table, 5, scores.shape[0])
    alike("draw", scores, torch.float64, **{"draws.table": how.table})
    if scores.device.type == "cpu":
        bounds = {"u": (0, _BELOW_1), "temperature": (_ABOVE_0, np.inf), "top_k": (0, np.inf)}
        bounds |= {"top_p": (_ABOVE_0, np.inf), "min_p": (0, 1)}
        for (name, (low, high)), row in zip(bounds.items(), how.table.numpy(), strict=True):
            if not ((row >= low) & (row <= high)).all():
                raise ContractError("draw", f"draws.{name}", str(row), f"{low} to {high}")


def writes(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """kv_write(k_pages, v_pages, k[T, K, d], v[T, K, e], locations int64[T])."""
    _floats("kv_write", "k", k)
    shaped("kv_write", "k", k, "T", "K", "d")
    tokens, heads, dim = k.shape
    shaped("kv_write", "v", v, tokens, heads, "e")
    shaped("kv_write", "k_pages", k_pages, "pages", "page_size", heads, dim)
    pages, size = k_pages.shape[:2]
    shaped("kv_write", "v_pages", v_pages, pages, size, heads, v.shape[2])
    shaped("kv_write", "locations", locations, tokens)
    alike("kv_write", k, k.dtype, v=v)
    holding("kv_write", k, k_pages=k_pages, v_pages=v_pages)
    alike("kv_write", k, _INT64, locations=locations)
    for name, own in (("k_pages", k_pages), ("v_pages", v_pages)):
        if own.stride(3) != 1 or (pages > 1 and own.stride(0) != size * own.stride(1)):
            raise ContractError("kv_write", name, f"strides {own.stride()}", "pages in one piece")
    within("kv_write", "locations", locations, 0, pages * size)
    distinct("kv_write", "locations", locations)


def attends(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, window: int | None
) -> None:
    """paged_attention(q[T, H, d], k_pages, v_pages, plan, window)."""
    op = "paged_attention"
    _floats(op, "q", q)
    shaped(op, "q", q, "T", "H", "d")
    tokens, heads, dim = q.shape
    shaped(op, "k_pages", k_pages, "pages", plan.page_size, "K", dim)
    shaped(op, "v_pages", v_pages, *k_pages.shape)
    holding(op, q, k_pages=k_pages, v_pages=v_pages)
    if not k_pages.shape[2] or heads % k_pages.shape[2]:
        raise ContractError(
            op, "q", str(list(q.shape)), f"a multiple of {k_pages.shape[2]} key heads"
        )
    if window is not None and window < 1:
        raise ContractError(op, "window", str(window), "None or at least 1")
    plan.once(_planned, q.device, tokens, k_pages.shape[0], window)


def _planned(
    plan: AttentionPlan, device: torch.device, tokens: int, pages: int, window: int | None
) -> None:
    op, table = "paged_attention", plan.page_table
    count = len(plan.context_lens)
    shaped(op, "plan.context_lens", plan.context_lens, count)
    shaped(op, "plan.query_start", plan.query_start, count + 1)
    shaped(op, "plan.page_table", table, count, "n")
    for name in ("query_start", "context_lens", "page_table"):
        own = getattr(plan, name)
        if own.dtype != _INT32 or own.device != device:
            given = f"{own.dtype} on {own.device}"
            raise ContractError(op, f"plan.{name}", given, f"{_INT32} on {device}")
    if device.type != "cpu":
        return
    counts = queries(op, plan.query_start, tokens)
    contexts = plan.context_lens.numpy().astype(np.int64)
    # A row without queries has no keys to see.
    lens = np.where(counts > 0, contexts + counts, 0)
    room = table.shape[1] * plan.page_size
    if (contexts < 0).any() or (lens > room).any():
        wanted = f"0 to what a row of page_table can hold, {room} with the queries"
        raise ContractError(op, "plan.context_lens", str(contexts.tolist()), wanted)
    hidden = contexts + 1 - (room + 1 if window is None else window)
    behind = np.maximum(hidden, 0) // plan.page_size
    known_pages(op, table, behind, -(-lens // plan.page_size), pages)


def queries(
    op: str, query_start: Tensor, tokens: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many queries each row has; on a CPU."""
    starts = query_start.numpy().astype(np.int64)
    counts = np.diff(starts)
    if starts[0] != 0 or (counts < 0).any() or starts[-1] > tokens:
        wanted = f"0 first, nothing less than the one before, and at most {tokens} tokens"
        raise ContractError(op, "plan.query_start", str(starts.tolist()), wanted)
    return counts


def known_pages(
    op: str, table: Tensor, first: NDArray[np.int64], end: NDArray[np.int64], pages: int
) -> None:
    """Refuse pages that do not exist in columns [first, end) of each row; on a CPU."""
    numbers = table.numpy()
    at = np.arange(numbers.shape[1])
    used = (at >= first[:, None]) & (at < end[:, None])
    strange = numbers[used & ((numbers < 0) | (numbers >= pages))]
    if len(strange):
        wanted = f"0 to {pages - 1} for each page that is seen"
        raise ContractError(op, "plan.page_table", f"{strange[0]} somewhere", wanted)


def routes(logits: Tensor, bias: Tensor | None, how: Routing) -> None:
    """moe_route(logits float32[T, G], bias float32[G] | None, routing)."""
    shaped("moe_route", "logits", logits, "T", "G")
    alike("moe_route", logits, _FLOAT32, logits=logits)
    experts = logits.shape[1]
    if bias is not None:
        shaped("moe_route", "bias", bias, experts)
        alike("moe_route", logits, _FLOAT32, bias=bias)
    if how.scoring not in ("softmax", "sigmoid"):
        raise ContractError("moe_route", "routing.scoring", how.scoring, "softmax or sigmoid")
    fits = 1 <= how.groups_chosen <= how.groups and experts % how.groups == 0
    if not fits or not 1 <= how.chosen <= how.groups_chosen * (experts // how.groups):
        wanted = f"groups of equal size that have as many of {experts} experts as are chosen"
        raise ContractError("moe_route", "routing", str(how), wanted)


def mixes(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """moe_mlp(x[T, D], experts int64[T, k], weights float32[T, k], gate_up[G, 2F, D],
    down[G, D, F])."""
    _floats("moe_mlp", "x", x)
    shaped("moe_mlp", "x", x, "T", "D")
    tokens, width = x.shape
    shaped("moe_mlp", "down", down, "G", width, "F")
    held, _, ffn = down.shape
    shaped("moe_mlp", "gate_up", gate_up, held, 2 * ffn, width)
    shaped("moe_mlp", "experts", experts, tokens, "k")
    shaped("moe_mlp", "weights", weights, *experts.shape)
    alike("moe_mlp", x, x.dtype, gate_up=gate_up, down=down)
    alike("moe_mlp", x, _INT64, experts=experts)
    alike("moe_mlp", x, _FLOAT32, weights=weights)
    within("moe_mlp", "experts", experts, -1, held)
