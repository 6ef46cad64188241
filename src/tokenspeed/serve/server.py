"""Hypercorn around the application: binding, limits, draining.

Rule: a signal first closes the door (readiness 503, new requests 503), then lets what runs finish
within `drain_s`, then ends the rest with an error event, then exits 0. When a rank of the mesh is
lost, /health says so for `LOST_S`, then the process exits 1: the others have no use any more.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hypercorn.asyncio
import hypercorn.config
import hypercorn.logging

from tokenspeed.config import ServeConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError
from tokenspeed.serve.app import create_app, read_keys

__all__ = ["check", "run", "serving"]

log = logging.getLogger("tokenspeed.serve")

BACKLOG = 1024
CLOSE_S = 5.0
"""What hypercorn gets to write out the last bytes after the engine has stopped."""

POLL_S = 0.25
LOST_S = 3.0


def run(engine: Engine, config: ServeConfig, on_ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. Blocks.

    Args:
        engine: closed by the time this returns.
        config: where and how.
        on_ready: called with the URL once connections are accepted.

    Raises:
        ConfigError: the address cannot be bound, or the key file cannot be read.
    """
    return asyncio.run(_run(engine, config, on_ready))


async def _run(engine: Engine, config: ServeConfig, on_ready: Callable[[str], None]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(engine, config) as url:
        on_ready(url)
        while not await _within(stop, POLL_S):
            if engine.lost is not None:
                await _within(stop, LOST_S)
                await asyncio.to_thread(engine.close)
                return 1
        log.info("draining")
        finished = await asyncio.to_thread(engine.drain, config.drain_s)
        if not finished:
            log.warning("%s; ending what is left", engine.health().reason)
        await asyncio.to_thread(engine.close)
    return 0


async def _within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True


def check(config: ServeConfig) -> None:
    """Find out before a model is loaded whether it could be served.

    Raises:
        ConfigError: the address cannot be bound, or the key file cannot be read.
    """
    read_keys(config)
    _bind(config).close()


@asynccontextmanager
async def serving(engine: Engine, config: ServeConfig) -> AsyncIterator[str]:
    """Serve while the block runs; gives the URL. The engine stays the caller's."""
    app = create_app(engine, config)
    listener = _bind(config)
    port = listener.getsockname()[1]
    settings = _hypercorn(listener.detach())  # from here on hypercorn's to close
    shutdown = asyncio.Event()

    async def trigger() -> None:
        await shutdown.wait()

    serve: Any = hypercorn.asyncio.serve
    task = asyncio.ensure_future(serve(app, settings, shutdown_trigger=trigger))
    try:
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"http://{host}:{port}"
    finally:
        shutdown.set()
        await task


def _hypercorn(descriptor: int) -> hypercorn.config.Config:
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{descriptor}"]
    settings.graceful_timeout = CLOSE_S
    settings.include_server_header = False
    settings.accesslog = None
    settings.errorlog = logging.getLogger("tokenspeed.hypercorn")
    settings.logger_class = _Quiet
    return settings


class _Quiet(hypercorn.logging.Logger):
    """Hypercorn's log without its line about where it runs: ours says that."""

    async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        if not message.startswith("Running on"):
            await super().info(message, *args, **kwargs)


def _bind(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)  # from now on connections wait, however long hypercorn takes
    except OSError as error:
        listener.close()
        busy = error.errno == errno.EADDRINUSE
        hint = "a free port (0 takes any)" if busy else f"an address of this machine: {error}"
        raise ConfigError(
            "port" if busy else "host", f"{config.host}:{config.port}", hint
        ) from error
    listener.setblocking(False)
    return listener
