"""OpenAI's protocol: models, chat completions, completions; streamed or whole.

Rule: everything that can be refused is refused before the engine hears of it; a request's sequences
are aborted on every way out of this file.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol, final

import attrs
import msgspec
from attrs import frozen
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tokenspeed import request as engine_request
from tokenspeed.config import ServeConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import RequestError
from tokenspeed.request import Delta, SamplingParams, Session, TokenLogprob, Usage
from tokenspeed.serve.http import (
    HttpError,
    error_body,
    json_response,
    owner,
    read_body,
    while_here,
)
from tokenspeed.serve.metrics import Metrics, Stopwatch
from tokenspeed.serve.wire import ChatRequest, CompletionRequest, PrefetchRequest, decode
from tokenspeed.stream import Stream, join

__all__ = ["OpenAI"]

log = logging.getLogger("tokenspeed.serve")

Json = dict[str, Any]


class _Shape(Protocol):
    """How a protocol writes choices."""

    prefix: str
    whole: str
    chunk: str

    def opening(self, index: int) -> Json | None:
        """A choice sent before any text, or None."""
        ...

    def part(self, index: int, delta: Delta, seen: int) -> Json:
        """A choice of a chunk; tokens of `seen` characters went before."""
        ...

    def length(self, delta: Delta) -> int:
        """Characters of the delta's tokens, where `part` wants them counted."""
        ...

    def choice(self, index: int, whole: Delta) -> Json:
        """A choice of a whole answer."""
        ...


@final
class _Chat:
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, delta: Delta, seen: int) -> Json:
        del seen
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def length(self, delta: Delta) -> int:
        del delta
        return 0

    def choice(self, index: int, whole: Delta) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._logprobs(whole),
            "finish_reason": whole.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> Json | None:
        if not delta.logprobs:
            return None
        return {"content": [self._entry(entry) for entry in delta.logprobs], "refusal": None}

    def _entry(self, entry: TokenLogprob) -> Json:
        top = [self._token(token, logprob) for token, logprob in entry.top]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> Json:
        piece = self._engine.tokenizer.piece(token_id)
        return {"token": piece.decode("utf-8", "replace"), "bytes": list(piece), "logprob": logprob}


@final
class _Text:
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def opening(self, index: int) -> Json | None:
        del index
        return None

    def part(self, index: int, delta: Delta, seen: int) -> Json:
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(delta, seen),
            "finish_reason": delta.finish_reason,
        }

    def choice(self, index: int, whole: Delta) -> Json:
        return self.part(index, whole, 0)

    def _logprobs(self, delta: Delta, seen: int) -> Json | None:
        if not delta.logprobs:
            return None
        ids = [entry.token_id for entry in delta.logprobs]
        return {
            "tokens": [self._piece(token) for token in ids],
            "token_logprobs": [entry.logprob for entry in delta.logprobs],
            "top_logprobs": [
                {self._piece(token): logprob for token, logprob in entry.top}
                for entry in delta.logprobs
            ],
            "text_offset": [seen + self._length(ids[:at]) for at in range(len(ids))],
        }

    def length(self, delta: Delta) -> int:
        return self._length([entry.token_id for entry in delta.logprobs])

    def _length(self, ids: Sequence[int]) -> int:
        """Whole characters of some tokens."""
        piece = self._engine.tokenizer.piece
        return len(b"".join(map(piece, ids)).decode("utf-8", "ignore"))

    def _piece(self, token_id: int) -> str:
        """A token's text, or OpenAI's spelling of bytes that are no whole characters."""
        data = self._engine.tokenizer.piece(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@final
@frozen(kw_only=True)
class _Answer:
    """A request's sequences on their way, and how to write them."""

    id: str
    model: str
    created: int
    shape: _Shape
    streams: tuple[Stream, ...]
    watches: tuple[Stopwatch, ...]
    prompts: int

    def abort(self) -> None:
        for stream in self.streams:
            stream.abort()

    def head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, usages: Sequence[Usage | None]) -> Json:
        """A prompt counts once, however many choices it has."""
        known = [usage for usage in usages if usage is not None]
        each = known[:: max(1, len(self.streams) // self.prompts)]
        prompt = sum(usage.prompt_tokens for usage in each)
        output = sum(usage.completion_tokens for usage in known)
        cached = sum(usage.cached_tokens for usage in each)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class _EventStream(StreamingResponse):
    """Server-sent events whose sequences end with the connection, read or not."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], answer: _Answer, write_timeout_s: float
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._answer = answer
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._write_timeout_s):  # wait_for would start a task
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except* TimeoutError:
            log.info("%s: the client stopped reading", self._answer.id)
        finally:
            self._answer.abort()
            await self._events.aclose()


def _event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


@final
class OpenAI:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, config: ServeConfig, metrics: Metrics) -> None:
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/{id}."""
        card = {
            "id": self._engine.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tokenspeed",
            "max_model_len": self._engine.context_max,
        }
        wanted = request.path_params.get("model")
        if wanted is None:
            return json_response({"object": "list", "data": [card]})
        self._check_model(wanted)
        return json_response(card)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = decode(await read_body(request, self._config), ChatRequest)
        self._check_model(asked.model)
        params = asked.params()
        messages = asked.conversation()
        prompt = await asyncio.to_thread(self._engine.encode_chat, messages)
        return await self._respond(request, asked, _Chat(self._engine), [prompt], params)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = decode(await read_body(request, self._config), CompletionRequest)
        self._check_model(asked.model)
        params = asked.params()
        prompts = await asyncio.to_thread(self._encode, asked.prompts())
        return await self._respond(request, asked, _Text(self._engine), prompts, params)

    async def end_session(self, request: Request) -> Response:
        """DELETE /v1/sessions/{id}: no next turn will come. Of the key's sessions alone, and of
        those under `?cache_salt=`."""
        name = request.path_params["session"]
        whose = owner(request, request.query_params.get("cache_salt", ""))
        if not await asyncio.to_thread(self._engine.end_session, name, whose):
            raise _unknown_session(name)
        return json_response({"id": name, "object": "session", "deleted": True})

    async def prefetch_session(self, request: Request) -> Response:
        """POST /v1/sessions/{id}/prefetch: its next turn is near. The body may be empty."""
        name = request.path_params["session"]
        body = await read_body(request, self._config)
        whose = owner(request, request.query_params.get("cache_salt", ""))
        session = decode(body or b"{}", PrefetchRequest).session(name, whose)
        pages = await asyncio.to_thread(self._engine.prefetch_session, session)
        if pages is None:
            raise _unknown_session(name)
        return json_response({"id": name, "object": "session.prefetch", "pages": pages})

    def _encode(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        encode, most = self._engine.tokenizer.encode, self._engine.context_max
        return [
            encode(p, special=True, tokens_max=most) if isinstance(p, str) else p for p in prompts
        ]

    def _check_model(self, name: str) -> None:
        if name != self._engine.model_name:
            raise HttpError(
                404,
                f"model: {name[:128]!r} is not served here; {self._engine.model_name!r} is",
                param="model",
                code="model_not_found",
            )

    async def _respond(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        shape: _Shape,
        prompts: list[list[int]],
        params: SamplingParams,
    ) -> Response:
        session = asked.session(owner(request, asked.cache_salt or ""))
        answer = self._submit(asked, session, shape, prompts, params)
        if asked.stream:
            events = self._events(answer, usage=asked.include_usage)
            return _EventStream(events, answer, self._config.write_timeout_s)
        try:
            return await while_here(request, self._whole(answer))
        finally:
            answer.abort()

    def _submit(
        self,
        asked: ChatRequest | CompletionRequest,
        session: Session | None,
        shape: _Shape,
        prompts: list[list[int]],
        params: SamplingParams,
    ) -> _Answer:
        """All sequences, or none: the first refusal takes the others back."""
        streams: list[Stream] = []
        field = "messages" if isinstance(asked, ChatRequest) else "prompt"
        try:
            for prompt in prompts:
                for choice in range(asked.choices):
                    own = params
                    if params.seed is not None and choice:
                        own = attrs.evolve(params, seed=(params.seed + choice) % 2**62)
                    wanted = engine_request.Request(
                        prompt_ids=prompt,
                        params=own,
                        salt=asked.cache_salt or "",
                        priority=asked.priority or 0,
                        session=session,
                    )
                    streams.append(self._engine.submit(wanted))
                    if session is not None:  # the others are of this very turn
                        session = attrs.evolve(session, supersedes=False)
        except Exception as error:
            for stream in streams:
                stream.abort()
            if isinstance(error, RequestError) and error.field == "prompt":
                raise RequestError(field, error.message, error.code) from error
            raise
        return _Answer(
            id=shape.prefix + secrets.token_hex(12),
            model=self._engine.model_name,
            created=int(time.time()),
            shape=shape,
            streams=tuple(streams),
            watches=tuple(Stopwatch(self._metrics) for _ in streams),
            prompts=len(prompts),
        )

    async def _whole(self, answer: _Answer) -> Response:
        async def read(stream: Stream, watch: Stopwatch) -> Delta:
            deltas = []
            async for delta in stream:
                watch.observe(delta)
                deltas.append(delta)
            return join(deltas)

        pairs = zip(answer.streams, answer.watches, strict=True)
        wholes = await asyncio.gather(*(read(stream, watch) for stream, watch in pairs))
        for whole in wholes:
            if (failure := _failure(whole)) is not None:
                raise failure
        choices = [answer.shape.choice(at, whole) for at, whole in enumerate(wholes)]
        usage = answer.usage([whole.usage for whole in wholes])
        return json_response(
            {**answer.head(answer.shape.whole), "choices": choices, "usage": usage}
        )

    async def _events(self, answer: _Answer, *, usage: bool) -> AsyncGenerator[bytes, None]:
        shape, head = answer.shape, answer.head(answer.shape.chunk)
        if usage:
            head["usage"] = None
        for at in range(len(answer.streams)):
            opening = shape.opening(at)
            if opening is not None:
                yield _event({**head, "choices": [opening]})
        seen = [0] * len(answer.streams)
        usages: list[Usage | None] = [None] * len(answer.streams)
        async with aclosing(_merged(answer.streams)) as arriving:
            async for at, delta in arriving:
                answer.watches[at].observe(delta)
                if (failure := _failure(delta)) is not None:
                    yield _event(error_body(failure))
                    return
                yield _event({**head, "choices": [shape.part(at, delta, seen[at])]})
                seen[at] += shape.length(delta)
                usages[at] = delta.usage
        if usage:
            yield _event({**head, "choices": [], "usage": answer.usage(usages)})
        yield b"data: [DONE]\n\n"


def _unknown_session(name: str) -> HttpError:
    said = f"session_id: no session {name[:128]!r} is known here"
    return HttpError(404, said, param="session_id")


def _failure(delta: Delta) -> HttpError | None:
    """An end that is nobody's wish."""
    if delta.finish_reason == "error":
        return HttpError(500, delta.error or "the step failed", code="step_failed")
    if delta.finish_reason == "abort" and delta.error is not None:
        return HttpError(409, delta.error, code="superseded")
    if delta.finish_reason == "abort":
        return HttpError(
            503, "the server stopped before the answer was complete", code="unavailable"
        )
    return None


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of several streams as they come, each with its stream's index."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(at: int, stream: Stream) -> None:
        async for delta in stream:
            await arrived.put((at, delta))

    pumps = [asyncio.ensure_future(pump(at, stream)) for at, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            at, delta = await arrived.get()
            left -= delta.finish_reason is not None
            yield at, delta
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
