"""GGUF: one file with metadata, tokenizer and (quantised) tensors.

Rule: every length and offset in the file is a claim, checked against the file's size with 64-bit
(here: unbounded) arithmetic before anything is read through it. Nothing is copied until a tensor is
asked for. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from attrs import define, frozen
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from tokenspeed.errors import CheckpointError

__all__ = ["GGUFFile", "GGUFTensor", "is_gguf"]

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_DIMS_MAX = 4
_ALIGNMENT = 32


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one does. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error


@final
@frozen
class GGUFTensor:
    """Where a tensor lies: shape in torch's order (rows first), absolute offset, size in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@final
class GGUFFile:
    """A checked GGUF file.

    Attributes:
        path: of the file.
        meta: metadata by key; arrays are lists.
        tensors: by name.

    Raises:
        CheckpointError: the file is no GGUF, truncated, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(path, f"cannot be read: {error}") from error
        cursor = _Cursor(path, self._data)
        if cursor.take(4) != _MAGIC:
            raise CheckpointError(path, "is no GGUF file: it does not begin with the letters GGUF")
        version = cursor.number("<I")
        if version not in (2, 3):
            raise CheckpointError(path, f"GGUF version {version}; versions 2 and 3 are read")
        tensors, entries = cursor.number("<Q"), cursor.number("<Q")
        cursor.must_hold(entries, 13, "metadata entries")
        self.meta: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.string()
            if key in self.meta:
                raise CheckpointError(path, f"metadata key {key!r} comes twice")
            self.meta[key] = cursor.value(cursor.number("<I"))
        cursor.must_hold(tensors, 24, "tensors")
        self.tensors = self._directory(cursor, tensors)

    def _directory(self, cursor: _Cursor, count: int) -> Mapping[str, GGUFTensor]:
        raw = [_tensor_entry(cursor) for _ in range(count)]
        alignment = self.meta.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise CheckpointError(self.path, f"general.alignment is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        end, previous = start, "the header"
        for name, shape, kind, size, offset in sorted(raw, key=lambda entry: entry[4]):
            if name in tensors:
                raise CheckpointError(self.path, f"tensor {name!r} comes twice")
            if start + offset < end:
                raise CheckpointError(self.path, f"tensor {name!r} overlaps {previous}")
            end, previous = start + offset + size, f"tensor {name!r}"
            if end > len(self._data):
                raise CheckpointError(
                    self.path,
                    f"tensor {name!r} ends at byte {end}, the file at {len(self._data)}: it is "
                    "truncated; fetch it again",
                )
            tensors[name] = GGUFTensor(name, shape, kind, start + offset, size)
        return tensors

    def read(self, name: str) -> Tensor:
        """A tensor in its own float type, or dequantised to float32; a copy."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, tensor.size, tensor.offset)
        if tensor.kind == GGMLQuantizationType.BF16:
            return torch.from_numpy(raw.copy()).view(torch.bfloat16).view(tensor.shape)
        if tensor.kind == GGMLQuantizationType.F16:
            return torch.from_numpy(raw.copy()).view(torch.float16).view(tensor.shape)
        if tensor.kind == GGMLQuantizationType.F32:
            return torch.from_numpy(raw.copy()).view(torch.float32).view(tensor.shape)
        _, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        blocks, _ = GGML_QUANT_SIZES[tensor.kind]
        rows = raw.reshape(-1, tensor.shape[-1] // blocks * block_bytes)
        return torch.from_numpy(dequantize(rows, tensor.kind)).view(tensor.shape)


@define(eq=False)
class _Cursor:
    """A reading position that never leaves the file."""

    path: Path
    data: mmap.mmap
    at: int = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CheckpointError(
                self.path,
                f"wants {size} bytes at {self.at}, but ends at {len(self.data)}: it is truncated "
                "or damaged; fetch it again",
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def must_hold(self, count: int, size: int, what: str) -> None:
        if count * size > len(self.data) - self.at:
            raise CheckpointError(
                self.path, f"claims {count} {what}, more than {len(self.data)} bytes can hold"
            )

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                self.path, f"a string before byte {self.at} is no UTF-8"
            ) from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(
                self.path, f"metadata type {kind} before byte {self.at} is unknown"
            )
        of, count = self.number("<I"), self.number("<Q")
        if of in _SCALARS:
            form = _SCALARS[of]
            raw = self.take(count * struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form[1]}", raw))
        if of != _STRING:
            raise CheckpointError(self.path, f"array of metadata type {of} before byte {self.at}")
        self.must_hold(count, 8, "strings")
        return [self.string() for _ in range(count)]


def _tensor_entry(
    cursor: _Cursor,
) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
    """(name, shape, kind, bytes, offset in the data section)"""
    name, dims = cursor.string(), cursor.number("<I")
    if not 1 <= dims <= _DIMS_MAX:
        raise CheckpointError(
            cursor.path, f"tensor {name!r} has {dims} dims; 1 to {_DIMS_MAX} expected"
        )
    shape = tuple(reversed([cursor.number("<Q") for _ in range(dims)]))
    number, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise CheckpointError(cursor.path, f"tensor {name!r} has unknown type {number}") from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise CheckpointError(
            cursor.path, f"tensor {name!r} {list(shape)}: {kind.name} wants rows of whole {block}s"
        )
    return name, shape, kind, math.prod(shape) // block * block_bytes, offset
