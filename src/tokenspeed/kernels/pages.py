"""What pages of KV hold of a number. Rule: as many bits as what is computed with, or eight.

Eight are float8_e4m3fn (Micikevicius et al., 2022): three bits of mantissa, up to 448, no infinity.
torch cannot write such tensors by index, nor look for one in another; as bytes it can.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EIGHT_BITS", "NARROW", "as_bytes", "gathered", "kv_dtype", "rounded", "scatter"]

EIGHT_BITS = torch.float8_e4m3fn
NARROW = (str(EIGHT_BITS).removeprefix("torch."),)
"""What a backend that takes these pages too has as `kv_dtypes`."""
_MOST = torch.finfo(EIGHT_BITS).max


def kv_dtype(computed: torch.dtype, pages: torch.dtype) -> str | None:
    """What a problem says of pages: None where they hold what is computed with."""
    return None if pages == computed else str(pages).removeprefix("torch.")


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as pages of a dtype hold it: to the nearest, ties to even, at most 448; NaN stays."""
    return x.clamp(-_MOST, _MOST).to(dtype) if dtype == EIGHT_BITS else x.to(dtype)


def as_bytes(pages: Tensor) -> Tensor:
    """The same memory as uint8; the last dim is as many times longer."""
    return pages.view(torch.uint8)


def gathered(pages: Tensor, where: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens of pages [pages, page_size, ...] by location (int64[L]), in a dtype; [L, ...]."""
    tokens = pages.flatten(0, 1)
    if tokens.dtype != EIGHT_BITS:
        return tokens.index_select(0, where).to(dtype)
    return as_bytes(tokens).index_select(0, where).view(EIGHT_BITS).to(dtype)


def scatter(pages: Tensor, where: Tensor, x: Tensor) -> None:
    """Write tokens x[L, ...] into pages [pages, page_size, ...], at locations int64[L]."""
    tokens, x = pages.flatten(0, 1), rounded(x, pages.dtype)
    if tokens.dtype != EIGHT_BITS:
        tokens.index_copy_(0, where, x)
    else:
        as_bytes(tokens).index_copy_(0, where, as_bytes(x))
