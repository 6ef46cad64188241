"""What rank 0 and the ranks that follow it tell each other, as MessagePack over a socket.

Rule: bytes become plain values of known types or an error, never code. A message is its length in
4 bytes, then itself; a channel that has closed gives None.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any, final

import msgspec
import numpy as np
from msgspec import Struct

from tokenspeed.plan import PLANNED, Joined, StepPlan

__all__ = [
    "Channel",
    "Digest",
    "End",
    "Failed",
    "Hello",
    "Introduction",
    "Message",
    "Plan",
    "Ready",
    "Sizes",
    "decoded",
    "encoded",
]

_LENGTH = struct.Struct("!I")
_Array = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, elements in row-major order."""


class Introduction(Struct, frozen=True, tag=True):
    """The first message of a follower: which rank it is, and that it may be."""

    rank: int
    token: str


class Hello(Struct, frozen=True, tag=True):
    """The answer: what to load, how, and the file where the ranks meet (None: torchrun's store)."""

    checkpoint: str
    config: dict[str, Any]
    meeting: str | None


class Sizes(Struct, frozen=True, tag=True):
    """How large the executor is to be: see `Executor`."""

    slots: int
    pages: int
    page_size: int
    context_max: int
    eos_ids: tuple[int, ...]


class Plan(Struct, frozen=True, tag=True):
    """A StepPlan."""

    step: int
    arrays: dict[str, _Array]
    joined: tuple[Joined, ...]

    @classmethod
    def of(cls, plan: StepPlan) -> Plan:
        """As it is sent."""
        arrays = {name: getattr(plan, name) for name in PLANNED if name != "step"}
        packed = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
        return cls(plan.step, packed, plan.joined)

    def restored(self) -> StepPlan:
        """As it was; the arrays are read-only."""
        arrays: dict[str, Any] = {
            name: np.frombuffer(data, dtype).reshape(shape)
            for name, (dtype, shape, data) in self.arrays.items()
        }
        return StepPlan(step=self.step, joined=self.joined, **arrays)


class Ready(Struct, frozen=True, tag=True):
    """A follower waits for plans."""


class Digest(Struct, frozen=True, tag=True):
    """Of all plans and all sampled tokens up to a step, as a follower saw them."""

    step: int
    value: bytes


class Failed(Struct, frozen=True, tag=True):
    """A follower cannot go on."""

    why: str


class End(Struct, frozen=True, tag=True):
    """No plan follows."""


Message = Introduction | Hello | Sizes | Plan | Ready | Digest | Failed | End
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encoded(message: Message) -> bytes:
    """Without its length."""
    return msgspec.msgpack.encode(message)


def decoded(data: bytes) -> Message:
    """What was encoded. Raises ValueError."""
    return _DECODER.decode(data)


@final
class Channel:
    """A connected socket that carries messages. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: Message) -> bool:
        """Whether it went out; the other side may be gone."""
        data = encoded(message)
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            return False
        return True

    def receive(self, bytes_max: int = 1 << 31) -> Message | None:
        """The next message; None: the other side is gone, or says what cannot be read."""
        try:
            head = self._reader.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            if length > bytes_max:
                return None
            data = self._reader.read(length)
            return decoded(data) if len(data) == length else None
        except (OSError, ValueError):  # msgspec's errors are ValueErrors
            return None

    def close(self) -> None:
        """Wake who receives, here and there."""
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self._socket.close()
