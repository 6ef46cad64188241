"""What `check`, `monitor` and `replay` say when the question cannot be put or answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokenspeed.cli import cli, main
from tokenspeed.errors import ConfigError, SpecError, TokenSpeedError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.model import load_model, parse_config
from tokenspeed.fsm.syntax import parse_module

COUNTING = """---- MODULE Counting ----
EXTENDS Naturals
CONSTANT N
VARIABLE x
Init == x = 0
Count == x < N /\\ x' = x + 1
Next == Count
Small == x < 2
====
"""


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    (path := tmp_path / "Counting.tla").write_text(COUNTING)
    path.with_suffix(".cfg").write_text("CONSTANT N = 2\nINIT Init\nNEXT Next\nINVARIANT Small\n")
    return path


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["check", "{spec}", "--config", "{empty}"], "CONSTANTS without a value: N"),
        (["check", "{empty}"], "--config"),
        (["check", "{spec}.none"], "SPEC"),
        (["check", "{spec}", "--config", "{spec}.none"], "--config"),
        (["check", "--trace", "{spec}.none"], "--trace"),
        (["check", "{spec}", "--svg", "-"], "--svg, --json"),
        (["check", "{spec}", "--sequence", "{spec}/none"], "--sequence"),
        (["monitor", "{spec}.none"], "EVENTS: got"),
        (["replay", "{spec}.none"], "RECORDING: got"),
        (["check", "--trace", "{empty}"], "trace"),
        (["check", "--simulate", "1"], "--simulate"),
        (["check", "{spec}", "--replay"], "to drive the runtime by"),
        (["monitor", "{empty}"], "EVENTS"),
        (["replay", "{empty}"], "recording"),
    ],
)
def test_an_error_before_the_first_state_is_json_too(
    counting: Path, words: list[str], named: str
) -> None:
    (empty := counting.with_name("empty")).write_text("")
    given = [word.format(empty=empty, spec=counting) for word in words]
    done = CliRunner().invoke(cli, [*given, "--json"])
    assert isinstance(done.exception, TokenSpeedError)
    report = json.loads(done.stdout)
    assert (report["result"], report["violated"]) == ("error", str(done.exception))
    assert named in report["violated"]
    if words[0] == "check":
        assert (report["generated"], report["distinct"], report["trace"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["{spec}", "--simulate", "1", "--workers", "2"], "--workers"),
        (["{spec}", "--simulate", "1", "--states-max", "9"], "--states-max"),
        (["{spec}", "--depth", "3", "--seed", "0"], "--depth, --seed"),
        (["{spec}", "--no-slow"], "--slow"),
        (["{spec}", "--runtime", "--seed", "1"], "--seed"),
        (["--museum", "--slow"], "--slow"),
        (["--trace", "{spec}", "--engine", "auto"], "--engine"),
        (["--depth", "3"], "--depth"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(
    counting: Path, words: list[str], idle: str
) -> None:
    done = CliRunner().invoke(cli, ["check", *(word.format(spec=counting) for word in words)])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.field == idle


def test_an_error_is_printed_as_it_stands(
    counting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counting.with_suffix(".cfg").write_text("CONSTANT N [/bold] [red]\n")
    monkeypatch.setattr(sys, "argv", ["tokenspeed", "check", str(counting), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "N [/bold] [red]: expected N = value" in said.err
    assert json.loads(said.out)["violated"] in said.err


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_a_drawing_that_cannot_be_written_is_an_error(counting: Path) -> None:
    for option in ("--svg", "--dot", "--sequence"):
        for path, found in (("/dev/full", "Small"), (str(counting / "file"), None)):
            done = CliRunner().invoke(cli, ["check", str(counting), option, path, "--json"])
            assert isinstance(done.exception, ConfigError)
            assert str(done.exception).startswith(f"{option}: got {path!r}")
            said = json.loads(done.stdout)["violated"]  # once, and it stands
            assert said == (found or str(done.exception)), "known before the search"


def test_a_place_to_draw_is_left_as_it_was(counting: Path, tmp_path: Path) -> None:
    kept, new = tmp_path / "kept.svg", tmp_path / "new.dot"
    kept.write_text("a picture")
    counting.with_suffix(".cfg").write_text("CONSTANT N = Init")  # so that nothing is searched
    words = ["check", str(counting), "--svg", str(kept), "--dot", str(new)]
    assert CliRunner().invoke(cli, words).exit_code != 0
    assert (kept.read_text(), new.exists()) == ("a picture", False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_a_report_that_cannot_be_written_is_an_error(counting: Path) -> None:
    words = ["check", str(counting), "--engine", "interpreter", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tokenspeed", *words], stdout=full, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "--json: got 'stdout'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "line", "column", "named"),
    [
        ("CONSTANT N = 2\nINIT Init", 2, 1, "INIT without NEXT"),
        ("CONSTANT N = 2\n  NEXT Next", 2, 3, "NEXT without INIT"),
        ("(* of\nold *) VIEW N", 2, 8, "VIEW"),
        ("CONSTANT N = 2\nSPECIFICATION Spec\nINIT Init", 3, 1, "beside INIT"),
        ("CONSTANT\n  N = 2\n  N = 3", 3, 3, "two values"),
        ("CONSTANT N = 2\n M = 3", 2, 2, "no CONSTANT"),
        ("CONSTANT N = 2\n M <- Small", 2, 2, "no CONSTANT"),
        ("CONSTANT N = {1, 2\n", 1, 14, "closing brace"),
        ("CONSTANT N = 2 \\* two\nCHECK_DEADLOCK maybe", 2, 16, "TRUE or FALSE"),
        ("CONSTANT N = 2\nINVARIANTS Small\n  Large", 3, 3, "Large is not defined in Counting"),
        ("CONSTANT N = 2\nINIT Start NEXT Next", 2, 6, "Start is not defined in Counting"),
        ("CONSTANT N = 2\nSPECIFICATION Spec", 2, 15, "SPECIFICATION Spec is not defined"),
    ],
)
def test_an_error_of_a_configuration_has_its_place(
    counting: Path, text: str, line: int, column: int, named: str
) -> None:
    (path := counting.with_suffix(".cfg")).write_text(text)
    with pytest.raises(SpecError, match=named) as caught:
        load_model(counting, path)
    assert str(caught.value).startswith(f"{path}:{line}:{column}:")


def test_of_a_long_behaviour_the_ends_are_told(counting: Path) -> None:
    counting.write_text(COUNTING.replace("x < 2", "x < 1000"))
    counting.with_suffix(".cfg").write_text("CONSTANT N = 1000\nINVARIANT Small\n")
    words = ["check", str(counting), "--engine", "interpreter"]
    done = CliRunner().invoke(cli, [*words, "--json"])
    assert len(json.loads(done.stdout)["trace"]) == 1_001
    told = [line.split() for line in done.stderr.splitlines() if "becomes" in line]
    assert [int(words[0]) for words in told] == [*range(1, 100), *range(901, 1_001)]
    assert "801 steps are left out" in done.stderr


@pytest.mark.parametrize(
    ("more", "named"), [("N = 3", "N has two values"), ("M = 3", "M is no CONSTANT of Counting")]
)
def test_a_constant_of_the_spec_has_one_value(counting: Path, more: str, named: str) -> None:
    (path := counting.with_suffix(".cfg")).write_text(f"CONSTANTS N = 2 {more}\n")
    with pytest.raises(SpecError, match=named):
        load_model(counting, path)


@pytest.mark.parametrize("command", [["check", "--trace"], ["monitor"], ["replay"]])
@pytest.mark.parametrize(
    "written",
    [b"\xff\xfe\n", b'{"a": "\xff"}\n', b'{"a": ' + b"[" * 200_000 + b"\n"],
    ids=["binary", "no UTF-8 in JSON", "deep"],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, command: list[str], written: bytes) -> None:
    (path := tmp_path / "file").write_bytes(written)
    assert isinstance(CliRunner().invoke(cli, [*command, str(path)]).exception, ConfigError)


def test_a_spec_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    text = COUNTING.replace("x < 2", "(" * 5_000 + "x < 2" + ")" * 5_000)
    (path := tmp_path / "Counting.tla").write_text(text)
    with pytest.raises(SpecError, match="nested too deeply"):
        parse_module(path)


def test_a_spec_that_is_no_text_is_refused_at_its_line(tmp_path: Path) -> None:
    (path := tmp_path / "Odd.tla").write_bytes(b"---- MODULE Odd ----\n\\* \xe9\n====\n")
    for read in (parse_module, parse_config):
        with pytest.raises(SpecError, match=r"Odd\.tla:2:1: .*UTF-8"):
            read(path)
