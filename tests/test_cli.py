"""The commands as a person types them: bad flags are refused before anything is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tokenspeed
from models_here import needs_smollm2


def run(*words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenspeed", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--port", "99999"], "port"),
        (["--pages", "0"], "pages"),
        (["--page-size", "-1"], "page_size"),
        (["--device", "tpu"], "device"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "no-such-file"], "api_key_file"),
        (["--overlap", "7"], "overlap"),
        (["--dtype", "float16"], "dtype"),
        (["--prefill-chunk", "3"], "slots"),
        (["--drain-s", "-1"], "drain_s"),
        (["--nonsense"], "nonsense"),
        (["no/such/model/anywhere"], "no/such/model/anywhere"),
    ],
)
def test_a_bad_flag_is_named_and_nothing_is_loaded(words: list[str], named: str) -> None:
    done = run("serve", *words)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert "weights" not in done.stderr


def test_help_fits_a_screen() -> None:
    for words in ([], ["serve"], ["chat"], ["bench", "serve"], ["bench", "scheduler"]):
        done = run(*words, "--help")
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) <= 45


def test_who_checks_a_spec_does_not_wait_for_torch() -> None:
    script = "import sys; import tokenspeed.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


def test_env_names_what_a_bug_report_needs() -> None:
    text = run("env").stdout
    for word in (tokenspeed.__version__, "python", "torch", "cuda", "compiler"):
        assert word in text


@needs_smollm2
def test_chat_answers_in_the_terminal() -> None:
    done = run("chat", "What is gravity?", "--max-tokens", "12")
    assert done.returncode == 0
    assert "ravity" in done.stdout


@needs_smollm2
@pytest.mark.slow
def test_bench_prints_a_table_and_json(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "report.json"
    sizes = ["--rounds", "1", "--prompt-tokens", "4", "--output-tokens", "4"]
    done = run("bench", "serve", *sizes, "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert [row["scenario"] for row in report["rows"]] == ["equal-1", "equal-8", "staggered-8"]
    assert all(row["engine"] > 0 and row["peer"] > 0 for row in report["rows"])
    assert "staggered-8" in done.stdout
