"""Benchmarks at sizes that measure nothing: what they print has the form that programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenspeed.bench.scheduler import Sizes
from tokenspeed.errors import ConfigError

TINY = ["--rows", "2", "--rows", "1", "--contexts", "128", "--steps", "20"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenspeed", "bench", "scheduler", *words]
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
