"""The reference: the contract in plain torch, in float32 at least. Rule: right before fast."""

from tokenspeed.kernels.contract import Backend
from tokenspeed.kernels.pages import NARROW
from tokenspeed.kernels.reference.attention import kv_write, paged_attention, rope
from tokenspeed.kernels.reference.dense import (
    add_rms_norm,
    argmax,
    embedding,
    finite,
    linear,
    linear_packed,
    rms_norm,
    silu_mul,
)
from tokenspeed.kernels.reference.mla import mla_decode, mla_prefill
from tokenspeed.kernels.reference.moe import moe_mlp, moe_route
from tokenspeed.kernels.reference.sampling import draw

__all__ = ["BACKEND"]

BACKEND = Backend(
    name="reference",
    priority=0,
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
        "draw": draw,
        "kv_write": kv_write,
        "paged_attention": paged_attention,
        "mla_decode": mla_decode,
        "mla_prefill": mla_prefill,
        "moe_route": moe_route,
        "moe_mlp": moe_mlp,
    },
    supports=lambda _problem: None,
    kv_dtypes=NARROW,
)
