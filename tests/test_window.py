"""Sliding windows end to end: pages go back as the window moves on, and no token changes for it.

In all layers, or in some: then layers of either kind have pages of their own, from one pool.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tokenspeed import models
from tokenspeed._core import Scheduler
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError
from tokenspeed.plan import PLANNED, Joined, StepPlan
from tokenspeed.request import SamplingParams
from tokenspeed.spmd import Executor, Mesh
from tokenspeed.spmd.kv import GROUPS_MAX, CacheGroups

WINDOW, PAGE_SIZE, OUTPUT = 12, 4, 40
PROMPTS = [list(range(3, 40)), [*range(3, 40), 50, 51], list(range(60, 80))]
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, seed=1)
FITTING = (WINDOW - 2) // PAGE_SIZE + 2
"""Pages that a window may lie in."""


MIXED = {
    "model_type": "qwen2", "num_hidden_layers": 3, "tie_word_embeddings": True,
    "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
}  # fmt: skip
"""A layer that sees all, then two that have the window."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    folder = tiny.write(
        tmp_path_factory.mktemp("mistral"), model_type="mistral", sliding_window=WINDOW
    )
    return models.build(models.open_checkpoint(folder), Mesh.single())


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("qwen2"), **MIXED)


@pytest.fixture(scope="module")
def mixed(mixed_folder: Path) -> models.Model:
    built = models.build(models.open_checkpoint(mixed_folder), Mesh.single())
    assert built.config.layer_windows == (None, WINDOW, WINDOW)
    return models.in_cache_groups(built, EngineConfig())


def in_one_group(model: models.Model, window: int = 0) -> models.Model:
    groups = CacheGroups.one(model.config.layers, window)
    return attrs.evolve(model, kv=attrs.evolve(model.kv, groups=groups))


def generate(
    model: models.Model, *, pages: int, overlap: int = 0, slots: int = 3
) -> tuple[list[list[int]], Scheduler]:
    """Greedy ids of PROMPTS, twice over: the second time with what is cached of the first."""
    sizes = {"slots": slots, "pages": pages, "page_size": PAGE_SIZE, "context_max": 128}
    settings = model.kv.groups.settings
    scheduler = Scheduler(**sizes, step_tokens=16, overlap=overlap, **settings)
    executor = Executor(model, **sizes, overlap=overlap)
    prompts = [*PROMPTS, *PROMPTS]
    output: list[list[int]] = [[] for _ in prompts]
    launched = deque()
    for number, prompt in enumerate(prompts):
        scheduler.submit(number, np.array(prompt, np.int32), OUTPUT)
    while not scheduler.idle():
        while (plan := scheduler.plan()) is not None:
            joined = tuple(
                Joined(slot=slot, params=GREEDY, prompt_ids=tuple(prompts[number]))
                for slot, number in plan.joined.tolist()
            )
            step = StepPlan(**{name: getattr(plan, name) for name in PLANNED}, joined=joined)
            launched.append((plan.step, plan.numbers.copy(), executor.launch(step)))
        number, rows, pending = launched.popleft()
        result = pending.result()
        done = scheduler.commit(number, result.token_ids, np.zeros(len(rows), np.bool_))
        for row, request in enumerate(rows.tolist()):
            if done.accepted[row]:
                output[request].append(int(result.token_ids[row]))
    executor.close()
    assert scheduler.check() == []
    return output, scheduler


@pytest.fixture(scope="module")
def expected(model: models.Model) -> list[list[int]]:
    """With room for everything, and no page given back early."""
    output, _ = generate(in_one_group(model), pages=200)
    assert output[:3] == output[3:]
    assert len({tuple(ids) for ids in output}) == 3, "all alike would hide errors"
    return output


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("pages", [FITTING, FITTING + 2, 14, 200])
def test_ids_do_not_depend_on_the_pages_there_are(
    model: models.Model, expected: list[list[int]], pages: int, overlap: int
) -> None:
    """Each request has more tokens than the three smaller pools can hold."""
    assert max(map(len, PROMPTS)) + OUTPUT > 14 * PAGE_SIZE
    output, scheduler = generate(in_one_group(model, WINDOW), pages=pages, overlap=overlap)
    assert output == expected
    stats = scheduler.stats()
    assert stats.pages_free + stats.pages_cached == pages
    assert stats.prefix_hits > 0 or pages < 200


def greedy(folder: Path) -> list[list[int]]:
    """What transformers says to each of PROMPTS."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = {"max_new_tokens": OUTPUT, "min_new_tokens": OUTPUT, "do_sample": False}
    return [
        peer.generate(torch.tensor([prompt]), **asked, eos_token_id=None)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


MIXED_FITTING = -(-(max(map(len, PROMPTS)) + OUTPUT - 1) // PAGE_SIZE) + 2 * FITTING
"""Pages for the layer that sees all, and for the two that slide, each with pages of its own."""


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("pages", [MIXED_FITTING, 60, 400])
def test_ids_of_a_mixed_model_are_those_of_transformers(
    mixed: models.Model, mixed_folder: Path, pages: int, overlap: int
) -> None:
    """The smallest pool has not two thirds of the pages that one of these requests writes."""
    assert mixed.kv.groups.windows == (0, WINDOW, WINDOW)
    output, scheduler = generate(mixed, pages=pages, overlap=overlap)
    assert output == greedy(mixed_folder) * 2
    stats = scheduler.stats()
    assert stats.pages_free + stats.pages_cached == pages
    assert stats.prefix_hits > 0 or pages < 60


@given(st.lists(st.sampled_from([None, 8]), min_size=1, max_size=64))
def test_each_layer_has_a_place_of_its_own_among_others_like_it(windows: list[int | None]) -> None:
    groups = CacheGroups.of(windows)
    assert len(set(groups.places)) == len(windows)
    assert [groups.windows[group] or None for group, _ in groups.places] == windows
    full = len({groups.places[at][0] for at, window in enumerate(windows) if window is None})
    assert groups.settings["full_groups"] in (0, full)
    assert max(full, groups.settings["window_groups"]) <= GROUPS_MAX
    assert groups.windows == tuple(sorted(groups.windows))


def held_most(tokens: int = 400, **groups: int) -> int:
    """The most pages that one request holds while it computes tokens, one a step at the end."""
    scheduler = Scheduler(
        page_size=PAGE_SIZE, pages=4000, slots=1, step_tokens=8, context_max=4000, **groups
    )
    scheduler.submit(0, np.arange(tokens - 100, dtype=np.int32), 100)
    most = 0
    while (plan := scheduler.plan()) is not None:
        stats = scheduler.stats()
        most = max(most, stats.pages_total - stats.pages_free - stats.pages_cached)
        rows = len(plan.slots)
        scheduler.commit(plan.step, np.ones(rows, np.int32), np.zeros(rows, np.bool_))
    return most


def test_a_request_holds_a_window_and_a_step_however_long_it_is() -> None:
    assert held_most() == 100
    assert held_most(window=WINDOW) <= (WINDOW + 8 - 2) // PAGE_SIZE + 2


@pytest.mark.parametrize(("full", "sliding"), [(1, 1), (1, 5), (3, 1)])
def test_pages_of_a_mixed_model_fall_towards_the_share_of_the_layers_that_see_all(
    full: int, sliding: int
) -> None:
    share = full / (full + sliding)
    used = []
    for tokens in (200, 800, 3200):
        written = tokens // PAGE_SIZE * (full + sliding)
        held = held_most(tokens, window=WINDOW, full_groups=full, window_groups=sliding)
        used.append(held / written)
        assert held <= share * written + sliding * ((WINDOW + 8 - 2) // PAGE_SIZE + 2)
    assert used == sorted(used, reverse=True)
    assert used[-1] == pytest.approx(share, abs=0.02)


def run(scheduler: Scheduler, number: int, prompt: np.ndarray, output: int) -> int:
    """A request to its end; how many of its prompt's tokens were found in the cache."""
    before = scheduler.stats().prefix_hits
    scheduler.submit(number, prompt, output)
    while (plan := scheduler.plan()) is not None:
        rows = len(plan.slots)
        scheduler.commit(plan.step, np.full(rows, 7, np.int32), np.zeros(rows, np.bool_))
    return scheduler.stats().prefix_hits - before


def test_a_next_turn_finds_the_last_window_though_the_pages_before_are_gone() -> None:
    pages = 8
    scheduler = Scheduler(
        page_size=PAGE_SIZE, pages=pages, slots=1, step_tokens=8, context_max=500, window=WINDOW
    )
    prompt = np.arange(1, 101, dtype=np.int32)
    assert run(scheduler, 0, prompt, 9) == 0
    assert scheduler.stats().evictions > 0
    assert all(len(tokens) > 100 - pages * PAGE_SIZE for _, tokens in scheduler.prefixes().values())
    turn = np.concatenate([prompt, np.full(9, 7, np.int32), prompt])
    assert run(scheduler, 1, turn, 9) == 108
    assert run(scheduler, 2, np.concatenate([[0], turn]).astype(np.int32), 9) == 0
    assert scheduler.check() == []


GROUPS = [{"window": WINDOW}, {"window": WINDOW, "full_groups": 1}]


@pytest.mark.parametrize("groups", GROUPS)
def test_what_waits_is_looked_up_again_only_when_something_on_its_path_changes(
    groups: dict[str, int],
) -> None:
    scheduler = Scheduler(
        page_size=PAGE_SIZE, pages=20 * len(groups), slots=3, step_tokens=64, context_max=500,
        **groups,
    )  # fmt: skip

    def steps(count: int) -> int:
        """How often something was looked up in so many steps."""
        before = scheduler.stats().prefix_looks
        for _ in range(count):
            plan = scheduler.plan()
            assert plan is not None
            rows = len(plan.slots)
            scheduler.commit(plan.step, np.full(rows, 7, np.int32), np.zeros(rows, np.bool_))
        return scheduler.stats().prefix_looks - before

    blocked = np.arange(100, 180, dtype=np.int32)
    scheduler.submit(0, np.arange(60, dtype=np.int32), 60)
    steps(4)
    scheduler.submit(1, blocked, 20)
    assert steps(1) == 1
    pages = scheduler.stats().pages_cached, scheduler.stats().evictions
    assert steps(40) == 0, "pages were published, slid away and evicted: none of its own"
    assert (scheduler.stats().pages_cached, scheduler.stats().evictions) != pages
    assert scheduler.stats().waiting == 1
    assert scheduler.check() == []
    scheduler.submit(2, blocked[: 3 * PAGE_SIZE + 1], 8, priority=-1)
    assert steps(6) > 1, "it was let in ahead, and published what waits for"
    while scheduler.stats().waiting:
        steps(1)
        assert scheduler.check() == []
    assert scheduler.stats().running > 0


@pytest.mark.parametrize("groups", GROUPS)
def test_the_memory_of_evicted_prefixes_returns(groups: dict[str, int]) -> None:
    def nodes(*prompts: np.ndarray) -> int:
        for number, prompt in enumerate(prompts):
            run(scheduler, number, prompt, 9)
        assert scheduler.check() == []
        return scheduler.stats().prefix_nodes

    sizes = {"page_size": PAGE_SIZE, "slots": 1, "step_tokens": 8, "context_max": 500, "pages": 120}
    scheduler = Scheduler(**sizes, **groups)
    prompts = [np.arange(400 * at, 400 * at + 300, dtype=np.int32) for at in range(20)]
    alone = nodes(prompts[0])
    assert alone > 300 // PAGE_SIZE
    assert nodes(*prompts) <= 2 * alone + 2, "of those that were evicted something is remembered"
    evicted, held = scheduler.clear_cache()
    assert evicted > 0
    assert held == scheduler.stats().prefix_nodes == 0
    assert scheduler.stats().pages_free == 120


def test_what_fits_no_window_is_refused_at_the_door() -> None:
    scheduler = Scheduler(
        page_size=PAGE_SIZE,
        pages=FITTING - 1,
        slots=1,
        step_tokens=8,
        context_max=500,
        window=WINDOW,
    )
    scheduler.submit(0, np.arange(4 * (FITTING - 1), dtype=np.int32), 1)
    with pytest.raises(ValueError, match=f"needs {FITTING} pages, the pool has {FITTING - 1}"):
        scheduler.submit(1, np.arange(300, dtype=np.int32), 1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("host_pages", 8),
        ("host_memory_gb", 0.1),
        ("kv_events", "events.ndjson"),
    ],
)
def test_what_cannot_follow_a_window_is_refused(
    model: models.Model, mixed: models.Model, setting: str, value: object
) -> None:
    """Where some layers see all, no page is given back instead."""
    config = EngineConfig(**{setting: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{setting}: got .*window of 12 tokens"):
        models.in_cache_groups(model, config)
    assert models.in_cache_groups(in_one_group(mixed), config).kv.groups.windows == (0,)


def test_a_trace_is_of_one_group_without_drafts(model: models.Model, mixed: models.Model) -> None:
    config = EngineConfig(trace_lifecycle="trace.ndjson")
    assert models.in_cache_groups(model, config).kv.groups.windows == (WINDOW,)
    assert models.in_cache_groups(in_one_group(mixed), config).kv.groups.windows == (0,)
    with pytest.raises(ConfigError, match="trace_lifecycle: got"):
        models.in_cache_groups(model, attrs.evolve(config, speculate="ngram"))


def test_the_pool_bounds_the_context_of_models_that_see_all(
    model: models.Model, mixed: models.Model
) -> None:
    config = EngineConfig(page_size=PAGE_SIZE)
    assert models.context_max(in_one_group(model, WINDOW), config, 8) == 128
    assert models.context_max(in_one_group(mixed), config, 8) == 32
    assert models.context_max(mixed, config, 2 * FITTING + 20) == 80
    assert models.context_max(mixed, config, 9) == 12


def test_the_scheduler_has_no_host_pages_beside_a_window() -> None:
    with pytest.raises(ValueError, match="host_pages: got 3; expected 0 with a window"):
        Scheduler(pages=8, context_max=64, host_pages=3, window=4)
