"""Latent attention on Hopper: what cpp/cuda/mla_decode*_sm90.cu take, as tensors.

Rule: the first layer of a step lets the device plan it, and the others reuse that; nothing here
waits for the device or reads from it, so that all of it can be captured in a graph.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Final, final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.errors import ContractError, KernelError
from tokenspeed.kernels.contract import MlaPlan, Problem
from tokenspeed.kernels.cuda.build import library, missing

__all__ = ["cost_us", "load_only", "mla_decode", "unsupported"]

ROWS, PAGE, LATENT, ROPE = 64, 64, 512, 64
BLOCKS_MAX = 144


@final
@frozen
class _Kernel:
    """One of the libraries, which have the same functions, and how its steps are best cut.

    overhead: what a row costs beside its keys, in pages: its queries are loaded and its result is
    written. share_min: fewest pages, with the overhead, for which one more block of the grid is
    worth its merging. floor_us, tile_us: of a nominal step, its loads and a tile's arithmetic.
    """

    library: str
    overhead: int
    share_min: int
    floor_us: float
    tile_us: float


WIDE: Final = _Kernel("mla_decode_sm90", overhead=2, share_min=3, floor_us=36, tile_us=29)
NARROW_PAGES: Final = _Kernel(
    "mla_decode_fp8_sm90", overhead=2, share_min=3, floor_us=20, tile_us=33
)

SAVED_MIN = 32
"""Fewest pages that a group of rows must save, read once for all, to be worth its merging."""

TOGETHER_MAX = 8192
"""Most query tokens times heads of a step for which rows may form groups: beyond, tiles are full
without, and room for partial results (2 KiB each) is dear."""


def unsupported(problem: Problem) -> str | None:
    """Why this kernel cannot run a problem, or None."""
    if problem.device != "cuda":
        return f"runs on CUDA devices, not on {problem.device}"
    if problem.capability != (9, 0):
        return f"runs on capability 9.0, not on {'.'.join(map(str, problem.capability or ['?']))}"
    if problem.dtype != "bfloat16":
        return f"computes in bfloat16, not {problem.dtype}"
    if problem.page_size != PAGE:
        return f"takes pages of {PAGE} tokens, not {problem.page_size}"
    if (problem.latent, problem.rope) != (LATENT, ROPE):
        wanted = f"{LATENT} latent and {ROPE} rotary columns"
        return f"takes {wanted}, not {problem.latent} and {problem.rope}"
    return missing(_kernel(problem.kv_dtype is not None).library)


def cost_us(problem: Problem) -> float:
    """See Backend; as measured on an H200: loading keys, or each tile's arithmetic."""
    tiles = (problem.q_len or 1) * (problem.heads or 1) / ROWS
    kernel = _kernel(problem.kv_dtype is not None)
    return 12 + max(kernel.floor_us, kernel.tile_us * tiles)


def _kernel(narrow: bool) -> _Kernel:
    return NARROW_PAGES if narrow else WIDE


@cache
def _functions(name: str) -> ctypes.CDLL:
    found = library(name)
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    found.mla_decode_sm90_blocks.argtypes = []
    found.mla_decode_sm90_plan.argtypes = [*[pointer] * 4, *[number] * 10, pointer]
    found.mla_decode_sm90.argtypes = [
        *[pointer] * 10, *[long] * 3, *[number] * 8, ctypes.c_float, number, pointer,
    ]  # fmt: skip
    return found


@frozen(eq=False)
class _Planned:
    """What the device planned, and the room for partial results. space: int32, see mla_plan.cuh."""

    space: Tensor
    part_out: Tensor
    part_lse: Tensor
    tiles: int
    blocks: int
    whole_rows: int


def _planned(plan: MlaPlan, kernel: _Kernel, tokens: int) -> _Planned:
    device = plan.kv_lens.device
    functions = _functions(kernel.library)
    rows, columns = plan.page_table.shape
    tiles = -(-plan.q_len_max * plan.heads // ROWS)
    blocks = functions.mla_decode_sm90_blocks()
    if blocks < 1:
        wanted = f"CUDA does not say how many multiprocessors {device} has"
        raise KernelError(f"{kernel.library}: {wanted}")
    # Groups are whatever the device finds; that there may be some is decided here.
    whole = rows * plan.q_len_max * plan.heads
    whole_rows = whole if rows > 1 and whole <= TOGETHER_MAX else 0
    # As mla_plan.cuh cuts it.
    phase = (rows + 1) + 2 * (BLOCKS_MAX + 1) + 2 * rows + rows * tiles
    items = blocks + 2 * (rows * tiles + blocks)
    ints = -(-(2 * phase + 2 * rows + 1) // 16) * 16 + 16 * items
    space = torch.empty(ints, dtype=torch.int32, device=device)
    _check(
        kernel,
        functions.mla_decode_sm90_plan(
            plan.query_start.data_ptr(), plan.kv_lens.data_ptr(), plan.page_table.data_ptr(),
            space.data_ptr(), rows, columns, tokens, plan.heads, tiles, blocks, whole_rows,
            kernel.overhead, kernel.share_min, SAVED_MIN, _stream(device),
        ),
    )  # fmt: skip
    # Two tiles of each block in each of two phases, then rows that a group has and are not split.
    partial = 4 * blocks * ROWS + 2 * whole_rows
    part_lse = torch.empty(partial, 4, dtype=torch.float32, device=device)
    part_out = torch.empty(partial, LATENT, dtype=torch.float16, device=device)
    return _Planned(space, part_out, part_lse, tiles, blocks, whole_rows)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _check(kernel: _Kernel, error: int) -> None:
    if error:
        raise KernelError(f"{kernel.library}: CUDA error {error}; driver_types.h names it")


def mla_decode(q: Tensor, kv_pages: Tensor, plan: MlaPlan, scale: float) -> tuple[Tensor, Tensor]:
    """See contract.py."""
    return _run(q, kv_pages, plan, scale, only_load=False)


def load_only(q: Tensor, kv_pages: Tensor, plan: MlaPlan) -> None:
    """The loads of `mla_decode` and nothing else: its floor on this machine."""
    _run(q, kv_pages, plan, 1.0, only_load=True)


def _run(
    q: Tensor, kv_pages: Tensor, plan: MlaPlan, scale: float, *, only_load: bool
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    # One step from a row to the next, be it the next head or the next token.
    if q.stride(2) != 1 or q.stride(0) != heads * q.stride(1) or not _aligned(q):
        q = q.contiguous()
    if kv_pages.stride(2) != 1 or not _aligned(kv_pages):
        given = f"at {kv_pages.data_ptr()} with strides {kv_pages.stride()}"
        wanted = "columns beside each other, and rows and pages 16 bytes aligned"
        raise ContractError("mla_decode", "kv_pages", given, wanted)
    out = torch.empty(tokens, heads, LATENT, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if not tokens:
        return out, lse
    with torch.cuda.device(q.device):
        kernel = _kernel(kv_pages.dtype != q.dtype)
        on = plan.once(_planned, kernel, tokens)
        rows, columns = plan.page_table.shape
        _check(
            kernel,
            _functions(kernel.library).mla_decode_sm90(
                q.data_ptr(), kv_pages.data_ptr(), plan.query_start.data_ptr(),
                plan.kv_lens.data_ptr(), plan.page_table.data_ptr(), on.space.data_ptr(),
                out.data_ptr(), lse.data_ptr(), on.part_out.data_ptr(), on.part_lse.data_ptr(),
                q.stride(1), kv_pages.stride(0), kv_pages.stride(1), tokens, kv_pages.shape[0],
                rows, columns, heads, on.tiles, on.blocks, on.whole_rows, scale, only_load,
                _stream(q.device),
            ),
        )  # fmt: skip
    return out, lse


def _aligned(x: Tensor) -> bool:
    strides = (stride * x.element_size() for stride in x.stride()[:2])
    return x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)
