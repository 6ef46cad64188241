"""The Starlette application: routes, and who may use them.

Rule: deny by default. Every path but /health wants a key where keys are set; the decision reads
`scope["path"]`, which no header can change, and compares in constant time.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenspeed.config import ServeConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError
from tokenspeed.serve.http import (
    KEY_NUMBER,
    ClientGone,
    HttpError,
    as_http,
    error_body,
    json_response,
)
from tokenspeed.serve.metrics import Metrics
from tokenspeed.serve.openai import OpenAI

__all__ = ["create_app", "read_keys"]

OPEN_PATHS = frozenset(("/health", "/health/live", "/health/ready"))

Handler = Callable[[Request], Awaitable[Response]]


def create_app(engine: Engine, config: ServeConfig) -> Starlette:
    """The application over one engine.

    Raises:
        ConfigError: the key file is missing or has no key.
    """
    metrics = Metrics(engine)
    openai = OpenAI(engine, config, metrics)

    async def health(request: Request) -> Response:
        state = engine.health()
        good = state.live if request.scope["path"] == "/health/live" else state.ready
        body = {"live": state.live, "ready": state.ready, "reason": state.reason}
        return json_response(body, 200 if good else 503)

    async def scrape(_request: Request) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        *(Route(path, _guarded(health)) for path in sorted(OPEN_PATHS)),
        Route("/metrics", _guarded(scrape)),
        Route("/v1/models", _guarded(openai.models)),
        Route("/v1/models/{model:path}", _guarded(openai.models)),
        Route("/v1/chat/completions", _guarded(openai.chat), methods=["POST"]),
        Route("/v1/completions", _guarded(openai.completions), methods=["POST"]),
        Route(
            "/v1/sessions/{session:path}/prefetch",
            _guarded(openai.prefetch_session),
            methods=["POST"],
        ),
        Route("/v1/sessions/{session:path}", _guarded(openai.end_session), methods=["DELETE"]),
    ]
    keys = read_keys(config)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Auth, keys=keys)] if keys else [],
        exception_handlers={HTTPException: _http_exception},
    )
    app.router.redirect_slashes = False  # a redirect would name the host of the client's header
    return app


def read_keys(config: ServeConfig) -> tuple[bytes, ...]:
    """The accepted keys; none where none are asked for."""
    if config.api_key_file is None:
        return ()
    path = Path(config.api_key_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", str(path), f"a readable text file: {error}") from error
    keys = tuple(line.strip().encode() for line in lines if line.strip())
    if not keys:
        raise ConfigError("api_key_file", str(path), "at least one key, one a line")
    return keys


def _guarded(handler: Handler) -> Handler:
    """The handler, its errors turned into answers."""

    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return _answer(as_http(error))

    return run


def _answer(error: HttpError) -> Response:
    return json_response(error_body(error), error.status, error.headers)


async def _http_exception(_request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in the shape of all others."""
    assert isinstance(error, HTTPException)
    return _answer(HttpError(error.status_code, error.detail, headers=dict(error.headers or {})))


class _Auth:
    """Lets a request through if it carries an accepted key, as Bearer or x-api-key."""

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_path = scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS
        key = None if open_path else self._accepted(Headers(scope=scope))
        if open_path or key is not None:
            scope[KEY_NUMBER] = key
            await self._app(scope, receive, send)
        else:
            message = "a valid key is required: Authorization: Bearer KEY, or x-api-key: KEY"
            error = HttpError(401, message, headers={"www-authenticate": "Bearer"})
            await _answer(error)(scope, receive, send)

    def _accepted(self, headers: Headers) -> int | None:
        """Which key it carries, by its place in the file."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        candidate = given.strip().encode("latin-1")  # as ASGI decoded it: the bytes that came
        # Every key is compared, so that time does not tell which one was close.
        matches = [hmac.compare_digest(candidate, key) for key in self._keys]
        return next((at for at, match in enumerate(matches) if match), None)
