"""Rung six for the C++: known bugs put into the control plane, and each guard's answer taken away.

A mutant counts as caught by the compiler, by a checked build, or by driving it through every state
of a small model; `cpp/tests/mutants.json` says by which, and why it is there is its exhibit's row.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pybind11
import pytest

from compiling import HEADERS, ROOT, needs
from tokenspeed.fsm.generated import GUARDS
from tokenspeed.fsm.museum import read_museum

SOURCES = ROOT / "cpp" / "src"
SPECS = ROOT / "specs"
ROWS: dict[str, Any] = json.loads((ROOT / "cpp" / "tests" / "mutants.json").read_text())
WORLD = sorted({guard for guards in GUARDS.values() for guard in guards})

# Models in which the answer matters, where tiny is too small for that.
TELLING = {"SlotFree": "oneslot.cfg"}
# The shortest way to where `NoneEvictable` matters; its model is too large to go through here.
TO_A_CACHED_PAGE = """
Submit r1,Submit r2,Submit r3,Admit r1,Acquire r1 p1,Admit r2,Acquire r2 p2,Schedule r1 1,Launch,
Complete,Publish r1,Release r1,Admit r3,Preempt r3
"""

pytestmark = [needs("g++"), pytest.mark.xdist_group("workshop")]

# Drives the extension that it is given instead of the installed one.
DRIVE = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("tokenspeed._core", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["tokenspeed._core"] = module
spec.loader.exec_module(module)
from tokenspeed.fsm.conform import conform
from tokenspeed.fsm.mirror import Action
from tokenspeed.fsm.model import load_model
from tokenspeed.fsm.runtime import Runtime, Tried
model, config, way = sys.argv[2:]
if way:
    runtime = Runtime(load_model(Path(model), Path(config)).evaluator)
    for words in way.replace("\\n", "").split(","):
        name, *args = (int(word) if word.isdigit() else word for word in words.split())
        if not runtime.take(Tried(Action(name, tuple(args)), frozenset({"r1"}))):
            print("refuses", words)
            break
    else:
        print("takes all")
else:
    print(conform(Path(model), Path(config)).divergence or "conforms")
"""


def of_config(config: str) -> str:
    """The module that a configuration is of."""
    modules = {"draft": "MCDraft.tla", "window": "MCWindow.tla", "host": "MCHostTier.tla"}
    named = (module for word, module in modules.items() if word in config)
    return next(named, "MCLifecycle.tla")


class Refused(Exception):
    """What the compiler said of a mutant that it does not take."""


class Workshop:
    """The control plane as objects, with asserts; one may be replaced.

    Optimised as far as it compiles no slower for that: it is driven in a third of the time.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.objects = {
            source.name: self.compile(source.read_text(encoding="utf-8"), source.name)
            for source in sorted(SOURCES.glob("*.cpp"))
        }

    def compile(self, text: str, name: str) -> Path:
        """The object of a source text."""
        source = self.scratch / name
        source.write_text(text, encoding="utf-8")
        out = self.scratch / f"{name}.{len(list(self.scratch.glob('*.o')))}.o"
        includes = [HEADERS, SOURCES, pybind11.get_include(), sysconfig.get_path("include")]
        flags = [
            "-std=c++20",
            "-Og",
            "-D_GLIBCXX_ASSERTIONS",
            "-fPIC",
            "-fvisibility=hidden",
            *(f"-I{path}" for path in includes),
        ]
        command = ["g++", *flags, "-c", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Refused(done.stderr)
        return out

    def drive(
        self,
        replaced: dict[str, Path],
        config: str,
        constants: dict[str, int] | None = None,
        way: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Link; then go through every state of a model, or one way, in a process of its own.

        Args:
            replaced: objects instead of those of the same names.
            config: of specs/.
            constants: of the model, that are others than it says there.
            way: actions, one after the other.
        """
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = self.scratch / f"module{len(list(self.scratch.glob('module*')))}"
        folder.mkdir()
        module = folder / f"_core{suffix}"
        objects = self.objects | replaced
        subprocess.run(
            ["g++", "-shared", *map(str, objects.values()), "-o", str(module)], check=True
        )
        return subprocess.run(
            [sys.executable, "-c", DRIVE, module, SPECS / of_config(config),
             self.model(config, constants or {}), way],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def model(self, config: str, constants: dict[str, int]) -> Path:
        """A configuration of specs/ with other constants."""
        text = (SPECS / config).read_text(encoding="utf-8")
        for name, value in constants.items():
            text, found = re.subn(rf"\b{name} = \d+", f"{name} = {value}", text)
            assert found == 1, f"{name} stands {found} times in {config}"
        made = self.scratch / config
        made.write_text(text, encoding="utf-8")
        return made

    def mutant(self, edits: list[list[str]]) -> dict[str, Path]:
        """The objects that edits replace; each text to find stands once.

        Raises:
            Refused: the compiler does not take them.
        """
        texts: dict[str, str] = {}
        for name, find, replace in edits:
            text = texts.get(name) or (SOURCES / name).read_text(encoding="utf-8")
            assert text.count(find) == 1, f"{find!r} stands {text.count(find)} times in {name}"
            texts[name] = text.replace(find, replace)
        return {name: self.compile(text, name) for name, text in texts.items()}

    def caught(
        self, edits: list[list[str]], config: str, constants: dict[str, int] | None = None
    ) -> tuple[str, str]:
        """By what a mutant is caught (`nothing` if by nothing), and what was said."""
        try:
            replaced = self.mutant(edits)
        except Refused as error:
            return "compiler", str(error)
        driven = self.drive(replaced, config, constants)
        if driven.returncode < 0:
            return "checked build", driven.stderr
        assert driven.returncode == 0, driven.stderr
        said = driven.stdout.strip()
        return ("nothing" if said == "conforms" else "runtime"), said


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def test_as_it_stands_it_conforms(workshop: Workshop) -> None:
    driven = workshop.drive({}, "tiny.cfg")
    assert driven.stdout.strip() == "conforms", driven.stderr


def test_every_exhibit_has_a_mutant_or_a_reason() -> None:
    mutants = {row["exhibit"] for row in ROWS["mutants"] if "story" not in row}
    specs = ("Lifecycle.tla", "HostTier.tla")
    runtime = {e.id for e in read_museum(SPECS).exhibits if e.spec in specs}
    assert runtime <= mutants | ROWS["without"].keys()
    assert not mutants & ROWS["without"].keys()


MUTANTS = [
    pytest.param(row, id=row["exhibit"], marks=[pytest.mark.slow] if row.get("slow") else [])
    for row in ROWS["mutants"]
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught_as_its_row_says(workshop: Workshop, mutant: dict[str, Any]) -> None:
    config, constants = mutant.get("config", "tiny.cfg"), mutant.get("constants")
    by, said = workshop.caught(mutant["edits"], config, constants)
    assert by == mutant["caught"], said
    assert mutant["said"] in said


# NoneEvictable has a test of its own; Fits, NoneLacks and Pinned are rows above.
OTHERS = sorted({*WORLD} - {"NoneEvictable", "Fits(r)", "NoneLacks", "~Pinned(r)"})


@pytest.mark.parametrize("guard", OTHERS)
def test_a_guard_that_always_says_yes_is_missed(workshop: Workshop, guard: str) -> None:
    name = guard.removeprefix("~").removesuffix("(r)")
    by, said = workshop.caught([saying_yes(guard)], TELLING.get(name, "tiny.cfg"))
    assert by in ("runtime", "checked build"), said
    if by == "runtime":  # by the action that has this guard, or by the count that it is for
        (action,) = (name for name, guards in GUARDS.items() if guard in guards)
        assert f": {action}" in said or "requests that lack a page is off" in said


def saying_yes(guard: str) -> list[str]:
    """The edit that makes a guard's answer the one that permits."""
    name = guard.removeprefix("~").removesuffix("(r)")
    text = (SOURCES / "control_guards.cpp").read_text(encoding="utf-8")
    head = re.search(rf"bool Control::{name}\(.*\) const noexcept {{\n", text)
    assert head is not None, name
    yes = "false" if guard.startswith("~") else "true"
    return ["control_guards.cpp", head[0], f"{head[0]}  return {yes};\n"]


def test_a_cached_page_goes_before_a_request_does(workshop: Workshop) -> None:
    as_it_is = workshop.drive({}, "evict.cfg", way=TO_A_CACHED_PAGE)
    assert as_it_is.stdout == "refuses Preempt r3\n", as_it_is.stderr
    mutant = workshop.mutant([saying_yes("NoneEvictable")])
    without = workshop.drive(mutant, "evict.cfg", way=TO_A_CACHED_PAGE)
    assert without.stdout == "takes all\n", without.stderr
