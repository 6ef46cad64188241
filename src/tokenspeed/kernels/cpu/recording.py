"""A function's calls of the C kernels, written down once and made again as one call.

Rule: what is made again is all that the function did, or there is no recording. So every operation
of torch is looked at while the function runs: views do nothing, memory comes from a place of our
own, which stays; anything else is a reason not to record. The tensors that the function was given
are read again where they lay: what is to be new in them must be written there.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, final

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenspeed.kernels.cpu import library

__all__ = ["Recording", "Workspace", "record"]

T = TypeVar("T")

WORKSPACE_BYTES = 1 << 28
"""Of addresses; what was never written takes no memory."""
_ALIGNED = 64
_FRESH = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))


@final
class Workspace:
    """Memory for what recorded functions make. One serves many recordings, of which one runs at a
    time: what one leaves there is gone when another one runs.

    While a function is recorded, memory that it drops is given out again, as it is when the calls
    are made again in the same order.
    """

    def __init__(self) -> None:
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, WORKSPACE_BYTES, flags=kind)
        self.clear()

    def clear(self) -> None:
        """Begin anew: a recording follows."""
        self._end = 0
        self._spare: dict[int, list[int]] = {}

    def take(self, size: int) -> Tensor | None:
        """Bytes that go back when nobody has them any more; None: there are not as many."""
        whole = -(-size // _ALIGNED) * _ALIGNED
        spare = self._spare.setdefault(whole, [])
        if spare:
            at = spare.pop()
        elif self._end + whole <= WORKSPACE_BYTES:
            at, self._end = self._end, self._end + whole
        else:
            return None
        held = (ctypes.c_uint8 * size).from_buffer(self._memory, at)
        weakref.finalize(held, spare.append, at)
        return torch.frombuffer(held, dtype=torch.uint8)


@final
class Recording:
    """Calls that were made. The tensors that they read and write must outlive it."""

    def __init__(self, calls: list[list[int]]) -> None:
        self._words = np.array(calls, np.int64).reshape(-1, library.CALL_WORDS)
        self._at = self._words.ctypes.data

    def __len__(self) -> int:
        return len(self._words)

    def replay(self) -> None:
        """Make the calls again, in their order."""
        library.replay(self._at, len(self._words))


def record(function: Callable[[], T], workspace: Workspace) -> tuple[T, Recording | str]:
    """Run a function once, and write down what it called.

    Returns:
        Its result, and the recording, or why there can be none. With a recording, tensors that the
        function made are in the workspace, and `replay` writes them there again.
    """
    workspace.clear()
    watch = _Watch(workspace)
    before, library.listening.listener = library.listening.listener, watch
    try:
        with watch:
            result = function()
    finally:
        library.listening.listener = before
    return result, watch.refused or Recording(watch.calls)


@final
class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Listens to calls, and to torch."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[list[int]] = []
        self.refused: str | None = None
        self._workspace = workspace

    def heard(self, name: str, arguments: tuple[library.Argument, ...]) -> None:
        """See Listener."""
        self.calls.append(library.words(name, arguments))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch, and see whether it can be left out later."""
        del types
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _FRESH:
            return self._placed(made)
        if not _is_view(func, made, args):
            self.refused = self.refused or f"{func} is none of the recorded kernels"
        return made

    def _placed(self, made: Tensor) -> Tensor:
        """The same shape of memory in the workspace."""
        if not made.numel():
            return made
        plain = made.device.type == "cpu" and made.is_contiguous()
        ours = self._workspace.take(made.nbytes) if plain else None
        if ours is None:
            self.refused = self.refused or f"{made.nbytes} bytes do not fit into the workspace"
            return made
        return ours.view(made.dtype).view(made.shape)


def _is_view(func: Any, made: Any, args: Any) -> bool:
    """Whether an operation did nothing but look at its first argument in another way."""
    if func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
        return False
    several = made if isinstance(made, tuple | list) else (made,)
    memory = args[0].untyped_storage().data_ptr()
    return all(isinstance(m, Tensor) and m.untyped_storage().data_ptr() == memory for m in several)
