"""An engine behind a server on a free port of this machine, as the tests of the wire want it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tokenspeed.bench.http import served
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine
from tokenspeed.request import SamplingParams

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "What is gravity? Answer in two sentences."}]


def fixtures(slots: int, **settings: Any) -> tuple[Any, Any]:
    """The fixtures `engine` and `url` of a module: SmolLM2 for so many at once, and a server.

    Args:
        slots: of the engine.
        settings: of the server.
    """

    @pytest.fixture(scope="module")
    def engine() -> Iterator[Engine]:
        config = EngineConfig(
            dtype="float32", slots=slots, prefill_chunk=64, pages=512, context_max=2048
        )
        with Engine.from_pretrained(config=config) as engine:
            yield engine

    @pytest.fixture(scope="module")
    def url(engine: Engine) -> Iterator[str]:
        with served(engine, **settings) as url:
            yield url

    return engine, url


def everything_back(engine: Engine, within_s: float = 20.0) -> bool:
    """Has every page come back? Waits for launched steps."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        stats = engine.stats()
        idle = stats.requests_running == stats.requests_waiting == 0
        if idle and stats.pages_free + stats.pages_cached == stats.pages_total:
            return True
        time.sleep(0.02)
    return False


def serves(
    engine: Engine, prompts: list[list[int]], expected: list[list[int]], *, hosted: bool
) -> None:
    """Greedy ids are these, the second time from the cache; nothing is lost."""
    params = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True)
    for _ in range(2):
        done = engine.generate(prompts, params)
        assert [list(one.token_ids) for one in done] == expected
    stats = engine.stats()
    assert stats.prefix_cache_hits > 0
    assert (stats.host_stores > 0) == hosted
    assert everything_back(engine)
