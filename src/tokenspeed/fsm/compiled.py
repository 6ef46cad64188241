"""A model as a program: printed, compiled once a configuration, run, and read back.

Rule: the program decides nothing about presentation and Python nothing about states. Programs are
kept by the hash of all that they are made of, and so is the search, which is the same in all of
them; without a C++ compiler there is none (`compiler()` is None) and the front end says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs

from tokenspeed.errors import ConfigError, TokenSpeedError
from tokenspeed.fsm.cpp_types import Bounds, TooNarrow
from tokenspeed.fsm.emit_model import CompiledModel, emit_model
from tokenspeed.fsm.values import Function, Value, function

__all__ = ["compiler", "decode", "run"]

FLAGS = ("-std=c++20", "-O1", "-DNDEBUG", "-pthread")
SEARCH_FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "-pthread")
Progress = Callable[[dict[str, int]], None]
Command = tuple[str | Path, ...]


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the path."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    return None


def headers() -> Path:
    """Where the checker's headers lie: in an installed package, or in a checkout.

    Raises:
        ConfigError: in neither; the installation is damaged.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "checker", package.parents[1] / "cpp" / "checker"):
        if (root / "main.hpp").is_file():
            return root
    raise ConfigError("checker headers", str(package), "an installation with checker/main.hpp")


def run(model: CompiledModel, options: dict[str, object], progress: Progress) -> dict[str, Any]:
    """Compile if need be, and run; bounds that turn out too narrow are widened.

    Args:
        options: of the program: `workers`, `memory_mb`, `states_max`, `graph`, `walks`,
            `walk_depth`, `seed`.
        progress: is told what the program says of itself, a few times a second.

    Returns:
        What the program printed (see cpp/checker/main.hpp), and `compile_seconds`.

    Raises:
        TokenSpeedError: the program could not be built, or died.
    """
    bounds = Bounds()
    while True:
        try:
            source = emit_model(model, bounds)
        except TooNarrow as narrow:
            bounds = _widened(bounds, narrow.bound, narrow.value)
            continue
        found = _executed(_built(source), options, progress)
        if "overflow" not in found:
            return found
        bounds = _widened(bounds, str(found["overflow"]), int(found["value"]))


def _widened(bounds: Bounds, bound: str, value: int) -> Bounds:
    """Bounds with room for a value; doubled, so that few programs are built."""
    if bound == "sequence":
        return _within(attrs.evolve(bounds, seq_max=max(2 * bounds.seq_max, value)), bound, value)
    prefix = "set" if bound == "number in a set" else "int"
    low, high = getattr(bounds, f"{prefix}_low"), getattr(bounds, f"{prefix}_high")
    low = low if value >= low else min(2 * low, value)
    high = high if value <= high else max(2 * high + 1, value)
    wider = attrs.evolve(bounds, **{f"{prefix}_low": low, f"{prefix}_high": high})
    return _within(wider, bound, value)


def _within(bounds: Bounds, bound: str, value: int) -> Bounds:
    if bounds.seq_max > 250 or bounds.int_high - bounds.int_low > 2**31 or bounds.set_ints > 4096:
        raise TokenSpeedError(
            f"a {bound} of {value}: the model does not seem to be finite; bound it by a CONSTRAINT"
        )
    return bounds


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tokenspeed" / "models"


def _built(source: str) -> Path:
    """The program for a source text.

    Raises:
        TokenSpeedError: the compiler refused it, or it cannot be kept.
    """
    tool = compiler()
    if tool is None:
        raise ConfigError("compiler", None, "a C++20 compiler: install g++ or clang++, or set CXX")
    texts = [path.read_text(encoding="utf-8") for path in sorted(headers().glob("*.[ch]pp"))]
    program = _cache() / _digest(source, tool, *FLAGS, *texts)
    if program.exists():
        return program
    search = _cache() / f"{_digest(tool, *SEARCH_FLAGS, *texts)}.o"
    try:
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
            model, kept, made = (Path(scratch) / name for name in ("model.cpp", "kept.o", "made"))
            model.write_text(source, encoding="utf-8")
            objects: list[Command] = [
                (tool, *FLAGS, f"-I{headers()}", "-c", model, "-o", model.with_suffix(".o"))
            ]
            if not search.exists():
                objects.append((tool, *SEARCH_FLAGS, "-c", headers() / "checker.cpp", "-o", kept))
            with ThreadPoolExecutor() as pool:
                list(pool.map(_compile, objects))
            if kept.exists():
                kept.replace(search)
            _compile((tool, *FLAGS, model.with_suffix(".o"), search, "-o", made))
            made.replace(program)
    except OSError as error:
        raise TokenSpeedError(
            f"{program.parent}: {error.strerror}; free some space, or set XDG_CACHE_HOME"
        ) from error
    return program


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(command: Command) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        name = Path(command[-3]).name
        raise TokenSpeedError(f"{command[0]} refused {name}:\n{done.stderr[:4000]}")


def _executed(program: Path, options: dict[str, object], progress: Progress) -> dict[str, Any]:
    command = [str(program)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    notes: list[str] = []
    with _started(command) as process:
        assert process.stderr is not None
        listener = threading.Thread(
            target=_listen, args=(process.stderr, progress, notes), daemon=True
        )
        listener.start()
        out = _output(process)
        listener.join()
    if process.returncode not in (0, 3):
        reason = "".join(notes)[-2000:] or f"exit status {process.returncode}"
        raise TokenSpeedError(f"the model's program stopped: {reason}")
    found: dict[str, Any] = json.loads(out)
    return found


def _started(command: list[str]) -> subprocess.Popen[str]:
    """The model's program, running.

    Raises:
        TokenSpeedError: what is kept under its name is no program.
    """
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise TokenSpeedError(
            f"{command[0]}: {error.strerror}; remove it, and it will be built again"
        ) from error


def _output(process: subprocess.Popen[str]) -> str:
    """All that it prints; interrupted, it is told to come to an end and say what it has found."""
    assert process.stdout is not None
    try:
        return process.stdout.read()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
    try:
        return process.stdout.read()
    except KeyboardInterrupt:  # a second time: at once
        process.kill()
        raise


def _listen(lines: Any, progress: Progress, notes: list[str]) -> None:
    for line in lines:
        if line.startswith("{"):
            progress(json.loads(line))
        else:
            notes.append(line)
            sys.stderr.write(line)


def decode(shown: Any) -> Value:
    """A value out of the program's JSON (see cpp/checker/show.hpp)."""
    if isinstance(shown, list):
        return tuple(decode(item) for item in shown)
    if isinstance(shown, dict):
        if "set" in shown:
            return frozenset(decode(item) for item in shown["set"])
        return _decoded_map({decode(key): decode(value) for key, value in shown["map"]})
    return shown


def _decoded_map(items: dict[Value, Value]) -> Value:
    return function(items) if items else Function({})
