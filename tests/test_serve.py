"""The server over the real engine, by the official client and by hostile sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from models_here import needs_smollm2
from serving import CHAT, MESSAGES, TEXT, everything_back, fixtures, served
from tokenspeed.config import EngineConfig, ServeConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError
from tokenspeed.serve import create_app, server

pytestmark = needs_smollm2


engine, url = fixtures(slots=16, body_max_bytes=1 << 20, body_timeout_s=1.0)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


# --- the official client --------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI, engine: Engine) -> None:
    assert [m.id for m in client.models.list()] == [engine.model_name]
    assert client.models.retrieve(engine.model_name).id == engine.model_name
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_chat_whole_and_streamed_agree(client: openai.OpenAI, engine: Engine) -> None:
    asked: Any = {"model": engine.model_name, "messages": MESSAGES, "temperature": 0}
    whole = client.chat.completions.create(**asked, max_completion_tokens=24)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    chunks = list(
        client.chat.completions.create(
            **asked, max_completion_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    details = chunks[-1].usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == 32, "39 prompt tokens: two whole pages of 16"


def test_completions_whole_and_streamed_agree(client: openai.OpenAI, engine: Engine) -> None:
    asked: Any = {"model": engine.model_name, "prompt": "One, two, three,", "temperature": 0}
    whole = client.completions.create(**asked, max_tokens=12)
    chunks = list(client.completions.create(**asked, max_tokens=12, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    ids = engine.tokenizer.encode("One, two, three,", special=True)
    by_ids = client.completions.create(
        model=engine.model_name, prompt=ids, temperature=0, max_tokens=12
    )
    assert by_ids.choices[0].text == whole.choices[0].text
    several = client.completions.create(
        model=engine.model_name, prompt=["One, two, three,", "A"], temperature=0, max_tokens=12
    )
    assert several.choices[0].text == whole.choices[0].text
    assert several.usage is not None
    assert several.usage.prompt_tokens == len(ids) + 1


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, engine: Engine) -> None:
    asked: Any = {"model": engine.model_name, "prompt": "1 2 3 4 5", "temperature": 0}
    free = client.completions.create(**asked, max_tokens=20).choices[0].text
    stop = free[7:9]
    for stream in (False, True):
        got: Any = client.completions.create(**asked, max_tokens=20, stop=[stop], stream=stream)
        choices = [c.choices[0] for c in (got if stream else [got])]
        assert "".join(c.text for c in choices) == free[: free.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_choices_differ_and_repeat_with_their_seed(client: openai.OpenAI, engine: Engine) -> None:
    def texts() -> list[str | None]:
        answer = client.chat.completions.create(
            model=engine.model_name, messages=MESSAGES, n=3, seed=11, max_tokens=12, temperature=1.5
        )
        assert [c.index for c in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 39, "the prompt counts once"
        return [c.message.content for c in answer.choices]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_logprobs_have_openais_shapes(client: openai.OpenAI, engine: Engine) -> None:
    chat = client.chat.completions.create(
        model=engine.model_name, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=3,
        temperature=0,
    )  # fmt: skip
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(e.token for e in logprobs.content) == chat.choices[0].message.content
    assert all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in logprobs.content)
    text = client.completions.create(
        model=engine.model_name, prompt="A", logprobs=1, max_tokens=3, temperature=0
    )
    found = text.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.text_offset == [0, len(found.tokens[0]), len(found.tokens[0] + found.tokens[1])]


# --- what is refused ------------------------------------------------------------------------------

WRONG: list[Any] = ["5", True, [], {}, 10**400, 10**4200]
NUMBERS = {
    "temperature": (-1, 3),
    "top_p": (-0.5, 1.5),
    "top_k": (-1, 2**40, 1.5),
    "min_p": (-0.1, 1.1),
    "n": (0, -1, 9, 10**9, 1.5),
    "seed": (2**80, 1.5),
    "max_tokens": (0, -1, 1.5, 10**9, 10**30),
    "presence_penalty": (-3, 3),
    "frequency_penalty": (-3, 3),
    "repetition_penalty": (0, -1, 100),
    "min_tokens": (-1,),
}
BAD_FIELDS = [
    *((name, value) for name, values in NUMBERS.items() for value in (*values, *WRONG)),
    *(("logprobs", v) for v in ("yes", 3, [])),
    *(("top_logprobs", v) for v in (-1, 21, "2")),
    *(("stream", v) for v in ("true", 1)),
    *(("stop", v) for v in (5, [""], ["a"] * 5, [1], "")),
    *(("logit_bias", v) for v in ({"x": 1}, {"1": 1000}, {"99999999": 1}, {"1": "a"}, [1])),
    *(("stop_token_ids", v) for v in ([-1], [10**8], ["a"], 5, list(range(65)))),
    *(("messages", v) for v in ("hi", [], {}, None, 5)),
    *(("model", v) for v in (5, None, "gpt-5")),
    ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}),
    ("temprature", 1),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", "no"),
    ("cache_salt", "x" * 300),
    *(("session_id", v) for v in ("", "x" * 257, 5)),
    *(("session_ttl_s", v) for v in (-1, 1e9, "5", True)),
    *(("session_supersede", v) for v in (1, "yes")),
    *(("priority", v) for v in (-101, 101, "high", 1.5, True)),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: str(v)[:24])
def test_each_bad_field_is_named(url: str, engine: Engine, field: str, value: Any) -> None:
    before = engine.stats().prompt_tokens
    body = {"model": engine.model_name, "messages": MESSAGES, field: value}
    if field == "top_logprobs":
        body["logprobs"] = True
    if field.startswith("session_"):
        body.setdefault("session_id", "s")
    answer = httpx.post(url + CHAT, json=body)
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert error["param"] is not None
    assert error["param"].split("[")[0].split(".")[0] == field
    assert field in error["message"] or error["code"]
    assert engine.stats().prompt_tokens == before, "it reached the engine"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        (
            [MESSAGES[0], {"role": "user", "content": [{"type": "image_url"}]}],
            "messages[1].content[0]",
        ),
        (["x"], "messages[0]"),
        ([{"role": "user", "content": "x", "contnet": "y"}], "messages[0]"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0]"),
        ([1] * 100_000, "messages"),
        ([{}] * 4000, "messages[0].role"),
    ],
)
def test_bad_messages_are_named_by_their_path(
    url: str, engine: Engine, messages: Any, param: str
) -> None:
    answer = httpx.post(url + CHAT, json={"model": engine.model_name, "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": NaN}',
        b'{"temperature": 1e999, "model": "x", "messages": []}',
        b'{"temperature": NaN}',
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_bodies_that_are_no_json_are_refused(url: str, engine: Engine, body: bytes) -> None:
    before = engine.stats().prompt_tokens
    for path in (CHAT, TEXT):
        answer = httpx.post(url + path, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert engine.stats().prompt_tokens == before


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], ["a", [1]], [-1], [10**9], 5, ["a"] * 9, None]
)
def test_bad_prompts_are_refused(url: str, engine: Engine, prompt: Any) -> None:
    answer = httpx.post(url + TEXT, json={"model": engine.model_name, "prompt": prompt})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")


def test_a_prompt_that_is_too_long_is_refused(client: openai.OpenAI, engine: Engine) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=engine.model_name, prompt=[5] * 3000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(url: str, engine: Engine) -> None:
    text = "word " * 190_000
    for path, body in (
        (TEXT, {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
    ):
        answer = httpx.post(url + path, json={"model": engine.model_name, **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "characters" in answer.json()["error"]["message"], "its tokens were not counted"


def test_offsets_count_characters_not_bytes(client: openai.OpenAI, engine: Engine) -> None:
    smiley = engine.tokenizer.encode("🙂", special=False)
    asked: Any = {
        "model": engine.model_name, "prompt": "Three smileys: 🙂🙃🙂", "logprobs": 5,
        "max_tokens": 12, "temperature": 0, "logit_bias": {str(smiley[0]): 30},
    }  # fmt: skip
    whole = client.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset is not None
    assert whole.logprobs.text_offset[-1] <= len(whole.text)
    assert all(len(top) == 5 for top in whole.logprobs.top_logprobs or [])
    chunks = client.completions.create(**asked, stream=True)
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs is not None]
    streamed = [offset for part in parts for offset in part.text_offset or []]
    assert streamed == whole.logprobs.text_offset


def test_a_trailing_slash_does_not_redirect_to_the_clients_host(url: str) -> None:
    for path in ("/health/", CHAT + "/"):
        answer = httpx.get(url + path, headers={"host": "elsewhere.example"})
        assert answer.status_code == 404


def test_bodies_are_bounded_in_size_and_time(url: str) -> None:
    large = httpx.post(url + CHAT, content=b" " * (2 << 20))
    assert large.status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    assert httpx.post(url + CHAT, content=chunks()).status_code == 413
    with connect(url) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        slow.settimeout(10)
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


def test_other_paths_and_methods_have_the_same_shape(url: str) -> None:
    for answer, status in ((httpx.get(url + "/nope"), 404), (httpx.get(url + CHAT), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


# --- who may --------------------------------------------------------------------------------------


def test_without_a_key_only_loopback() -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        ServeConfig(host="0.0.0.0")
    ServeConfig(host="0.0.0.0", no_auth=True)


def test_every_route_but_health_wants_the_key(engine: Engine, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key\n\nsecond-key\n")
    config = ServeConfig(port=0, api_key_file=str(keys))
    paths = [route.path for route in create_app(engine, config).routes]  # type: ignore[attr-defined]
    hostile = [
        "//v1/models",
        "/v1/models?/health",
        "/%2fhealth/../v1/models",
        "/V1/models",
        "/health/x",
    ]
    with served(engine, api_key_file=str(keys)) as url, httpx.Client(base_url=url) as http:
        for path in [*paths, *hostile]:
            open_ = path.startswith("/health") and path != "/health/x"
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Bearer first-ke"},
                {"authorization": "Basic first-key"},
                {"x-api-key": "first-key2"},
                {"host": "x/health"},
                {"host": "x?/health"},
            ):
                answer = http.get(path.replace("{model:path}", "x"), headers=headers)
                assert (answer.status_code == 401) != open_, (path, headers)
        for headers in ({"authorization": "Bearer first-key"}, {"x-api-key": "second-key"}):
            assert http.get("/v1/models", headers=headers).status_code == 200
            assert http.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize("text", [None, "", "\n\n"])
def test_a_key_file_without_keys_is_refused(
    engine: Engine, tmp_path: Any, text: str | None
) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="api_key_file"):
        create_app(engine, ServeConfig(api_key_file=str(path)))


# --- who leaves -----------------------------------------------------------------------------------


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.connect((host, int(port)))
    return made


def send(
    url: str, path: str, body: dict[str, Any], receive_buffer: int | None = None
) -> socket.socket:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    sent = connect(url, receive_buffer)
    sent.sendall(head.encode() + content)
    return sent


def test_two_hundred_killed_clients_return_every_page(url: str, engine: Engine) -> None:
    """Mid-prefill and mid-decode, streaming and not, one choice and two."""
    long = [[7 + i % 50 for i in range(start, start + 700)] for start in range(8)]
    for wave in range(10):
        victims = []
        for i in range(20):
            decoding = i % 2
            body = {
                "model": engine.model_name,
                "prompt": "Once upon a time" if decoding else long[i % 8],
                "max_tokens": 1000,
                "ignore_eos": True,
                "stream": i % 4 < 2,
                "n": 1 + (i % 5 == 0),
            }
            victims.append((send(url, TEXT, body), decoding and i % 4 < 2))
        for victim, reads in victims:
            if reads and wave % 2:
                victim.settimeout(60)
                assert b"data: {" in victim.recv(65536) + victim.recv(65536)
            victim.close()
    assert everything_back(engine)
    assert engine.health().ready


def test_a_client_that_never_reads_is_let_go(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(config: ServeConfig) -> socket.socket:
        listener = bind(config)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return listener

    bind = server._bind
    monkeypatch.setattr(server, "_bind", small)
    body = {
        "model": engine.model_name, "prompt": "A", "max_tokens": 1500, "ignore_eos": True, "n": 4,
        "logprobs": 20, "stream": True,
    }  # fmt: skip
    with served(engine, write_timeout_s=0.5) as url, send(url, TEXT, body, receive_buffer=4096):
        while engine.stats().requests_running == 0:
            time.sleep(0.01)
        assert everything_back(engine)
        assert engine.stats().requests_finished["abort"] >= 4


def test_a_client_that_leaves_frees_its_slot_at_once(url: str, engine: Engine) -> None:
    body = {"model": engine.model_name, "prompt": "A", "max_tokens": 1500, "ignore_eos": True}
    with send(url, TEXT, body):
        while engine.stats().requests_running == 0:
            time.sleep(0.01)
    started_s = time.monotonic()
    assert everything_back(engine)
    assert time.monotonic() - started_s < 5


# --- health, metrics, the end ---------------------------------------------------------------------


def test_health_and_metrics_tell_the_truth(url: str, client: openai.OpenAI, engine: Engine) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx.get(url + path).json()["live"] is True
    client.completions.create(model=engine.model_name, prompt="A", max_tokens=2)
    text = httpx.get(url + "/metrics").text
    for name in (
        "tokenspeed:num_requests_running 0.0",
        "tokenspeed:prompt_tokens_total",
        "tokenspeed:kv_pages_kept",
        "tokenspeed:sessions",
        "tokenspeed:time_to_first_token_seconds_count",
        'tokenspeed:fsm_transitions_total{event="Admit",from="Waiting",to="Prefilling"}',
    ):
        assert name in text


def test_an_overloaded_engine_answers_429() -> None:
    config = EngineConfig(slots=1, waiting_max=1, pages=64, context_max=900)
    with Engine.from_pretrained(config=config) as engine, served(engine) as url:
        body = {"model": engine.model_name, "prompt": "A", "max_tokens": 800, "ignore_eos": True}
        held = [send(url, TEXT, body) for _ in range(2)]
        while engine.stats().requests_running + engine.stats().requests_waiting < 2:
            time.sleep(0.01)
        answer = httpx.post(url + TEXT, json=body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        for one in held:
            one.close()
        assert everything_back(engine)


def test_sigterm_lets_streams_finish_and_exits_zero() -> None:
    command = [sys.executable, "-m", "tokenspeed", "serve", "--port", "0", "--pages", "256",
               "--context-max", "1024", "--drain-s", "60"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("ready at "):
            break
    url = lines[-1].split()[-1]
    assert any(line.startswith(f"curl {url}/v1/chat/completions") for line in lines)
    body = {"model": "smollm2-135m-instruct", "prompt": "A", "max_tokens": 60, "ignore_eos": True}
    with httpx.stream("POST", url + TEXT, json={**body, "stream": True}, timeout=60) as answer:
        events = answer.iter_lines()
        next(events)
        process.send_signal(signal.SIGTERM)
        while httpx.get(url + "/health/ready").status_code != 503:
            time.sleep(0.02)
        refused = httpx.post(url + TEXT, json=body)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        rest = [line for line in events if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert process.wait(30) == 0
    process.stderr.close()
