"""The mesh: ranks arranged along named axes.

Rule: an *axis* is the mesh's, a *dim* is a tensor's. A mesh is a value; it opens no connection.
Ranks are numbered in row-major order of the axes, the first axis outermost.
"""

from __future__ import annotations

import math
from typing import Self, final

from attrs import frozen

from tokenspeed.errors import ConfigError

__all__ = ["Mesh"]

RANKS_MAX = 1 << 16


@final
@frozen
class Mesh:
    """Named axes with their sizes, as one rank sees them.

    Attributes:
        axes: (name, size) pairs, outermost first.
        rank: this rank, in [0, ranks).
    """

    axes: tuple[tuple[str, int], ...] = ()
    rank: int = 0

    def __attrs_post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
            raise ConfigError("mesh", names, "distinct axis names such as dp, tp, ep, pp")
        for name, size in self.axes:
            if type(size) is not int or size < 1:
                raise ConfigError(f"mesh.{name}", size, "an integer, 1 or more ranks")
        if self.ranks > RANKS_MAX:
            raise ConfigError("mesh", str(self), f"at most {RANKS_MAX:,} ranks: axes multiply")
        if not 0 <= self.rank < self.ranks:
            raise ConfigError("rank", self.rank, f"0 to {self.ranks - 1} on the mesh {self}")

    @classmethod
    def single(cls) -> Self:
        """The mesh of one rank."""
        return cls()

    @classmethod
    def of(cls, *, rank: int = 0, **axes: int) -> Self:
        """`Mesh.of(dp=2, tp=4, rank=5)`: axes in the order given."""
        return cls(tuple(axes.items()), rank)

    @property
    def ranks(self) -> int:
        """Ranks in the mesh: the product of its axes."""
        return math.prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        """Ranks along an axis; 1 for an axis that this mesh does not have."""
        return dict(self.axes).get(axis, 1)

    def coordinate(self, axis: str) -> int:
        """Where this rank stands along an axis; 0 on an axis that the mesh does not have."""
        rest = self.rank
        for name, size in reversed(self.axes):
            if name == axis:
                return rest % size
            rest //= size
        return 0

    def peers(self, axis: str) -> tuple[int, ...]:
        """The ranks that differ from this one along `axis` alone, this one included, in order."""
        first = self.rank - self.coordinate(axis) * self.stride(axis)
        return tuple(first + i * self.stride(axis) for i in range(self.size(axis)))

    def stride(self, axis: str) -> int:
        """By how much the numbers of two ranks differ that are neighbours along an axis."""
        names = [name for name, _ in self.axes]
        inner = self.axes[names.index(axis) + 1 :] if axis in names else ()
        return math.prod(size for _, size in inner)

    def at(self, rank: int) -> Mesh:
        """The same mesh seen by another rank."""
        return Mesh(self.axes, rank)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes) or "one rank"
