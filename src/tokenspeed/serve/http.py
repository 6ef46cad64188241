"""Bodies in, errors out, and noticing that somebody has left.

Rule: reading is bounded in bytes and time; every error has OpenAI's shape; work for a client that
has gone is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenspeed.config import ServeConfig
from tokenspeed.errors import EngineStopped, OverloadedError, RequestError, StepError

__all__ = [
    "KEY_NUMBER",
    "ClientGone",
    "HttpError",
    "as_http",
    "error_body",
    "json_response",
    "owner",
    "read_body",
    "while_here",
]

log = logging.getLogger("tokenspeed.serve")

T = TypeVar("T")

KEY_NUMBER = "tokenspeed.key_number"
"""In a request's scope: which of the accepted keys it carries. The key itself goes no further."""


class HttpError(Exception):
    """An answer other than success.

    Args:
        status: HTTP's.
        message: for the sender.
        param: the offending field.
        code: a stable word.
        headers: to add.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def as_http(error: Exception) -> HttpError:
    """What an error of ours means in HTTP."""
    match error:
        case HttpError():
            return error
        case RequestError():
            return HttpError(400, error.message, param=error.field, code=error.code)
        case OverloadedError():
            retry = {"retry-after": str(max(1, round(error.retry_after_s)))}
            return HttpError(429, str(error), code="overloaded", headers=retry)
        case EngineStopped():
            return HttpError(503, str(error), code="unavailable", headers={"retry-after": "5"})
        case StepError():
            return HttpError(500, f"the engine failed on this request: {error}", code="step_failed")
    log.error("a request failed", exc_info=error)
    return HttpError(500, "internal error; the server's log has the details", code="internal")


def error_body(error: HttpError) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
    kind = (
        "server_error" if error.status >= 500 else kinds.get(error.status, "invalid_request_error")
    )
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": body}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def owner(request: Request, cache_salt: str) -> str:
    """Whose sessions a request speaks of: those of its key, under its cache salt."""
    return f"{request.scope.get(KEY_NUMBER, '')} {cache_salt}"


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """The whole body.

    Raises:
        HttpError: 413 if it is larger than allowed, declared or not; 408 if it stalls.
        ClientGone: the connection closed.
    """
    limit = config.body_max_bytes
    too_large = HttpError(
        413, f"the body may have at most {limit} bytes", headers={"connection": "close"}
    )
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), config.body_timeout_s)
        except TimeoutError as error:
            closing = {"connection": "close"}
            raise HttpError(408, "the body stopped coming", headers=closing) from error
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(chunks)


async def while_here(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first.

    Raises:
        ClientGone: it did.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
