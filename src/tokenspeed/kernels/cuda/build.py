"""CUDA sources become a library of plain C functions, on first use, and stay one.

Rule: `nvcc` makes it where it is installed (on the PATH, or under `CUDA_HOME`), once for each text
of the sources; the result lies under `XDG_CACHE_HOME`, where a machine without nvcc finds it too.
It needs no torch and no Python, so that one library serves every version of both.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tokenspeed.errors import KernelError

__all__ = ["library", "missing"]

log = logging.getLogger("tokenspeed.kernels")

FLAGS = (
    *("-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC"),
    *("-gencode", "arch=compute_90a,code=sm_90a"),
)
BUILD_S_MAX = 600


def _sources() -> Path | None:
    """Where the sources lie: in an installed package, or in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for root in (package / "cuda", package.parents[1] / "cpp" / "cuda"):
        if (root / "hopper.cuh").exists():
            return root
    return None


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    under = Path(home) / "bin" / "nvcc" if home else None
    return str(under) if under is not None and under.exists() else shutil.which("nvcc")


@cache
def _built(name: str) -> Path | None:
    """Where the library of `name`.cu is, or will be; None without sources."""
    root = _sources()
    if root is None:
        return None
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in (root / f"{name}.cu", *sorted(root.glob("*.cuh"))):
        digest.update(source.read_bytes())
    cached = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cached) if cached else Path.home() / ".cache"
    return folder / "tokenspeed" / "kernels" / f"{name}-{digest.hexdigest()[:16]}.so"


def missing(name: str) -> str | None:
    """Why there is no library of `name`.cu and none can be built, or None."""
    built = _built(name)
    if built is None:
        return f"finds no source {name}.cu"
    if not built.exists() and _nvcc() is None:
        return "is not built, and there is no nvcc on the PATH or under CUDA_HOME to build it"
    return None


@cache
def library(name: str) -> ctypes.CDLL:
    """The library of `name`.cu, built if it has to be.

    Raises:
        KernelError: it cannot be built; with the words of nvcc.
    """
    reason, built, root = missing(name), _built(name), _sources()
    if reason is not None or built is None or root is None:
        raise KernelError(f"{name} {reason}")
    if not built.exists():
        log.info("building %s, once", built.name)
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            command = [_nvcc() or "nvcc", *FLAGS, "-o", str(made), str(root / f"{name}.cu")]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=BUILD_S_MAX
            )
            if done.returncode:
                raise KernelError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            # Whole or not at all, whoever else builds it now.
            made.replace(built)
    return ctypes.CDLL(str(built))
