"""`serve --kv-events`: what enters and leaves our prefix cache, told in vLLM's schema, as NDJSON.

Rule: a page is told once when it is published and once when it is evicted, in the order in which
that happened. The engine's thread only hands over what the scheduler noted; hashing, encoding and
writing are done on a thread of their own.

A line is what happened in one step: `{"ts", "events", "seq"}`. The first says AllBlocksCleared,
because an engine starts with an empty cache. Pages that lie one behind the other share an event.
`medium` is the schema's word for where the engine computes, on a CPU too.

Block hashes are those of vLLM's `sha256_cbor` with PYTHONHASHSEED=0, so that they are the same in
every run and on every replica:

    SHA-256 of CBOR [hash of the page before, [tokens], null]

where a first page has SHA-256 of CBOR "0" before it, and [salt], if any, in place of null. All 32
bytes are told (base64 in JSON): shorter ones could be made to collide by who writes prompts. The
cache itself compares tokens and never looks at a hash. The salt, which is a secret, is not told.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import struct
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import final

import msgspec

from tokenspeed._core import Scheduler
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.kv_adapters import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch
from tokenspeed.fsm.kv_events import DEVICE

__all__ = ["KVLog", "Pages", "make_kv_log", "page_hash"]

log = logging.getLogger("tokenspeed.fsm")

Noted = tuple[str, int, int, str, tuple[int, ...]]
"""An event as the scheduler's `kv_events()` gives it: (action, page, parent, salt, tokens)."""

Told = BlockStored | BlockRemoved | AllBlocksCleared

BEHIND_MAX = 10_000
"""Steps that may wait to be written; a disk that is slower ends the log."""

CLOSE_S = 10.0
"""What closing waits for the disk."""

# CBOR (RFC 8949): the major types that a block hash is made over, and null.
_INTEGER, _BYTES, _TEXT, _ARRAY, _NULL = 0x00, 0x40, 0x60, 0x80, b"\xf6"
_PACK_16, _PACK_32 = struct.Struct(">BH").pack, struct.Struct(">BI").pack


def _head(major: int, value: int) -> bytes:
    """A type and its number, below 2^32, in the fewest bytes."""
    if value < 24:
        return bytes((major | value,))
    if value < 1 << 8:
        return bytes((major | 24, value))
    return _PACK_16(major | 25, value) if value < 1 << 16 else _PACK_32(major | 26, value)


def _text(value: str) -> bytes:
    raw = value.encode()
    return _head(_TEXT, len(raw)) + raw


_ROOT = hashlib.sha256(_text("0")).digest()


def page_hash(before: bytes | None, tokens: Sequence[int], salt: str = "") -> bytes:
    """The block hash of a page.

    Args:
        before: that of the page before; None for a first one.
        tokens: what the page holds, each at least 0.
        salt: of a first page; empty if there is none.
    """
    digest = hashlib.sha256(_head(_ARRAY, 3) + _head(_BYTES, 32) + (before or _ROOT))
    digest.update(_head(_ARRAY, len(tokens)) + b"".join(_head(_INTEGER, t) for t in tokens))
    digest.update(_head(_ARRAY, 1) + _text(salt) if salt else _NULL)
    return digest.digest()


@final
class Pages:
    """The block hash of each page that is in the prefix cache.

    Example:
        >>> pages = Pages()
        >>> (stored,) = pages.tell([("Publish", 5, -1, "", (1, 2)), ("Publish", 3, 5, "", (4, 6))])
        >>> stored.token_ids, len(stored.block_hashes), stored.parent_block_hash
        ([1, 2, 4, 6], 2, None)
    """

    def __init__(self) -> None:
        self.hashes: dict[int, bytes] = {}

    def tell(self, noted: Iterable[Noted]) -> list[Told]:
        """Follow what the scheduler noted, in the schema's words."""
        told: list[Told] = []
        for action, page, parent, salt, tokens in noted:
            match action:
                case "Publish":
                    self._publish(told, page, parent, salt, tokens)
                case "Evict":
                    self._evict(told, page)
                case "Clear":
                    if told and isinstance(told[-1], BlockRemoved):
                        told.pop()  # all that it names is gone, and so is the rest
                    told.append(AllBlocksCleared())
        return told

    def _publish(
        self, told: list[Told], page: int, parent: int, salt: str, tokens: tuple[int, ...]
    ) -> None:
        before = self.hashes[parent] if parent >= 0 else None
        own = self.hashes[page] = page_hash(before, tokens, salt)
        last = told[-1] if told else None
        if isinstance(last, BlockStored) and last.block_hashes[-1] == before:
            last.block_hashes.append(own)
            last.token_ids.extend(tokens)
        else:
            told.append(BlockStored([own], before, [*tokens], len(tokens), medium=DEVICE))

    def _evict(self, told: list[Told], page: int) -> None:
        gone = self.hashes.pop(page)
        last = told[-1] if told else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(gone)
        else:
            told.append(BlockRemoved([gone], DEVICE))


@final
class KVLog:
    """Writes a new scheduler's KV events to a file; a full disk ends the log, not the engine.

    Args:
        path: the file; what is in it is replaced.
        scheduler: whose cache is still empty.
        now_s: seconds since the epoch, as all times here.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, scheduler: Scheduler, now_s: float) -> None:
        self.path = path
        self._scheduler = scheduler
        self._pages = Pages()
        self._batches = 0
        self._ended = False
        self._queue: queue.Queue[tuple[float, list[Noted]] | None] = queue.Queue()
        try:
            path.write_bytes(self._line(now_s, [AllBlocksCleared()]))
        except OSError as error:
            raise ConfigError(
                "kv_events", str(path), f"a file that can be written: {error.strerror}"
            ) from error
        scheduler.record_kv(True)
        self._thread = threading.Thread(target=self._write, name="tokenspeed-kv-log", daemon=True)
        self._thread.start()

    def tell(self, now_s: float) -> None:
        """Hand over what happened since the last call, as one batch; nothing if nothing did."""
        noted = self._scheduler.kv_events()
        if noted and self._queue.qsize() < BEHIND_MAX:
            self._queue.put((now_s, noted))
        elif noted:
            self._end(f"the disk is {BEHIND_MAX} steps behind")

    def close(self, now_s: float) -> None:
        """Write what is left, and wait for it. Repeated calls do nothing."""
        self.tell(now_s)
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._end(f"the disk took more than {CLOSE_S:.0f} s for what was left")

    def _write(self) -> None:
        for now_s, noted in iter(self._queue.get, None):
            if self._ended:
                continue
            line = self._line(now_s, self._pages.tell(noted))
            try:
                with self.path.open("ab") as file:
                    file.write(line)
            except OSError as error:
                self._end(error.strerror or str(error))

    def _end(self, why: str) -> None:
        log.error("the log of KV events ends here: %s", why)
        self._ended = True
        self._scheduler.record_kv(False)

    def _line(self, now_s: float, told: Sequence[Told]) -> bytes:
        batch = EventBatch(ts=now_s, events=[*told], seq=self._batches)
        self._batches += 1
        return msgspec.json.encode(batch) + b"\n"


def make_kv_log(path: str | None, scheduler: Scheduler, now_s: float) -> KVLog | None:
    """A log of a new scheduler's KV events, if there is a path; see `KVLog`."""
    return KVLog(Path(path), scheduler, now_s) if path else None
