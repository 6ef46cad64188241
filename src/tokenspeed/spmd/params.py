"""Parameter trees: nested dicts and lists whose leaves say what a tensor is, then are that tensor.

Rule: a leaf names its sources in the checkpoint and the granule (for instance the head size) that
no rank may split; how it lies on the mesh is said by the module that uses it, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import Layout, Shard

__all__ = [
    "Constant",
    "Parameter",
    "Path",
    "Source",
    "Tree",
    "leaves",
    "local_shape",
    "path_name",
    "shard_slice",
]

Tree = Any
"""A leaf, or a dict or list of trees."""

Path = tuple[str | int, ...]


@final
@frozen
class Source:
    """A checkpoint tensor that (part of) a parameter is read from.

    Attributes:
        name: in the checkpoint.
        shape: whole, not one rank's.
        granule: elements along the sharded dim that stay together on one rank.
    """

    name: str
    shape: tuple[int, ...]
    granule: int = 1


@final
@frozen
class Parameter:
    """A learned tensor: its sources, each sharded for itself, then joined along dim 0.

    Attributes:
        sources: in the checkpoint.
        dtype: of the tensor, whatever the model's; None: the model's.
    """

    sources: tuple[Source, ...]
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        rows = sum(source.shape[0] for source in self.sources)
        return (rows, *self.sources[0].shape[1:])


@final
@frozen(eq=False)
class Constant:
    """A tensor that is computed from the configuration; every rank has all of it."""

    make: Callable[[], Tensor]


def leaves(tree: Tree, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All leaves with their paths, in order."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from leaves(branch, (*at, key))
    elif isinstance(tree, list):
        for index, branch in enumerate(tree):
            yield from leaves(branch, (*at, index))
    else:
        yield at, tree


def path_name(path: Path) -> str:
    """A path as in messages: `layers.3.attention.qkv`."""
    return ".".join(str(part) for part in path)


def shard_slice(source: Source, lies: Layout, mesh: Mesh, path: Path) -> tuple[slice, ...]:
    """The part of a source that this rank holds.

    Raises:
        PlacementError: an axis does not divide the dim into whole granules.
    """
    index = [slice(0, size) for size in source.shape]
    for axis, size in mesh.axes:  # outermost first: inner axes split what outer ones left
        placement = lies.on(axis)
        if not isinstance(placement, Shard) or size == 1:
            continue
        dim = placement.dim
        part = index[dim]
        units = (part.stop - part.start) // source.granule
        if units % size:
            raise PlacementError(
                f"{path_name(path)} ({source.name} {list(source.shape)}): {lies} on the mesh "
                f"{mesh} splits {units} units of {source.granule} over {size} ranks; choose "
                f"{axis} as a divisor of {units}"
            )
        step = units // size * source.granule
        start = part.start + mesh.coordinate(axis) * step
        index[dim] = slice(start, start + step)
    return tuple(index)


def local_shape(parameter: Parameter, lies: Layout, mesh: Mesh, path: Path) -> tuple[int, ...]:
    """Shape of this rank's part of a parameter. Raises PlacementError, as `shard_slice`."""
    rows, rest = 0, ()
    for source in parameter.sources:
        part = shard_slice(source, lies, mesh, path)
        rows += part[0].stop - part[0].start
        rest = tuple(p.stop - p.start for p in part[1:])
    return rows, *rest


def allocate(parameter: Parameter, lies: Layout, mesh: Mesh, path: Path, **kind: Any) -> Tensor:
    """Uninitialised memory for this rank's part of a parameter (`kind`: dtype and device)."""
    if parameter.dtype is not None:
        kind["dtype"] = parameter.dtype
    return torch.empty(local_shape(parameter, lies, mesh, path), **kind)
