"""The channel from the engine thread to whoever reads one sequence.

Rule: the engine never waits for a reader, and a reader that leaves aborts its sequence. Deltas that
pile up while the reader is busy are read as one.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Self, final

from tokenspeed.errors import StepError
from tokenspeed.request import Completion, Delta

__all__ = ["Prompt", "Stream", "completion", "deliver", "join", "running_loop", "several"]

Prompt = str | Sequence[int]
"""Text, or token ids."""


def join(deltas: Sequence[Delta]) -> Delta:
    """One delta with the text, ids and logprobs of all; the end is the last one's."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return Delta(
        text="".join(d.text for d in deltas),
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        logprobs=tuple(p for d in deltas for p in d.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        error=last.error,
    )


def completion(whole: Delta) -> Completion:
    """All of a sequence, joined, as one value. Raises StepError if the sequence failed."""
    if whole.finish_reason == "error":
        raise StepError(whole.error or "the step failed")
    assert whole.finish_reason is not None
    assert whole.usage is not None
    return Completion(
        text=whole.text,
        token_ids=whole.token_ids,
        finish_reason=whole.finish_reason,
        usage=whole.usage,
        logprobs=whole.logprobs,
    )


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that the caller is in, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@final
class Stream:
    """The deltas of one sequence, in order, until one with a finish reason.

    Made by `Engine.submit`. Inside a running event loop it is read with `async for` on that loop,
    elsewhere with `for`. Leaving it early (`abort`, `with`, `async with`) ends the sequence.
    """

    def __init__(
        self,
        request_id: int,
        on_abort: Callable[[int], None],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.request_id = request_id
        self.loop = loop
        self._on_abort = on_abort
        self._ended = False
        self._blocking: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._waiting: asyncio.Queue[Delta] = asyncio.Queue()

    def put(self, delta: Delta) -> None:
        """Hand a delta over; on the loop's thread for an asynchronous reader."""
        if self.loop is None:
            self._blocking.put(delta)
        else:
            self._waiting.put_nowait(delta)

    def abort(self) -> None:
        """End the sequence; from any thread, any number of times; never waits."""
        if not self._ended:
            self._on_abort(self.request_id)

    def _take(self, first: Delta) -> Delta:
        deltas = [first]
        source = self._blocking if self.loop is None else self._waiting
        while not source.empty():
            deltas.append(source.get_nowait())
        self._ended = deltas[-1].finish_reason is not None
        return join(deltas)

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self.loop is not None:
            raise TypeError("this stream belongs to an event loop; read it with `async for`")
        if self._ended:
            raise StopIteration
        return self._take(self._blocking.get())

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self.loop is None:
            raise TypeError("this stream was opened outside an event loop; read it with `for`")
        if self._ended:
            raise StopAsyncIteration
        return self._take(await self._waiting.get())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()


def deliver(outbox: Sequence[tuple[Stream, Delta]]) -> None:
    """Hand deltas on: at once to blocking readers, by one call to each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[Stream, Delta]]] = {}
    for item in outbox:
        by_loop.setdefault(item[0].loop, []).append(item)
    for loop, batch in by_loop.items():
        if loop is None:
            _put(batch)
            continue
        try:
            loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:  # the loop is closed: nobody is left to read
            for stream, _ in batch:
                stream.abort()


def _put(batch: Sequence[tuple[Stream, Delta]]) -> None:
    for stream, delta in batch:
        stream.put(delta)


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as several."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
