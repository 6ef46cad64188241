"""Our own KV events: what a live engine writes is accepted, and what is not so is refused by name.

That the events, replayed from nothing, give what is cached is a law of every scheduler test: see
`Listener` in `scheduling.py`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from click.testing import CliRunner

import tiny
from tokenspeed._core import Scheduler
from tokenspeed.cli import cli
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError, EngineStopped
from tokenspeed.fsm import kv_log
from tokenspeed.fsm.kv_adapters import ADAPTERS
from tokenspeed.fsm.kv_events import monitor
from tokenspeed.fsm.kv_log import KVLog, Pages, page_hash
from tokenspeed.fsm.replay import play
from tokenspeed.fsm.trace import read_trace, validate
from tokenspeed.plan import StepPlan
from tokenspeed.request import Request, SamplingParams
from tokenspeed.spmd import Pending
from tokenspeed.stats import Cleared

SPECS = Path(__file__).resolve().parents[1] / "specs"
PAGES = 16
SIZES = {
    "pages": 8, "page_size": 2, "slots": 2, "waiting_max": 8, "step_tokens": 4, "context_max": 16,
}  # fmt: skip


# --- A live run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of single characters."""
    return tiny.letters(tiny.write(tmp_path_factory.mktemp("tiny")))


def start(folder: Path, **settings: Any) -> Engine:
    sizes = {"pages": PAGES, "page_size": 4, "slots": 3, "prefill_chunk": 8, "overlap": 1}
    return Engine.from_pretrained(folder, dtype="float32", **sizes, **settings)


def ask(engine: Engine, prompt: list[int], output: int, salt: str = "") -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    with engine.submit(Request(prompt_ids=tuple(prompt), params=params, salt=salt)) as stream:
        return [*prompt, *(token for delta in stream for token in delta.token_ids)]


def clear_under_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Cleared:
    """Clear while a request is in the middle of its answer, however busy this machine is."""
    cleared: list[Cleared] = []
    helper = threading.Thread(target=lambda: cleared.append(engine.clear_cache()))
    launch = engine._executor.launch
    steps = iter(range(1000))

    def wait_then_launch(plan: StepPlan) -> Pending:
        if next(steps) == 8:
            helper.start()
            while not engine._loop._inbox:
                time.sleep(0.001)
        return launch(plan)

    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "launch", wait_then_launch)
        ask(engine, [9] * 10, 20)
    helper.join()
    return cleared[0]


@frozen
class Run:
    """What a run wrote, and what its clears answered."""

    events: Path
    trace: Path
    under_way: Cleared
    idle: Cleared

    def batches(self) -> list[Any]:
        return [json.loads(line) for line in self.events.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Turns of a conversation, two salts, more than the pool holds, and clears."""
    path = tmp_path_factory.mktemp("run")
    names = {"kv_events": "events", "trace_lifecycle": "trace", "record_scheduler": "recording"}
    files = {setting: str(path / name) for setting, name in names.items()}
    with pytest.MonkeyPatch.context() as monkeypatch, start(folder, **files) as engine:
        talk = ask(engine, [1, 2, 3, 4, 5, 6, 7, 8, 9], 4)
        talk = ask(engine, [*talk, 10, 11], 6)
        ask(engine, talk, 3, salt="tenant")
        for first in range(20, 24):
            ask(engine, [first] * 20, 12)
        ask(engine, talk, 3)
        under_way = clear_under_way(engine, monkeypatch)
        cached = engine.stats().pages_cached
        idle = engine.clear_cache()
        assert idle.evicted == cached
        assert engine.stats().pages_free == PAGES
        ask(engine, talk, 1)
        stats = engine.stats()
    assert stats.preemptions == 0
    return Run(path / "events", path / "trace", under_way, idle)


def test_a_live_run_is_replayed(run: Run) -> None:
    done = play(run.events.with_name("recording"), check=True)
    assert (done.difference, done.notes) == (None, ())
    assert done.calls > 50


def test_a_live_run_is_accepted(run: Run) -> None:
    report = monitor(run.events, ADAPTERS["tokenspeed"], pages=PAGES)
    assert (report.violations, report.allowed, report.bad_lines) == ((), {}, 0)
    batches = run.batches()
    assert [batch["seq"] for batch in batches] == list(range(len(batches)))
    assert all(batch["ts"] > 1.7e9 for batch in batches)
    done = CliRunner().invoke(cli, ["monitor", "--adapter", "tokenspeed", str(run.events)])
    assert done.exit_code == 0
    header, steps = read_trace(run.trace)
    assert sum(step.action == "Evict" for step in steps) > run.under_way.evicted + run.idle.evicted
    assert validate(SPECS, header, steps) is None


def test_a_clear_tells_what_went_and_what_stayed(run: Run) -> None:
    assert run.under_way.evicted > 0
    assert run.under_way.held > 0
    assert run.idle.held == 0
    events = [event for batch in run.batches() for event in batch["events"]]
    assert [e["type"] for e in events].count("AllBlocksCleared") == 2, "at the start, and when idle"
    removed = [len(e["block_hashes"]) for e in events if e["type"] == "BlockRemoved"]
    assert run.under_way.evicted in removed


def test_salts_have_keys_of_their_own_and_are_not_told(run: Run) -> None:
    stored = [e for b in run.batches() for e in b["events"] if e["type"] == "BlockStored"]
    firsts = [e["block_hashes"][0] for e in stored if e["token_ids"][:4] == [1, 2, 3, 4]]
    assert len(set(firsts)) == 2
    assert "tenant" not in run.events.read_text()


def test_hashes_are_those_of_vllm() -> None:
    """Against cbor2 5.7 and hashlib, as `hash_block_tokens` has it, over every width of a token."""
    tokens = (0, 23, 24, 255, 256, 65535, 65536, 2**31 - 1)
    first = page_hash(None, tokens, "tenant ü, a salt of more than 23 bytes")
    assert first.hex() == "da20513287247ef4dcbc28483bf019c77aefdc84ee93318ff6a3d81f20c83027"
    second = page_hash(first, tuple(range(30)))
    assert second.hex() == "50aa237634d6257524fc731aa3f766142c9abce83385fb365aeb0b0097626c49"
    plain = page_hash(None, (1, 2))
    assert plain.hex() == "a4d2c1b4e93a03eb50e0b865783b206c617b3b1479fb8a0aa6a9c4e888af6d5f"


def test_runs_of_pages_share_an_event() -> None:
    pages = Pages()
    chain = [("Publish", 7, -1, "", (1, 2)), ("Publish", 3, 7, "", (3, 4))]
    fork = [("Publish", 5, 7, "", (5, 6)), ("Evict", 5, -1, "", ()), ("Evict", 3, -1, "", ())]
    told = pages.tell([*chain, *fork])
    assert [type(event).__name__ for event in told] == [
        "BlockStored",
        "BlockStored",
        "BlockRemoved",
    ]
    assert set(pages.hashes) == {7}
    (cleared,) = pages.tell([("Evict", 7, -1, "", ()), ("Clear", -1, -1, "", ())])
    assert type(cleared).__name__ == "AllBlocksCleared"


# --- What is not so -------------------------------------------------------------------------------

Batches = list[Any]


def find(batches: Batches, kind: str, good: Callable[[Any], bool] = bool) -> tuple[int, int]:
    """Where an event of a kind is, first: batch and place in it."""
    return next(
        (i, j)
        for i, batch in enumerate(batches)
        for j, event in enumerate(batch["events"])
        if event["type"] == kind and good(event)
    )


def again(batches: Batches) -> tuple[int, int]:
    """A page that is stored for a second time: the batch of its removal, and of its return."""
    removed: dict[str, int] = {}
    for i, batch in enumerate(batches):
        for event in batch["events"]:
            if event["type"] == "BlockRemoved":
                removed |= dict.fromkeys(event["block_hashes"], i)
            back = [h for h in event.get("block_hashes", ()) if h in removed]
            if event["type"] == "BlockStored" and back:
                return removed[back[0]], i
    raise AssertionError("no page comes back")


def leave_a_batch_out(batches: Batches) -> None:
    del batches[2]


def say_a_batch_twice(batches: Batches) -> None:
    batches.insert(3, batches[2])


def keep_a_removal_back(batches: Batches) -> None:
    at, _ = again(batches)
    batches[at]["events"] = [e for e in batches[at]["events"] if e["type"] != "BlockRemoved"]


def store_twice(batches: Batches) -> None:
    i, j = find(batches, "BlockStored")
    batches[i]["events"].append(batches[i]["events"][j])


def remove_twice(batches: Batches) -> None:
    i, j = find(batches, "BlockRemoved")
    batches[i]["events"].append(batches[i]["events"][j])


def remove_a_stranger(batches: Batches) -> None:
    i, j = find(batches, "BlockRemoved")
    batches[i]["events"][j]["block_hashes"].append("stranger")


def change_a_token(batches: Batches) -> None:
    _, back = again(batches)
    batches[back]["events"][-1]["token_ids"][0] += 1


def lose_a_token(batches: Batches) -> None:
    i, j = find(batches, "BlockStored")
    batches[i]["events"][j]["token_ids"].pop()


def remove_a_parent(batches: Batches) -> None:
    i, j = find(batches, "BlockStored", lambda event: len(event["block_hashes"]) > 1)
    parent = batches[i]["events"][j]["block_hashes"][0]
    batches[i]["events"].append({"type": "BlockRemoved", "block_hashes": [parent]})


CORRUPTIONS = {
    leave_a_batch_out: "SequenceGap",
    say_a_batch_twice: "EpochMatch",
    keep_a_removal_back: "OneCopyPerKey",
    store_twice: "OneCopyPerKey",
    remove_twice: "FreeUnique",
    remove_a_stranger: "AccountingExact",
    change_a_token: "KeyInjective",
    lose_a_token: "ContentMatches",
    remove_a_parent: "NoDangling",
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_a_corrupted_stream_is_refused_by_name(run: Run, tmp_path: Path, corrupt: Any) -> None:
    batches = run.batches()
    corrupt(batches)
    path = tmp_path / "events"
    path.write_text("".join(json.dumps(batch) + "\n" for batch in batches))
    report = monitor(path, ADAPTERS["tokenspeed"])
    assert report.exit_status == 1
    assert report.violations[0].rule == CORRUPTIONS[corrupt]


# --- Off, and files that cannot be written --------------------------------------------------------


def test_off_nothing_is_kept(folder: Path) -> None:
    with start(folder) as engine:
        ask(engine, [1, 2, 3, 4, 5], 4)
        assert engine.stats().pages_cached > 0
        assert engine._loop._kv_log is None
        assert engine._scheduler.kv_events() == []
        assert engine.clear_cache().held == 0
    with pytest.raises(EngineStopped, match="closed"):
        engine.clear_cache()


def test_a_file_that_cannot_be_written_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_events.*a file that can be written: Is a directory"):
        start(folder, kv_events=str(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_ends_the_log_and_not_the_engine(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events"
    with start(folder, kv_events=str(path)) as engine:
        before = ask(engine, [1, 2, 3, 4, 5], 4)
        assert engine._loop._kv_log is not None
        engine._loop._kv_log.path = Path("/dev/full")
        assert ask(engine, [1, 2, 3, 4, 5, 6, 7, 8, 9], 20)[:5] == before[:5]
        assert engine.health().ready
    assert caplog.text.count("the log of KV events ends here: No space left on device") == 1
    assert engine._scheduler.kv_events() == []
    assert monitor(path, ADAPTERS["tokenspeed"]).exit_status == 0


def test_a_slow_disk_ends_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_log, "BEHIND_MAX", 0)
    scheduler = Scheduler(**SIZES)
    writer = KVLog(tmp_path / "events", scheduler, 0.0)
    scheduler.clear_cache()
    writer.tell(1.0)
    writer.close(2.0)
    writer.close(3.0)
    assert caplog.text.count("the log of KV events ends here: the disk is 0 steps behind") == 1
    assert len((tmp_path / "events").read_text().splitlines()) == 1
