"""The KV cache as a value: the page tensors of each layer, donated from step to step.

Rule: who passes a KV on has it no longer; touching it again raises. Storage is taken once, zeroed
(what was never written is read under a mask, and 0 * NaN would be NaN).
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.errors import StepError

__all__ = ["KV", "KVSpec", "LayerKV"]

LayerKV = tuple[Tensor, ...]
"""A layer's pages: k_pages and v_pages, each [pages, page_size, kv_heads, dim], say."""


@final
@frozen(kw_only=True)
class KVSpec:
    """What one rank caches for a token.

    Attributes:
        layers: attention layers.
        parts: the shapes of what a layer keeps of a token: two of (heads on this rank, elements of
            a head), or one of (elements of a latent,).
        dtype, device: of the pages.
    """

    layers: int
    parts: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers."""
        return self.layers * sum(map(math.prod, self.parts)) * self.dtype.itemsize

    def allocate(self, pages: int, page_size: int) -> KV:
        """Zeroed pages for `pages * page_size` tokens."""
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        return KV(
            tuple(
                tuple(torch.zeros((pages, page_size, *part), **kind) for part in self.parts)
                for _ in range(self.layers)
            )
        )


@final
class KV:
    """A handle on the pages of all layers; `kv[layer]` gives those of one."""

    __slots__ = ("_layers",)

    def __init__(self, layers: tuple[LayerKV, ...]) -> None:
        self._layers: tuple[LayerKV, ...] | None = layers

    def __getitem__(self, layer: int) -> LayerKV:
        return self._owned()[layer]

    def __len__(self) -> int:
        return len(self._owned())

    @property
    def pages(self) -> tuple[LayerKV, ...]:
        """The storage itself, for its owner: a KV made of it again outlives a step that raised."""
        return self._owned()

    def donate(self) -> KV:
        """Move the storage to a new handle; this one is dead from here on.

        Raises:
            StepError: it was donated before.
        """
        layers, self._layers = self._owned(), None
        return KV(layers)

    def _owned(self) -> tuple[LayerKV, ...]:
        if self._layers is None:
            raise StepError(
                "this KV was donated to a step: use the KV that the step returned in its place"
            )
        return self._layers
