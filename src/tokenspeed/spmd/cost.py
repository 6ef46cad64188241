"""What a plan costs: an alpha-beta model of collectives, and the memory that modules touch.

Rule: a link has a latency (alpha) and a bandwidth (1 / beta); a collective takes what the better of
its textbook algorithms takes (Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", 2005). Seconds here rank plans; they promise no time.

    n ranks, B bytes              messages        bytes on the link
    all_gather, reduce_scatter    log n           (n-1)/n B         B: the whole along the axis
    all_reduce                    log n           log n B           doubling
                                  2 log n         2 (n-1)/n B       halving, then doubling
    all_to_all                    n-1             (n-1)/n B         pairwise
                                  log n           log n B/2         Bruck et al., 1997
    send, broadcast               1, log n        B, log n B
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self, final

from attrs import evolve, field, frozen

from tokenspeed.errors import ConfigError
from tokenspeed.spmd.mesh import Mesh

__all__ = ["NETWORK", "NVLINK", "Costs", "Link"]

LOCAL_S = 1e-9
"""Of an operation that moves nothing: only so that of equal plans the shorter one is taken."""


@final
@frozen
class Link:
    """What joins the ranks along an axis.

    Attributes:
        latency_s: of a message.
        bytes_per_s: that a rank sends while it receives as much.
        launch_s: of a collective, whatever it sends.
    """

    latency_s: float
    bytes_per_s: float
    launch_s: float = 0.0

    def __attrs_post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.launch_s >= 0 and self.bytes_per_s > 0):
            raise ConfigError(
                "link", (self.latency_s, self.bytes_per_s), "a latency from 0 s and bytes/s above 0"
            )

    def seconds(self, op: str, ranks: int, size_bytes: float) -> float:
        """What a collective takes; `size_bytes` as `Collective.bytes` counts them."""
        if ranks == 1 or op == "slice":
            return LOCAL_S
        rounds, most = math.ceil(math.log2(ranks)), (ranks - 1) / ranks
        ways = {
            "all_gather": ((rounds, most),),
            "reduce_scatter": ((rounds, most),),
            "all_reduce": ((rounds, rounds), (2 * rounds, 2 * most)),
            "all_to_all": ((ranks - 1, most), (rounds, rounds / 2)),
            "send": ((1, 1.0),),
            "broadcast": ((rounds, rounds),),
        }[op]
        return (
            self.launch_s
            + LOCAL_S
            + min(
                messages * self.latency_s + share * size_bytes / self.bytes_per_s
                for messages, share in ways
            )
        )


NVLINK = Link(latency_s=3e-6, bytes_per_s=260e9, launch_s=5e-6)
"""Fourth generation, 18 links, as measured between two GPUs: see README.md. How the time of what is
small divides into launch and message two ranks cannot tell; three fifths are taken for the launch.
"""

NETWORK = Link(latency_s=10e-6, bytes_per_s=50e9, launch_s=5e-6)
"""400 Gb/s a rank."""

_HOST_RANKS = 8


@final
@frozen
class Costs:
    """The machine that a program is compiled for.

    Attributes:
        links: by axis; an axis that is not named has NVLINK or NETWORK.
        memory_bytes_per_s: of a rank's own memory.
        flops_per_s: of products of matrices.
        begin_s: what it costs to begin a collective and await it later rather than at once.
        host_ranks: ranks with NVLink between them, numbered one after the other.
    """

    links: Mapping[str, Link] = field(factory=dict)
    memory_bytes_per_s: float = 3.35e12
    flops_per_s: float = 7e14
    begin_s: float = 2e-6
    host_ranks: int = _HOST_RANKS

    @classmethod
    def of(cls, **links: Link) -> Self:
        """`Costs.of(dp=Link(5e-6, 100e9))`: by axis."""
        return cls(links)

    def link(self, axis: str, mesh: Mesh) -> Link:
        """What joins the ranks along an axis: the network, if some of them are on another host."""
        if axis in self.links:
            return self.links[axis]
        size, stride = mesh.size(axis), mesh.stride(axis)
        starts = (
            first
            for block in range(0, mesh.ranks, stride * size)
            for first in range(block, block + stride)
        )
        away = stride * (size - 1)
        beyond = any(at // self.host_ranks != (at + away) // self.host_ranks for at in starts)
        return NETWORK if beyond else NVLINK

    def on(self, mesh: Mesh) -> Costs:
        """The same with a link for every axis of a mesh, so that none is looked for again."""
        return evolve(self, links={axis: self.link(axis, mesh) for axis, _ in mesh.axes})

    def touched_s(self, size_bytes: float) -> float:
        """Reading or writing so many bytes of a rank's own memory."""
        return size_bytes / self.memory_bytes_per_s
