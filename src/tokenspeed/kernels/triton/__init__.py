"""The Triton backend: one portable source for every GPU. Rule: the reference's names, its results.

Triton itself is imported only where there is a CUDA device, or under its interpreter
(`TRITON_INTERPRET=1`), which runs the same source on a CPU for the tests.
"""

import importlib.util
import os

import torch

from tokenspeed.kernels.contract import Backend

__all__ = ["BACKENDS"]

BACKENDS: tuple[Backend, ...] = ()

_useful = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
if _useful and importlib.util.find_spec("triton") is not None:
    from tokenspeed.kernels.triton.backend import BACKEND

    BACKENDS = (BACKEND,)
