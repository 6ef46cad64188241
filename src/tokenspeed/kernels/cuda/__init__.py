"""Kernels in CUDA C++, one library each. Rule: each says exactly what it can run."""

from tokenspeed.kernels.contract import Backend
from tokenspeed.kernels.cuda.mla import cost_us, mla_decode, unsupported
from tokenspeed.kernels.pages import NARROW

__all__ = ["BACKEND"]

BACKEND = Backend(
    name="cuda_sm90",
    priority=12,
    functions={"mla_decode": mla_decode},
    supports=unsupported,
    cost_us=cost_us,
    kv_dtypes=NARROW,
)
