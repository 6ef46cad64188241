"""Steps that are replayed say what steps that are computed say; what a graph is made of is a law.

Where there is no GPU a recording is a function that is called again: what is put where it reads its
inputs, and what is padded, is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from models_here import DATA, needs_deepseek_tiny, with_tokenizer
from stepping import Feed, Stepper
from tokenspeed import kernels, models
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine, warm_ups
from tokenspeed.plan import StepPlan
from tokenspeed.spmd import Executor, Mesh, replay
from tokenspeed.spmd.batch import Slots
from tokenspeed.spmd.replay import DecodeSteps, decodes

ON_GPU = torch.cuda.is_available()
PAGE, SLOT_PAGES, SLOTS = 8, 6, 7


class Again(replay.Graphs):
    """Records by capturing, or, where there is no GPU, by calling. Says how many rows it has."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.recorded: list[int] = []

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        """See Recorder."""
        result, again = super().record(run) if ON_GPU else called(run)
        self.recorded.append(len(result))
        return result, again


def called(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A recording that calls."""
    result = run().clone()

    def again() -> None:
        result.copy_(run())

    return result, again


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every recording of executors that record, `graphs=True`."""
    here = Again()
    made = lambda *_, graphs: here if graphs else None  # noqa: E731
    monkeypatch.setattr("tokenspeed.spmd.executor.recorder", made)
    return here.recorded


def stepper(model: models.Model, **kind: Any) -> Stepper:
    sizes = {"slots": SLOTS, "pages": SLOTS * SLOT_PAGES, "page_size": PAGE}
    executor = Executor(model, context_max=SLOT_PAGES * PAGE, **sizes, **kind)
    return Stepper(executor, SLOT_PAGES, PAGE)


def build(folder: Path) -> models.Model:
    device = "cuda" if ON_GPU else "cpu"
    return models.build(models.open_checkpoint(folder), Mesh.single(), device=device)


def generated(steps: Stepper) -> list[list[int]]:
    """Rows that come one after the other, and leave again, so that every number of rows decodes
    together, few of them also after many."""
    for slot in range(SLOTS):
        steps.join(slot, [(slot * 7 + i * 3) % 90 + 1 for i in range(slot + 1)])
        steps.generate([slot], 1)
        for _ in range(4):
            steps.run(*(Feed(own, from_device=own != slot) for own in range(slot + 1)))
    for rows in range(SLOTS - 1, 0, -1):
        steps.run(*(Feed(own) for own in range(rows)))
    return [steps.output(slot) for slot in range(SLOTS)]


@pytest.mark.parametrize("overlap", [0, 1])
def test_replayed_steps_are_computed_steps(
    tmp_path: Path, recorded: list[int], overlap: int
) -> None:
    model = build(tiny.write(tmp_path))
    wanted = generated(stepper(model))
    assert not recorded, "nobody asked"
    assert generated(stepper(model, graphs=True, overlap=overlap)) == wanted
    assert recorded == [1, 2, 4, 8]


@needs_deepseek_tiny
def test_latent_attention_and_experts_are_replayed(tmp_path: Path, recorded: list[int]) -> None:
    model = build(with_tokenizer(DATA / "deepseek_tiny", tmp_path))
    assert generated(stepper(model, graphs=True)) == generated(stepper(model))
    assert recorded == [1, 2, 4, 8]


def test_what_cannot_be_captured_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(_run: Callable[[], Tensor], _pool: Any) -> tuple[Tensor, Callable[[], None]]:
        raise RuntimeError("somebody waits for the device")

    model = build(tiny.write(tmp_path))
    wanted = generated(stepper(model))
    monkeypatch.setattr(replay, "capture", refuse)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr("tokenspeed.spmd.executor.recorder", lambda *_, **__: replay.Graphs(PAGE))
    assert generated(stepper(model, graphs=True)) == wanted
    told = [record for record in caplog.records if "could not be captured" in record.message]
    assert len(told) == 1, "once, not a step"


def test_what_could_not_be_captured_is_tried_again_with_other_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []

    def capture(run: Callable[[], Tensor], _pool: Any) -> tuple[Tensor, Callable[[], None]]:
        problem = kernels.Problem("rope", "cpu", "float32")
        tried.append(kernels.registry.explain(problem).backend == "reference")
        if not tried[-1]:
            raise RuntimeError("somebody waits for the device")
        return called(run)

    monkeypatch.setattr(replay, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr("tokenspeed.spmd.executor.recorder", lambda *_, **__: replay.Graphs(PAGE))
    checkpoint = models.open_checkpoint(tiny.write(tmp_path))
    steps = stepper(models.build(checkpoint, Mesh.single(), device="cpu"), graphs=True)
    steps.join(0, [1, 2, 3])
    steps.generate([0], 1)
    for backend in ("native", "reference", "native"):
        with kernels.registry.using(rope=backend):
            for _ in range(3):
                steps.run(Feed(0))
    assert tried == [False, True, False], "once with each choice"


class FakeCuda:
    """What torch's streams and captures do: the end of a capture that failed raises, and then the
    stream that was captured stays the current one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.device, self.current, self.fails = 0, "step's", False
        self.made: list[str] = []
        self.pools: list[Any] = []
        for name in ("stream", "graph"):
            patch.setattr(torch.cuda, name, contextmanager(getattr(self, name)))
        patch.setattr(torch.cuda, "current_stream", lambda: self.current)
        patch.setattr(torch.cuda, "current_device", lambda: self.device)
        patch.setattr(torch.cuda, "Stream", self.new)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        handles = itertools.count()
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))

    def new(self) -> str:
        self.made.append(f"{len(self.made)} of device {self.device}")
        return self.made[-1]

    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(
        self, _graph: Any, pool: Any, stream: str, *, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "copies go on beside it"
        self.pools.append(pool)
        before, self.current = self.current, stream
        yield
        if self.fails:
            raise RuntimeError("the capture is void")
        self.current = before


def test_a_capture_is_on_a_stream_of_its_device_and_leaves_the_step_on_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    replay._beside.cache_clear()
    on = []
    for device in (0, 0, 1):
        cuda.device = device
        on.append(replay.capture(lambda: cuda.current)[0])
    assert on == ["0 of device 0", "0 of device 0", "1 of device 1"]
    cuda.fails = True
    with pytest.raises(RuntimeError, match="void"):
        replay.capture(lambda: cuda.current)
    assert cuda.current == "step's"
    replay._beside.cache_clear()


def test_graphs_share_a_pool_until_one_fails_or_all_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, logits = FakeCuda(monkeypatch), torch.zeros(2)
    replay._beside.cache_clear()
    graphs, others = replay.Graphs(PAGE), replay.Graphs(PAGE)
    for recorder in (graphs, graphs, others):
        recorder.record(lambda: logits)
    assert cuda.pools == [(0, 0), (0, 0), (0, 1)], "that of another executor is another one"
    cuda.fails = True
    assert graphs.record(lambda: logits) == (logits, None)
    assert graphs.rows(1) == 0, "into a pool in which a capture failed torch captures no more"
    cuda.fails = False
    graphs.forget()
    assert graphs.rows(1) == 1
    graphs.record(lambda: logits)
    assert cuda.pools[-1] == (0, 2), "a pool whose graphs are gone is none to torch"
    replay._beside.cache_clear()


@given(st.integers(1, 5000), st.integers(1, 128))
def test_a_bucket_pads_by_less_than_a_page(rows: int, page_size: int) -> None:
    found = replay.bucket(rows, page_size)
    assert rows <= found < rows + page_size
    assert replay.bucket(found, page_size) == found


@given(st.integers(1, 40), st.integers(1, 16), st.data())
def test_a_padded_plan_decodes_and_its_rows_have_places_of_their_own(
    rows: int, more: int, data: st.DataObject
) -> None:
    ints = lambda values: np.array(values, np.int32)  # noqa: E731
    plan = StepPlan(
        step=3,
        slots=ints(data.draw(st.permutations(range(rows)))),
        query_start=np.arange(rows + 1, dtype=np.int32),
        token_ids=ints(data.draw(st.lists(st.integers(-1, 9), min_size=rows, max_size=rows))),
        context_lens=ints(range(rows)),
        sampled=np.ones(rows, np.bool_),
        page_delta=np.zeros((0, 3), np.int32),
    )
    wide = replay.padded(plan, rows + more, spare=99)
    assert replay.decodes(plan)
    assert replay.decodes(wide)
    for name in ("slots", "token_ids", "context_lens"):
        assert np.array_equal(getattr(wide, name)[:rows], getattr(plan, name))
        assert getattr(wide, name).dtype == np.int32
    assert set(wide.slots[rows:].tolist()) == {99}
    assert wide.context_lens[rows:].tolist() == list(range(more)), "positions, which are distinct"


def test_a_gpu_serves_all_kinds_of_steps_before_anybody_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which warms up as a GPU does: what is decoded, prefilled, and left behind."""
    config = EngineConfig(device="cuda", slots=6, prefill_chunk=16)
    assert warm_ups(attrs.evolve(config, device="cpu"), 40) == [[8]]
    batches = warm_ups(config, 40)
    assert batches == [[8], [16], [1], [1] * 2, [1] * 4]
    monkeypatch.setattr("tokenspeed.engine.warm_ups", lambda *_: batches)
    told: list[tuple[str, int, int]] = []
    seen: set[int] = set()
    run = DecodeSteps.__call__

    def noted(self: DecodeSteps, plan: StepPlan, slots: Slots) -> torch.Tensor:
        seen.add(plan.rows if decodes(plan) else -plan.tokens)
        return run(self, plan, slots)

    monkeypatch.setattr(DecodeSteps, "__call__", noted)
    with Engine.from_pretrained(
        tiny.letters(tiny.write(tmp_path)),
        progress=lambda *now: told.append(now),
        **{"slots": 6, "prefill_chunk": 16, "pages": 40, "page_size": 4},
    ) as engine:
        assert {1, 2, 4, -8, -16} <= seen
        assert engine.stats().pages_free == 40
    assert [one for one in told if one[0] == "warm-up"] == [("warm-up", i, 5) for i in range(6)]
