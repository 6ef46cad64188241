"""Benchmarks at sizes that measure nothing: what they print has the form that programs read."""

from __future__ import annotations

import io
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import tiny
from tokenspeed.bench import cells, mesh, quality
from tokenspeed.bench.conversations import BLOCK, generate, live_blocks, read
from tokenspeed.bench.http import HttpSide, served
from tokenspeed.bench.jobs import Job, timed
from tokenspeed.bench.kernels import CELLS, Cell
from tokenspeed.bench.report import Measured, Report, Timing
from tokenspeed.bench.roofline import plot
from tokenspeed.bench.scheduler import Sizes
from tokenspeed.bench.serve import Workload, compare
from tokenspeed.bench.sessions import (
    COPY_TOKENS_S,
    Link,
    Replay,
    measure,
    parse_sizes,
    workload,
)
from tokenspeed.cli import cli
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError, RankLost
from tokenspeed.fsm.trace import read_trace, validate

TINY = ["--rows", "2", "--rows", "1", "--contexts", "128", "--steps", "20"]


def run(*words: str, what: str = "scheduler") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenspeed", "bench", what, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_scheduler_is_measured_as_json() -> None:
    done = run(*TINY, "--prompt-tokens", "4096", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"steps", "admission", "blocked", "stats_us", "memory", "machine"}
    assert [(row["rows"], row["context"]) for row in found["steps"]] == [(1, 128), (2, 128)]
    assert all(row.keys() == {"rows", "context", "step_us"} for row in found["steps"])
    assert all(row["step_us"] > 0 for row in found["steps"])
    assert found["admission"].keys() == {"tokens", "cached_ms", "cold_ms", "evicting_ms"}
    assert found["blocked"].keys() == {"waiting", "tokens", "step_us", "added_us"}
    assert (found["blocked"]["waiting"], found["blocked"]["tokens"]) == (64, 4096)
    assert found["memory"].keys() == {"rows", "context", "rss_mb", "token_ids_mb", "beyond_mb"}
    assert (found["memory"]["rows"], found["memory"]["context"]) == (2, 128)
    assert found["stats_us"] > 0
    assert "step, 2 x 128 tokens" in done.stderr, "the table is for people"


BEYOND_MB_MAX = 250


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no resident size is told here")
def test_a_thousand_long_requests_fit_into_memory() -> None:
    """1,024 of 51,200 tokens, 48K of them shared: the whole process, without the token ids."""
    case = ["--rows", "1024", "--contexts", "51200", "--steps", "20", "--repeats", "1"]
    done = run(*case, "--json")
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert memory["token_ids_mb"] > 1024 * 51200 * 4 / 1e6
    assert 0 < memory["beyond_mb"] <= BEYOND_MB_MAX


@pytest.mark.parametrize("words", [["--steps", "0"], ["--rows", "0"], ["--prompt-tokens", "64"]])
def test_sizes_that_measure_nothing_are_refused(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert words[0].strip("-").replace("-", "_") in done.stderr
    assert done.stdout == ""


def test_prompts_that_would_not_wait_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt_tokens"):
        Sizes(steps=100_000)


def test_sessions_are_replayed_as_json_with_a_plot(tmp_path: Path) -> None:
    plot = tmp_path / "hits.svg"
    sizes = ["--shares", "2,1", "--hosts", "1,0"]
    words = ["--sessions", "12", "--gap-s", "60", *sizes, "--plot", str(plot), "--json"]
    done = run(*words, what="sessions")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["workload"] == "12 generated sessions", "it says what it replayed"
    runs = found["runs"]
    orders = ("lru", "learned")
    limited = [(order, share, host) for share in (1, 2) for host in (0, 1) for order in orders]
    assert [(run["order"], run["share"], run["host"]) for run in runs] == [
        ("unlimited", None, 0), *limited,
    ]  # fmt: skip
    best = runs[0]
    for each in runs[1:]:
        assert each["host_tokens"] == each["host"] * each["pool_tokens"]
        assert 0 <= each["host_hit_rate"] <= each["hit_rate"] * each["host"]
    assert (best["recomputed_tokens"], best["preemptions"]) == (0, 0)
    assert all(0 < run["hit_rate"] <= best["hit_rate"] < 1 for run in runs)
    assert all(run["queued_mean_s"] <= run["queued_p99_s"] for run in runs)
    assert "unlimited" in done.stderr, "the table is for people"
    assert "polyline" in plot.read_text(encoding="utf-8")


def test_hints_help_where_the_pool_is_small() -> None:
    conversations = generate(60, 30.0)
    report = measure("generated", conversations, (0.5,), (0,), lambda _what, _done, _total: None)
    _, plain, learned = report.runs
    assert learned.hit_rate > plain.hit_rate + 0.01
    assert learned.recomputed_tokens < plain.recomputed_tokens


def test_a_replay_is_a_behaviour_of_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    turns = [
        {"t": 0, "in": 256, "out": 64, "api_time": 1, "stop": "tool_use", "h": [0, [[1, 4]]]},
        {"t": 5, "in": 320, "out": 64, "think_time": 4, "stop": "end_turn", "h": [4, [[9, 1]]]},
        {"t": 9, "requests": [{"t": 0, "in": 192, "out": 1, "h": [0, [[20, 3]]]}]},
    ]
    path.write_text("".join(json.dumps({"requests": turns}) + "\n" for _ in range(3)))
    conversations = read(path, 1.0, None)
    assert [len(c.turns) for c in conversations] == [2, 1] * 3
    assert [turn.awaits_tool for turn in conversations[0].turns] == [True, False]
    assert live_blocks(conversations) > 4
    replay = Replay(conversations, 7, hints=True, host_pages=9, trace=str(tmp_path / "trace"))
    replay.run(lambda _done: None)
    found = replay.report("learned", 1.0, 1.0, replay.hits)
    assert 0 < found.host_hit_rate <= found.hit_rate < 1
    header, steps = read_trace(tmp_path / "trace")
    assert {"Evict", "StoreEnd", "LoadEnd"} <= {step.action for step in steps}
    assert validate(Path(__file__).resolve().parents[1] / "specs", header, steps) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "JSON"), ('{"requests": [{"in": 99, "out": 1, "h": [0, []]}]}', "recorded session"),
     ('{"requests": [{"t": 0, "in": 99, "out": 1, "h": [1, []]}]}', "keeps 1 blocks of 0"),
     ('{"requests": []}', "at least one session")],
)  # fmt: skip
def test_a_trace_of_another_form_is_refused(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=words):
        read(path, 1.0, None)


def test_a_host_tier_finds_what_the_pool_has_lost() -> None:
    conversations = generate(60, 30.0)
    report = measure("generated", conversations, (0.5,), (0, 2), lambda _what, _done, _total: None)
    _, *alone, lru, learned = report.runs
    for without, tiered in zip(alone, (lru, learned), strict=True):
        assert without.host_hit_rate == 0 < tiered.host_hit_rate
        assert tiered.hit_rate > without.hit_rate + 0.02


def test_copies_take_their_time_one_after_the_other() -> None:
    link = Link()
    link.start([7, 8, 9], [5], 1.0)
    one_s = BLOCK / COPY_TOKENS_S
    assert link.ended(1.0) == []
    assert link.ended(1.0 + 1.5 * one_s) == [7, 5], "each way its own"
    assert link.next_s == pytest.approx(1.0 + 3 * one_s)
    link.start([], [6], 1.0 + 2 * one_s)
    assert link.ended(1.0 + 3.1 * one_s) == [8, 9, 6]
    assert link.next_s == np.inf, "nothing moves"


@pytest.mark.parametrize("text", ["", "a", "0", "1,-1", "17"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="shares"):
        parse_sizes("shares", text, 0.001)


def test_workloads_that_cannot_be_replayed_are_refused(tmp_path: Path) -> None:
    for gap_s, sessions, words in ((0.0, 1, "gap_s"), (1.0, 0, "sessions")):
        with pytest.raises(ConfigError, match=words):
            workload(None, gap_s, sessions)
    with pytest.raises(ConfigError, match="trace"):
        workload(tmp_path / "none", 1.0, None)
    with pytest.raises(ConfigError, match="for one request"):
        measure("generated", generate(2, 1.0), (0.01,), (0,), lambda _what, _done, _total: None)


def test_the_policy_is_simulated_as_json() -> None:
    sizes = ("--users", "2", "--prompts", "2", "--prompt-tokens", "2000")
    done = run("--floors", "50,100", *sizes, "--json", what="policy")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"machine", "workload", "rows"}
    assert [row["floor"] for row in found["rows"]] == [50, 100]
    assert all(row["budgeted"]["prefill_per_s"] > 0 for row in found["rows"])


@pytest.mark.parametrize("words", [["--floors", "70,fast"], ["--floors", "0"], ["--users", "1"]])
def test_a_policy_that_cannot_be_simulated_is_refused(words: list[str]) -> None:
    done = run(*words, what="policy")
    assert done.returncode == 2
    assert words[0].strip("-") in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--cell", "b3_q1"], "b3_q1"),
        (["--backend", "fast"], "fast"),
        (["--cell", "b4_q1_h16_64K"], "a CUDA device"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured here")
def test_kernels_are_measured_on_a_gpu_or_not_at_all(words: list[str], named: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "kernels", *words])
    assert isinstance(done.exception, ConfigError)
    assert named in str(done.exception)


@pytest.mark.parametrize(("cell", "named"), [("decode_b3", "decode_b3"), ("rope_t64", "a CUDA")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured here")
def test_ops_are_measured_on_a_gpu_or_not_at_all(cell: str, named: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "ops", "--cell", cell])
    assert isinstance(done.exception, ConfigError)
    assert named in str(done.exception)


def test_what_is_wrong_is_said_beside_its_time() -> None:
    times = {
        "good": Timing(us=20.0, error=1e-3),
        "bad": Timing(us=1.0, error=0.5),
        "odd": Timing(us=5.0, error=float("nan")),
        "torch": Timing(us=30.0),
    }
    table = of_cells(rope_t64=measured(10.0, times)).table()
    shown = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert shown == {
        "cell": "rope_t64",
        "load only": "10.0",
        "bad": "1.0 (0.10x) WRONG 5.0e-01",
        "good": "20.0 (2.00x)",
        "odd": "5.0 (0.50x) WRONG nan",
        "torch": "30.0 (3.00x)",
    }
    text = io.StringIO()
    Console(file=text, width=120).print(of_cells(c=measured(None, times)).table())
    assert "30.0 " in text.getvalue(), "no floor, no ratio"
    assert "x)" not in text.getvalue()


def test_cells_are_measured_in_turn_between_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    products = iter((700.0, 650.0))
    for name, makes in {
        "copy_gb_s": lambda: 4000.0, "matmul_tflop_s": lambda: next(products),
        "machine": lambda: "m",
    }.items():  # fmt: skip
        monkeypatch.setattr(cells, name, makes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))

    def run(cell: int, rates: cells.Rates) -> Measured:
        done.append((cell, rates.copy_gb_s, rates.matmul_tflop_s))
        return measured(float(cell), {})

    tell = lambda *told: done.append(told)  # noqa: E731
    wanted = cells.chosen({"a": 1, "b": 2, "c": 3}, ["c", "a"])
    report = cells.reported(wanted, run, tell, floor="load only", error_max=2e-3)
    assert report == of_cells(c=measured(3.0, {}), a=measured(1.0, {}))
    assert list(report.cells) == ["c", "a"]
    assert done == [
        ("c", 0, 2), (3, 4000.0, 700.0), "given back",
        ("a", 1, 2), (1, 4000.0, 700.0), "given back", ("done", 2, 2),
    ]  # fmt: skip


def test_a_cell_counts_its_pages_and_a_shared_one_counts_them_once() -> None:
    page = 64 * 576 * 2
    assert Cell((65, 64, 1), 1, 16).key_bytes == 4 * page
    assert Cell((640, 640), 1, 16, shared=True).key_bytes == 10 * page
    assert CELLS["b4_q4_h16_64K"] == Cell((65536,) * 4, 4, 16)


def measured(floor_us: float | None, times: dict[str, Timing], name: str = "") -> Measured:
    cell = CELLS.get(name, Cell((1,), 1, 1))
    return Measured(
        op="any", floor_us=floor_us, bytes=cell.bytes_moved, flops=cell.flops, times=times
    )


def of_cells(**cells: Measured) -> Report:
    return Report(
        floor="load only",
        error_max=2e-3,
        machine="m",
        copy_gb_s=4000.0,
        matmul_tflop_s=700.0,
        matmul_after_tflop_s=650.0,
        cells=cells,
    )


def test_a_roofline_has_what_is_right_where_it_belongs() -> None:
    right, wrong = Timing(us=100.0, error=1e-3), Timing(us=1.0, error=float("nan"))
    timings = {"b4_q1_h16_64K": right, "b8_q4_h64_64K": right}
    cells = {
        name: measured(1.0, {"good": timing, "bad": wrong}, name)
        for name, timing in timings.items()
    }
    drawn = ElementTree.fromstring(plot(of_cells(**cells)))
    circles = [one for one in drawn.iter() if one.tag.endswith("circle")]
    assert [one[0].text for one in circles] == [
        f"{name}: {CELLS[name].flops / 100 / 1e6:.0f} TFLOP/s" for name in cells
    ]
    across, up = ([float(one.attrib[at]) for one in circles] for at in ("cx", "cy"))
    assert across[0] < across[1], "more queries do more with each byte"
    assert up[0] > up[1], "and so reach more"


def with_tokenizer(folder: Path) -> Path:
    """A tiny model with a tokenizer of single characters."""
    return tiny.letters(tiny.write(folder))


def test_another_server_is_measured_by_the_same_client(tmp_path: Path) -> None:
    """Here it is one of ours; and one that knows no completions is an error."""
    folder = str(with_tokenizer(tmp_path))
    workload = Workload(prompt_tokens=8, output_tokens=4, rounds=1)
    silent = Console(file=io.StringIO())
    with Engine.from_pretrained(folder) as engine, served(engine) as url:
        found = compare(folder, EngineConfig(), workload, console=silent, peer=url)
        assert [row.scenario for row in found.rows] == ["equal-1", "equal-8", "staggered-8"]
        assert all(row.engine > 0 and row.peer > 0 for row in found.rows)
        assert found.as_json()["peer"] == url
        with pytest.raises(ConfigError, match=r"peer: .* status 404"):
            HttpSide(f"{url}/elsewhere").run([Job(0.0, (1, 2), 3)])
    with pytest.raises(RuntimeError, match="gave 2 tokens of 3"):
        timed([Job(0.0, (1, 2), 3)], lambda _: 2)
    for address in ("ftp://somewhere", "transformer"):
        with pytest.raises(ConfigError, match="transformers, or http://host:port"):
            HttpSide(address)


def test_quality_is_measured_alike_for_all_ways_to_keep_weights(tmp_path: Path) -> None:
    """Random weights predict no better than chance; and a text is what one gives."""
    folder = with_tokenizer(tmp_path)
    text = tmp_path / "text"
    text.write_text("some words of a text that is long enough " * 20)
    words = [str(folder), "--text", str(text), "--window", "32", "--json"]
    done = CliRunner().invoke(cli, ["bench", "quality", *words])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["dtype"], row["quantize"], row["kv_dtype"]) for row in found["rows"]] == list(
        quality.KINDS
    )
    assert found["tokens"] > 0
    assert found["tokens"] % 31 == 0
    exact, *others = (row["perplexity"] for row in found["rows"])
    assert exact > 20
    assert others == pytest.approx([exact] * len(others), rel=0.05)
    sizes = {row["quantize"]: row["weights_mb"] for row in found["rows"]}
    assert sizes["int4"] < sizes["int8"] < sizes["none"]
    _, whole, eight, *_ = (row["perplexity"] for row in found["rows"])
    assert whole != eight, "KV in 8 bits are others"
    with pytest.raises(ConfigError, match="at least 32 tokens; it has 20"):
        quality.measure(str(folder), str(text), 20, 32, lambda *_: None)
    with pytest.raises(ConfigError, match="2 to 128, the model's context"):
        quality.measure(str(folder), str(text), 8192, 4096, lambda *_: None)
    with pytest.raises(ConfigError, match="a file in UTF-8"):
        quality.measure(str(folder), str(tmp_path), 8192, 32, lambda *_: None)


def test_a_mesh_is_measured_by_its_ranks(tmp_path: Path) -> None:
    config = {**tiny.CONFIG, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["bench", "mesh", str(tmp_path), "--rows", "2", "--context", "70", "--json"]
    found = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert found.exit_code == 0
    told = json.loads(found.stdout)
    ops = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    assert [one["what"] for one in told["collectives"][::3]] == ops
    assert all(one["eager_s"] > 0 and one["graph_s"] is None for one in told["collectives"])
    assert {one["bytes"] for one in told["collectives"]} == {1 << 10, 1 << 15, 1 << 20}
    assert told["step"]["eager_s"] > 0


def test_a_rank_that_fails_ends_the_measurement() -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=time.sleep, args=(600,), daemon=True),
        context.Process(target=sys.exit, args=(5,), daemon=True),
    ]
    for process in ranks:
        process.start()
    with pytest.raises(RankLost, match="rank 1 ended with status 5: nothing was measured"):
        mesh._join(ranks)
    assert ranks[0].exitcode == -signal.SIGKILL
    with pytest.raises(ConfigError, match="mesh: got 'tp=64'; expected at most a rank a GPU"):
        mesh.measure(None, "tp=64", device="cuda", dtype="float32", rows=1, context=0)


def test_rows_are_dealt_out_evenly() -> None:
    with pytest.raises(ConfigError, match="rows: got 3; expected a multiple of 2"):
        mesh.measure(None, "ep=2", device="cpu", dtype="float32", rows=3, context=0)
