"""The lifecycle in somebody else's program: each example is built by its route, run, and read.

Rule: an embedder's compiler is as strict as ours, with neither exceptions nor RTTI, and what is
installed is moved before it is used: no path of this checkout may be in it.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compiling import C_FLAGS, CC, CXX, CXX_FLAGS, HEADERS, ROOT, needs, run
from tokenspeed.fsm.generated import ACTIONS, EDGES, OWNS, SPEC, SPEC_HASH, SPEC_VERSION, STATES
from tokenspeed.fsm.lifecycle import read_lifecycle

EXAMPLES = ROOT / "cpp" / "examples"
SOURCES = sorted(path for path in EXAMPLES.rglob("*") if path.is_file())

each_cc = pytest.mark.parametrize("cc", CC)
each_cxx = pytest.mark.parametrize("cxx", CXX)

LIFE = ["Waiting", "Prefilling", "Prefilling", "Decoding", "Finishing", "Finished"]
COMPLETE_WAITING = (
    "Complete is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla"
)
RELEASE_PREFILLING = (
    "Release is not legal in Prefilling. "
    "Legal here: Acquire, Schedule, Complete, Publish, Preempt, Abort. See specs/Lifecycle.tla"
)
PREEMPT_WAITING = (
    "Preempt is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_short_and_stands_in_the_guide(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) < 20
    assert text in (ROOT / "cpp" / "README.md").read_text(encoding="utf-8"), (
        f"cpp/README.md does not quote {path.name} as it is"
    )


# --- the routes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed headers, moved away from where they were installed."""
    place = tmp_path_factory.mktemp("embedding")
    run("cmake", "-S", ROOT, "-B", place / "build", "-DTOKENSPEED_PYTHON=OFF")
    run("cmake", "--install", place / "build", "--prefix", place / "installed")
    return (place / "installed").rename(place / "moved")


def configure(build: Path, source: Path, cxx: str, prefix: Path) -> None:
    """Configure an embedder's build. Which C++ it is comes from the target, so it is not passed."""
    run("cmake", "-S", source, "-B", build, f"-DCMAKE_CXX_COMPILER={cxx}",
        f"-DCMAKE_CXX_FLAGS={' '.join(CXX_FLAGS[1:])}",
        f"-Dtokenspeed_fsm_ROOT={prefix}")  # fmt: skip


@needs("cmake", "make")
@each_cxx
def test_find_package(cxx: str, prefix: Path, tmp_path: Path) -> None:
    configure(tmp_path, EXAMPLES / "find_package", cxx, prefix)
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "engine").split() == LIFE


@needs("cmake", "make")
@each_cxx
def test_find_package_refuses_another_major_version(cxx: str, prefix: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "find_package", tmp_path / "source")
    lists = tmp_path / "source" / "CMakeLists.txt"
    asked = lists.read_text()
    major = int(SPEC_VERSION.split(".")[0])
    assert f"tokenspeed_fsm {major} " in asked
    lists.write_text(asked.replace(f"tokenspeed_fsm {major} ", f"tokenspeed_fsm {major + 1} "))
    with pytest.raises(AssertionError, match=f"version: {SPEC_VERSION}"):
        configure(tmp_path / "build", tmp_path / "source", cxx, prefix)


@needs("cmake", "make", "pkg-config")
@each_cxx
def test_pkg_config(cxx: str, prefix: Path, tmp_path: Path) -> None:
    found = {"PKG_CONFIG_PATH": str(prefix / "share" / "pkgconfig")}
    assert run("pkg-config", "--modversion", "tokenspeed_fsm", **found).strip() == SPEC_VERSION
    flags = run("pkg-config", "--cflags", "tokenspeed_fsm", **found).split()
    program = tmp_path / "guard"
    run(cxx, *CXX_FLAGS, *flags, EXAMPLES / "pkg_config" / "guard.cpp", "-o", program)
    assert run(program) == "Admit is refused by SlotFree\n"


@each_cxx
def test_get_include(cxx: str, tmp_path: Path) -> None:
    program = tmp_path / "illegal"
    code = "import tokenspeed; print(tokenspeed.get_include())"
    flags = [*CXX_FLAGS, f"-I{run(sys.executable, '-c', code).strip()}"]
    source = EXAMPLES / "get_include" / "illegal.cpp"
    run(cxx, *flags, source, "-o", program)
    assert run(program) == "Aborted\n"
    refused = subprocess.run(
        [cxx, *flags, "-DILLEGAL", "-fsyntax-only", source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    assert COMPLETE_WAITING in refused.stderr


@each_cc
def test_c(cc: str, tmp_path: Path) -> None:
    program = tmp_path / "machine"
    run(cc, *C_FLAGS, f"-I{HEADERS}", EXAMPLES / "c" / "machine.c", "-o", program)
    assert run(program).splitlines() == [
        "Waiting", PREEMPT_WAITING, "Prefilling", "Finishing", "Finished",
    ]  # fmt: skip


def shared_object(cc: str, place: Path) -> Path:
    """The C ABI, built as its file says."""
    source = HEADERS / "tokenspeed" / "lifecycle_c.c"
    asked = re.match(r"// .*: cc (.*) lifecycle_c\.c -o (\S+)\n", source.read_text())
    assert asked is not None
    run(cc, *C_FLAGS, *asked[1].split(), source, "-o", place / asked[2])
    return place / asked[2]


@each_cc
def test_ctypes(cc: str, tmp_path: Path) -> None:
    library = shared_object(cc, tmp_path)
    said = run(sys.executable, EXAMPLES / "ctypes" / "machine.py", library)
    assert said.splitlines() == ["Waiting", "Prefilling", RELEASE_PREFILLING, "Aborting"]


# --- the C ABI says what the spec says ----------------------------------------------------------


@pytest.fixture(params=CC, scope="module")
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The shared object of one compiler; its words are bytes."""
    loaded = ctypes.CDLL(str(shared_object(request.param, tmp_path_factory.mktemp("library"))))
    for name in ("spec", "spec_hash", "spec_version", "state_name", "action_name", "refusal"):
        getattr(loaded, f"tokenspeed_{name}").restype = ctypes.c_char_p
    loaded.tokenspeed_can.restype = loaded.tokenspeed_ended.restype = ctypes.c_bool
    return loaded


def test_the_abi_says_which_spec_it_is(library: ctypes.CDLL) -> None:
    said = (library.tokenspeed_spec(), library.tokenspeed_spec_hash())
    assert said == (SPEC.encode(), SPEC_HASH.encode())
    assert library.tokenspeed_spec_version() == SPEC_VERSION.encode()


def test_the_abi_owns_what_the_spec_owns(library: ctypes.CDLL) -> None:
    resources = read_lifecycle(ROOT / SPEC).resources
    for at, state in enumerate(STATES):
        held = library.tokenspeed_owns(at)
        assert [r for bit, r in enumerate(resources) if held >> bit & 1] == list(OWNS[state])
        assert library.tokenspeed_ended(at) == all(
            source != state for edges in EDGES.values() for source, _ in edges
        )


def apply(library: ctypes.CDLL, action: int, state: int, to: int) -> tuple[int, int, str | None]:
    """Try one move: the status, where the machine is then, and the sentence."""
    machine, error = ctypes.c_int(state), ctypes.c_char_p(b"untouched")
    status = library.tokenspeed_apply(ctypes.byref(machine), action, to, ctypes.byref(error))
    assert library.tokenspeed_refusal(action, state, to) == error.value
    return status, machine.value, error.value.decode() if error.value else None


def triples() -> Iterator[tuple[int, int, int]]:
    return itertools.product(range(len(ACTIONS)), range(len(STATES)), range(len(STATES)))


def test_the_abi_moves_along_the_edges_and_names_every_refusal(library: ctypes.CDLL) -> None:
    ok, illegal, elsewhere = 0, 1, 2
    lifecycle = read_lifecycle(ROOT / SPEC)
    for action, state, to in triples():
        row = lifecycle.actions[action]
        if (STATES[state], STATES[to]) in EDGES[ACTIONS[action]]:
            expected: tuple[int, int, str | None] = (ok, to, None)
        else:
            status = elsewhere if row.targets(STATES[state]) else illegal
            expected = (status, state, lifecycle.refusal(row, STATES[state]))
        assert apply(library, action, state, to) == expected
        assert library.tokenspeed_can(action, state) == bool(row.targets(STATES[state]))


@pytest.mark.parametrize("number", [-1, 99, 2**31 - 1, -(2**31)])
def test_the_abi_refuses_numbers_that_are_nothing(library: ctypes.CDLL, number: int) -> None:
    unknown = 3
    assert library.tokenspeed_state_name(number) is None
    assert library.tokenspeed_action_name(number) is None
    assert not library.tokenspeed_ended(number)
    no_state, no_action = f"no such state. See {SPEC}", f"no such action. See {SPEC}"
    assert apply(library, number, 0, 1) == (unknown, 0, no_action)
    assert apply(library, 0, number, 1) == (unknown, number, no_state)
    assert apply(library, 0, 0, number) == (unknown, 0, no_state)


# --- it costs its embedder little ---------------------------------------------------------------


@each_cxx
def test_the_header_costs_what_the_run_prints(
    cxx: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The aim is 2 s; a test that asked for it would fail on a busy machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(cxx, *CXX_FLAGS, "-O2", f"-I{HEADERS}", "-c", EXAMPLES / "find_package" / "engine.cpp",
        "-o", tmp_path / "engine.o")  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record_property(f"{cxx} -O2 compiles the lifecycle's header", f"{spent_s:.2f} CPU s")


@each_cxx
def test_c_plus_plus_takes_the_c_header(cxx: str, tmp_path: Path) -> None:
    source = tmp_path / "both.cpp"
    source.write_text(
        '#include "tokenspeed/lifecycle.hpp"\n#include "tokenspeed/lifecycle_c.h"\n'
        "int main() { return tokenspeed_can(TOKENSPEED_ACTION_Submit, 0) ? 0 : 1; }\n"
    )
    run(cxx, *CXX_FLAGS, "-pedantic", f"-I{HEADERS}", source, "-o", tmp_path / "both")
    run(tmp_path / "both")
