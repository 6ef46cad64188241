"""How one value gets from layout to layout: a graph whose edges are collectives, and its trees.

Rule: a move changes one axis by one collective; what several moves make is found by search, the
cheapest first. A dim that several axes shard is split along the mesh's axes in order, dim 0 first
along the batch's; only the innermost of them can be gathered, scattered or moved. Nothing becomes
summands that was not.

    Partial  -> Replicate   all_reduce           Shard(d)  -> Replicate   all_gather
    Partial  -> Shard(d)    reduce_scatter       Shard(a)  -> Shard(b)    all_to_all
                                                 Replicate -> Shard(d)    slice
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import final

from attrs import define, field, frozen

from tokenspeed.spmd.cost import Costs
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import REPLICATED, Layout, Partial, Placement, Replicate, Shard

__all__ = ["Kind", "Move", "Moves", "Tree"]


@final
@frozen(cache_hash=True)
class Kind:
    """What the cost of moving a value depends on.

    Attributes:
        shape: whole, not one rank's; () where it is not known.
        itemsize: bytes of an element.
        any_count: dim 0 counts the tokens of a step that may have any number of them, so that it
            is only cut where a boundary says so.
    """

    shape: tuple[int, ...]
    itemsize: int
    any_count: bool

    def local_bytes(self, lies: Layout, mesh: Mesh) -> float:
        """One rank's bytes of the value."""
        return math.prod(self.shape) * self.itemsize / lies.parts(mesh) if self.shape else 0.0

    def admits(self, lies: Layout, mesh: Mesh) -> bool:
        """Whether every dim divides into the slices of the layout."""
        for dim, size in enumerate(self.shape):
            known = not (self.any_count and dim == 0)
            if known and size % lies.parts(mesh, dim):
                return False
        dims = [p.dim for _, p in lies.axes if isinstance(p, Shard)]
        return not self.shape or all(0 <= dim < len(self.shape) for dim in dims)


@final
@frozen
class Move:
    """One collective on one value.

    Attributes:
        op: all_reduce, all_gather, reduce_scatter, all_to_all or slice.
        axis: of the mesh.
        dim: that is joined or cut; of all_to_all the one that is cut; None for all_reduce.
        from_dim: of all_to_all, the one that is joined.
        given, wanted: layouts before and after.
        bytes: of the value whole along the axis, as one rank has it before (all_reduce,
            reduce_scatter), after (all_gather), or in all (all_to_all); 0 of a slice.
        cost_s: by the model.
    """

    op: str
    axis: str
    dim: int | None
    from_dim: int | None
    given: Layout
    wanted: Layout
    bytes: int
    cost_s: float


Tree = tuple[Move, ...]
"""Moves from one layout to others; each layout is reached by one of them."""

_Reach = dict[Layout, tuple[float, Move | None]]
"""Layout -> (cost of the cheapest path to it, its last move)."""


@final
@define(eq=False)
class Moves:
    """All layouts of values of one kind on a mesh, searched as they are asked for.

    Args:
        kind: of the values.
        mesh: whose axes may be moved along.
        costs: of the machine.
        batch: how the step's batch lies.
    """

    kind: Kind
    mesh: Mesh
    costs: Costs
    batch: Layout = REPLICATED
    _reached: dict[tuple[Layout, frozenset[str]], _Reach] = field(factory=dict, init=False)
    _distances: dict[tuple[Layout, Layout], float] = field(factory=dict, init=False)
    _trees: dict[tuple[Layout, frozenset[Layout]], tuple[float, Tree]] = field(
        factory=dict, init=False
    )

    def distance(self, given: Layout, wanted: Layout) -> float:
        """Cost of the cheapest moves from one layout to another; infinite if there are none."""
        key = given, wanted
        found = self._distances.get(key)
        if found is None:
            found = self._distances[key] = self.tree(given, frozenset((wanted,)))[0]
        return found

    def tree(self, given: Layout, wanted: frozenset[Layout]) -> tuple[float, Tree]:
        """The cheapest moves that make all wanted layouts, and what they cost (infinite: none do).

        What is cheapest for one consumer may not be where it is shared with another.
        """
        key = given, wanted
        if key not in self._trees:
            self._trees[key] = self._search(given, tuple(sorted(wanted - {given}, key=str)))
        return self._trees[key]

    def _search(self, given: Layout, wanted: tuple[Layout, ...]) -> tuple[float, Tree]:
        if not wanted:
            return 0.0, ()
        if not all(self.kind.admits(lies, self.mesh) for lies in (given, *wanted)):
            return math.inf, ()
        cut = frozenset(a for lies in (given, *wanted) for a, p in lies.axes if p.is_shard(0))
        if any(lies not in self._reach(given, cut) for lies in wanted):
            return math.inf, ()
        if len(wanted) == 1:
            return self._reach(given, cut)[wanted[0]][0], self._path(given, wanted[0], cut)
        return self._steiner(given, wanted, cut)

    def _steiner(
        self, given: Layout, wanted: tuple[Layout, ...], cut: frozenset[str]
    ) -> tuple[float, Tree]:
        """Dreyfus and Wagner, "The Steiner problem in graphs" (1971), from one root.

        best[group, node]: cost of reaching a group of wanted layouts from a node, the layout where
        that group's tree forks or ends, and one side of the fork (0: it ends).
        """
        best: dict[tuple[int, Layout], tuple[float, Layout, int]] = {}
        nodes = tuple(self._reach(given, cut))
        for group in range(1, 1 << len(wanted)):
            forks: dict[Layout, tuple[float, int]] = {}
            if group & (group - 1) == 0:
                forks[wanted[group.bit_length() - 1]] = 0.0, 0
            else:
                sides = [side for side in range(1, group) if side & group == side]
                for node in nodes:
                    forks[node] = min(
                        (best[side, node][0] + best[group ^ side, node][0], side) for side in sides
                    )
            for node in nodes:
                reach = self._reach(node, cut)
                best[group, node] = min(
                    (
                        (reach[at][0] + cost, at, side)
                        for at, (cost, side) in forks.items()
                        if at in reach
                    ),
                    key=lambda found: found[0],
                    default=(math.inf, node, 0),
                )
        found: dict[Layout, Move] = {}
        waiting = [((1 << len(wanted)) - 1, given)]
        while waiting:
            group, node = waiting.pop()
            _, fork, side = best[group, node]
            found |= {move.wanted: move for move in self._path(node, fork, cut)}
            waiting += [(side, fork), (group ^ side, fork)] if side else []
        return best[(1 << len(wanted)) - 1, given][0], tuple(found.values())

    def _path(self, given: Layout, wanted: Layout, cut: frozenset[str]) -> Tree:
        """The cheapest moves from one layout to one that it reaches."""
        reach, path, at = self._reach(given, cut), [], wanted
        while at != given:
            move = reach[at][1]
            assert move is not None
            path.append(move)
            at = move.given
        return tuple(reversed(path))

    def _reach(self, given: Layout, cut: frozenset[str]) -> _Reach:
        """Dijkstra (1959) over the layouts that can be reached; ties are broken by order."""
        key = given, cut
        if key in self._reached:
            return self._reached[key]
        reached: _Reach = {}
        queue: list[tuple[float, int, Layout, Move | None]] = [(0.0, 0, given, None)]
        count = 0
        while queue:
            cost, _, at, last = heapq.heappop(queue)
            if at in reached:
                continue
            reached[at] = cost, last
            for move in self._moves(at, cut):
                count += 1
                if move.wanted not in reached:
                    heapq.heappush(queue, (cost + move.cost_s, count, move.wanted, move))
        self._reached[key] = reached
        return reached

    def _moves(self, given: Layout, cut: frozenset[str]) -> Iterator[Move]:
        """Every single move from a layout."""
        for axis, size in self.mesh.axes:
            if size == 1 or axis == "pp":  # stages hold different values, not parts of one
                continue
            have = given.on(axis)
            if isinstance(have, Shard):
                if not self._innermost(given, axis, have.dim):
                    continue
                yield self._move("all_gather", axis, None, given, Replicate())
            elif isinstance(have, Partial):
                yield self._move("all_reduce", axis, None, given, Replicate())
            for dim in range(len(self.kind.shape) or _DIMS_UNKNOWN):
                if isinstance(have, Shard) and have.dim == dim:
                    continue
                move = self._cut(given, axis, dim)
                allowed = not self.kind.any_count or dim or axis in cut
                fits = self.kind.admits(move.wanted, self.mesh)
                if allowed and fits and self._innermost(move.wanted, axis, dim):
                    yield move

    def _cut(self, given: Layout, axis: str, dim: int) -> Move:
        have = given.on(axis)
        op = "slice"
        if isinstance(have, Partial):
            op = "reduce_scatter"
        elif isinstance(have, Shard):
            op = "all_to_all"
        from_dim = have.dim if isinstance(have, Shard) else None
        return self._move(op, axis, from_dim, given, Shard(dim))

    def _innermost(self, lies: Layout, axis: str, dim: int) -> bool:
        """Whether no axis further in than this one shards the dim."""
        depth = {name: at for at, (name, _) in enumerate(self.mesh.axes)}
        if dim == 0:
            depth |= {
                name: depth[name] - len(depth) for name, _ in self.batch.axes if name in depth
            }
        return not any(p.is_shard(dim) and depth[other] > depth[axis] for other, p in lies.axes)

    def _move(
        self, op: str, axis: str, from_dim: int | None, given: Layout, after: Placement
    ) -> Move:
        ranks = self.mesh.size(axis)
        size = 0.0 if op == "slice" else self.kind.local_bytes(given, self.mesh)
        if op == "all_gather":
            size *= ranks
        have = given.on(axis)
        gathered = have.dim if op == "all_gather" and isinstance(have, Shard) else None
        return Move(
            op=op,
            axis=axis,
            dim=after.dim if isinstance(after, Shard) else gathered,
            from_dim=from_dim,
            given=given,
            wanted=given.having(axis, after),
            bytes=round(size),
            cost_s=self.costs.link(axis, self.mesh).seconds(op, ranks, size),
        )


_DIMS_UNKNOWN = 2
"""Dims that a value of unknown shape may be cut along, unless a boundary cuts another."""
