"""Collectives by mesh axis, over torch.distributed or between threads of one process.

Rule: every operation returns a new tensor and leaves its input alone; a collective along an axis
involves exactly `mesh.peers(axis)`. Models never call these: the compiler does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, final

import torch
import torch.distributed as dist
from attrs import define, field
from torch import Tensor

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.mesh import Mesh

__all__ = ["Communicator", "ProcessGroups", "ThreadGroups", "local_slice"]


class Communicator(Protocol):
    """What a compiled program needs of the mesh. All ranks of an axis call alike, in one order."""

    def all_reduce(self, x: Tensor, *, axis: str) -> Tensor:
        """Sum over the axis; every rank gets it."""
        ...

    def all_gather(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """Join the ranks' slices along a tensor dim."""
        ...

    def reduce_scatter(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """Sum over the axis; each rank gets its slice along a tensor dim."""
        ...


def local_slice(x: Tensor, *, dim: int, size: int, at: int) -> Tensor:
    """Slice `at` of `size` equal ones along a tensor dim (a view).

    Raises:
        PlacementError: the dim does not divide.
    """
    if x.shape[dim] % size:
        raise PlacementError(
            f"a tensor {list(x.shape)} cannot be sharded along dim {dim} over {size} ranks: "
            f"pad the dim to a multiple of {size}"
        )
    width = x.shape[dim] // size
    return x.narrow(dim, at * width, width)


@final
class ProcessGroups:
    """Collectives of torch.distributed (NCCL, gloo), one process group for each axis.

    Every process of the default group makes one of these, in the same order.
    """

    def __init__(self, mesh: Mesh) -> None:
        if dist.get_world_size() != mesh.ranks or dist.get_rank() != mesh.rank:
            raise PlacementError(
                f"rank {mesh.rank} of the mesh {mesh} ({mesh.ranks} ranks) is process "
                f"{dist.get_rank()} of {dist.get_world_size()}: start one process a rank, as "
                "torchrun does"
            )
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._mesh = mesh
        for axis, _ in mesh.axes:
            for peers in sorted({mesh.at(rank).peers(axis) for rank in range(mesh.ranks)}):
                group = dist.new_group(list(peers))
                if mesh.rank in peers:
                    self._groups[axis] = group

    def all_reduce(self, x: Tensor, *, axis: str) -> Tensor:
        """See Communicator."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._groups[axis])
        return total

    def all_gather(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """See Communicator."""
        mine = x.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self._mesh.size(axis))]
        dist.all_gather(parts, mine, group=self._groups[axis])
        return torch.cat(parts, dim)

    def reduce_scatter(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """See Communicator."""
        size, at = self._mesh.size(axis), self._mesh.coordinate(axis)
        if dist.get_backend(self._groups[axis]) == "gloo":  # it has no reduce_scatter of its own
            return local_slice(self.all_reduce(x, axis=axis), dim=dim, size=size, at=at)
        parts = [local_slice(x, dim=dim, size=size, at=i).contiguous() for i in range(size)]
        mine = torch.empty_like(parts[at])
        dist.reduce_scatter(mine, parts, group=self._groups[axis])
        return mine


@define(eq=False)
class _Board:
    """Where the ranks of one axis show each other their tensors, one exchange at a time."""

    barrier: threading.Barrier
    tensors: dict[int, Tensor] = field(factory=dict)

    def exchange(self, at: int, x: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self.tensors[at] = x
        self.barrier.wait()
        result = combine([self.tensors[i] for i in range(self.barrier.parties)])
        self.barrier.wait()
        return result


@final
class ThreadGroups:
    """A mesh whose ranks are threads of this process: the compiler's laboratory.

    `ThreadGroups.of(mesh)` gives one communicator a rank; each is used by one thread.
    """

    def __init__(self, mesh: Mesh, boards: dict[tuple[str, tuple[int, ...]], _Board]) -> None:
        self._mesh = mesh
        self._boards = boards

    @classmethod
    def of(cls, mesh: Mesh, *, timeout_s: float = 30.0) -> list[ThreadGroups]:
        """Communicators of all ranks; one that waits longer than `timeout_s` breaks the others."""
        keys = {(a, mesh.at(r).peers(a)) for a, _ in mesh.axes for r in range(mesh.ranks)}
        boards = {key: _Board(threading.Barrier(len(key[1]), timeout=timeout_s)) for key in keys}
        return [cls(mesh.at(rank), boards) for rank in range(mesh.ranks)]

    @property
    def mesh(self) -> Mesh:
        """The mesh as this rank sees it."""
        return self._mesh

    def all_reduce(self, x: Tensor, *, axis: str) -> Tensor:
        """See Communicator. Summed in rank order, so all ranks get the same bits."""
        return self._exchange(x, axis, lambda parts: torch.stack(parts).sum(0))

    def all_gather(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """See Communicator."""
        return self._exchange(x, axis, lambda parts: torch.cat(parts, dim))

    def reduce_scatter(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """See Communicator."""
        size, at = self._mesh.size(axis), self._mesh.coordinate(axis)
        return local_slice(self.all_reduce(x, axis=axis), dim=dim, size=size, at=at)

    def _exchange(self, x: Tensor, axis: str, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        board = self._boards[axis, self._mesh.peers(axis)]
        return board.exchange(self._mesh.coordinate(axis), x, combine)
