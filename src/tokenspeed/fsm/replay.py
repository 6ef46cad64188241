"""Recordings: what a scheduler was asked and what it answered, as NDJSON, and asked again.

Rule: a scheduler has no clock and no chance in it, so that the same calls give the same answers,
bit for bit. `CALLS` says which calls there are. A call is in the file before it is made and its
answer after it, so that a call which ends the process is the last line.

The first line has the settings; then lines of two kinds take turns:

    {"call": "commit", "step": 3, "token_ids": [7, 7], "stop": [false, true]}
    {"answer": {"accepted": [true, true], "finished": [[1, "stop"]], "released": [1]}}

Arguments are written in full. An answer is written field by field, and of a long array its type,
its shape and a hash. A recording holds what users sent: their tokens and their salts.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast, final

import cattrs
import msgspec
import numpy as np
from attrs import asdict, frozen
from numpy.typing import DTypeLike

from tokenspeed._core import Committed, Plan, QueueFull, Scheduler
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.generated import SPEC, SPEC_HASH, SPEC_VERSION
from tokenspeed.fsm.trace import traced

__all__ = ["CALLS", "Difference", "RecordedScheduler", "Replayed", "make_scheduler", "play"]

log = logging.getLogger("tokenspeed.fsm")

FORM = 1
"""Of the file; another one is refused."""

CALLS: Mapping[str, Mapping[str, DTypeLike | None]] = {
    "submit": {
        "number": None, "prompt": np.int32, "max_tokens": None, "salt": None,
        "session": None, "keep_us": None, "supersedes": None, "priority": None,
    },
    "propose": {"number": None, "draft": np.int32},
    "guess": {"numbers": np.int64},
    "plan": {},
    "commit": {
        "step": None, "token_ids": np.int32, "stop": np.bool_, "duration_us": None,
        "awaits_tool": np.bool_,
    },
    "acknowledge": {"tickets": np.int64, "good": np.bool_},
    "advance": {"now_us": None},
    "end_session": {"session": None},
    "prefetch": {"session": None, "keep_us": None},
    "abort": {"number": None},
    "clear_cache": {},
}  # fmt: skip
"""Each call that changes a scheduler: its arguments in order, and the element type of arrays."""

IN_FULL_MAX = 32
"""Elements up to which an array of an answer is written in full."""


@frozen(kw_only=True)
class Header:
    """The first line of a recording.

    Attributes:
        settings: of the scheduler, as it was made.
        form: of the file.
        spec, spec_version, spec_hash: of the lifecycle that it ran on.
    """

    settings: dict[str, int]
    form: int = FORM
    spec: str = SPEC
    spec_version: str = SPEC_VERSION
    spec_hash: str = SPEC_HASH


@frozen
class Difference:
    """The first answer that is another one.

    Attributes:
        line: of the recorded answer, from 1.
        call: its kind.
        field: of the answer; `check` if the scheduler's own books are wrong.
        got: now.
        expected: what was recorded.
    """

    line: int
    call: str
    field: str
    got: Any
    expected: Any

    def __str__(self) -> str:
        where = f"line {self.line}: {self.call}: {self.field}"
        return f"{where}: got {self.got!r}; expected {self.expected!r}"


@frozen
class Replayed:
    """What became of a recording.

    Attributes:
        calls: that were made again.
        difference: the first one, after which nothing is asked; None if there is none.
        notes: what else there is to know, in sentences.
    """

    calls: int
    difference: Difference | None
    notes: tuple[str, ...]


# --- recording ------------------------------------------------------------------------------------


@final
class RecordedScheduler:
    """Passes everything on to a scheduler, and writes down each of `CALLS`.

    A full disk ends the recording, not the engine.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, scheduler: Scheduler, settings: Mapping[str, int]) -> None:
        self.path = path
        self._scheduler = scheduler
        self._writing = True
        self._file = path.open("wb", buffering=0)  # what is written is there, even after a crash
        weakref.finalize(self, self._file.close)
        self._file.write(_line(asdict(Header(settings=dict(settings)))))
        for name in CALLS:
            setattr(self, name, partial(self._call, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def _call(self, name: str, *args: Any, **more: Any) -> Any:
        given = dict(zip(CALLS[name], args, strict=False)) | more
        self._write({"call": name, **given})
        try:
            found = getattr(self._scheduler, name)(*args, **more)
        except (ValueError, TypeError, QueueFull) as error:
            self._write({"answer": _refused(error)})
            raise
        self._write({"answer": _answer(found)})
        return found

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self._writing:
            return
        try:
            self._file.write(_line(row))
        except OSError as error:
            log.error("the recording of the scheduler ends here: %s", error.strerror)
            self._writing = False


def make_scheduler(trace: str | None, recording: str | None, **settings: Any) -> Scheduler:
    """A scheduler; with paths, one that writes its trace to the one and is recorded in the other.

    Raises:
        ConfigError: a file cannot be written.
    """
    scheduler = traced(trace, **settings) if trace else Scheduler(**settings)
    if recording is None:
        return scheduler
    try:
        return cast(Scheduler, RecordedScheduler(Path(recording), scheduler, settings))
    except OSError as error:
        raise ConfigError(
            "record_scheduler", recording, f"a file that can be written: {error.strerror}"
        ) from error


def _line(row: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(row, enc_hook=_listed) + b"\n"


def _listed(value: Any) -> Any:
    """An argument that JSON has no form for: an array, or a number of numpy's."""
    return np.asarray(value).tolist()


def _answer(found: object) -> dict[str, Any]:
    """What a call returned, by field."""
    if not isinstance(found, Plan | Committed):
        return {"returned": found}
    fields = (name for name in dir(found) if not name.startswith("_"))
    return {name: _brief(getattr(found, name)) for name in fields}


def _brief(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.size <= IN_FULL_MAX:
        return value.tolist()
    digest = hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()
    return f"{value.dtype}{list(value.shape)} {digest}"


def _refused(error: Exception) -> dict[str, Any]:
    return {"refused": f"{type(error).__name__}: {error}"}


# --- replaying ------------------------------------------------------------------------------------


def play(
    path: Path, *, check: bool = False, progress: Callable[[int, int], None] | None = None
) -> Replayed:
    """Ask a fresh scheduler the same, and compare each answer.

    Args:
        path: the recording.
        check: after each call, let the scheduler recompute who holds which page.
        progress: called with the bytes that are done, and all of them.

    Raises:
        ConfigError: the file is no recording (the line is named), or its settings are refused.
    """
    lines = _Lines(path, progress or (lambda _done, _total: None))
    header = _header(path, next(lines.rows, None))
    try:
        scheduler = Scheduler(**header.settings)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}:1", header.settings, f"settings of a scheduler: {error}"
        ) from error
    calls, difference = 0, None
    for row in lines.rows:
        if "call" not in row:
            raise ConfigError(f"{path}:{lines.number}", row, "a call")
        calls += 1
        difference = _again(scheduler, row, lines, check)
        if difference is not None:
            break
    return Replayed(calls, difference, tuple(_notes(header, lines)))


def _header(path: Path, row: dict[str, Any] | None) -> Header:
    if row is None:
        raise ConfigError("recording", str(path), "a header and calls; it is empty")
    if row.get("form") != FORM:
        raise ConfigError(f"{path}:1", row.get("form"), f"a recording of form {FORM}")
    try:
        return cattrs.structure(row, Header)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}:1", row, "the header of a recording") from error


def _again(
    scheduler: Scheduler, row: dict[str, Any], lines: _Lines, check: bool
) -> Difference | None:
    """Make one call; where its answer differs, if it does."""
    name = row.pop("call")
    got = msgspec.json.decode(_line(_ask(scheduler, name, row, lines)))
    answer = next(lines.rows, None)
    if answer is None:
        lines.unanswered = name
    expected = {} if answer is None else answer.get("answer")
    if not isinstance(expected, dict):
        raise ConfigError(f"{lines.path}:{lines.number}", answer, f"the answer to {name}")
    for field, value in expected.items():
        if field not in got or got[field] != value:
            return Difference(lines.number, name, field, got.get(field), value)
    wrong = scheduler.check() if check else []
    return Difference(lines.number, name, "check", wrong, []) if wrong else None


def _ask(scheduler: Scheduler, name: str, given: dict[str, Any], lines: _Lines) -> dict[str, Any]:
    if name not in CALLS or given.keys() - CALLS[name].keys():
        raise ConfigError(f"{lines.path}:{lines.number}", {"call": name, **given}, "one of CALLS")
    types = CALLS[name]
    plain = {name for name, value in given.items() if value is None or types[name] is None}
    args = {k: v if k in plain else np.asarray(v, types[k]) for k, v in given.items()}
    try:
        return _answer(getattr(scheduler, name)(**args))
    except (ValueError, TypeError, QueueFull) as error:
        return _refused(error)


@final
class _Lines:
    """The rows of a file, read as they are asked for."""

    def __init__(self, path: Path, progress: Callable[[int, int], None]) -> None:
        self.path = path
        self.number = 0
        self.cut = False
        self.unanswered = ""
        self.rows = self._read(progress)

    def _read(self, progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
        done, total = 0, self.path.stat().st_size
        with self.path.open("rb") as file:
            for line in file:
                done += len(line)
                progress(done, total)
                if not line.endswith(b"\n"):
                    self.cut = True
                    return
                self.number += 1
                yield self._decode(line)

    def _decode(self, line: bytes) -> dict[str, Any]:
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            text = line[:80].decode(errors="replace")
            raise ConfigError(f"{self.path}:{self.number}", text, "an object of JSON") from error


def _notes(header: Header, lines: _Lines) -> Iterator[str]:
    if header.spec_hash != SPEC_HASH:
        then = f"{header.spec} {header.spec_version} ({header.spec_hash[:12]})"
        now = f"{SPEC} {SPEC_VERSION} ({SPEC_HASH[:12]})"
        yield f"recorded with {then} and replayed with {now}: a difference may be meant"
    if lines.cut:
        yield f"line {lines.number + 1} is cut off and was left out: who wrote it ended there"
    if lines.unanswered:
        yield f"the last call, {lines.unanswered}, has no answer"
