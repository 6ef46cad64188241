"""The library of `cpp/cpu`, and calls of its functions.

Rule: all calls go through `call`, so that they can be written down while they are made; see
recording.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import threading
from functools import cache
from typing import Protocol, final

from tokenspeed.errors import KernelError

__all__ = [
    "CALL_WORDS",
    "attends_long",
    "call",
    "isa",
    "library_path",
    "listening",
    "number",
    "product_tokens",
    "replay",
    "words",
]

Argument = int | float | None

CALL_WORDS = 19
"""TS_CPU_CALL_WORDS."""

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "linear": [
        *(_INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _INT, _POINTER, _POINTER, _INT)
    ],
    "product": [
        *(_INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _INT)
    ],
    "rms_norm": [
        *(_INT, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, ctypes.c_float, _POINTER, _POINTER),
        _INT,
    ],
    "silu_mul": [_INT, _POINTER, _SIZE, _SIZE, _POINTER, _INT],
    "rope": [
        *(_INT, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER),
        _INT,
    ],
    "argmax": [_INT, _POINTER, _SIZE, _SIZE, _POINTER, _INT],
    "finite": [_INT, _POINTER, _SIZE, _SIZE, _POINTER, _INT],
    "take": [_INT, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER],
    "kv_write": [_INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _INT],
    "attention": [
        *(_INT, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE),
        *(_SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _INT, _INT),
    ],
}  # fmt: skip


@cache
def library_path() -> str | None:
    """Where the library lies, or None."""
    spec = importlib.util.find_spec("tokenspeed._cpu")
    return None if spec is None else spec.origin


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise KernelError("the library _cpu is not installed: build the package again")
    library = ctypes.CDLL(path)
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"ts_cpu_{name}")
        function.argtypes, function.restype = arguments, None
    library.ts_cpu_number.argtypes, library.ts_cpu_number.restype = [ctypes.c_char_p], _INT
    library.ts_cpu_isa.argtypes, library.ts_cpu_isa.restype = [], ctypes.c_char_p
    library.ts_cpu_product_tokens.argtypes = [_INT]
    library.ts_cpu_product_tokens.restype = _SIZE
    library.ts_cpu_attends_long.argtypes = [_INT, _INT, _SIZE]
    library.ts_cpu_attends_long.restype = _INT
    library.ts_cpu_replay.argtypes, library.ts_cpu_replay.restype = [_POINTER, _SIZE], None
    return library


@cache
def isa() -> str:
    """The instruction set that the kernels run on."""
    name: bytes = _library().ts_cpu_isa()
    return name.decode()


@cache
def product_tokens(dtype: int) -> int:
    """For how many tokens `product` is worth calling; the dtype as tokenspeed_cpu.h counts them."""
    found: int = _library().ts_cpu_product_tokens(dtype)
    return found


@cache
def attends_long(dtype: int, kv_dtype: int, dim: int) -> bool:
    """Whether `attention` takes rows of many queries too."""
    return bool(_library().ts_cpu_attends_long(dtype, kv_dtype, dim))


@cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    found: ctypes._NamedFuncPointer = getattr(_library(), f"ts_cpu_{name}")
    return found


class Listener(Protocol):
    """Who is told of calls."""

    def heard(self, name: str, arguments: tuple[Argument, ...]) -> None:
        """A function is called."""
        ...


@final
class _Listening(threading.local):
    """Who listens to the calls of this thread."""

    listener: Listener | None = None


listening = _Listening()


def call(name: str, *arguments: Argument) -> None:
    """Call a function: `linear` is ts_cpu_linear."""
    if listening.listener is not None:
        listening.listener.heard(name, arguments)
    _function(name)(*arguments)


@cache
def number(name: str) -> int:
    """Of a function in what is written down."""
    found: int = _library().ts_cpu_number(name.encode())
    if found < 0:
        raise KernelError(f"ts_cpu_{name} cannot be written down: it is not in kReplayable")
    return found


def words(name: str, arguments: tuple[Argument, ...]) -> list[int]:
    """A call as it is written down: see tokenspeed_cpu.h."""
    found = [number(name)]
    for argument in arguments:
        if isinstance(argument, float):
            found.append(struct.unpack("<i", struct.pack("<f", argument))[0])
        else:
            found.append(int(argument or 0))
    return found + [0] * (CALL_WORDS - len(found))


def replay(calls: int, count: int) -> None:
    """Make calls again that are written down at this address."""
    _function("replay")(calls, count)
