"""One safetensors file: its header, checked whole, and any rows of its tensors.

Rule: nothing is mapped, so what is resident is what was asked for: rows go straight to memory that
the caller has, or through a block of BLOCK_BYTES.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from operator import index
from pathlib import Path
from typing import Any, final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.errors import CheckpointError

__all__ = ["BLOCK_BYTES", "FP8", "Entry", "SafetensorsFile"]

FP8 = torch.float8_e4m3fn
BLOCK_BYTES = 16 << 20

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": FP8}
_HEADER_MAX = 100 << 20


@final
@frozen
class Entry:
    """Where a tensor lies in its file: `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Of what has one index along dim 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@final
class SafetensorsFile:
    """An opened file. No handle is kept between reads.

    Attributes:
        path: of the file.
        entries: its tensors by name.

    Raises:
        CheckpointError: the header is damaged, or does not describe the file exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _header(path)

    def read_rows(self, name: str, first: int, target: Tensor) -> None:
        """Fill `target` with the rows from `first` on.

        Args:
            name: of a tensor.
            first: row.
            target: contiguous, on the CPU, in the tensor's dtype; [rows, ...].

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        entry = self.entries[name]
        memory: memoryview[int] = target.flatten().view(torch.uint8).numpy().data
        at, done = entry.start + first * entry.row_bytes, 0
        try:
            with self.path.open("rb", buffering=0) as file:
                while done < len(memory):
                    count = os.preadv(file.fileno(), [memory[done:]], at + done)
                    if not count:
                        raise CheckpointError(self.path, f"tensor {name!r} is cut off")
                    done += count
        except OSError as error:
            raise CheckpointError(self.path, f"tensor {name!r} cannot be read: {error}") from error


def _header(path: Path) -> dict[str, Entry]:
    """Check and read a header: 8 bytes of length, JSON, then the tensors without gap or overlap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_HEADER_MAX, size - 8):
            raise CheckpointError(path, f"claims a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_distinct)
        header.pop("__metadata__", None)
        entries = []
        for name, e in header.items():
            start, end = map(index, e["data_offsets"])
            entries.append((name, str(e["dtype"]), tuple(map(index, e["shape"])), start, end))
        entries.sort(key=lambda entry: entry[3:])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"the header is damaged: {error!r}") from error
    at, found = 0, {}
    for name, dtype, shape, start, end in entries:
        if dtype not in _FLOATS:
            raise CheckpointError(
                path, f"tensor {name!r} is {dtype}; read are {', '.join(_FLOATS)}"
            )
        wanted = math.prod(shape) * _FLOATS[dtype].itemsize
        if start != at or end - start != wanted or any(n < 0 for n in shape):
            raise CheckpointError(
                path,
                f"tensor {name!r} {dtype}{list(shape)} lies at {start}..{end}; expected "
                f"{at}..{at + wanted}",
            )
        found[name] = Entry(_FLOATS[dtype], shape, 8 + length + at)
        at = end
    if at != size - 8 - length:
        raise CheckpointError(
            path,
            f"describes {at} bytes of tensors and holds {size - 8 - length}: it is truncated or "
            "damaged; fetch it again",
        )
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose names Python would else let replace each other. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} comes twice")
    return found
