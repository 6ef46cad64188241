"""The whole engine on the real model: the same ids whatever the schedule, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_here import needs_reference, needs_smollm2, reference
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError, EngineStopped, OverloadedError, RequestError, StepError
from tokenspeed.request import Completion, Request, SamplingParams, Session, session_key

pytestmark = needs_smollm2

TOKENS = 64
"""Of an output in the reference, at most."""
FEW = 16
"""As many tell whether a prompt's KV is right, where each takes a step of its own."""
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS)


def make(**settings: object) -> Engine:
    return Engine.from_pretrained(config=EngineConfig(dtype="float32", **settings))  # type: ignore[arg-type]


def run(engine: Engine, *, together: bool, tokens: int = TOKENS) -> list[list[int]]:
    params = attrs.evolve(GREEDY, max_tokens=tokens)
    prompts = [record["prompt_ids"] for record in reference()]
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    done: list[Completion] = []
    for batch in batches:
        done += engine.generate(batch, params)
    return [list(completion.token_ids) for completion in done]


def expected(tokens: int = TOKENS) -> list[list[int]]:
    return [record["output_ids"][:tokens] for record in reference()]


def pages_back(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.pages_free + stats.pages_cached == stats.pages_total


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make() as shared:
        yield shared


@needs_reference
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("prefill_chunk", [16, 512])
def test_greedy_ids_equal_the_reference(overlap: int, prefill_chunk: int) -> None:
    alone = FEW if prefill_chunk == 16 else TOKENS
    with make(overlap=overlap, prefill_chunk=prefill_chunk, slots=8) as engine:
        assert run(engine, together=False, tokens=alone) == expected(alone)
        assert run(engine, together=True) == expected()
        hits = engine.stats().prefix_cache_hits
        assert hits > 0, "the second pass must have been served from the prefix cache"
        assert pages_back(engine)


@needs_reference
@pytest.mark.parametrize("overlap", [0, 1])
def test_greedy_ids_survive_preemption(overlap: int) -> None:
    longest = max(len(r["prompt_ids"]) + 64 for r in reference())
    pages = -(-longest // 8) + 4
    with make(overlap=overlap, page_size=8, pages=pages, slots=8, prefill_chunk=64) as engine:
        assert run(engine, together=True) == expected()
        assert engine.stats().preemptions > 0, "the pool is too small to hold all five"
        assert pages_back(engine)


@needs_reference
def test_cached_tokens_are_reported(engine: Engine) -> None:
    prompt = max((r["prompt_ids"] for r in reference()), key=len)
    engine.generate(prompt, GREEDY)
    (again,) = engine.generate(prompt, GREEDY)
    size = engine.config.page_size
    assert again.usage.cached_tokens == (len(prompt) - 1) // size * size


def test_seeded_sampling_does_not_depend_on_company(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=24)
    prompt = engine.encode_chat([{"role": "user", "content": "Tell me a story."}])
    (alone,) = engine.generate([prompt], params)
    others = [engine.tokenizer.encode(f"Fact {i}:", special=False) for i in range(4)]
    together = engine.generate([prompt, *others], params)
    assert together[0].token_ids == alone.token_ids


def test_stop_string_cuts_the_text(engine: Engine) -> None:
    prompt = "1 2 3 4 5 6"
    (free,) = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=24))
    stop = free.text[5:8]
    (cut,) = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=24, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_scheduler_hears_of_priority_budget_and_durations(tmp_path: Path, overlap: int) -> None:
    path = tmp_path / "recording"
    with make(record_scheduler=str(path), tps_floor=50, overlap=overlap, slots=4) as engine:
        asked = [Request(prompt_ids=(1, 2, 3), params=GREEDY, priority=p) for p in (0, -3)]
        for stream in [engine.submit(request) for request in asked]:
            assert list(stream)[-1].finish_reason is not None
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["settings"]["itl_budget_us"] == 20_000
    submits = [row for row in rows if row.get("call") == "submit"]
    assert [row["priority"] for row in submits[-2:]] == [0, -3]
    commits = [row for row in rows if row.get("call") == "commit"]
    assert len(commits) > 60
    assert all(100 < row["duration_us"] < 60e6 for row in commits), "none is unknown"


def test_logprobs_come_with_their_tokens(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    (done,) = engine.generate("The capital of France is", params)
    assert [p.token_id for p in done.logprobs] == list(done.token_ids)
    for entry in done.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))


def test_stream_equals_generate(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=16)
    (whole,) = engine.generate("Once upon a time", params)
    deltas = list(engine.stream("Once upon a time", params))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == list(whole.token_ids)
    assert deltas[-1].finish_reason == "length"

    async def read() -> str:
        return "".join([d.text async for d in engine.astream("Once upon a time", params)])

    assert asyncio.run(read()) == whole.text


def test_leaving_a_stream_returns_its_pages(engine: Engine) -> None:
    for taken in range(4):
        stream = engine.stream("Once upon a time", SamplingParams(max_tokens=200))
        for _ in range(taken):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    engine.generate("Hi", SamplingParams(max_tokens=1))
    assert pages_back(engine)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request(prompt_ids=()), "prompt"),
        (Request(prompt_ids=(-1,)), "prompt"),
        (Request(prompt_ids=(10**9,)), "prompt"),
        (Request(prompt_ids=(1,), params=SamplingParams(max_tokens=10**6)), "max_tokens"),
        (Request(prompt_ids=(1,), params=SamplingParams(logit_bias={10**9: 1.0})), "logit_bias"),
        (Request(prompt_ids=(1,) * 9000), "prompt"),
    ],
)
def test_bad_requests_are_refused_at_the_door(
    engine: Engine, request_: Request, field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        engine.submit(request_)
    assert caught.value.field == field


def test_overload_and_stop_are_values_not_losses() -> None:
    with make(slots=1, waiting_max=1, pages=64, context_max=512) as engine:
        request = Request(prompt_ids=(1, 2, 3), params=SamplingParams(max_tokens=400))
        streams = [engine.submit(request) for _ in range(2)]
        with pytest.raises(OverloadedError):
            engine.submit(request)
        for stream in streams:
            stream.abort()
            assert list(stream)[-1].finish_reason == "abort"
        assert engine.drain(timeout_s=10)
        with pytest.raises(EngineStopped):
            engine.submit(request)
    assert not engine.health().live


def test_a_failing_step_fails_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(pages=64, context_max=256) as engine:
        launch, calls = engine._executor.launch, threading.Semaphore(1)

        class Broken:
            def result(self) -> object:
                raise StepError("injected")

        def fail_once(plan: object) -> object:
            pending = launch(plan)  # type: ignore[arg-type]
            if calls.acquire(blocking=False):
                pending.result()
                return Broken()
            return pending

        monkeypatch.setattr(engine._executor, "launch", fail_once)
        with pytest.raises(StepError, match="injected"):
            engine.generate("Hello", SamplingParams(max_tokens=4))
        (good,) = engine.generate("Hello", SamplingParams(max_tokens=4))
        assert good.usage.completion_tokens > 0
        assert engine.health().ready
        assert pages_back(engine)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"page_size": 0}, "page_size"),
        ({"pages": 0}, "pages"),
        ({"overlap": 2}, "overlap"),
        ({"prefill_chunk": 1}, "prefill_chunk"),
        ({"slots": True}, "slots"),
    ],
)
def test_bad_settings_name_the_field(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineConfig(**settings)  # type: ignore[arg-type]


def test_a_superseding_turn_ends_the_one_that_still_runs(engine: Engine) -> None:
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    turn = Session(name="typing", supersedes=True)
    other = Session(name="other", supersedes=True)
    first = engine.submit(Request(prompt_ids=(1, 2, 3), params=long, session=turn))
    bystander = engine.submit(Request(prompt_ids=(1, 2, 3), params=GREEDY, session=other))
    second = engine.submit(Request(prompt_ids=(1, 2, 3, 4), params=GREEDY, session=turn))
    ended = list(first)[-1]
    assert ended.finish_reason == "abort"
    assert ended.error is not None
    assert "superseded" in ended.error
    assert list(second)[-1].finish_reason in ("length", "stop")
    assert list(bystander)[-1].finish_reason in ("length", "stop")
    assert engine.end_session("typing")
    assert not engine.end_session("typing")
    assert pages_back(engine)


def test_a_question_that_fails_is_its_askers_alone(engine: Engine) -> None:
    with pytest.raises(ValueError, match="keep_us"):
        engine._loop.ask(lambda: engine._scheduler.prefetch("typing", 0)).result(timeout=20)
    assert engine.health().live
    assert engine.generate([1, 2, 3], GREEDY)[0].finish_reason in ("length", "stop")


def test_owners_do_not_touch_each_others_sessions(engine: Engine) -> None:
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    mine = Session(name="chat", supersedes=True, owner="a")
    theirs = Session(name="chat", supersedes=True, owner="b")
    first = engine.submit(Request(prompt_ids=(1, 2, 3), params=long, session=mine))
    second = engine.submit(Request(prompt_ids=(1, 2, 3), params=GREEDY, session=theirs))
    assert list(second)[-1].finish_reason in ("length", "stop")
    assert list(first)[-1].finish_reason == "length", "it was not superseded"
    assert not engine.end_session("chat")
    assert engine.end_session("chat", "a")
    assert not engine.end_session("chat", "a")
    assert engine.end_session("chat", "b")
    assert pages_back(engine)


@given(*[st.text(max_size=4)] * 4)
def test_two_sessions_have_one_key_only_if_they_are_one(a: str, b: str, c: str, d: str) -> None:
    assert (session_key(a, b) == session_key(c, d)) == ((a, b) == (c, d))


@pytest.mark.parametrize(
    ("bad", "field"), [({"name": ""}, "name"), ({"name": "a", "ttl_s": -1}, "ttl_s")]
)
def test_a_bad_session_names_its_field(bad: dict[str, object], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Session(**bad)  # type: ignore[arg-type]
    assert caught.value.field == field


def spoil(engine: Engine, blocks: int) -> None:
    """Turn a bit of the first host pages over."""
    host = engine._executor._host
    assert host is not None
    for block in range(blocks):
        host._bytes[block][7] ^= 1


@needs_reference
@pytest.mark.parametrize(("overlap", "spoilt"), [(1, 0), (0, 100)])
def test_greedy_ids_survive_the_way_to_the_host_and_back(overlap: int, spoilt: int) -> None:
    """The device has pages for one request: what others had is on the host, whole or spoilt."""
    longest = max(len(r["prompt_ids"]) + 64 for r in reference())
    pages = -(-longest // 8) + 4
    with make(
        overlap=overlap, page_size=8, pages=pages, slots=8, prefill_chunk=64, host_pages=300
    ) as engine:
        assert run(engine, together=True) == expected()
        engine.generate("x", SamplingParams(max_tokens=1))  # acknowledged with or before it
        spoil(engine, spoilt)
        assert run(engine, together=False, tokens=FEW) == expected(FEW)
        stats = engine.stats()
        assert stats.host_stores > 0
        assert spoilt or stats.prefix_cache_hits_host > 0
        assert (stats.host_copies_failed > 0) == (spoilt > 0)
        assert pages_back(engine)


def test_a_host_without_a_prefix_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="host_pages: got 8"):
        EngineConfig(host_pages=8, prefix_cache=False)
