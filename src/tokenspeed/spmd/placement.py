"""Placements: how a value lies on the mesh, in torch.distributed.tensor's own words.

Rule: along each mesh axis a value is `Replicate()` (every rank has all of it), `Shard(dim)` (the
ranks have equal slices of a tensor dim) or `Partial()` (the ranks have summands of it). An axis
that a layout does not name is Replicate.
"""

from __future__ import annotations

from typing import final

from attrs import field, frozen
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.mesh import Mesh

__all__ = ["REPLICATED", "Layout", "Partial", "Placement", "Replicate", "Shard", "layout"]


def _canonical(axes: tuple[tuple[str, Placement], ...]) -> tuple[tuple[str, Placement], ...]:
    return tuple(sorted((item for item in axes if not item[1].is_replicate()), key=lambda a: a[0]))


@final
@frozen
class Layout:
    """One placement an axis. Layouts that mean the same are equal.

    Attributes:
        axes: (axis, placement) pairs by name; Replicate is left out.
    """

    axes: tuple[tuple[str, Placement], ...] = field(default=(), converter=_canonical)

    def __attrs_post_init__(self) -> None:
        for axis, placement in self.axes:
            if isinstance(placement, Partial) and placement.reduce_op != "sum":
                raise PlacementError(
                    f"axis {axis}: got {placement}; a partial value here is a sum: use Partial()"
                )

    def on(self, axis: str) -> Placement:
        """The placement along one axis."""
        return dict(self.axes).get(axis, Replicate())

    def within(self, mesh: Mesh) -> Layout:
        """The same without axes along which the mesh has one rank: there all placements agree."""
        return Layout(tuple((axis, p) for axis, p in self.axes if mesh.size(axis) > 1))

    def __str__(self) -> str:
        return " ".join(f"{_short(p)}@{axis}" for axis, p in self.axes) or "R"


def layout(**axes: Placement) -> Layout:
    """`layout(tp=Shard(0))`: by axis name."""
    return Layout(tuple(axes.items()))


REPLICATED = Layout()


def _short(placement: Placement) -> str:
    return f"S({placement.dim})" if isinstance(placement, Shard) else "P"
