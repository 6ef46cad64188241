"""The architecture and the house style, read from the source: a rule worth having is a test.

Rule: tables first, one function a rule, and a failure says `path:line: rule; what to do instead`.
Each rule is also shown a text that breaks it, so that none can pass by looking at nothing.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mypy_extensions
import pytest

from tokenspeed.cli import cli

ROOT = Path(__file__).resolve().parents[1]

# --- The tables -----------------------------------------------------------------------------------

LEAVES = {"bounds", "config", "errors", "plan", "request", "stats"}

# room -> the rooms it may import, beside itself. `leaves` are the modules above.
MAY_IMPORT = {
    "leaves": set(),
    "_core": set(),
    "fsm": {"leaves", "_core"},
    "kernels": {"leaves"},
    "spmd": {"leaves", "kernels"},
    "models": {"leaves", "spmd", "kernels"},
    "text": {"leaves"},
    "stream": {"leaves"},
    "sequence": {"leaves", "stream", "text"},
    "ranks": {"leaves", "kernels", "spmd", "models"},
    "loop": {"leaves", "_core", "fsm", "spmd", "ranks", "text", "stream", "sequence"},
    "engine": {"leaves", "fsm", "models", "ranks", "text", "stream", "loop"},
    "serve": {"leaves", "engine", "stream", "text"},
    "tokenspeed": {"leaves", "engine"},
    "__main__": {"cli"},
}
MAY_IMPORT_ANYTHING = {"bench", "cli"}

# room -> packages that it must not need, not even by way of another room.
NEVER = {"leaves": {"torch"}, "fsm": {"torch"}, "text": {"torch"}}

# Imported where they are used, because they may be absent.
OPTIONAL = {"hypothesis", "transformers", "triton"}

# Modules that are started rather than imported.
ENTRY_POINTS = {"tokenspeed", "tokenspeed.__main__"}

# Declared requirements whose import has another name, or which are never imported.
IMPORT_NAMES = {
    "prometheus-client": "prometheus_client",
    "tree-sitter": "tree_sitter",
    "tree-sitter-tlaplus": "tree_sitter_tlaplus",
}

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
NO_ROOMS = {"common", "helper", "helpers", "misc", "util", "utils"}
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_FLAGS = {"allow_pickle", "trust_remote_code"}
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work)/\w")


# --- What the rules read --------------------------------------------------------------------------


class Source(NamedTuple):
    """One Python file: its dotted name (`tokenspeed.fsm`), its path from the root, its tree."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


class Import(NamedTuple):
    """One imported module, in full (`tokenspeed.fsm.model`), and the names taken from it."""

    module: str
    names: tuple[ast.alias, ...]
    line: int


@cache
def tracked() -> tuple[str, ...]:
    """The files that git has or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for path in sorted(set(listed.splitlines())) if (ROOT / path).is_file())


@cache
def generated() -> frozenset[str]:
    marks = (ROOT / ".gitattributes").read_text().splitlines()
    return frozenset(line.split()[0] for line in marks if "linguist-generated" in line)


def source(path: str, text: str) -> Source:
    parts = Path(path).with_suffix("").parts
    name = ".".join(parts[1:] if parts[0] == "src" else parts).removesuffix(".__init__")
    return Source(name, path, text, ast.parse(text, path))


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    return tuple(
        source(path, (ROOT / path).read_text(encoding="utf-8"))
        for path in tracked()
        if path.endswith(".py") and path.startswith(folders)
    )


def imports(tree: ast.AST) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.module or "", tuple(node.names), node.lineno)


def targets(found: Import, modules: set[str]) -> set[str]:
    """The modules that an import reaches: `from a import b` reaches a.b if that is a module."""
    inner = {f"{found.module}.{alias.name}" for alias in found.names}
    reached = {name for name in inner if name in modules}
    return reached if inner and reached == inner else reached | {found.module}


def room(module: str) -> str:
    """`tokenspeed.spmd.kv` -> `spmd`; the package itself is `tokenspeed`."""
    parts = module.split(".")
    first = parts[1] if len(parts) > 1 else parts[0]
    return "leaves" if first in LEAVES else first


@cache
def project_modules() -> frozenset[str]:
    return frozenset(s.name for s in sources("src/")) | {"tokenspeed._core"}


Rule = Callable[[Source], Iterator[tuple[int, str]]]


def refuse(found: Iterable[str]) -> None:
    """Fail with the lines found, if any; they name the place, so no traceback does."""
    lines = list(found)
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def violations(rule: Rule, among: Iterable[Source]) -> list[str]:
    return [f"{s.path}:{line}: {text}" for s in among for line, text in rule(s)]


# --- The rules: each yields (line, "rule; what to do instead") ------------------------------------


def arrows(s: Source) -> Iterator[tuple[int, str]]:
    """Imports between rooms follow MAY_IMPORT."""
    here = room(s.name)
    if here in MAY_IMPORT_ANYTHING:
        return
    if here not in MAY_IMPORT:
        yield (
            1,
            f"room {here!r} has no row in MAY_IMPORT; add it to ARCHITECTURE.md and to the table",
        )
        return
    for found in imports(s.tree):
        if found.module.split(".")[0] != "tokenspeed":
            continue
        for target in targets(found, set(project_modules())):
            there = room(target)
            if there not in {here} | MAY_IMPORT[here]:
                allowed = ", ".join(sorted(MAY_IMPORT[here])) or "nothing of ours"
                yield (
                    found.line,
                    f"{here} imports {there}; it may import {allowed}: pass the value in",
                )


def no_forbidden_packages(s: Source) -> Iterator[tuple[int, str]]:
    """Rooms keep clear of the packages in NEVER."""
    for found in imports(s.tree):
        package = found.module.split(".")[0]
        if package in NEVER.get(room(s.name), ()):
            yield (
                found.line,
                f"{room(s.name)} imports {package}; it must work without: move the code",
            )


def imports_at_the_top(s: Source) -> Iterator[tuple[int, str]]:
    """An import inside a function is an optional package; nothing is imported by a string."""
    for function in (
        n for n in ast.walk(s.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ):
        for found in imports(function):
            if found.module.split(".")[0] not in OPTIONAL:
                yield found.line, f"{found.module} is imported in a function; import it at the top"
    for call in (n for n in ast.walk(s.tree) if isinstance(n, ast.Call)):
        named = [
            a for a in call.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        by_string = ast.unparse(call.func) in {
            "importlib.import_module",
            "import_module",
            "__import__",
        }
        # The package itself is lazy about Engine (PEP 562).
        if (
            by_string
            and named
            and str(named[0].value).startswith("tokenspeed")
            and s.name != "tokenspeed"
        ):
            yield call.lineno, "a module of ours is imported by a string; import it at the top"


def full_names(s: Source) -> Iterator[tuple[int, str]]:
    """No relative imports."""
    for node in ast.walk(s.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative import; write the full name, so that a search finds it"


def short_functions(s: Source) -> Iterator[tuple[int, str]]:
    for node in ast.walk(s.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield (
                    node.lineno,
                    f"{node.name} has {lines} lines of {FUNCTION_LINES_MAX}; name its parts",
                )


def opens_with_its_rule(s: Source) -> Iterator[tuple[int, str]]:
    if not ast.get_docstring(s.tree):
        yield 1, "no module docstring; say in the first lines what the file holds and its rule"


def no_swallowed_exceptions(s: Source) -> Iterator[tuple[int, str]]:
    """A handler for everything raises again, logs with the traceback, or uses what it caught."""
    broad = {"Exception", "BaseException"}
    for node in ast.walk(s.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = (
                {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if node.type
                else broad
            )
            body = [n for statement in node.body for n in ast.walk(statement)]
            used = any(isinstance(n, ast.Name) and n.id == node.name for n in body if node.name)
            logged = any(isinstance(n, ast.Attribute) and n.attr == "exception" for n in body)
            if caught & broad and not (
                used or logged or any(isinstance(n, ast.Raise) for n in body)
            ):
                yield (
                    node.lineno,
                    "every exception is swallowed here; name the one expected, or raise",
                )
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("suppress")
            and broad & {ast.unparse(argument) for argument in node.args}
        ):
            yield node.lineno, "suppress() of every exception; name the one that is expected"


def nothing_unpickled(s: Source) -> Iterator[tuple[int, str]]:
    for found in imports(s.tree):
        if found.module.split(".")[0] in UNSAFE_MODULES:
            yield found.line, f"{found.module} runs code from data; use msgspec or safetensors"
    for node in ast.walk(s.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield node.lineno, "torch.load unpickles; use safetensors"
        elif (
            isinstance(node, ast.keyword)
            and node.arg in UNSAFE_FLAGS
            and ast.unparse(node.value) != "False"
        ):
            yield node.lineno, f"{node.arg} runs code from data; leave it False"


def exact_exports(s: Source) -> Iterator[tuple[int, str]]:
    """A package exports what it defines and gathers, but for what it uses itself, and says so."""
    if not s.is_package:
        return
    bound, quiet, exports, line = set(), set(), set(), 1
    for node in ast.walk(s.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenspeed"):
            bound |= {alias.asname or alias.name for alias in node.names}
            quiet |= {alias.name for alias in node.names if alias.asname != alias.name}
    quiet -= {node.id for node in ast.walk(s.tree) if isinstance(node, ast.Name)}
    for node in s.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
            quiet.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exports, line = set(ast.literal_eval(node.value)), node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            bound.add(ast.unparse(target))
    for name in sorted(name for name in quiet - exports if name[0] != "_"):
        yield line, f"{name} is not exported; add it to __all__, or do not bring it here"
    for name in sorted(exports - bound):
        yield line, f"__all__ has {name}, which is not here; remove it"


def one_profile(s: Source) -> Iterator[tuple[int, str]]:
    """A profile of Hypothesis holds for the whole process: a file's own would change all others."""
    for node in ast.walk(s.tree):
        loads = isinstance(node, ast.Attribute) and node.attr == "load_profile"
        if loads and s.path != "tests/conftest.py":
            yield node.lineno, "load_profile is for conftest.py; put @settings on the test"


PYTHON_RULES: dict[Rule, tuple[str, str]] = {
    # rule -> (which files, a text that breaks it)
    arrows: ("src/", "from tokenspeed.fsm import check"),
    no_forbidden_packages: ("src/", "import torch.nn"),
    imports_at_the_top: ("src/", "def f():\n    from tokenspeed.plan import StepPlan"),
    full_names: ("", "from . import plan"),
    short_functions: ("", "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX),
    opens_with_its_rule: ("", "x = 1"),
    no_swallowed_exceptions: ("", "try:\n    f()\nexcept Exception:\n    x = 1"),
    nothing_unpickled: ("src/", "import torch\ntorch.load('x')"),
    exact_exports: ("src/", "from tokenspeed.plan import StepPlan"),
    one_profile: ("", "settings.load_profile('few')"),
}
BREAKS_IN: dict[Rule, str] = {
    no_forbidden_packages: "src/tokenspeed/fsm/x.py",
    exact_exports: "src/tokenspeed/spmd/__init__.py",
}


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_files_keep_the_rule(rule: Rule) -> None:
    folder, _ = PYTHON_RULES[rule]
    among = [s for s in sources("src/", "tests/") if s.path.startswith(folder)]
    found = violations(rule, (s for s in among if s.path not in generated()))
    refuse(found)


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_the_rule_sees_a_breach(rule: Rule) -> None:
    path = BREAKS_IN.get(rule, "src/tokenspeed/kernels/x.py")
    assert violations(rule, [source(path, PYTHON_RULES[rule][1])])


# --- Rules over many files ------------------------------------------------------------------------


def unused(among: Iterable[Source], modules: set[str]) -> set[str]:
    """The modules that no other file imports."""
    used: set[str] = set()
    for s in among:
        for found in imports(s.tree):
            used |= targets(found, modules) - {s.name}
    # Importing a.b.c runs the packages a and a.b too.
    used |= {".".join(name.split(".")[:i]) for name in used for i in range(1, name.count(".") + 1)}
    return modules - used - ENTRY_POINTS


def test_every_file_is_imported_by_something() -> None:
    modules = {s.name for s in sources("src/")}
    found = unused(sources("src/", "tests/"), modules)
    text = "imported by nothing; delete it, or import it where it belongs"
    refuse(f"{s.path}:1: {text}" for s in sources("src/") if s.name in found)


def test_an_unused_file_is_seen() -> None:
    used = source("src/tokenspeed/a.py", "import tokenspeed.b")
    assert unused([used], {"tokenspeed.a", "tokenspeed.b"}) == {"tokenspeed.a"}


def test_files_are_short_and_rooms_have_names() -> None:
    found = []
    for path in tracked():
        if not path.startswith(("src/", "cpp/", "tests/", "specs/")):
            continue
        vague = NO_ROOMS & set(Path(path).with_suffix("").parts)
        if vague:
            found.append(f"{path}:1: a room called {vague.pop()}; name it after what it holds")
        if path.endswith((".py", ".cpp", ".hpp")) and path not in generated():
            lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
            if lines > FILE_LINES_MAX:
                found.append(
                    f"{path}:{lines}: {lines} lines of {FILE_LINES_MAX}; split it by what it holds"
                )
    refuse(found)


AT_THE_TOP = {
    ".clang-format", ".editorconfig", ".gitattributes", ".gitignore", "CHANGELOG.md",
    "CMakeLists.txt", "LICENSE", "Makefile", "README.md", "SECURITY.md", "constraints.txt",
    "pyproject.toml",
}  # fmt: skip


def test_nothing_is_left_lying_about() -> None:
    """What somebody wrote to look at once, say, and took along."""
    found = [
        f"{path}:1: nothing like that belongs at the top; put it into a room, or remove it"
        for path in tracked()
        if "/" not in path and path not in AT_THE_TOP
    ]
    found += [
        f"{path}:1: {size:,} bytes; nobody writes so much into a file"
        for path in tracked()
        if (size := (ROOT / path).stat().st_size) > 200_000
    ]
    refuse(found)


def test_headers_open_with_their_rule() -> None:
    found = [
        f"{path}:1: no comment in the first line; say what the file holds and its rule"
        for path in tracked()
        if path.startswith("cpp/include/") and not (ROOT / path).read_text().startswith("//")
    ]
    refuse(found)


def machine_paths(path: str, text: str) -> list[str]:
    return [
        f"{path}:{number}: a path of one machine; make it relative to the file, or an argument"
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]


def test_no_file_knows_this_machine() -> None:
    found = []
    for path in tracked():
        content = (ROOT / path).read_bytes()
        if b"\0" not in content:
            found += machine_paths(path, content.decode("utf-8"))
    refuse(found)
    assert machine_paths("x", "see /" + "home/me/x"), "the pattern finds nothing"


# --- What the documents and the build say ---------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> set[str]:
    """What `tokenspeed` offers."""
    return set(cli.commands)


def test_the_readme_names_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"\bmake ([a-z-]+)(?=[\s`])", text))
    offered = set(re.findall(r"`tokenspeed ([a-z]+)", text))
    assert asked >= {"serve", "test"}
    assert not asked - make_targets(), "README.md:1: these make targets are not in the Makefile"
    assert offered
    assert not offered - commands(), "README.md:1: these commands are not in cli.py"


def test_links_between_documents_lead_somewhere() -> None:
    found = []
    for path in (path for path in tracked() if path.endswith(".md")):
        text = (ROOT / path).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
            if not (ROOT / path).parent.joinpath(link).exists():
                found.append(f"{path}:1: the link {link} leads nowhere; mend or remove it")
    refuse(found)


@cache
def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names_of(requirements: object) -> set[str]:
    assert isinstance(requirements, list)
    return {re.split(r"[<>=!~;\[ ]", text)[0].lower().replace("_", "-") for text in requirements}


def declared() -> dict[str, set[str]]:
    table = project()["project"]
    extras = table["optional-dependencies"]
    assert isinstance(extras, dict)
    return {"": names_of(table["dependencies"])} | {name: names_of(extras[name]) for name in extras}


def imported_packages() -> set[str]:
    return {found.module.split(".")[0] for s in sources("src/") for found in imports(s.tree)}


def test_a_failing_example_can_be_written_down() -> None:
    """Hypothesis imports what calls this; a warning that is an error would hide the example."""
    assert mypy_extensions.TypedDict("Example", {"n": int})


def test_each_requirement_is_imported() -> None:
    wanted = {IMPORT_NAMES.get(name, name.replace("-", "_")): name for name in declared()[""]}
    idle = {wanted[name] for name in set(wanted) - imported_packages()}
    assert not idle, (
        f"pyproject.toml:1: required but imported by nothing: {sorted(idle)}; remove them"
    )


def test_each_import_is_required() -> None:
    available = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared()[""]}
    ours = {"tokenspeed", "__future__"} | OPTIONAL
    foreign = imported_packages() - sys.stdlib_module_names - available - ours
    assert not foreign, f"pyproject.toml:1: imported but not required: {sorted(foreign)}; add them"


def test_each_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), (
        "constraints.txt:1: pins only"
    )
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    unpinned = set().union(*declared().values()) - pinned
    # triton comes with torch's GPU builds, in the version that they name.
    assert unpinned <= {"triton"}, f"constraints.txt:1: not pinned: {sorted(unpinned)}; add them"
