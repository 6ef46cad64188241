"""A check that cannot go on says why and keeps what it found: memory, disk, compiler, interrupt."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenspeed.errors import TokenSpeedError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Settings, check, explore
from tokenspeed.fsm.model import Model, load_model

SPEC = Path(__file__).parent / "specs" / "TwoPhase.tla"
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")


def two_phase(tmp_path: Path, managers: int) -> Path:
    config = tmp_path / "TwoPhase.cfg"
    names = ", ".join("abcdefghi"[:managers])
    config.write_text(
        f"CONSTANT RM = {{{names}}}\nINIT TPInit NEXT TPNext\nINVARIANT Consistent\n"
        "CHECK_DEADLOCK FALSE\n"
    )
    return config


# --- the interpreter ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "why"), [(KeyboardInterrupt(), "interrupted"), (MemoryError(), "out of memory")]
)
def test_the_interpreter_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, why: str
) -> None:
    model: Model = load_model(SPEC, two_phase(tmp_path, 3))
    real = model.evaluator.successors("TPNext")
    left = iter(range(20))

    def failing(state: object) -> object:
        if next(left, None) is None:
            raise error
        return real(state)  # type: ignore[arg-type]

    monkeypatch.setattr(model.evaluator, "successors", lambda _: failing)
    report, reached = explore(model)
    assert (report.result, report.violated) == ("error", why)
    assert report.distinct == len(reached) > 20
    assert report.generated > report.distinct


# --- the compiler and its cache -------------------------------------------------------------------


def scripted(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_fails_is_named_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = scripted(tmp_path / "broken", "echo no space left on device >&2; exit 1")
    monkeypatch.setenv("CXX", tool)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(TokenSpeedError, match=r"broken refused model\.cpp:\n.*no space left"):
        check(SPEC, two_phase(tmp_path, 3))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_what_is_kept_but_no_program_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache entry that a crash or a full disk cut off."""
    tool = scripted(tmp_path / "cutter", 'while [ "$1" != -o ]; do shift; done; : >"$2"')
    monkeypatch.setenv("CXX", tool)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(TokenSpeedError, match="remove it, and it will be built again"):
        check(SPEC, two_phase(tmp_path, 3))


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("CXX", scripted(tmp_path / "idle", "exit 0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = two_phase(tmp_path, 3)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(TokenSpeedError, match="No space left on device; free some space"):
        check(SPEC, config)


# --- a search that is stopped ---------------------------------------------------------------------

CHECK = """
import json, resource, sys
from pathlib import Path
from tokenspeed.fsm.check import check
address_space = int(sys.argv[3])
if address_space:
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
say = lambda counts: print("going", flush=True)
print(json.dumps(check(Path(sys.argv[1]), Path(sys.argv[2]), progress=say).json()))
"""


def checking(config: Path, address_space: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHECK, str(SPEC), str(config), str(address_space)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@needs_compiler
@pytest.mark.slow
def test_an_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    """The signal goes to the front end alone, which passes it on."""
    config = two_phase(tmp_path, 9)
    check(SPEC, config, Settings(states_max=1))  # builds it
    with checking(config, 0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.send_signal(signal.SIGINT)
        report = json.loads(process.stdout.read().splitlines()[-1])
    assert (report["result"], report["violated"]) == ("error", "interrupted")
    assert report["generated"] > report["distinct"] > 1_000


@needs_compiler
@pytest.mark.slow
def test_a_limit_of_the_system_on_memory_keeps_what_was_found(tmp_path: Path) -> None:
    config = two_phase(tmp_path, 9)
    check(SPEC, config, Settings(states_max=1))
    with checking(config, 1 << 28) as process:
        assert process.stdout is not None
        report = json.loads(process.stdout.read().splitlines()[-1])
    assert (report["result"], report["violated"]) == ("error", "out of memory")
    assert report["distinct"] > 100_000
