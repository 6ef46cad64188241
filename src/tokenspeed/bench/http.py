"""A server with OpenAI's completions, as a side of a measurement: ours, or any other one.

Rule: both sides are asked by the same client, with token ids, over streaming connections of their
own. A server that says less than it was asked for is an error, not a fast server.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from attrs import frozen

from tokenspeed.bench.jobs import Job, timed
from tokenspeed.config import ServeConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError
from tokenspeed.serve import serving

__all__ = ["HttpSide", "served"]

_TIMEOUT_S = 600


@frozen
class HttpSide:
    """A server by its address: `http://host:port`, and what stands before `/v1`.

    Raises:
        ConfigError: it is no such address.
    """

    url: str

    def __attrs_post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError("peer", self.url, "transformers, or http://host:port")

    def run(self, jobs: Sequence[Job]) -> float:
        """Seconds from the first arrival to the last token.

        Raises:
            ConfigError: a request failed, or ended early.
        """
        try:
            model = self._model()
            return timed(jobs, partial(self._tokens, model))
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            expected = f"a server that gives what it is asked for: {error}"
            raise ConfigError("peer", self.url, expected) from error

    def _connection(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)

    def _model(self) -> str:
        """The name of the first model that the server lists."""
        with closing(self._connection()) as connection:
            connection.request("GET", f"{urllib.parse.urlsplit(self.url).path}/v1/models")
            return str(json.loads(_good(connection).read())["data"][0]["id"])

    def _tokens(self, model: str, job: Job) -> int:
        """Ask, read to the end, and return how many tokens the server says that it gave."""
        body = {
            "model": model,
            "prompt": list(job.prompt_ids),
            "max_tokens": job.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"content-type": "application/json"}
        where = f"{urllib.parse.urlsplit(self.url).path}/v1/completions"
        tokens = 0
        with closing(self._connection()) as connection:
            connection.request("POST", where, json.dumps(body), headers)
            for line in _good(connection):
                if line.startswith(b"data: {"):
                    usage = json.loads(line[6:]).get("usage")
                    tokens = usage["completion_tokens"] if usage else tokens
        return tokens


def _good(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.read(500).decode(errors='replace')}")
    return answer


@contextmanager
def served(engine: Engine, **settings: Any) -> Iterator[str]:
    """The engine behind a server of its own on a free port of this machine; gives the URL."""
    loop = asyncio.new_event_loop()
    ready: asyncio.Future[str] = loop.create_future()
    stop = asyncio.Event()

    async def main() -> None:
        async with serving(engine, ServeConfig(port=0, **settings)) as url:
            ready.set_result(url)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    while not ready.done():
        time.sleep(0.01)
    try:
        yield ready.result()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
