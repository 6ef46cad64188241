"""Rung five: what the real scheduler did is a behaviour of the spec; what it did not do is none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import attrs
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import World
from tokenspeed._core import Scheduler
from tokenspeed.cli import cli
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.trace import (
    TraceStep,
    read_trace,
    traced,
    validate,
)

SIZES = {
    "pages": 8, "page_size": 2, "slots": 2, "waiting_max": 8, "step_tokens": 4, "context_max": 16,
}  # fmt: skip
SPECS = Path(__file__).resolve().parents[1] / "specs"


def busy(path: Path, *, overlap: int, pages: int = 6) -> Path:
    """A short run with shared prefixes, preemption, stops, aborts and clears."""
    world = World(pages=pages, page_size=2, slots=3, step_tokens=4, overlap=overlap)
    for _ in range(2):
        for number, salt in enumerate(("", "", "other", "")):
            world.submit([1, 2, 3, 4, 5 + number], 5, salt, stop_after=4 if number == 1 else 99)
        for _ in range(5):
            world.turn()
        world.abort(len(world.clients) - 1)
        world.clear_cache()  # of what nobody holds
        world.submit([1, 2, 3, 4, 5], 5)
        world.finish()
    world.clear_cache()
    return world.write_trace(path)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_what_the_scheduler_does_is_a_behaviour_of_the_spec(tmp_path: Path, overlap: int) -> None:
    header, steps = read_trace(busy(tmp_path / "trace", overlap=overlap))
    actions = {step.action for step in steps}
    assert {"Submit", "Admit", "Acquire", "Schedule", "Launch", "Complete", "Publish", "Abort",
            "Release", "Evict", "Preempt"} <= actions  # fmt: skip
    assert any(s.action == "Admit" and s.value for s in steps), "no prefix was found again"
    assert validate(SPECS, header, steps) is None


@settings(max_examples=15, deadline=None)
@given(
    overlap=st.integers(0, 2),
    page_size=st.integers(1, 3),
    requests=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 5), st.booleans(), st.integers(0, 4),
                  st.integers(-1, 1)),
        min_size=1, max_size=6,
    ),
)  # fmt: skip
def test_any_run_is_a_behaviour_of_the_spec(
    tmp_path_factory: pytest.TempPathFactory,
    overlap: int,
    page_size: int,
    requests: list[tuple[int, int, bool, int, int]],
) -> None:
    path = tmp_path_factory.mktemp("t") / "trace"
    world = World(pages=12, page_size=page_size, slots=2, step_tokens=3, overlap=overlap)
    for prompt, output, salted, turns, priority in requests:
        salt = "x" if salted else ""
        number = world.submit(list(range(1, prompt + 1)), output, salt, priority=priority)
        for _ in range(turns):
            world.turn()
        if turns == 3:
            world.abort(number)
        if turns == 4:
            world.clear_cache()
    world.finish()
    header, steps = read_trace(world.write_trace(path))
    assert validate(SPECS, header, steps) is None


def tiered(path: Path, seed: int) -> Path:
    """Copies that end late, in any order, and badly; aborts and clears while they are under way."""
    chance = random.Random(seed)
    world = World(pages=6, page_size=2, slots=2, step_tokens=4, overlap=seed % 3, host_pages=12)
    for _ in range(60):
        match chance.randrange(7):
            case 0 | 1:
                prompt = [chance.randint(1, 3)] * chance.randint(4, 7)
                world.submit(prompt, chance.randint(1, 3), chance.choice(["", "", "x"]))
            case 2 if world.copies:
                copies = chance.sample(world.copies, chance.randint(1, len(world.copies)))
                world.acknowledge(*copies, good=chance.random() < 0.6)
            case 3 if world.launched:
                world.commit()
            case 4 if world.clients and chance.random() < 0.3:
                world.abort(chance.choice(sorted(world.clients)))
            case 5 if chance.random() < 0.1:
                world.clear_cache()
            case _:
                world.launch()
        loads = [copy for copy in world.copies if not copy.out]
        if loads and chance.random() < 0.3:
            world.acknowledge(*loads, good=False)
    world.finish()
    return world.write_trace(path)


def test_what_is_copied_to_the_host_and_back_is_a_behaviour_of_the_spec(tmp_path: Path) -> None:
    seen = set()
    for seed in range(10):
        header, steps = read_trace(tiered(tmp_path / str(seed), seed))
        seen |= {(s.action, s.to if s.request is None else None) for s in steps}
        assert validate(SPECS, header, steps) is None, seed
    ends = {(f"{copy}End", how) for copy in ("Store", "Load") for how in ("good", "bad")}
    assert ends | {("HostDrop", None), ("Evict", None), ("LoadStart", None)} <= seen


def test_what_a_copy_touches_cannot_be_given_away_in_a_trace(tmp_path: Path) -> None:
    header, steps = read_trace(tiered(tmp_path / "trace", 0))
    start = next(i for i, s in enumerate(steps) if s.action == "StoreStart")
    page, block = steps[start].page, steps[start].value
    for lie in (
        TraceStep("HostDrop", value=block),
        TraceStep("StoreStart", page=page, value=block),
    ):
        rejected = validate(SPECS, header, [*steps[: start + 1], lie])
        assert rejected is not None
        assert "does not hold (HostTier.tla" in rejected.why
    load = next(i for i, s in enumerate(steps) if s.action == "LoadStart")
    rejected = validate(SPECS, header, [*steps[:load], *steps[load + 1 :]])
    assert rejected is not None
    assert rejected.step.action == "LoadEnd"


def without(steps: list[TraceStep], at: int) -> list[TraceStep]:
    return [*steps[:at], *steps[at + 1 :]]


def test_a_trace_that_lies_is_refused_with_the_guard(tmp_path: Path) -> None:
    header, steps = read_trace(busy(tmp_path / "trace", overlap=1))
    launch = next(i for i, s in enumerate(steps) if s.action == "Launch")
    rejected = validate(SPECS, header, without(steps, launch))
    assert rejected is not None
    assert "does not hold" in str(rejected)

    early = next(i for i, s in enumerate(steps) if s.action == "Schedule")
    release = TraceStep("Release", steps[early].request, to="Finished")
    rejected = validate(SPECS, header, [*steps[: early + 1], release])
    assert rejected is not None
    assert rejected.line == early + 3
    assert 'Move("Release", r, to)' in rejected.why

    other = next(i for i, s in enumerate(steps) if s.action == "Acquire")
    taken = attrs.evolve(steps[other], page=steps[other].page)
    rejected = validate(SPECS, header, [*steps[: other + 1], taken])
    assert rejected is not None

    hit = next(i for i, s in enumerate(steps) if s.action == "Admit" and s.value)
    more = [*steps[:hit], attrs.evolve(steps[hit], value=0), *steps[hit + 1 :]]
    rejected = validate(SPECS, header, more)
    assert rejected is not None
    assert "another outcome" in rejected.why


def test_a_trace_of_another_spec_is_refused_by_name(tmp_path: Path) -> None:
    path = busy(tmp_path / "trace", overlap=0)
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), "spec_hash": "0" * 64}), *rest]))
    with pytest.raises(ConfigError, match="000000000000"):
        read_trace(path)
    path.write_text("\n".join([first, "{"]))
    with pytest.raises(ConfigError, match=":2"):
        read_trace(path)


def test_an_engine_writes_what_its_scheduler_does(tmp_path: Path) -> None:
    """Off: nothing is kept. On: every step is there, and the spec accepts them."""
    quiet = Scheduler(**SIZES)
    quiet.submit(0, np.array([1, 2], np.int32), 2)
    assert quiet.trace() == []
    path = tmp_path / "trace"
    writing = traced(str(path), **SIZES)
    writing.submit(0, np.array([1, 2, 3], np.int32), 2)
    writing.submit(1, np.array([1, 2, 3], np.int32), 2)
    while plan := writing.plan():
        rows = len(plan.numbers)
        writing.commit(plan.step, np.full(rows, 7, np.int32), np.zeros(rows, bool))
    assert not writing.abort(1)
    header, steps = read_trace(path)
    assert validate(SPECS, header, steps) is None
    assert [s.to for s in steps if s.action == "Release"] == ["Finished", "Finished"]
    with pytest.raises(ConfigError, match="trace_lifecycle"):
        traced(str(tmp_path), **SIZES)


def test_an_engine_writes_its_copies_too(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    scheduler = traced(str(path), **SIZES, host_pages=4)
    scheduler.submit(0, np.array([1, 2, 3, 4, 5], np.int32), 2)
    while plan := scheduler.plan():
        rows = len(plan.numbers)
        copied = plan.stores[:, 0]
        scheduler.acknowledge(copied, np.ones(len(copied), bool))
        if rows:
            scheduler.commit(plan.step, np.full(rows, 7, np.int32), np.zeros(rows, bool))
    header, steps = read_trace(path)
    assert header.host_pages == 4
    assert [s.to for s in steps if s.action == "StoreEnd"] == ["good"] * scheduler.stats().stores
    assert scheduler.stats().stores == 3
    assert validate(SPECS, header, steps) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_ends_the_trace_and_not_the_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writing = traced(str(tmp_path / "trace"), **SIZES)
    writing._trace.path = Path("/dev/full")  # type: ignore[attr-defined]
    writing.submit(0, np.array([1, 2, 3], np.int32), 2)
    assert "the lifecycle trace ends here: No space left" in caplog.text
    plan = writing.plan()
    assert plan is not None
    assert writing.trace() == []


def test_the_command_judges_a_trace(tmp_path: Path) -> None:
    path = busy(tmp_path / "trace", overlap=1)
    assert CliRunner().invoke(cli, ["check", "--trace", str(path)]).exit_code == 0
    lines = path.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if '"Launch"' in line)
    path.write_text("\n".join([*lines[:cut], *lines[cut + 1 :]]))
    done = CliRunner().invoke(cli, ["check", "--trace", str(path), "--json"])
    assert done.exit_code == 1
    assert "does not hold" in json.loads(done.stdout)["rejected"]["why"]
