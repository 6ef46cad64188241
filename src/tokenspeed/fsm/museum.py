"""The bug museum: known bugs put back into the specification, each to be found by its property.

Rule: an exhibit is an edit of the spec; it counts as found only if the property that its row names
is violated. Guards are deleted one by one besides, and one that nobody misses must have a reason:
in one program a model, where a variable `off` that nothing changes names the guard that says yes.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs
import cattrs
from attrs import field, frozen

from tokenspeed.errors import ConfigError
from tokenspeed.fsm.check import ENDED_EARLY, Report, Settings, check
from tokenspeed.fsm.model import load_module
from tokenspeed.fsm.syntax import Definition, Expr
from tokenspeed.fsm.temporal import is_temporal

__all__ = [
    "Exhibit",
    "Guard",
    "Judged",
    "Museum",
    "guards",
    "read_museum",
    "try_exhibit",
    "try_guard",
]

Progress = Callable[[dict[str, int]], None]


@frozen
class Exhibit:
    """A known bug.

    Attributes:
        property: by which the checker must find it.
        edits: (find, replace) in the spec; each text to find occurs once.
        bugs: public reports of the class.
        cpp: what keeps it out of the C++, where types or checked builds do.
        liveness, step: what kind of property it is; an invariant otherwise.
    """

    id: str
    property: str
    config: str
    edits: tuple[tuple[str, str], ...]
    story: str
    bugs: tuple[str, ...]
    cpp: str | None = None
    liveness: bool = False
    step: bool = False
    spec: str = "Lifecycle.tla"
    model: str = "MCLifecycle.tla"


@frozen
class Judged:
    """A specification whose guards are deleted one by one.

    Attributes:
        models: (module, configuration) that each deletion is tried against, in this order.
        survivors: the guards that may be deleted unnoticed, with the reason for each.
    """

    models: tuple[tuple[str, str], ...]
    survivors: Mapping[str, str] = field(factory=dict)


@frozen
class Museum:
    """All exhibits, and the specifications whose guards are deleted, by file."""

    exhibits: tuple[Exhibit, ...]
    guards: Mapping[str, Judged]


@frozen
class Guard:
    """A conjunct of an action that only tests.

    Attributes:
        action: where it stands.
        text: as written, on one line.
        lies: where in the file, in bytes.
    """

    action: str
    text: str
    lies: slice

    @property
    def name(self) -> str:
        """`Action: text`."""
        return f"{self.action}: {self.text}"


def read_museum(specs: Path) -> Museum:
    """The museum of a directory of specs.

    Raises:
        ConfigError: the file does not have the form above.
    """
    path = specs / "museum" / "museum.json"
    try:
        return cattrs.structure(json.loads(path.read_text(encoding="utf-8")), Museum)
    except (KeyError, ValueError, cattrs.BaseValidationError) as error:
        raise ConfigError(str(path), error, "exhibits and survivors, as in museum.py") from error


def try_exhibit(specs: Path, exhibit: Exhibit, settings: Settings, progress: Progress) -> Report:
    """Put the bug back and check the one property.

    Raises:
        ConfigError: a text to replace does not occur exactly once.
    """
    text = (specs / exhibit.spec).read_text(encoding="utf-8")
    for find, replace in exhibit.edits:
        if text.count(find) != 1:
            raise ConfigError(exhibit.id, find, f"a text that {exhibit.spec} has exactly once")
        text = text.replace(find, replace)
    keyword = "PROPERTY" if exhibit.liveness or exhibit.step else "INVARIANT"
    config = _asking(
        (specs / exhibit.config).read_text(encoding="utf-8"), keyword, exhibit.property
    )
    with _changed(specs, exhibit.spec, text) as copy:
        (copy / "exhibit.cfg").write_text(config, encoding="utf-8")
        return check(copy / exhibit.model, copy / "exhibit.cfg", settings, progress)


def guards(spec: Path) -> list[Guard]:
    """Every conjunct of an action of this file that speaks only of the state before."""
    module = load_module(spec)
    definitions = {d.name: d for d in module.definitions}
    source = spec.read_bytes()
    out = []
    for definition in module.definitions:
        body = definition.body
        if not _assigns(body, definitions) or is_temporal(body, definitions):
            continue
        for conjunct in _conjuncts(body):
            if conjunct.span.path == spec and not _assigns(conjunct, definitions):
                lies = conjunct.span.lies
                text = " ".join(source[lies].decode().split())
                out.append(Guard(definition.name, text, lies))
    return out


def _conjuncts(expr: Expr) -> Iterator[Expr]:
    """The conjuncts of an action, also those under LET and \\E."""
    if expr.op == "and":
        for part in expr.exprs():
            yield from _conjuncts(part)
    elif expr.op in ("let", "exists"):
        yield from _conjuncts(expr.expr(-1))
    else:
        yield expr


def try_guard(
    specs: Path, museum: Museum, spec: str, guard: Guard, settings: Settings, progress: Progress
) -> Report | None:
    """Let a guard say yes and check the models of its spec until one fails; None if all hold.

    Raises:
        ConfigError: a check did not come to its end, which says nothing of the guard.
    """
    there = guards(specs / spec)
    alone = attrs.evolve(settings, initial=there.index(guard))
    with _changed(specs, spec, _switched(specs / spec, there)) as copy:
        for path in copy.glob("*.tla"):
            path.write_text(_carrying(path.read_text(encoding="utf-8"), len(there)))
        for module, config in museum.guards[spec].models:
            report = check(copy / module, copy / config, alone, progress)
            if report.result == "error" and report.violated in ENDED_EARLY:
                raise ConfigError(
                    guard.name, report.violated,
                    f"all states of {config}; raise --memory-mb or --states-max",
                )  # fmt: skip
            if report.result != "ok":
                return report
    return None


def _switched(spec: Path, there: list[Guard]) -> str:
    """A spec in which each guard says yes where `off` is its number."""
    source = spec.read_bytes()
    for number, guard in reversed([*enumerate(there)]):
        before = f'(off = "{number:03}" \\/ ('.encode()
        text = source[guard.lies].replace(b"\n", b"\n" + b" " * len(before))  # lists stay aligned
        source = source[: guard.lies.start] + before + text + b"))" + source[guard.lies.stop :]
    return source.decode()


def _carrying(text: str, guards: int) -> str:
    """A module in which no action changes `off`; the root has it, in `guards` initial states."""
    text = re.sub(r"UNCHANGED (\w+)", r"UNCHANGED <<\1>>", text)
    text = text.replace("UNCHANGED <<", "UNCHANGED <<off, ")
    if "\nInit ==\n" not in text:
        return text
    numbers = ", ".join(f'"{number:03}"' for number in range(guards))
    text = text.replace("\nVARIABLES\n", "\nVARIABLE off\nVARIABLES\n")
    return text.replace("\nInit ==\n", f"\nInit ==\n  /\\ off \\in {{{numbers}}}\n")


def _asking(config: str, keyword: str, name: str) -> str:
    """A configuration that asks for one property only."""
    kept = re.sub(r"(?m)^(INVARIANTS?|PROPERT(Y|IES))\b(.*\n)( .*\n)*", "", config)
    return f"{kept}\n{keyword} {name}\n"


@contextmanager
def _changed(specs: Path, name: str, text: str) -> Iterator[Path]:
    """A copy of the specs in which one file is different."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "specs"
        shutil.copytree(specs, copy)
        (copy / name).write_text(text, encoding="utf-8")
        yield copy


def _assigns(expr: Expr, definitions: Mapping[str, Definition]) -> bool:
    """Does it speak of the successor, itself or through an operator?"""
    if expr.op in ("prime", "unchanged"):
        return True
    name = str(expr.args[0]) if expr.op in ("name", "call") else ""
    if name in definitions and _assigns(definitions[name].body, definitions):
        return True
    parts = (a.body if isinstance(a, Definition) else a for a in expr.args)
    return any(_assigns(part, definitions) for part in parts if isinstance(part, Expr))
