"""The CPU backends: one of torch's functions, and one of our own kernels where they are built.

Rule: few calls, for their overhead is what a decode step costs.
"""

from tokenspeed.kernels.contract import Backend, Problem
from tokenspeed.kernels.cpu.attention import kv_write, paged_attention, rope
from tokenspeed.kernels.cpu.dense import add_rms_norm, embedding, linear, rms_norm, silu_mul
from tokenspeed.kernels.cpu.mla import mla_decode, mla_prefill
from tokenspeed.kernels.cpu.moe import moe_mlp
from tokenspeed.kernels.cpu.native import BACKEND as NATIVE
from tokenspeed.kernels.cpu.sampling import draw
from tokenspeed.kernels.pages import NARROW

__all__ = ["BACKEND", "NATIVE"]


def _supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.dtype not in ("float32", "bfloat16"):
        return f"computes in float32 or bfloat16, not {problem.dtype}"
    return None


BACKEND = Backend(
    name="cpu",
    priority=10,
    functions={
        "embedding": embedding,
        "linear": linear,
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rope": rope,
        "silu_mul": silu_mul,
        "draw": draw,
        "kv_write": kv_write,
        "paged_attention": paged_attention,
        "mla_decode": mla_decode,
        "mla_prefill": mla_prefill,
        "moe_mlp": moe_mlp,
    },
    supports=_supports,
    kv_dtypes=NARROW,
)
