"""The KV cache as a value: the page tensors of each layer, donated from step to step.

Rule: who passes a KV on has it no longer; touching it again raises. Storage is taken once, zeroed
(what was never written is read under a mask, and 0 * NaN would be NaN).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self, final

import torch
from attrs import Factory, field, frozen
from torch import Tensor

from tokenspeed.errors import StepError
from tokenspeed.spmd.arena import Arena

__all__ = ["KV", "CacheGroups", "KVSpec", "LayerKV"]

LayerKV = tuple[Tensor, ...]
"""A layer's pages: k_pages and v_pages, each [pages, page_size, kv_heads, dim], say."""


GROUPS_MAX = 8
"""Groups that see all, and groups with the window: so many of each at most."""


@final
@frozen
class CacheGroups:
    """Layers that cache alike share a page table; all tables take their pages from one pool.

    A page has the KV of so many tokens in the layers of one group, so that the groups are of one
    size: the last one of a kind may leave rows of its pages empty.

    Attributes:
        windows: of each group, how many tokens its layers see; 0: all. These come first.
        places: of each layer its group, and which row of that group's pages is its own.
    """

    windows: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def one(cls, layers: int, window: int = 0) -> Self:
        """All layers cache alike."""
        return cls((window,), tuple((0, layer) for layer in range(layers)))

    @classmethod
    def of(cls, windows: Sequence[int | None]) -> Self:
        """Those of a model, by the windows of its layers; None: the layer sees all.

        The size is the one with the fewest rows for the layers that see all, whose pages are most
        of a long context, and then the fewest groups.
        """
        spans = [window for window in windows if window is not None]
        full = len(windows) - len(spans)
        if not spans or not full:
            return cls.one(len(windows), max(spans, default=0))
        counts = {
            rows: (-(-full // rows), -(-len(spans) // rows)) for rows in range(1, full + len(spans))
        }
        fitting = [rows for rows, each in counts.items() if max(each) <= GROUPS_MAX]
        rows = min(fitting, key=lambda rows: (counts[rows][0] * rows, sum(counts[rows])))
        full_groups, window_groups = counts[rows]
        seen = {True: 0, False: 0}
        places = []
        for window in windows:
            at, row = divmod(seen[window is None], rows)
            seen[window is None] += 1
            places.append((at if window is None else full_groups + at, row))
        return cls((0,) * full_groups + (max(spans),) * window_groups, tuple(places))

    @property
    def rows(self) -> int:
        """Layers that have their KV in one page, at most."""
        return 1 + max(row for _, row in self.places)

    @property
    def settings(self) -> dict[str, int]:
        """The scheduler's."""
        full = self.windows.count(0) if len(self.windows) > 1 else 0
        groups = len(self.windows) - full
        return {"window": self.windows[-1], "full_groups": full, "window_groups": groups}


@final
@frozen(kw_only=True)
class KVSpec:
    """What one rank caches for a token.

    Attributes:
        layers: attention layers.
        parts: the shapes of what a layer keeps of a token: two of (heads on this rank, elements of
            a head), or one of (elements of a latent,).
        dtype, device: of the pages.
        groups: which layers share a page table; all, if nothing is said.
        held: the layers whose KV this rank has; None: all. Others have no pages here.
    """

    layers: int
    parts: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    groups: CacheGroups = field(
        default=Factory(lambda self: CacheGroups.one(self.layers), takes_self=True)
    )
    held: range | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in a page: over all layers, if there is one group."""
        return len(self._rows) * sum(map(math.prod, self.parts)) * self.dtype.itemsize

    @property
    def _rows(self) -> frozenset[int]:
        """Those that this rank has of a page."""
        places = self.groups.places
        held = range(len(places)) if self.held is None else self.held
        return frozenset(places[layer][1] for layer in held)

    def allocate(self, pages: int, page_size: int) -> KV:
        """Zeroed pages of `page_size` tokens. Layers in the same row have the same tensors."""
        arena = Arena(self.device)
        rows = [
            tuple(arena.zeros((pages, page_size, *part), dtype=self.dtype) for part in self.parts)
            if row in self._rows
            else ()
            for row in range(self.groups.rows)
        ]
        return KV(tuple(rows[row] for _, row in self.groups.places))


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
