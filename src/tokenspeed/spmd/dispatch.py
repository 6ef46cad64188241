"""Tokens travel to the ranks that hold their rows, and what was made of them travels back.

Rule: a token goes to a rank once, however many of its choices are there, and not at all if none is.
Ranks tell each other how many tokens come, so nothing is padded and nothing dropped; the sizes are
known on the CPU only after that, so a program with this in it cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.spmd.collectives import Communicator, Started

__all__ = ["Away", "combine", "count_own", "dispatch", "start_combine"]


@final
@frozen(eq=False)
class Away:
    """What `combine` needs of a `dispatch`.

    Attributes:
        tokens: for each rank of the axis, int64: which of this rank's tokens went there.
        came: how many tokens came from each rank.
        count: of this rank's tokens.
    """

    tokens: tuple[Tensor, ...]
    came: list[int]
    count: int


def count_own(ids: Tensor, *, first: int, rows: int) -> Tensor:
    """Row numbers of a whole table as numbers of the `rows` from `first` on; -1: elsewhere."""
    return torch.where((ids >= first) & (ids < first + rows), ids - first, -1)


def dispatch(
    *tensors: Tensor, communicator: Communicator, axis: str, ranks: int, rows: int, routed: int
) -> tuple[Tensor | Away, ...]:
    """Send each token to the ranks of an axis that hold a row it has chosen.

    Args:
        tensors: [tokens, ...] each, of this rank's tokens.
        communicator: of the mesh.
        axis: of the mesh, with `ranks` ranks.
        rows: of the table on each rank.
        routed: which of the tensors has the choices: row numbers of the whole table.

    Returns:
        For each tensor what came, in order of the ranks it came from; then what `combine` needs.
    """
    holder = tensors[routed].flatten(1) // rows
    tokens = tuple((holder == rank).any(1).nonzero().flatten() for rank in range(ranks))
    came = communicator.exchange_counts([len(some) for some in tokens], axis=axis)
    moved = [
        torch.cat(communicator.exchange([tensor[some] for some in tokens], came, axis=axis))
        for tensor in tensors
    ]
    return *moved, Away(tokens, came, len(tensors[routed]))


def combine(
    away: Away, *tensors: Tensor, communicator: Communicator, axis: str
) -> tuple[Tensor, ...]:
    """Send results back to the ranks that their tokens came from, and add them up there."""
    went = [len(some) for some in away.tokens]
    return tuple(
        _added(away, communicator.exchange(torch.split(tensor, away.came), went, axis=axis))
        for tensor in tensors
    )


def start_combine(
    away: Away, *tensors: Tensor, communicator: Communicator, axis: str
) -> Started[tuple[Tensor, ...]]:
    """`combine`, begun."""
    went = [len(some) for some in away.tokens]
    back = [
        communicator.start("exchange", torch.split(tensor, away.came), went, axis=axis)
        for tensor in tensors
    ]
    return Started.of(None, lambda: tuple(_added(away, one.wait()) for one in back))


def _added(away: Away, back: Sequence[Tensor]) -> Tensor:
    """What came back, [tokens, ...] from each rank, added to the token that it belongs to."""
    total = back[0].new_zeros((away.count, *back[0].shape[1:]))
    return total.index_add_(0, torch.cat(away.tokens), torch.cat(list(back)))
