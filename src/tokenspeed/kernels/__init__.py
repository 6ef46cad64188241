"""Kernels: ops behind a registry of backends.

Rule: callers name an op and never a backend; `contract.py` says what each op promises, `reference/`
is the judge of every other backend, and backends repeat the same file names. What breaks an op's
contract is refused in its words (ContractError) before a backend sees it.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from tokenspeed.kernels import checks
from tokenspeed.kernels.contract import AttentionPlan, Backend, Draws, MlaPlan, Problem, Routing
from tokenspeed.kernels.cpu.recording import Recording, Workspace, record
from tokenspeed.kernels.latent import latent_attention
from tokenspeed.kernels.mla import mla_decode, mla_decode_plan, mla_prefill
from tokenspeed.kernels.packing import GROUP, PackedWeight, pack
from tokenspeed.kernels.pages import EIGHT_BITS
from tokenspeed.kernels.registry import Choice, Registry, registry

__all__ = [
    "EIGHT_BITS",
    "GROUP",
    "AttentionPlan",
    "Backend",
    "Choice",
    "Draws",
    "MlaPlan",
    "PackedWeight",
    "Problem",
    "Recording",
    "Registry",
    "Routing",
    "Workspace",
    "add_rms_norm",
    "argmax",
    "draw",
    "embedding",
    "finite",
    "kv_write",
    "latent_attention",
    "linear",
    "mla_decode",
    "mla_decode_plan",
    "mla_prefill",
    "moe_mlp",
    "moe_route",
    "pack",
    "paged_attention",
    "record",
    "registry",
    "rms_norm",
    "rope",
    "silu_mul",
]


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids[T] -> weight[ids], [T, D]; also of rows that are no weight."""
    checks.embeds(ids, weight)
    return cast(Tensor, registry.of("embedding", weight)(ids, weight))


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x[T, I] @ weight[O, I].T + bias[O] -> [T, O]."""
    checks.multiplies(x, weight, bias)
    op = "linear_packed" if isinstance(weight, PackedWeight) else "linear"
    return cast(Tensor, registry.of(op, x)(x, weight, bias))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; [T, D]."""
    checks.norms(x, weight)
    return cast(Tensor, registry.of("rms_norm", x)(x, weight, eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual; both [T, D]."""
    checks.norms(x, weight, residual)
    run = registry.of("add_rms_norm", x)
    return cast(tuple[Tensor, Tensor], run(x, residual, weight, eps))


def rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary positions on q[T, H, d] and k[T, K, d], in pairs of halves or of neighbours."""
    checks.turns(q, k, positions, cos_sin)
    run = registry.of("rope", q)
    return cast(tuple[Tensor, Tensor], run(q, k, positions, cos_sin, interleaved))


def silu_mul(x: Tensor) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] of x[T, 2F]; [T, F]."""
    checks.rows("silu_mul", x)
    return cast(Tensor, registry.of("silu_mul", x)(x))


def argmax(x: Tensor) -> Tensor:
    """The first index of the largest element of each row of x[R, V]; int64[R]."""
    checks.rows("argmax", x)
    return cast(Tensor, registry.of("argmax", x)(x))


def finite(x: Tensor) -> Tensor:
    """Whether all elements of each row of x[R, V] are finite; bool[R]."""
    checks.rows("finite", x)
    return cast(Tensor, registry.of("finite", x)(x))


def draw(scores: Tensor, draws: Draws) -> Tensor:
    """A token of each row of scores[R, V], drawn as `draws` says; int64[R]."""
    checks.draws(scores, draws)
    return cast(Tensor, registry.of("draw", scores)(scores, draws))


def kv_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """Put k[T, K, d] and v[T, K, e] at locations int64[T] of pages [pages, page_size, K, .]."""
    checks.writes(k_pages, v_pages, k, v, locations)
    registry.of("kv_write", k, k_pages)(k_pages, v_pages, k, v, locations)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, window: int | None = None
) -> Tensor:
    """Causal attention of q[T, H, d] over each row's pages, or over `window` tokens; [T, H, d]."""
    checks.attends(q, k_pages, v_pages, plan, window)
    run = registry.of("paged_attention", q, k_pages)
    return cast(Tensor, run(q, k_pages, v_pages, plan, window))


def moe_route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Experts int64[T, k] and their weights float32[T, k], from logits float32[T, G]."""
    checks.routes(logits, bias, routing)
    run = registry.of("moe_route", logits)
    return cast(tuple[Tensor, Tensor], run(logits, bias, routing))


def moe_mlp(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of what a token's experts make of x[T, D]; [T, D]."""
    checks.mixes(x, experts, weights, gate_up, down)
    return cast(Tensor, registry.of("moe_mlp", x)(x, experts, weights, gate_up, down))
