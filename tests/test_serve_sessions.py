"""Sessions over HTTP: kept, superseded, ended, and each tenant's own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from models_here import needs_smollm2
from serving import CHAT, MESSAGES, TEXT, everything_back, fixtures, served
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine

pytestmark = needs_smollm2


engine, url = fixtures(slots=4)


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


def test_a_superseded_turn_is_told_so(url: str, engine: Engine) -> None:
    turn = {"model": engine.model_name, "prompt": "Count:", "session_id": "typing"}
    early = {**turn, "max_tokens": 400, "ignore_eos": True}
    late = {**turn, "max_tokens": 2, "session_supersede": True}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, url + TEXT, json=early, timeout=60)
        deadline_s = time.monotonic() + 20
        while not engine.stats().requests_running and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert httpx.post(url + TEXT, json=late).status_code == 200
        answer = first.result()
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "superseded"
    assert everything_back(engine)


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


def test_pages_of_the_next_turn_are_fetched_ahead() -> None:
    config = EngineConfig(
        dtype="float32", slots=2, prefill_chunk=64, pages=16, host_pages=64, context_max=256
    )
    with Engine.from_pretrained(config=config) as engine, served(engine) as url:
        ids = engine.tokenizer.encode("A session has turns. " * 12, special=True)
        body = {"model": engine.model_name, "prompt": ids, "max_tokens": 2, "session_id": "a/b"}
        assert httpx.post(url + TEXT, json=body).status_code == 200
        fill = {**body, "prompt": [5] * (16 * engine.config.page_size - 1), "max_tokens": 1}
        del fill["session_id"]
        assert httpx.post(url + TEXT, json=fill).status_code == 200
        assert everything_back(engine)
        where = f"{url}/v1/sessions/a/b/prefetch"
        pages = len(ids) // engine.config.page_size
        answer = httpx.post(where)
        assert answer.json() == {"id": "a/b", "object": "session.prefetch", "pages": pages}
        deadline_s = time.monotonic() + 20
        while engine.stats().host_prefetches < pages and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert engine.stats().host_prefetches == engine.stats().host_loads == pages
        shown = httpx.get(url + "/metrics").text
        assert f"tokenspeed:kv_host_prefetches_total {pages}.0" in shown
        again = httpx.post(url + TEXT, json=body).json()
        found = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert found == pages * engine.config.page_size
        assert engine.stats().host_loads == pages, "it was on the device already"
        assert httpx.post(f"{url}/v1/sessions/b/prefetch").status_code == 404
        assert httpx.delete(f"{url}/v1/sessions/a/prefetch").status_code == 404
        for wrong in ({"session_ttl_s": 0}, {"session_ttl_s": -1}, {"session_ttl_s": "x"}):
            refused = httpx.post(where, json=wrong)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "session_ttl_s"
        assert httpx.post(where, json={"session_ttl_s": 5}).status_code == 200


TOOLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CALL = "<tool_call>look</tool_call>"


@pytest.mark.parametrize(
    ("hints", "busy", "warm"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"session_id": "agent", "session_ttl_s": 60}, True, True),
    ],
)
def test_a_turn_that_calls_a_tool_stays_warm_as_any_other(
    tmp_path: Path, hints: dict[str, Any], busy: bool, warm: bool
) -> None:
    """The server knows no tool call, so nothing but `session_ttl_s` keeps its pages from others."""
    folder = tiny.letters(tiny.write(tmp_path, max_position_embeddings=1024))
    (folder / "chat_template.jinja").write_text(TOOLS)
    config = EngineConfig(dtype="float32", slots=2, pages=40, page_size=8, prefill_chunk=64)
    with Engine.from_pretrained(str(folder), config=config) as engine, served(engine) as url:

        def ask(*told: tuple[str, str], **more: Any) -> Any:
            messages = [{"role": role, "content": content} for role, content in told]
            body = {"model": engine.model_name, "messages": messages, "max_tokens": 8, **more}
            answer = httpx.post(url + CHAT, json=body)
            assert answer.status_code == 200, answer.text
            assert everything_back(engine)
            return answer.json()

        asked = ("user", "x" * 64)
        first = ask(asked, ("assistant", CALL), ("tool", "1"), **hints)
        said = first["choices"][0]["message"]["content"]
        if busy:
            for other in "yz":
                ask(("user", other * 150))
        usage = ask(
            asked, ("assistant", CALL), ("tool", "1"), ("assistant", said), ("tool", "2"), **hints
        )["usage"]
        known = first["usage"]["total_tokens"] - 1  # the last one was not fed
        found = usage["prompt_tokens_details"]["cached_tokens"]
        assert found == (known // 8 * 8 if warm else 0)


@pytest.mark.parametrize("field", ["session_ttl_s", "session_supersede"])
def test_a_hint_without_a_session_is_refused(url: str, engine: Engine, field: str) -> None:
    value = 5 if field == "session_ttl_s" else True
    body = {"model": engine.model_name, "messages": MESSAGES, field: value}
    answer = httpx.post(url + CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
