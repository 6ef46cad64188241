"""Traces: what a live scheduler did, written as NDJSON, and judged by the specification itself.

Rule: the steps are the spec's own actions, reported by the code that takes them; a step is accepted
if the interpreter finds it among the successors of the state so far. The first line of a file names
the spec by its hash: a trace of another spec is refused, not misread.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

import cattrs
import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray

from tokenspeed._core import Committed, Plan, Scheduler
from tokenspeed.errors import ConfigError
from tokenspeed.fsm.evaluate import Evaluator, State
from tokenspeed.fsm.generated import SPEC, SPEC_HASH, SPEC_VERSION
from tokenspeed.fsm.model import load_module
from tokenspeed.fsm.syntax import Definition, Expr, Span
from tokenspeed.fsm.values import Function, Value

__all__ = [
    "Rejected", "TraceHeader", "TraceStep", "TraceWriter", "read_trace", "traced", "validate",
]  # fmt: skip

log = logging.getLogger("tokenspeed.fsm")


@frozen
class TraceHeader:
    """The first line of a trace.

    Attributes:
        pages, page_size: of the device.
        slots: requests that may hold pages at once.
        chunk: tokens of one step, at most.
        overlap: steps launched beyond the one that is awaited.
        host_pages: of the second home of cached pages; with any, the spec is HostTier.
        draft_tokens: guesses of a request in a step, at most; with any, the spec is Draft.
        window: tokens that one sees, itself included; with one, the spec is Window. 0: all.
    """

    pages: int
    page_size: int
    slots: int
    chunk: int
    overlap: int
    host_pages: int = 0
    draft_tokens: int = 0
    window: int = 0
    spec: str = SPEC
    spec_version: str = SPEC_VERSION
    spec_hash: str = SPEC_HASH


@frozen
class TraceStep:
    """One line: a step of the spec.

    Attributes:
        request: its number, or None for a step of all.
        page: that was acquired, reserved, published or evicted, or of a copy.
        value: patience of a Submit, tokens of a Schedule, drafts of a Speculate, pages of an Admit,
            the token that a Complete accepted, or an Accept before it, the host page of a copy or
            of a HostDrop.
        to: the request's state after it; of a copy that ends, "good" or "bad".
        prompt, length, salt: of a Submit: its tokens, how many it may have in all, its tenant.
    """

    action: str
    request: int | None = None
    page: int | None = None
    value: int | None = None
    to: str | None = None
    prompt: tuple[int, ...] | None = None
    length: int | None = None
    salt: str | None = None


@frozen
class Rejected:
    """The first step that the spec does not allow.

    Attributes:
        line: of the file, from 1.
        why: the guard that does not hold, or what the step claims and the spec denies.
    """

    line: int
    step: TraceStep
    why: str

    def __str__(self) -> str:
        args = [
            str(v) for v in (self.step.request, self.step.page, self.step.value) if v is not None
        ]
        return f"line {self.line}: {self.step.action}({', '.join(args)}): {self.why}"


@final
class TraceWriter:
    """Writes a trace as it happens.

    Raises:
        OSError: the file cannot be written; here, or later.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self._submitted: dict[int, tuple[tuple[int, ...], int, str]] = {}
        path.write_text(json.dumps(asdict(header)) + "\n", encoding="utf-8")

    def submitted(self, request: int, prompt: Sequence[int], length: int, salt: str) -> None:
        """What a request is, before its Submit is written."""
        self._submitted[request] = (tuple(prompt), length, salt)

    def write(self, steps: Iterable[tuple[str, int, int, int, str]]) -> None:
        """Steps as the scheduler's `trace()` gives them."""
        rows = []
        for action, request, page, value, to in steps:
            row: dict[str, Any] = {"action": action}
            row |= {k: v for k, v in (("request", request), ("page", page)) if v >= 0}
            row |= {"value": value} if value >= 0 else {}
            row |= {"to": to} if to else {}
            if action == "Submit":
                prompt, length, salt = self._submitted.pop(request)
                row |= {"prompt": prompt, "length": length, "salt": salt}
            rows.append(json.dumps(row) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(rows)


@final
class _TracedScheduler(Scheduler):
    """A scheduler that writes down what it does; a full disk ends the trace, not the engine."""

    def __init__(self, path: str, **settings: Any) -> None:
        super().__init__(**settings)
        header = TraceHeader(
            settings["pages"], settings["page_size"], settings["slots"], settings["step_tokens"],
            settings.get("overlap", 0), settings.get("host_pages", 0),
            settings.get("draft_tokens", 0), settings.get("window", 0),
        )  # fmt: skip
        try:
            self._trace: TraceWriter | None = TraceWriter(Path(path), header)
        except OSError as error:
            raise ConfigError(
                "trace_lifecycle", path, f"a file that can be written: {error.strerror}"
            ) from error
        self.record(True)

    def submit(
        self,
        number: int,
        prompt: NDArray[np.int32],
        max_tokens: int,
        salt: str = "",
        *more: Any,
        **hints: Any,
    ) -> None:
        if self._trace is not None:
            self._trace.submitted(number, prompt.tolist(), len(prompt) + max_tokens, salt)
        super().submit(number, prompt, max_tokens, salt, *more, **hints)
        self._tell()

    def plan(self) -> Plan | None:
        found = super().plan()
        self._tell()
        return found

    def commit(
        self,
        step: int,
        token_ids: NDArray[np.int32],
        stop: NDArray[np.bool_],
        duration_us: int = 0,
        awaits_tool: NDArray[np.bool_] | None = None,
    ) -> Committed:
        found = super().commit(step, token_ids, stop, duration_us, awaits_tool)
        self._tell()
        return found

    def acknowledge(self, tickets: NDArray[np.int64], good: NDArray[np.bool_]) -> tuple[int, int]:
        found = super().acknowledge(tickets, good)
        self._tell()
        return found

    def abort(self, number: int) -> bool:
        found = super().abort(number)
        self._tell()
        return found

    def clear_cache(self) -> tuple[int, int]:
        found = super().clear_cache()
        self._tell()
        return found

    def _tell(self) -> None:
        steps = self.trace()
        self.events()  # kept beside the trace; nobody else asks for them here
        if self._trace is None:
            return
        try:
            self._trace.write(steps)
        except OSError as error:
            log.error("the lifecycle trace ends here: %s", error.strerror)
            self._trace = None
            self.record(False)


def traced(path: str, **settings: Any) -> Scheduler:
    """A scheduler that writes its trace.

    Raises:
        ConfigError: the file cannot be written.
    """
    return _TracedScheduler(path, **settings)


def read_trace(path: Path) -> tuple[TraceHeader, list[TraceStep]]:
    """Read a file.

    Raises:
        ConfigError: a line has another form (its number is named), or the trace is of another spec.
    """
    rows: list[Any] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                rows.append(cattrs.structure(row, TraceStep if rows else TraceHeader))
            except (ValueError, TypeError, RecursionError, cattrs.BaseValidationError) as error:
                shown = line[:80].decode(errors="replace")
                raise ConfigError(f"{path}:{number}", shown, "a step of a trace") from error
    if not rows:
        raise ConfigError("trace", str(path), "a header and steps; it is empty")
    header, *steps = rows
    if header.spec_hash != SPEC_HASH:
        raise ConfigError(
            "trace", f"{header.spec} {header.spec_version} ({header.spec_hash[:12]})",
            f"a trace of {SPEC} {SPEC_VERSION} ({SPEC_HASH[:12]}); check it with what wrote it",
        )  # fmt: skip
    return header, steps


def validate(specs: Path, header: TraceHeader, steps: Sequence[TraceStep]) -> Rejected | None:
    """Is the trace a behaviour of the spec? None, or the first step that is none."""
    judge = _Judge(specs, header, steps)
    for line, step in enumerate(steps, 2):
        why = judge.take(step)
        if why:
            return Rejected(line, step, why)
    return None


ARGUMENTS = {
    "Acquire": ("page",), "Evict": ("page",), "Schedule": ("value",), "HostDrop": ("value",),
    "StoreStart": ("page", "value"), "StoreEnd": ("page", "value", "to"),
    "LoadStart": ("value", "page"), "LoadEnd": ("value", "page", "to"),
    "Reserve": ("page",), "Speculate": ("value",),
}  # fmt: skip
"""What of a step are arguments of its action, in order, beside its request."""


LAYERS = (("Lifecycle", ""), ("HostTier", "Tier"), ("Draft", "Draft"))
"""The modules, each of which extends the one before it, and what their actions begin with."""


@final
class _Judge:
    """The interpreter at the bounds of one trace."""

    def __init__(self, specs: Path, header: TraceHeader, steps: Sequence[TraceStep]) -> None:
        self._rows: dict[str, str] = {}
        self._gained: Counter[str] = Counter()
        contents = _contents(steps)
        constants = {
            "Req": frozenset(contents),
            "Page": frozenset(range(header.pages)),
            "Token": frozenset(t for r in contents.values() for t in (r.salt, *r.content)),
            "Content": Function({r: found.content for r, found in contents.items()}),
            "PromptLen": Function({r: found.prompt for r, found in contents.items()}),
            "Salt": Function({r: found.salt for r, found in contents.items()}),
            "Patience": Function({r: found.patience for r, found in contents.items()}),
            "PageSize": header.page_size,
            "Chunk": header.chunk,
            "Slots": header.slots,
            "MaxInFlight": header.overlap + 1,
        }
        constants["Block"] = frozenset(range(header.host_pages))
        constants["Drafts"] = header.draft_tokens
        layers = 3 if header.draft_tokens else 2 if header.host_pages else 1
        module, self._layers = LAYERS[layers - 1][0], [name for _, name in LAYERS[:layers]]
        init = f"{self._layers[-1]}Init"
        self._instead = header.window > 0  # Window has other guards, the rest adds to Lifecycle's
        if header.window:
            module, self._layers, init = "Window", ["", "Sliding"], "Init"
            constants |= {"Window": header.window, "Hole": "Hole"}
        spec = specs / f"{module}.tla"
        self._evaluator = Evaluator(load_module(spec), constants)
        self._span = Span(spec, 1, 1)
        (self._state,) = self._evaluator.initial(init)

    def take(self, step: TraceStep) -> str:
        """Follow a step; why it cannot be, or nothing."""
        request = None if step.request is None else _name(step.request)
        if request is not None and step.action in ("Accept", "Complete"):
            self._rows[request] = step.to or ""
            self._gained[request] += step.value is not None
            return ""
        args: list[Value] = [] if request is None else [request]
        args += [{"page": step.page, "value": step.value, "to": step.to == "good"}[name]
                 for name in ARGUMENTS.get(step.action, ())]  # fmt: skip
        action = step.action
        if action == "Complete" and self._layers[-1] == "Draft":
            requests = self._value(self._state, "known").items
            action, args = "CompleteAs", [Function({r: self._gained[r] for r in requests})]
        found = list(self._successors(action, args))
        if not found:
            return self._refusal(action, args)
        told = [after for after in found if self._says(step, request, after)]
        if step.action == "Complete":
            self._rows, self._gained = {}, Counter()
        if not told:
            return "the spec allows it, with another outcome than the trace tells"
        self._state = told[0]
        return ""

    def _successors(self, action: str, args: list[Value]) -> Iterable[State]:
        bound = {f"a{i}": value for i, value in enumerate(args)}
        names = tuple(Expr("name", (name,), self._span) for name in bound)
        there = [n for n in self._names(action) if n in self._evaluator.definitions]
        name = there[-1] if there else action
        call = Expr("call" if names else "name", (name, *names), self._span)
        return self._evaluator.steps(call, bound)(self._state)

    def _says(self, step: TraceStep, request: str | None, after: State) -> bool:
        """Is this the outcome that the trace tells?"""
        state = self._value(after, "st").items
        if step.action == "Complete":
            before, known = (self._value(s, "known").items for s in (self._state, after))
            gained = {r: known[r] - before[r] for r in self._rows}
            return all(state[r] == to for r, to in self._rows.items()) and all(
                gained[r] == self._gained[r] for r in self._rows
            )
        if request is not None and step.to is not None and state[request] != step.to:
            return False
        if step.action == "Admit":
            return len(self._value(after, "tab").items[request]) == step.value
        if step.action == "Publish":
            pages = (self._value(state, "page").items for state in (self._state, after))
            return len({page[step.page] for page in pages}) == 2
        return True

    def _names(self, action: str) -> Iterable[str]:
        """Of an action, as Lifecycle has it, and as each module that extends it."""
        return (f"{layer}{action}" for layer in self._layers)

    def _value(self, state: State, name: str) -> Any:
        return state[self._evaluator.variables.index(name)]

    def _refusal(self, action: str, args: list[Value]) -> str:
        """The first guard of an action that does not hold."""
        definitions = self._evaluator.definitions
        if not {*self._names(action)} & definitions.keys():
            return f"the spec has no action {action}"
        names = [name for name in self._names(action) if name in definitions]
        for name in names[-1:] if self._instead else names:
            if why := self._failing(definitions[name], args):
                return why
        return "its conjuncts exclude each other"

    def _failing(self, definition: Definition, args: list[Value]) -> str:
        bound = dict(zip(definition.params, args, strict=True))
        for conjunct in definition.body.exprs():
            if not any(True for _ in self._evaluator.steps(conjunct, bound)(self._state)):
                line = conjunct.span.line
                text = definition.span.path.read_text(encoding="utf-8").splitlines()[line - 1]
                return f"{text.strip()} does not hold ({definition.span.path.name}:{line})"
        return ""


def _name(request: int) -> str:
    return f"r{request}"


@frozen
class _Content:
    """A request: its tokens, as far as the trace knows them, and how many of them are prompt."""

    content: tuple[str, ...]
    prompt: int
    salt: str
    patience: int


def _contents(steps: Sequence[TraceStep]) -> dict[str, _Content]:
    tokens: dict[str, list[str]] = {}
    submitted: dict[str, TraceStep] = {}
    for step in steps:
        if step.request is None:
            continue
        name = _name(step.request)
        if step.action == "Submit":
            submitted[name] = step
            tokens[name] = [str(token) for token in step.prompt or ()]
        elif step.action in ("Accept", "Complete") and step.value is not None and name in tokens:
            tokens[name].append(str(step.value))
    found = {}
    for name, step in submitted.items():
        unknown = (step.length or 0) - len(tokens[name])
        content = (*tokens[name], *(f"{name}?" for _ in range(unknown)))
        found[name] = _Content(
            content, len(step.prompt or ()), f"salt {step.salt}", step.value or 0
        )
    return found
