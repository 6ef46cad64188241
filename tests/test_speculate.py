"""Speculation changes how many steps there are, and nothing that anybody reads."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest

from models_here import needs_reference, needs_smollm2, reference
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError
from tokenspeed.request import Completion, SamplingParams

pytestmark = needs_smollm2

REPETITIVE = "one two three four one two three four one two three four one two"
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def make(**settings: object) -> Engine:
    return Engine.from_pretrained(
        config=EngineConfig(dtype="float32", slots=8, page_size=4, **settings)  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    with make() as engine:
        yield engine


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def guessing(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with make(speculate="ngram", draft_tokens=5, overlap=request.param) as engine:
        yield engine


def said(done: list[Completion]) -> list[tuple[object, ...]]:
    return [(c.text, c.token_ids, c.finish_reason, c.usage.completion_tokens) for c in done]


@needs_reference
@pytest.mark.slow
def test_greedy_ids_equal_the_reference(guessing: Engine) -> None:
    prompts = [record["prompt_ids"] for record in reference()]
    done = guessing.generate(prompts, SamplingParams(temperature=0, max_tokens=64))
    assert [list(c.token_ids) for c in done] == [record["output_ids"] for record in reference()]
    stats = guessing.stats()
    assert 0 < stats.drafts_accepted < stats.drafts
    assert stats.pages_free + stats.pages_cached == stats.pages_total


@pytest.mark.parametrize(
    "params",
    [
        attrs.evolve(GREEDY, logprobs=2),
        SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=12, logprobs=1),
        SamplingParams(temperature=1, seed=5, max_tokens=12, repetition_penalty=1.3,
                       frequency_penalty=0.5, presence_penalty=0.2),
        attrs.evolve(GREEDY, stop=("three",)),
        pytest.param(attrs.evolve(GREEDY, max_tokens=7), marks=pytest.mark.slow),
        pytest.param(attrs.evolve(GREEDY, min_tokens=9), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_is_read_is_the_same(plain: Engine, guessing: Engine, params: SamplingParams) -> None:
    prompts = [REPETITIVE, "Count: 1 2 3 1 2 3 1 2 3 1"]
    expected, got = plain.generate(prompts, params), guessing.generate(prompts, params)
    assert said(got) == said(expected)
    for one, other in zip(got, expected, strict=True):
        assert [t.token_id for t in one.logprobs] == [t.token_id for t in other.logprobs]
        assert [t.logprob for t in one.logprobs] == pytest.approx(
            [t.logprob for t in other.logprobs], abs=1e-3
        )


def test_a_stop_token_within_a_run_ends_there(plain: Engine, guessing: Engine) -> None:
    (free,) = plain.generate(REPETITIVE, GREEDY)
    ends = attrs.evolve(GREEDY, stop_token_ids=(free.token_ids[6],))
    assert said(guessing.generate(REPETITIVE, ends)) == said(plain.generate(REPETITIVE, ends))


def test_repetitive_text_takes_fewer_steps(plain: Engine, guessing: Engine) -> None:
    def steps(engine: Engine) -> int:
        before = engine.stats().steps
        engine.generate(REPETITIVE, GREEDY)
        return engine.stats().steps - before

    assert steps(guessing) < 0.6 * steps(plain)


def test_drafts_without_a_drafter_are_refused() -> None:
    with pytest.raises(ConfigError, match="draft_tokens: got 3; expected none without speculate"):
        EngineConfig(draft_tokens=3)
    with pytest.raises(ConfigError, match="speculate: got 'magic'"):
        EngineConfig(speculate="magic")
    assert EngineConfig().drafts_max == 0
    assert EngineConfig(speculate="ngram").drafts_max == 4
