"""Sessions over HTTP: kept, superseded, ended, and each tenant's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from models_here import needs_smollm2
from serving import CHAT, MESSAGES, TEXT, everything_back, served
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine

pytestmark = needs_smollm2


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = EngineConfig(dtype="float32", slots=4, prefill_chunk=64, pages=512, context_max=2048)
    with Engine.from_pretrained(config=config) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with served(engine) as url:
        yield url


def test_a_session_is_kept_superseded_and_ended(url: str, engine: Engine) -> None:
    engine.clear_cache()
    ids = engine.tokenizer.encode("A session has turns. " * 12, special=True)
    body = {"model": engine.model_name, "prompt": ids, "max_tokens": 2, "session_id": "a/b"}
    before = engine.stats()
    assert httpx.post(url + TEXT, json={**body, "session_ttl_s": 60}).status_code == 200
    assert everything_back(engine)
    after = engine.stats()
    assert after.sessions == before.sessions + 1
    assert after.pages_kept >= len(ids) // engine.config.page_size
    again = httpx.post(url + TEXT, json={**body, "session_supersede": True, "n": 2}).json()
    assert len(again["choices"]) == 2, "choices of one turn do not supersede each other"
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert everything_back(engine)
    assert engine.stats().pages_kept == 0, "this turn did not ask for it"
    ended = httpx.delete(url + "/v1/sessions/a/b")
    assert ended.json() == {"id": "a/b", "object": "session", "deleted": True}
    assert engine.stats().sessions == before.sessions
    unknown = httpx.delete(url + "/v1/sessions/a/b")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "session_id"
    assert httpx.post(url + "/v1/sessions/a").status_code == 405


def test_a_key_and_a_salt_have_their_own_sessions(engine: Engine, tmp_path: Any) -> None:
    path = tmp_path / "keys"
    path.write_text("alice\nbob\n")
    body = {"model": engine.model_name, "prompt": "Hi", "max_tokens": 2, "session_id": "chat"}
    with served(engine, api_key_file=str(path)) as url, httpx.Client(base_url=url) as http:
        alice, bob = ({"x-api-key": name} for name in ("alice", "bob"))
        before = engine.stats().sessions
        salted = {**body, "cache_salt": "s"}
        for asked, headers in ((body, alice), (body, bob), (salted, alice)):
            assert http.post(TEXT, json=asked, headers=headers).status_code == 200
        assert engine.stats().sessions == before + 3
        gone = []
        for query, headers in (("", bob), ("", bob), ("?cache_salt=s", bob), ("", alice),
                               ("?cache_salt=s", alice), ("?cache_salt=s", alice)):  # fmt: skip
            gone.append(http.delete(f"/v1/sessions/chat{query}", headers=headers).status_code)
        assert gone == [200, 404, 404, 200, 200, 404]
        assert engine.stats().sessions == before


@pytest.mark.parametrize("field", ["session_ttl_s", "session_supersede"])
def test_a_hint_without_a_session_is_refused(url: str, engine: Engine, field: str) -> None:
    value = 5 if field == "session_ttl_s" else True
    body = {"model": engine.model_name, "messages": MESSAGES, field: value}
    answer = httpx.post(url + CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
