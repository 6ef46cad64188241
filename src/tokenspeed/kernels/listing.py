"""What `tokenspeed kernels` prints. Rule: it asks the registry, and knows no backend itself."""

from __future__ import annotations

import torch
from rich.table import Table

from tokenspeed.errors import ConfigError, KernelError
from tokenspeed.kernels.contract import OPS, Problem, capability
from tokenspeed.kernels.cpu.library import isa, library_path
from tokenspeed.kernels.registry import registry

__all__ = ["explained", "parse", "table"]

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "fp8": "float8_e4m3fn",
}
KEYS = "b, q, h, kv, page, latent, rope, dtype, kv_dtype, device, cap"
PAGED = ("kv_write", "paged_attention", "mla_decode", "mla_prefill")


def _here() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _cap(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def parse(text: str) -> Problem:
    """A problem in words: an op, then name=value. `b` and `kv` are taken, but select nothing.

    Raises:
        ConfigError: the op or a name is unknown, or a value is none.
    """
    op, *words = text.split() or [""]
    if op not in OPS:
        raise ConfigError("explain", op, f"an op first, one of {', '.join(OPS)}")
    here = _here()
    given = dict(word.partition("=")[::2] for word in words)
    try:
        sizes = {name: int(given.pop(name)) for name in ("b", "kv") if name in given}
        q_len, heads = int(given.pop("q", 1)), int(given.pop("h", 16))
        page, latent = int(given.pop("page", 64)), int(given.pop("latent", 512))
        rope = int(given.pop("rope", 64))
        device = given.pop("device", here.type)
        cap = _cap(given.pop("cap")) if "cap" in given else None
    except ValueError:
        raise ConfigError("explain", text, "whole numbers, and cap as 9.0") from None
    if min(q_len, heads, page, latent, rope, *sizes.values()) < 1:
        raise ConfigError("explain", text, "sizes of at least 1")
    dtype, kv_dtype = given.pop("dtype", "bf16"), given.pop("kv_dtype", None)
    if given:
        raise ConfigError("explain", next(iter(given)), f"name=value with a name of {KEYS}")
    if cap is None and device == here.type:
        cap = capability(here)
    dtype, kv_dtype = _dtype(dtype), None if kv_dtype is None else _dtype(kv_dtype)
    if kv_dtype is not None and op not in PAGED:
        raise ConfigError("explain", f"kv_dtype={kv_dtype}", f"an op of pages: {', '.join(PAGED)}")
    kv_dtype = None if kv_dtype == dtype else kv_dtype
    if op not in ("mla_decode", "mla_prefill"):
        return Problem(op, device, dtype, capability=cap, kv_dtype=kv_dtype)
    rounded = 1 << (q_len - 1).bit_length()
    return Problem(op, device, dtype, cap, heads, rounded, page, latent, rope, kv_dtype)


def _dtype(name: str) -> str:
    found = DTYPES.get(name, name)
    if not isinstance(getattr(torch, found, None), torch.dtype):
        raise ConfigError("explain", name, f"a dtype: {', '.join(DTYPES)}, or torch's name")
    return found


def explained(text: str) -> Table:
    """Who runs one problem, first, and why the others do not."""
    problem = parse(text)
    rows = Table("backend", "", title=f"{text}  ({problem.device})", title_justify="left")
    choice = registry.explain(problem)
    rows.add_row(choice.backend, "runs it", style="bold")
    for name, reason in choice.rejected:
        rows.add_row(name, reason)
    _failed(rows)
    return rows


def table() -> Table:
    """Every op and who runs it here, by dtype, and the plugins that failed to load."""
    dtypes = ("bfloat16", "float32")
    device = _here().type
    ours = f", native kernels for {isa()}" if device == "cpu" and library_path() else ""
    rows = Table("op", *dtypes, title=f"on {device}{ours}", title_justify="left")
    for op in OPS:
        rows.add_row(op, *(_runner(f"{op} dtype={dtype}") for dtype in dtypes))
    _failed(rows)
    return rows


def _runner(text: str) -> str:
    try:
        return registry.explain(parse(text)).backend
    except KernelError:
        return "nobody"


def _failed(rows: Table) -> None:
    for name, reason in registry.failed.items():
        rows.add_row(f"plugin {name}", f"left out: {reason}", style="red")
