"""What a scheduler was asked is asked again, and the first other answer is named."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import scheduling
from scheduling import World
from tokenspeed._core import Scheduler
from tokenspeed.cli import cli
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.generated import SPEC_HASH
from tokenspeed.fsm.replay import CALLS, Difference, Replayed, make_scheduler, play
from tokenspeed.fsm.trace import read_trace

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "pages": 8, "page_size": 2, "slots": 2, "waiting_max": 2, "step_tokens": 4, "context_max": 16,
}  # fmt: skip

LOOKS = {
    "tokens", "stats", "idle", "check", "record", "record_kv", "kv_events", "prefixes",
    "host_prefixes", "transitions", "events", "trace",
}  # fmt: skip
"""What changes no plan, and is not recorded."""


def busy(overlap: int = 1) -> Path:
    """Shared prefixes, sessions, preemption, aborts, clears, refusals: every kind of call."""
    world = World(
        pages=6, page_size=2, slots=3, step_tokens=4, overlap=overlap, waiting_max=4,
        context_max=12, session_pages_max=2, host_pages=3, draft_tokens=2,
    )  # fmt: skip
    for number in range(4):
        salt, session = ("other", "") if number == 2 else ("", "a turn's")
        world.submit([1, 2, 3, 4, 5 + number], 5, salt, session=session, keep_us=9)
        world.scheduler.advance(number)
    with pytest.raises(ValueError, match="context_max"):
        world.submit([1] * 12, 12)
    for _ in range(5):
        world.turn()
        world.propose(0, 1, 1)
        world.scheduler.guess(np.arange(1, 4))
    world.abort(3)
    world.scheduler.prefetch("a turn's", 9)
    world.scheduler.end_session("a turn's")
    world.clear_cache()
    world.finish()
    assert world.scheduler.stats().preemptions
    return world.scheduler.path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, changed: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    return path


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_the_same_calls_have_the_same_answers(overlap: int) -> None:
    path = busy(overlap)
    told = rows(path)
    assert {row["call"] for row in told if "call" in row} == CALLS.keys()
    assert any("refused" in row.get("answer", ()) for row in told)
    calls = sum("call" in row for row in told)
    assert play(path, check=True) == Replayed(calls, None, ())


def test_a_recording_begins_with_all_that_a_scheduler_is_made_of() -> None:
    header, *_ = rows(busy())
    assert header["settings"]["waiting_max"] == 4
    assert header["spec_hash"] == SPEC_HASH


def answer_of(told: list[dict[str, Any]], call: str, matters: str) -> int:
    """Where the last answer to such a call is that has something in a field."""
    return max(
        at for at in range(2, len(told), 2)
        if told[at - 1]["call"] == call and told[at]["answer"].get(matters)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "field", "other"),
    [
        ("plan", "slots", [7]),
        ("plan", "preempted", []),
        ("commit", "finished", [[0, "stop"]]),
        ("clear_cache", "returned", [5, 5]),
        ("submit", "refused", "ValueError: no"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, call: str, field: str, other: Any) -> None:
    told = rows(busy())
    at = answer_of(told, call, field)
    expected = told[at]["answer"][field]
    told[at]["answer"][field] = other
    done = play(write(tmp_path / "changed", told))
    assert done.difference == Difference(at + 1, call, field, expected, other)
    assert str(done.difference).startswith(f"line {at + 1}: {call}: {field}: got ")
    assert done.calls == at // 2


def test_another_argument_shows_in_the_answers(tmp_path: Path) -> None:
    told = rows(busy())
    at = next(i for i, row in enumerate(told) if row.get("call") == "submit")
    told[at]["prompt"][0] = 9
    difference = play(write(tmp_path / "changed", told)).difference
    assert difference is not None
    assert (difference.call, difference.field) == ("plan", "token_ids")


def test_long_arrays_are_compared_by_their_hash(tmp_path: Path) -> None:
    world = World(pages=64, page_size=4, slots=2, step_tokens=128)
    world.submit(list(range(100)), 2)
    world.finish()
    told = rows(world.scheduler.path)
    at = answer_of(told, "plan", "page_delta")
    assert re.fullmatch(r"int32\[100\] [0-9a-f]{16}", told[4]["answer"]["token_ids"])
    told[at]["answer"]["page_delta"] = "int32[25, 3] 0000000000000000"
    assert play(world.scheduler.path).difference is None
    assert play(write(tmp_path / "changed", told)).difference is not None


def test_a_crash_leaves_a_recording_that_leads_to_it(tmp_path: Path) -> None:
    """Cut off in the last answer, or before it."""
    data = busy().read_bytes()
    lines = data.splitlines(keepends=True)
    for kept, notes in (
        (data[:-5], (f"line {len(lines)} is cut off and was left out: who wrote it ended there",
                     "the last call, plan, has no answer")),
        (b"".join(lines[:-1]), ("the last call, plan, has no answer",)),
    ):  # fmt: skip
        path = tmp_path / "cut"
        path.write_bytes(kept)
        assert play(path) == Replayed(len(lines) // 2, None, notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: [], "is empty"),
        (lambda told: [{**told[0], "form": 99}], "recording of form 1"),
        (lambda told: [{**told[0], "settings": "none"}], "header"),
        (lambda told: [{**told[0], "settings": {**told[0]["settings"], "pages": 0}}], "pages"),
        (lambda told: [told[0], {"call": "explode"}], ":2.*explode"),
        (lambda told: [told[0], {"call": "abort", "nobody": 1}], ":2.*nobody"),
        (lambda told: [told[0], {"answer": {}}], ":2.*a call"),
        (lambda told: [*told[:2], told[1]], ":3.*answer to submit"),
        (lambda told: [*told[:2], 7], ":3.*object of JSON"),
    ],
)
def test_what_is_no_recording_is_refused_by_line(
    tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        play(write(tmp_path / "changed", change(rows(busy()))))


def test_a_recording_of_another_spec_is_replayed_and_said(tmp_path: Path) -> None:
    told = rows(busy())
    told[0]["spec_hash"] = "0" * 64
    done = play(write(tmp_path / "changed", told))
    assert done.difference is None
    assert "000000000000" in done.notes[0]


def test_off_it_is_the_scheduler_itself_and_on_it_goes_with_a_trace(tmp_path: Path) -> None:
    assert type(make_scheduler(None, None, **SIZES)) is Scheduler
    trace, path = tmp_path / "trace", tmp_path / "recording"
    both = make_scheduler(str(trace), str(path), **SIZES)
    both.submit(0, np.array([1, 2, 3], np.int32), 2)
    while plan := both.plan():
        rows = len(plan.numbers)
        both.commit(plan.step, token_ids=np.full(rows, 7, np.int32), stop=np.zeros(rows, bool))
    assert both.idle()
    assert play(path, check=True) == Replayed(6, None, ())
    assert [s.to for s in read_trace(trace)[1] if s.action == "Release"] == ["Finished"]
    with pytest.raises(ConfigError, match=r"record_scheduler.*a file that can be written"):
        make_scheduler(None, str(tmp_path), **SIZES)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_ends_the_recording_and_not_the_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = make_scheduler(None, str(tmp_path / "recording"), **SIZES)
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_file", full)
        for number in range(2):
            scheduler.submit(number, np.array([1, 2, 3], np.int32), 2)
    assert caplog.text.count("the recording of the scheduler ends here: No space left") == 1
    assert scheduler.plan() is not None


def test_the_command_replays(tmp_path: Path) -> None:
    path = busy()
    done = CliRunner().invoke(cli, ["replay", str(path), "--check", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["result"] == "ok"
    told = rows(path)
    at = answer_of(told, "commit", "released")
    told[at]["answer"]["released"] = []
    changed = write(tmp_path / "changed", told)
    done = CliRunner().invoke(cli, ["replay", str(changed), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["result"], found["difference"]["line"]) == ("differs", at + 1)
    assert "commit: released: got" in done.stderr


def test_every_call_and_argument_of_the_scheduler_is_known() -> None:
    """A new one is in CALLS, or only looks: else recordings would silently leave it out."""
    stub = ast.parse((ROOT / "src/tokenspeed/_core.pyi").read_text())
    (scheduler,) = (
        node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "Scheduler"
    )
    methods = {
        node.name: [a.arg for a in (*node.args.args, *node.args.kwonlyargs)][1:]
        for node in scheduler.body
        if isinstance(node, ast.FunctionDef) and node.name != "__init__"
    }
    assert {name: list(arguments) for name, arguments in CALLS.items()} == {
        name: arguments for name, arguments in methods.items() if name not in LOOKS
    }
    public = {name for name in dir(Scheduler) if not name.startswith("_")}
    assert public == methods.keys(), "the stub and the module differ"


FAILING = """
from hypothesis import given
from hypothesis import strategies as st
from scheduling import World

@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_nobody_is_long(lengths):
    world = World(pages=16, page_size=4, slots=2, step_tokens=4)
    for length in lengths:
        world.submit([1] * length, 2)
    world.finish()
    assert max(lengths) < 6
"""


def test_a_failing_property_names_the_recording_of_its_smallest_example(tmp_path: Path) -> None:
    path = tmp_path / "test_failing.py"
    path.write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "conftest", str(path)]
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--basetemp",
               str(tmp_path / "base"), "-p", "no:cacheprovider"]  # fmt: skip
    done = subprocess.run(
        command + options, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (named,) = re.findall(r"^tokenspeed replay (.+)$", done.stdout, re.MULTILINE)
    told = rows(Path(named))
    assert [len(row["prompt"]) for row in told if row.get("call") == "submit"] == [6]
    assert play(Path(named)).difference is None


def test_the_recording_of_a_test_is_named_after_it(request: pytest.FixtureRequest) -> None:
    assert busy() == scheduling.recording(request.node.nodeid)
