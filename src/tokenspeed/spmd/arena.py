"""Memory for what every step reads: weights and KV, in huge pages.

Rule: on a CPU a step walks through all of the weights, and in pages of 4 KB that is a walk through
the page tables too, which takes longer than the reading, the more so in a virtual machine. Such
memory is therefore taken in blocks that the kernel may back with pages of 2 MB (Linux's transparent
huge pages, where they are set to `madvise` or `always`; elsewhere it is memory like any other).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import final

import torch
from torch import Tensor

__all__ = ["Arena"]

HUGE_BYTES = 1 << 21
BLOCK_BYTES = 1 << 25
"""Taken at once, unless a tensor is larger."""
_ALIGNED = 64


@final
class Arena:
    """Hands out tensors side by side, from blocks of memory of their own.

    A block is given back when the last tensor in it is gone. What is handed out is zeroed, and is
    resident once it has been written.

    Args:
        device: of the tensors; on any other than the CPU they are torch's own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._left = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros."""
        size = math.prod(shape) * dtype.itemsize
        if self._device.type != "cpu" or not size:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        rounded = -(-size // _ALIGNED) * _ALIGNED
        if rounded > len(self._left):
            self._left = _block(max(rounded, BLOCK_BYTES))
        taken, self._left = self._left[:size], self._left[rounded:]
        return taken.view(dtype).view(shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor, for the tensor to be dropped; on other devices, itself."""
        if tensor.device.type != "cpu" or self._device.type != "cpu":
            return tensor
        return self.zeros(tuple(tensor.shape), dtype=tensor.dtype).copy_(tensor)


def _block(size: int) -> Tensor:
    """Zeroed bytes that begin with a huge page and end with one."""
    size = -(-size // HUGE_BYTES) * HUGE_BYTES
    memory = mmap.mmap(-1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system that has none goes without
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_BYTES
    return whole[first : first + size]
