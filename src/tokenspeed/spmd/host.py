"""The host's pages of KV, and the copies between them and the device's.

Rule: copies are what plans say, made beside the steps on a thread (and, for a GPU, a stream) of
their own: the scheduler keeps both pages of a copy as they are until it is told that the copy has
ended, so that nothing here has to wait for a step. A page is given a checksum when it is stored;
one that no longer has it is not loaded, and its copy has failed.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.spmd.kv import LayerKV

__all__ = ["Ended", "HostKV"]

log = logging.getLogger("tokenspeed.spmd")

Copies = NDArray[np.int64]
"""int64[copies, 3]: ticket, device page, host page."""

Ended = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Tickets of copies that have ended, and which of these are good."""


@final
class HostKV:
    """A page of host memory holds what a device page holds, over all layers.

    Args:
        device_pages: of each layer; all of one shape, [pages, page_size, ...].
        pages: of the host; its memory is pinned where the device is a GPU.
    """

    def __init__(self, device_pages: Iterable[LayerKV], pages: int) -> None:
        self._parts = [part.view(torch.uint8) for layer in device_pages for part in layer]
        first = self._parts[0]
        cuda = first.device.type == "cuda"
        shape = (pages, len(self._parts), *first.shape[1:])
        self._pages = torch.zeros(shape, dtype=torch.uint8, pin_memory=cuda)
        self._bytes = self._pages.view(pages, -1).numpy()
        self._checksums: dict[int, int] = {}
        self._stream = torch.cuda.Stream(first.device) if cuda else None  # type: ignore[no-untyped-call]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenspeed-copy")
        self._under_way: deque[Future[Ended]] = deque()

    def start(self, stores: Copies, loads: Copies) -> None:
        """Start copies. The arrays are copied: the caller may reuse their memory."""
        self._under_way.append(self._worker.submit(self._run, stores.copy(), loads.copy()))

    def ended(self, *, wait: bool) -> list[Ended]:
        """What has ended since the last call; if nothing has, wait for it or return at once."""
        found: list[Ended] = []
        while self._under_way and (self._under_way[0].done() or (wait and not found)):
            found.append(self._under_way.popleft().result())
        return found

    def close(self) -> None:
        """Finish the copies under way and end their thread."""
        self._worker.shutdown()

    @torch.inference_mode()
    def _run(self, stores: Copies, loads: Copies) -> Ended:
        tickets = np.concatenate([stores[:, 0], loads[:, 0]])
        try:
            with self._on_stream():
                good = np.concatenate([self._store(stores), self._load(loads)])
            return tickets, good
        except Exception:  # whatever a copy fails of, its tickets end, and the pages are computed
            log.exception("%d copies between device and host failed", len(tickets))
            return tickets, np.zeros(len(tickets), np.bool_)

    def _store(self, copies: Copies) -> NDArray[np.bool_]:
        if len(copies):
            pages = self._to_device(copies[:, 1])
            gathered = torch.stack([part[pages] for part in self._parts], dim=1)
            for at, block in enumerate(copies[:, 2].tolist()):
                self._pages[block].copy_(gathered[at], non_blocking=True)
            self._synchronize()
        for block in copies[:, 2].tolist():
            self._checksums[block] = zlib.crc32(self._bytes[block])
        return np.ones(len(copies), np.bool_)

    def _load(self, copies: Copies) -> NDArray[np.bool_]:
        good = np.array([self._intact(block) for block in copies[:, 2].tolist()], np.bool_)
        if good.any():
            _, pages, blocks = copies[good].T
            device = self._parts[0].device
            there = [self._pages[b].to(device, non_blocking=True) for b in blocks.tolist()]
            brought, where = torch.stack(there), self._to_device(pages)
            for at, part in enumerate(self._parts):
                part.index_copy_(0, where, brought[:, at])
            self._synchronize()
        return good

    def _intact(self, block: int) -> bool:
        intact = zlib.crc32(self._bytes[block]) == self._checksums.get(block)
        if not intact:
            log.error("host page %d does not have its checksum; it will be computed again", block)
        return intact

    def _to_device(self, pages: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(pages.copy()).to(self._parts[0].device)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
