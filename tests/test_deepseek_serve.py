"""DeepSeek's family served: chunks, a prefix cache, a host tier and guesses change no id."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import tokenizers

import tiny
from models_here import DATA
from serving import TEXT, everything_back, served
from test_models import greedy_ids
from tokenspeed import models
from tokenspeed.engine import Engine
from tokenspeed.request import Request, SamplingParams
from tokenspeed.spmd import Mesh

OUTPUT = 10
PROMPTS = [[7 * i % 90 + 3 for i in range(40)], [5, 9, 33, 70], [7 * i % 90 + 3 for i in range(29)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.letters(tiny.write(tmp_path_factory.mktemp("deepseek"), **tiny.DEEPSEEK))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """Greedy ids, each by a forward over all that is before it, with nothing cached."""
    model = models.build(models.open_checkpoint(folder), Mesh.single())
    outputs = [greedy_ids(model, prompt, OUTPUT) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in outputs}) == 3, "all alike would hide errors"
    return outputs


def start(folder: Path, **settings: object) -> Engine:
    sizes = {"pages": 48, "page_size": 4, "slots": 3, "prefill_chunk": 24} | settings
    return Engine.from_pretrained(folder, dtype="float32", **sizes)


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": 0},
        {"overlap": 1, "prefill_chunk": 7},
        {"overlap": 1, "prefill_chunk": 64},
        {"overlap": 0, "pages": 16},
        {"overlap": 0, "host_pages": 64, "pages": 16},
        {"overlap": 0, "speculate": "ngram"},
    ],
    ids=str,
)
def test_every_way_to_serve_gives_the_ids_of_a_full_forward(
    folder: Path, expected: list[list[int]], settings: dict[str, object]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    with start(folder, **settings) as engine:
        for _ in range(2):  # the second time from the cache
            done = engine.generate(PROMPTS, params)
            assert [list(one.token_ids) for one in done] == expected
        stats = engine.stats()
        assert stats.prefix_cache_hits > 0
        assert everything_back(engine)


def test_a_token_takes_one_latent_a_layer(folder: Path) -> None:
    model = models.build(models.open_checkpoint(folder), Mesh.single(), dtype="bfloat16")
    assert model.kv.token_bytes == 2 * (24 + 8) * 2  # layers, latent and rotary key, bytes
    assert [part.shape for part in model.kv.allocate(3, 4)[1]] == [(3, 4, 32)]


def test_it_answers_over_http(folder: Path, expected: list[list[int]]) -> None:
    """And says how much of a prompt that goes on was cached."""
    with start(folder) as engine, served(engine) as url, httpx.Client(base_url=url) as client:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            body = {"model": engine.model_name, "prompt": prompt, "temperature": 0}
            answer = client.post(
                TEXT, json={**body, "max_tokens": OUTPUT, "ignore_eos": True}, timeout=60
            ).json()
            assert answer["choices"][0]["text"] == engine.tokenizer.decode(wanted), answer
        longer = [*PROMPTS[0], *expected[0], 11]
        body = {"model": engine.model_name, "prompt": longer, "max_tokens": 1}
        usage = client.post(TEXT, json=body, timeout=60).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 48


@pytest.mark.skipif(
    not (DATA / "deepseek_tiny").is_dir(), reason="shared/data/deepseek_tiny is not here"
)
@pytest.mark.parametrize("name", ["deepseek_tiny", "deepseek_v2_tiny"])
def test_reference_ids_are_served(name: str, tmp_path: Path) -> None:
    for file in (DATA / name).iterdir():
        (tmp_path / file.name).symlink_to(file)
    vocab = {chr(256 + i): i for i in range(512)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).save(str(tmp_path / "tokenizer.json"))
    records = json.loads((tmp_path / "reference.json").read_text())["records"]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    requests = [Request(prompt_ids=tuple(r["prompt_ids"]), params=params) for r in records]
    sizes = {"pages": 80, "page_size": 16, "slots": 3, "prefill_chunk": 200}
    with Engine.from_pretrained(tmp_path, dtype="float32", **sizes) as engine:
        for _ in range(2):
            streams = [engine.submit(request) for request in requests]
            ids = [[t for delta in stream for t in delta.token_ids] for stream in streams]
            assert ids == [record["greedy_ids"] for record in records]
        assert engine.stats().prefix_cache_hits > 0
