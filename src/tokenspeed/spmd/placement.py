"""Placements: how a value lies on the mesh, in torch.distributed.tensor's own words.

Rule: along each mesh axis a value is `Replicate()` (every rank has all of it), `Shard(dim)` (the
ranks have equal slices of a tensor dim) or `Partial()` (the ranks have summands of it). A `Layout`
says it for every axis; a `Boundary` is what a module declares, and may leave axes open. A dim that
several axes shard is split along the mesh's axes in order, the outermost first; dim 0 of what lies
between modules along those of the batch before all others.
"""

from __future__ import annotations

import enum
from typing import final

from attrs import field, frozen
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.mesh import Mesh

__all__ = [
    "REPLICATED",
    "Boundary",
    "Layout",
    "Partial",
    "Placement",
    "Replicate",
    "Rest",
    "Shard",
    "alike",
    "as_batch",
    "boundary",
    "layout",
    "tokens",
]

Axes = tuple[tuple[str, Placement], ...]


def _by_name(axes: Axes) -> Axes:
    for axis, placement in axes:
        if not isinstance(placement, (Shard, Replicate, Partial)):
            raise PlacementError(
                f"axis {axis}: got {placement!r}; expected Shard(dim), Replicate() or Partial()"
            )
        if isinstance(placement, Shard) and placement.dim < 0:
            raise PlacementError(
                f"axis {axis}: got {placement}; dims count from 0, the first: how many a tensor "
                "has is not known here"
            )
        if isinstance(placement, Partial) and placement.reduce_op != "sum":
            raise PlacementError(
                f"axis {axis}: got {placement}; a partial value here is a sum: use Partial()"
            )
    return tuple(sorted(axes, key=lambda item: item[0]))


def _canonical(axes: Axes) -> Axes:
    return tuple(item for item in _by_name(axes) if not item[1].is_replicate())


@final
@frozen(cache_hash=True)
class Layout:
    """One placement an axis. Layouts that mean the same are equal.

    Attributes:
        axes: (axis, placement) pairs by name; Replicate is left out.
    """

    axes: Axes = field(default=(), converter=_canonical)

    def on(self, axis: str) -> Placement:
        """The placement along one axis."""
        for name, placement in self.axes:
            if name == axis:
                return placement
        return Replicate()

    def having(self, axis: str, placement: Placement) -> Layout:
        """The same with another placement along one axis."""
        return _one(Layout((*((a, p) for a, p in self.axes if a != axis), (axis, placement))))

    def within(self, mesh: Mesh) -> Layout:
        """The same without axes along which the mesh has one rank: there all placements agree."""
        return _one(Layout(tuple((axis, p) for axis, p in self.axes if mesh.size(axis) > 1)))

    def parts(self, mesh: Mesh, dim: int | None = None) -> int:
        """Into how many slices the mesh cuts a tensor dim; with None, all dims together."""
        parts = 1
        for axis, placement in self.axes:
            if isinstance(placement, Shard) and dim in (None, placement.dim):
                parts *= mesh.size(axis)
        return parts

    def __str__(self) -> str:
        return " ".join(f"{_short(p)}@{axis}" for axis, p in self.axes) or "R"


_SEEN: dict[Layout, Layout] = {}


def _one(lies: Layout) -> Layout:
    """The same object for equal layouts: the search looks them up by the million."""
    return _SEEN.setdefault(lies, lies)


def layout(**axes: Placement) -> Layout:
    """`layout(tp=Shard(0))`: by axis name; Replicate along every other axis."""
    return Layout(tuple(axes.items()))


REPLICATED = Layout()


@final
class Rest(enum.Enum):
    """How a boundary lies along the axes that it does not name."""

    REPLICATE = "R"
    BATCH = "batch"
    TOKENS = "tokens"
    ANY = "any"


@final
@frozen(cache_hash=True)
class Boundary:
    """How a module takes or gives a tensor; made by `layout`, `tokens`, `as_batch` and `alike`.

    Attributes:
        named: (axis, placement) pairs by name, Replicate included.
        rest: along all other axes.
    """

    named: Axes = field(converter=_by_name)
    rest: Rest

    @property
    def is_free(self) -> bool:
        """Whether the compiler chooses along the axes that are not named."""
        return self.rest in (Rest.TOKENS, Rest.ANY)

    def resolve(self, batch: Layout, chosen: Layout) -> Layout:
        """The layout, given the batch's and the one chosen for the axes that are left open."""
        if self.rest is Rest.REPLICATE:
            return Layout(self.named)
        names = {axis for axis, _ in self.named}
        others = (batch if self.rest is Rest.BATCH else chosen).axes
        return Layout((*self.named, *(item for item in others if item[0] not in names)))

    def __str__(self) -> str:
        named = " ".join(f"{_short(p)}@{axis}" for axis, p in self.named)
        if self.rest is Rest.REPLICATE:
            return named or "R"
        return f"{named} {self.rest.value}".strip()


def boundary(declared: Layout | Boundary) -> Boundary:
    """A layout is the boundary that leaves nothing open. Raises PlacementError for others."""
    if isinstance(declared, Boundary):
        return declared
    if not isinstance(declared, Layout):
        raise PlacementError(
            f"got {declared!r} as a placement; expected layout(...), tokens(...), as_batch(...) or "
            "alike(...) by axis names, as in layout(tp=Shard(0))"
        )
    return Boundary(declared.axes, Rest.REPLICATE)


def tokens(**axes: Placement) -> Boundary:
    """Dim 0 is the tokens, and the module treats each for itself: along the axes that are not named
    any sharding of dim 0 will do, the same for all boundaries of the call. The compiler chooses it.
    """
    return Boundary(tuple(axes.items()), Rest.TOKENS)


def as_batch(**axes: Placement) -> Boundary:
    """Dim 0 is what the step's batch counts, and it lies as the batch does along the axes that are
    not named: for modules that read positions, pages or rows from the batch."""
    return Boundary(tuple(axes.items()), Rest.BATCH)


def alike(**axes: Placement) -> Boundary:
    """The module is linear in its inputs and treats each token for itself, as a sum does: along the
    axes that are not named whatever will do, summands too, the same for all boundaries."""
    return Boundary(tuple(axes.items()), Rest.ANY)


def _short(placement: Placement) -> str:
    if isinstance(placement, Shard):
        return f"S({placement.dim})"
    return "P" if isinstance(placement, Partial) else "R"
