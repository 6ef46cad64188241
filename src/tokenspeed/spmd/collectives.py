"""Collectives by mesh axis, over torch.distributed or between threads of one process.

Rule: every operation returns a new tensor and leaves its input alone; a collective along an axis
involves exactly `mesh.peers(axis)`. Models never call these: the compiler does.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any, Generic, Protocol, Self, TypeVar, cast, final

import torch
import torch.distributed as dist
from attrs import define, field, frozen
from torch import Tensor

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.mesh import Mesh

__all__ = ["Communicator", "ProcessGroups", "Started", "ThreadGroups", "local_slice"]

T = TypeVar("T")
R = TypeVar("R")


@final
@frozen(eq=False)
class Started(Generic[T]):
    """A collective under way. What it was given may not be written to until it has been awaited."""

    _works: tuple[dist.Work, ...]
    _finish: Callable[[], T]

    @classmethod
    def of(cls, work: dist.Work | None, finish: Callable[[], T]) -> Self:
        """One of torch's, or none where it is over."""
        return cls(() if work is None else (work,), finish)

    def wait(self) -> T:
        """Its result. On a GPU the stream waits for it, not the CPU."""
        for work in self._works:
            work.wait()
        return self._finish()


class Communicator(Protocol):
    """What a compiled program needs of the mesh. All ranks of an axis call alike, in one order."""

    def start(self, op: str, *args: Any, **how: Any) -> Started[Any]:
        """Begin `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all` or `exchange`.

        Called as these are. Others may be begun and awaited before it is awaited.
        """
        ...

    def all_reduce(self, x: Tensor, *, axis: str) -> Tensor:
        """Sum over the axis; every rank gets it."""
        ...

    def all_gather(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """Join the ranks' slices along a tensor dim."""
        ...

    def reduce_scatter(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """Sum over the axis; each rank gets its slice along a tensor dim."""
        ...

    def all_to_all(self, x: Tensor, *, axis: str, dim: int, from_dim: int) -> Tensor:
        """Cut along a tensor dim instead of `from_dim`; each rank gets its slice of the new cut."""
        ...

    def send(self, x: Tensor, *, axis: str) -> None:
        """Give a tensor to the next rank along the axis."""
        ...

    def receive(self, empty: Tensor, *, axis: str) -> Tensor:
        """What the rank before this one along the axis sends; `empty` has its shape and dtype."""
        ...

    def broadcast(self, x: Tensor, *, axis: str, root: int) -> Tensor:
        """What the rank at a coordinate of the axis has, on all; `x` has its shape and dtype."""
        ...

    def exchange_counts(self, counts: Sequence[int], *, axis: str) -> list[int]:
        """Give each rank its number and get one of each; waits for them."""
        ...

    def exchange(
        self, parts: Sequence[Tensor], came: Sequence[int], *, axis: str
    ) -> tuple[Tensor, ...]:
        """Give each rank its part and get one of each; parts may differ in dim 0 alone.

        Args:
            parts: for each rank of the axis.
            came: rows of what each rank gives to this one.
        """
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

    def abort(self) -> None:
        """Have what is under way end, without a result; from any thread. Nothing works after that.

        NCCL waits for a rank that is gone for ever, on the GPU; gloo notices by itself.
        """
        for group in set(self._groups.values()):
            if dist.get_backend(group) == "nccl":
                group.abort()

    def start(self, op: str, *args: Any, **how: Any) -> Started[Any]:
        """See Communicator. NCCL has a stream of its own for it, gloo threads."""
        begun: Started[Any] = getattr(self, f"_{op}")(*args, later=True, **how)
        return begun

    def all_reduce(self, x: Tensor, *, axis: str) -> Tensor:
        """See Communicator."""
        return self._all_reduce(x, axis=axis).wait()

    def all_gather(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """See Communicator."""
        return self._all_gather(x, axis=axis, dim=dim).wait()

    def reduce_scatter(self, x: Tensor, *, axis: str, dim: int) -> Tensor:
        """See Communicator."""
        return self._reduce_scatter(x, axis=axis, dim=dim).wait()

    def all_to_all(self, x: Tensor, *, axis: str, dim: int, from_dim: int) -> Tensor:
        """See Communicator."""
        return self._all_to_all(x, axis=axis, dim=dim, from_dim=from_dim).wait()

    def exchange(
        self, parts: Sequence[Tensor], came: Sequence[int], *, axis: str
    ) -> tuple[Tensor, ...]:
        """See Communicator."""
        return self._exchange(parts, came, axis=axis).wait()

    def _all_reduce(self, x: Tensor, *, axis: str, later: bool = False) -> Started[Tensor]:
        total = x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(total, group=self._groups[axis], async_op=later)
        return Started.of(work, lambda: total)

    def _all_gather(
        self, x: Tensor, *, axis: str, dim: int, later: bool = False
    ) -> Started[Tensor]:
        mine, size = x.contiguous(), self._mesh.size(axis)
        parts = mine.new_empty((size * mine.shape[0], *mine.shape[1:]))
        work = _all_gather(parts, mine, group=self._groups[axis], async_op=later)
        return Started.of(work, lambda: parts if dim == 0 else torch.cat(parts.chunk(size), dim))

    def _reduce_scatter(
        self, x: Tensor, *, axis: str, dim: int, later: bool = False
    ) -> Started[Tensor]:
        size, at, group = self._mesh.size(axis), self._mesh.coordinate(axis), self._groups[axis]
        if dist.get_backend(group) == "gloo":  # it has no reduce_scatter of its own
            whole = self._all_reduce(x, axis=axis, later=later)
            return Started.of(None, lambda: local_slice(whole.wait(), dim=dim, size=size, at=at))
        parts = x.contiguous() if dim == 0 else torch.cat(_slices(x, dim, size))
        mine = torch.empty_like(local_slice(parts, dim=0, size=size, at=at))
        work = _reduce_scatter(mine, parts, group=group, async_op=later)
        return Started.of(work, lambda: mine)

    def _all_to_all(
        self, x: Tensor, *, axis: str, dim: int, from_dim: int, later: bool = False
    ) -> Started[Tensor]:
        sent = torch.stack(_slices(x, dim, self._mesh.size(axis)))
        got = torch.empty_like(sent)
        work = dist.all_to_all_single(got, sent, group=self._groups[axis], async_op=later)
        return Started.of(work, lambda: torch.cat(got.unbind(0), from_dim))

    def _exchange(
        self, parts: Sequence[Tensor], came: Sequence[int], *, axis: str, later: bool = False
    ) -> Started[tuple[Tensor, ...]]:
        group, sizes = self._groups[axis], list(came)
        got = parts[0].new_empty((sum(sizes), *parts[0].shape[1:]))
        sent, counts = torch.cat(list(parts)), [len(part) for part in parts]
        work = dist.all_to_all_single(got, sent, sizes, counts, group=group, async_op=later)
        return Started.of(work, lambda: tuple(torch.split(got, sizes)))

    def send(self, x: Tensor, *, axis: str) -> None:
        """See Communicator."""
        to = self._mesh.peers(axis)[self._mesh.coordinate(axis) + 1]
        dist.send(x.contiguous(), to, group=self._groups[axis])

    def receive(self, empty: Tensor, *, axis: str) -> Tensor:
        """See Communicator."""
        before = self._mesh.peers(axis)[self._mesh.coordinate(axis) - 1]
        dist.recv(empty, before, group=self._groups[axis])
        return empty

    def broadcast(self, x: Tensor, *, axis: str, root: int) -> Tensor:
        """See Communicator."""
        everywhere = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(everywhere, self._mesh.peers(axis)[root], group=self._groups[axis])
        return everywhere

    def exchange_counts(self, counts: Sequence[int], *, axis: str) -> list[int]:
        """See Communicator."""
        group = self._groups[axis]
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"  # the current one
        sent = torch.tensor(counts, dtype=torch.int64, device=device)
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=group)
        return cast(list[int], came.tolist())


def _slices(x: Tensor, dim: int, size: int) -> list[Tensor]:
    return [local_slice(x, dim=dim, size=size, at=at).contiguous() for at in range(size)]


# torch 2.13 has new names for these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@define(eq=False)
class _Board:
    """Where the ranks of one axis show each other what they have, one exchange at a time."""

    barrier: threading.Barrier
    timeout_s: float
    shown: dict[int, Any] = field(factory=dict)
    pipes: defaultdict[int, Queue[Tensor]] = field(factory=lambda: defaultdict(Queue))

    def exchange(self, at: int, mine: T, combine: Callable[[list[T]], R]) -> R:
        self.shown[at] = mine
        self.barrier.wait()
        result = combine([self.shown[i] for i in range(self.barrier.parties)])
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
        boards = {
            key: _Board(threading.Barrier(len(key[1]), timeout=timeout_s), timeout_s)
            for key in keys
        }
        return [cls(mesh.at(rank), boards) for rank in range(mesh.ranks)]

    @property
    def mesh(self) -> Mesh:
        """The mesh as this rank sees it."""
        return self._mesh

    def start(self, op: str, *args: Any, **how: Any) -> Started[Any]:
        """See Communicator. Here it is over by then."""
        result = getattr(self, op)(*args, **how)
        return Started.of(None, lambda: result)

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

    def all_to_all(self, x: Tensor, *, axis: str, dim: int, from_dim: int) -> Tensor:
        """See Communicator."""
        at = self._mesh.coordinate(axis)
        parts = _slices(x, dim, self._mesh.size(axis))
        got = self._exchange(parts, axis, lambda shown: [some[at] for some in shown])
        return torch.cat(got, from_dim)

    def send(self, x: Tensor, *, axis: str) -> None:
        """See Communicator."""
        self._board(axis).pipes[self._mesh.coordinate(axis) + 1].put(x)

    def receive(self, empty: Tensor, *, axis: str) -> Tensor:
        """See Communicator."""
        board = self._board(axis)
        x = board.pipes[self._mesh.coordinate(axis)].get(timeout=board.timeout_s)
        assert (x.shape, x.dtype) == (empty.shape, empty.dtype)
        return x

    def broadcast(self, x: Tensor, *, axis: str, root: int) -> Tensor:
        """See Communicator."""
        return self._exchange(x, axis, lambda shown: shown[root])

    def exchange_counts(self, counts: Sequence[int], *, axis: str) -> list[int]:
        """See Communicator."""
        at = self._mesh.coordinate(axis)
        return self._exchange(counts, axis, lambda shown: [some[at] for some in shown])

    def exchange(
        self, parts: Sequence[Tensor], came: Sequence[int], *, axis: str
    ) -> tuple[Tensor, ...]:
        """See Communicator."""
        at = self._mesh.coordinate(axis)
        got = self._exchange(parts, axis, lambda shown: [some[at] for some in shown])
        assert [len(part) for part in got] == list(came)
        return tuple(got)

    def _exchange(self, mine: T, axis: str, combine: Callable[[list[T]], R]) -> R:
        return self._board(axis).exchange(self._mesh.coordinate(axis), mine, combine)

    def _board(self, axis: str) -> _Board:
        return self._boards[axis, self._mesh.peers(axis)]
