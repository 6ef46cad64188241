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
    "allocate",
    "leaves",
    "local_shape",
    "own_rows",
    "own_sources",
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
        stacked: where not 0, the sources are so many groups of equal shapes, one after the other
            (of experts, say). Each group is joined for itself, and dim 0 of the parameter counts
            the groups: sharding dim 0 deals out whole groups, and dim d + 1 is dim d of a source.
        bits_min: nothing but `kernels.linear` reads it, so that it may be packed, into as few bits
            as these; None: it may not.
    """

    sources: tuple[Source, ...]
    dtype: torch.dtype | None = None
    stacked: int = 0
    bits_min: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        group = self.sources[: len(self.sources) // self.stacked if self.stacked else None]
        shape = (sum(source.shape[0] for source in group), *self.sources[0].shape[1:])
        return (self.stacked, *shape) if self.stacked else shape


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
        PlacementError: an axis does not divide the dim into whole granules, or there is none.
    """
    index = [slice(0, size) for size in source.shape]
    for axis, size in mesh.axes:  # outermost first: inner axes split what outer ones left
        placement = lies.on(axis)
        if not isinstance(placement, Shard) or size == 1:
            continue
        dim = placement.dim
        if dim >= len(index):
            raise PlacementError(
                f"{path_name(path)} ({source.name} {list(source.shape)}): {lies} shards dim {dim}, "
                f"but there are {len(index)} dims; declare another in @module(params=...)"
            )
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


def own_rows(parameter: Parameter, lies: Layout, mesh: Mesh, path: Path) -> tuple[int, int]:
    """(first, count) of this rank's rows, or groups, along dim 0; of several sources, of the first.

    Raises:
        PlacementError: as `shard_slice`.
    """
    dim = Source(path_name(path), (parameter.stacked,)) if parameter.stacked else None
    outer = Layout(tuple((axis, p) for axis, p in lies.axes if p.is_shard(0)))
    part = shard_slice(dim or parameter.sources[0], outer if dim else lies, mesh, path)[0]
    return part.start, part.stop - part.start


def own_sources(
    parameter: Parameter, lies: Layout, mesh: Mesh, path: Path
) -> list[tuple[Source, tuple[slice, ...]]]:
    """The sources that this rank reads, in order, and which part of each.

    Raises:
        PlacementError: as `shard_slice`.
    """
    sources = parameter.sources
    if parameter.stacked:
        first, count = own_rows(parameter, lies, mesh, path)
        group = len(sources) // parameter.stacked
        sources = sources[first * group : (first + count) * group]
        inner = ((a, p) for a, p in lies.axes if not p.is_shard(0))
        lies = Layout(tuple((a, Shard(p.dim - 1) if isinstance(p, Shard) else p) for a, p in inner))
    parts: dict[tuple[tuple[int, ...], int], tuple[slice, ...]] = {}
    for source in sources:
        if (source.shape, source.granule) not in parts:
            parts[source.shape, source.granule] = shard_slice(source, lies, mesh, path)
    return [(source, parts[source.shape, source.granule]) for source in sources]


def local_shape(parameter: Parameter, lies: Layout, mesh: Mesh, path: Path) -> tuple[int, ...]:
    """Shape of this rank's part of a parameter. Raises PlacementError, as `shard_slice`."""
    own = own_sources(parameter, lies, mesh, path)
    rows = sum(part[0].stop - part[0].start for _, part in own)
    rest = tuple(p.stop - p.start for p in own[0][1][1:])
    if parameter.stacked:
        groups = own_rows(parameter, lies, mesh, path)[1]
        return groups, rows // groups, *rest
    return rows, *rest


def allocate(
    parameter: Parameter,
    lies: Layout,
    mesh: Mesh,
    path: Path,
    make: Callable[..., Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Memory for this rank's part of a parameter: `make(shape, dtype=own dtype, or this one)`."""
    return make(local_shape(parameter, lies, mesh, path), dtype=parameter.dtype or dtype)
