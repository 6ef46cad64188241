"""The functions of the Triton backend, and what they can run."""

from __future__ import annotations

import os

from tokenspeed.kernels.contract import Backend, Problem
from tokenspeed.kernels.pages import NARROW
from tokenspeed.kernels.triton.attention import kv_write, paged_attention, rope
from tokenspeed.kernels.triton.dense import add_rms_norm, embedding, linear, rms_norm, silu_mul
from tokenspeed.kernels.triton.mla import cost_us, mla_decode, mla_prefill, unsupported
from tokenspeed.kernels.triton.moe import moe_mlp, moe_route
from tokenspeed.kernels.triton.sampling import argmax, draw, finite

__all__ = ["BACKEND"]

DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def _supports(problem: Problem) -> str | None:
    if problem.device not in DEVICES:
        return f"runs on {' and '.join(DEVICES)}, not on {problem.device}"
    if problem.dtype not in ("float32", "bfloat16", "float16"):
        return f"computes in float32, bfloat16 or float16, not {problem.dtype}"
    if problem.kv_dtype is not None and (problem.capability or (9, 0)) < (8, 9):
        return "reads float8 from capability 8.9 on"
    return unsupported(problem) if problem.op == "mla_decode" else None


def _cost_us(problem: Problem) -> float | None:
    return cost_us(problem) if problem.op == "mla_decode" else None


BACKEND = Backend(
    name="triton",
    priority=5,
    functions={
        "embedding": embedding,
        "linear": linear,
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rope": rope,
        "silu_mul": silu_mul,
        "argmax": argmax,
        "finite": finite,
        "draw": draw,
        "kv_write": kv_write,
        "paged_attention": paged_attention,
        "mla_decode": mla_decode,
        "mla_prefill": mla_prefill,
        "moe_route": moe_route,
        "moe_mlp": moe_mlp,
    },
    supports=_supports,
    kv_dtypes=NARROW,
    cost_us=_cost_us,
)
