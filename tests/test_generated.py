"""What is printed from the spec: fresh, as strict as the spec, and broken where the spec is cut."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import attrs
import pytest

from compiling import CXX, CXX_FLAGS, HEADERS, ROOT, needs, run
from tokenspeed.fsm import read_lifecycle
from tokenspeed.fsm.codegen import generate, stale
from tokenspeed.fsm.emit_cpp import emit_cpp
from tokenspeed.fsm.generated import (
    ACTIONS,
    EDGES,
    GUARDS,
    OWNS,
    PAGE_KINDS,
    SPEC_VERSION,
    STATES,
)
from tokenspeed.fsm.mirror import ENDED, IllegalTransition, RequestMachine, legal, targets
from tokenspeed.fsm.monitor import Monitor

SPEC = ROOT / "specs" / "Lifecycle.tla"
FAILING = sorted((ROOT / "cpp" / "tests" / "compile_fail").glob("*.cpp"))

each_compiler = pytest.mark.parametrize("cxx", CXX)
# The echo of a source line would let any error show the words that are looked for.
NO_ECHO = {
    "g++": ("-fno-diagnostics-show-caret", "-fmessage-length=0"),
    "clang++": ("-fno-caret-diagnostics", "-fmessage-length=0"),
}


def test_generated_files_are_fresh() -> None:
    assert not stale(ROOT), "run: tokenspeed codegen"


def test_what_embedders_see_keeps_its_version() -> None:
    """The tables and names that they program against, as they are in this version of the spec."""
    seen = repr((STATES, ACTIONS, PAGE_KINDS, EDGES, OWNS, GUARDS))
    assert (SPEC_VERSION, hashlib.sha256(seen.encode()).hexdigest()[:16]) == (
        "2.0.1", "de5aeae197940e91",
    ), "raise specs/VERSION by the rule of specs/README.md, then write both here"  # fmt: skip


# --- the mirror ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "state"), list(product(ACTIONS, STATES)))
def test_the_mirror_moves_exactly_as_the_table_says(action: str, state: str) -> None:
    for to in STATES:
        machine = RequestMachine(1)
        machine.state = state
        if (state, to) in EDGES[action]:
            assert machine.apply(action, to) == machine.state == to
        else:
            with pytest.raises(IllegalTransition):
                machine.apply(action, to)
            assert machine.state == state
    assert (action in legal(state)) == bool(targets(action, state))


def test_illegal_moves_are_named() -> None:
    machine = RequestMachine(17)
    machine.apply("Submit")
    with pytest.raises(IllegalTransition) as caught:
        machine.apply("Preempt")
    assert str(caught.value) == (
        "Preempt is not legal in Waiting (request 17). Legal here: Admit, Abort. "
        "See specs/Lifecycle.tla"
    )
    machine.apply("Admit")
    with pytest.raises(IllegalTransition, match="It leads to: Prefilling, Decoding, Finishing"):
        machine.apply("Complete")
    assert machine.state == "Prefilling"
    assert machine.holds == ("Slot", "Pages")
    assert {"Finished", "Aborted"} == ENDED


def test_the_monitor_wants_moves_that_join() -> None:
    monitor = Monitor()
    monitor.feed([("Submit", 1, 0, "New", "Waiting"), ("Admit", 1, 0, "Waiting", "Prefilling")])
    monitor.feed([("Submit", 1, 1, "New", "Waiting"), ("Abort", 1, 1, "Waiting", "Aborted")])
    assert [m.state for m in monitor.live()] == ["Prefilling"]
    with pytest.raises(IllegalTransition, match="claims to start in Waiting"):
        monitor.feed([("Abort", 1, 0, "Waiting", "Aborted")])
    with pytest.raises(IllegalTransition, match="Release is not legal in Prefilling"):
        monitor.feed([("Release", 1, 0, "Prefilling", "Finished")])


# --- the C++ side -------------------------------------------------------------------------------


def compiler(
    cxx: str, source: Path, *options: str | Path, headers: Path = HEADERS
) -> tuple[int, str]:
    """Compile without output; the exit status and what was said, in plain quotes."""
    command = [cxx, *CXX_FLAGS, *NO_ECHO[cxx], "-fsyntax-only", *options,
               f"-I{headers}", f"-I{HEADERS}", str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, re.sub("[‘’]", "'", done.stderr)


def expectation(source: Path, cxx: str) -> str:
    """The words after `expect:` in a file's opening comment; or after `expect clang++:`."""
    opening = re.match(r"(//.*\n)+", source.read_text(encoding="utf-8"))
    assert opening is not None
    words = " ".join(line.removeprefix("//").strip() for line in opening[0].splitlines())
    found = re.findall(r"expect( \S+)?: (.*?)(?= expect|$)", words)
    by_compiler = {name.strip(): sentence for name, sentence in found}
    return by_compiler.get(cxx) or by_compiler[""]


def test_each_action_has_a_file_that_must_fail() -> None:
    assert set(ACTIONS) <= {path.stem for path in FAILING}


@each_compiler
@pytest.mark.parametrize("source", FAILING, ids=[path.stem for path in FAILING])
def test_what_is_illegal_does_not_compile_and_says_why(cxx: str, source: Path) -> None:
    status, errors = compiler(cxx, source, "-DLEGAL")
    assert status == 0, errors
    status, errors = compiler(cxx, source)
    assert status != 0
    assert expectation(source, cxx) in errors, errors
    places = set(re.findall(r"(\S+:\d+):\d+: error: ", errors))
    assert len(places) == 1, "one reason, in one place:\n" + errors


@each_compiler
def test_the_matrix_refutes_with_a_sentence(cxx: str, tmp_path: Path) -> None:
    """Each line of it is a check: one that is turned around stops the build, by its words."""
    header = generate(ROOT)[HEADERS / "tokenspeed" / "lifecycle.hpp"]
    pair = "can(Action::Admit, State::Decoding)"
    assert f"static_assert(!{pair}" in header
    path = tmp_path / "tokenspeed" / "lifecycle.hpp"
    path.parent.mkdir()
    path.write_text(header.replace(f"static_assert(!{pair}", f"static_assert({pair}"))
    status, errors = compiler(cxx, path)
    assert status != 0
    assert "Admit is not legal in Decoding. Legal here: Acquire, Schedule" in errors


USER = (
    '#include "{world}"\n'
    + """
template <State S> In<S> some() noexcept;
template <Action A> Permit<A> permit() noexcept;
static_assert(sizeof(In<State::Waiting>) == sizeof(OwnedId), "what is not held takes no room");
static_assert(sizeof(Permit<Action::Admit>) == sizeof(RequestId));
"""
)


def moves(row: dict[str, object]) -> str:
    """A function for each edge of one action, written from the spec as it should be."""
    name, guarded, gains = row["name"], row["guards"], row["gains"]
    assert isinstance(row["edges"], list)
    out = []
    for at, (source, to) in enumerate(row["edges"]):
        chosen = f"<State::{to}>" if row["chosen"] else ""
        args = ["world", f"some<State::{source}>()"]
        args += [f"permit<Action::{name}>()"] if guarded else []
        args += ["Always::Slot{}", "Always::Pages{}"] if gains else []
        out.append(
            f"auto {name}_{at}(Always& world) {{ return {name}{chosen}({', '.join(args)}); }}\n"
        )
    return "".join(out)


def described(action: str) -> dict[str, object]:
    lifecycle = read_lifecycle(SPEC)
    row = next(a for a in lifecycle.actions if a.name == action)
    source, to = row.edges[0]
    return {
        "name": action,
        "edges": list(row.edges),
        "guards": bool(row.guards),
        "gains": bool(set(lifecycle.owns[to]) - set(lifecycle.owns[source])),
        "chosen": any(len(row.targets(s)) > 1 for s in row.sources()),
    }


def users(path: Path, *actions: str) -> Path:
    """A program that takes every edge of these actions."""
    world = ROOT / "cpp" / "tests" / "compile_fail" / "world.hpp"
    taken = "".join(moves(described(action)) for action in actions)
    path.write_text(USER.replace("{world}", str(world)) + taken)
    return path


@each_compiler
def test_every_edge_has_a_user(cxx: str, tmp_path: Path) -> None:
    """The twin of the tests below: as the spec stands, all of it compiles."""
    status, errors = compiler(cxx, users(tmp_path / "user.cpp", *ACTIONS))
    assert status == 0, errors


@each_compiler
@pytest.mark.parametrize(
    ("action", "edge"),
    [pytest.param(a, e, id=f"{a}-{e[0]}-{e[1]}") for a in ACTIONS for e in EDGES[a]],
)
def test_deleting_an_edge_breaks_its_user(
    cxx: str, tmp_path: Path, action: str, edge: tuple[str, str]
) -> None:
    """Cut one edge out of a copy of the spec, print the header again, compile against it."""
    changed = tmp_path / "changed"
    (changed / "tokenspeed").mkdir(parents=True)
    shutil.copy(SPEC.with_name("VERSION"), changed)
    (changed / "Lifecycle.tla").write_text(without(SPEC.read_text(), action, edge))
    lifecycle = read_lifecycle(changed / "Lifecycle.tla")
    assert edge not in next(a.edges for a in lifecycle.actions if a.name == action)
    (changed / "tokenspeed" / "lifecycle.hpp").write_text(emit_cpp(lifecycle))
    status, errors = compiler(cxx, users(tmp_path / "user.cpp", action), headers=changed)
    assert status != 0
    assert f"{action} is not legal in {edge[0]}" in errors or f"{action} leads from" in errors


@needs("g++")
def test_deleting_an_action_breaks_the_control_plane(tmp_path: Path) -> None:
    """Print the header without one action after another, and compile what the engine runs on."""
    sources = ROOT / "cpp" / "src"
    lifecycle = read_lifecycle(SPEC)
    homes = {action: moving(sources, action.name) for action in lifecycle.actions}
    for home in set(homes.values()):
        status, errors = compiler("g++", home, f"-I{sources}")
        assert status == 0, errors

    header = tmp_path / "tokenspeed" / "lifecycle.hpp"
    header.parent.mkdir()
    for deleted in lifecycle.actions:
        rest = tuple(action for action in lifecycle.actions if action != deleted)
        header.write_text(emit_cpp(attrs.evolve(lifecycle, actions=rest)))
        status, errors = compiler("g++", homes[deleted], f"-I{sources}", headers=tmp_path)
        assert status != 0
        assert re.search(rf"'(permit_)?{deleted.name}' is not a member of", errors), errors


def moving(sources: Path, action: str) -> Path:
    """The first source of the control plane that makes an action's moves."""
    move = re.compile(rf"lifecycle::{action}\b")
    return next(
        path for path in sorted(sources.glob("control*.cpp")) if move.search(path.read_text())
    )


def without(text: str, action: str, edge: tuple[str, str]) -> str:
    """The spec less one entry of `Edges`; an action that loses all of them keeps a self-loop."""
    table = text[text.index("Edges ==") : text.index("Owns ==")]
    row = re.search(rf"{action}\s*\|->\s*\{{(.*?)\}}", table, re.DOTALL)
    assert row is not None
    pairs = re.findall(r'<<"(\w+)", "(\w+)">>', row[1])
    assert edge in pairs
    kept = [pair for pair in pairs if pair != edge] or [("Aborted", "Aborted")]
    cut = row[0].replace(row[1], ", ".join(f'<<"{a}", "{b}">>' for a, b in kept))
    return text.replace(row[0], cut)


@each_compiler
def test_the_header_stands_alone(cxx: str, tmp_path: Path) -> None:
    """It needs nothing but the standard library."""
    source = tmp_path / "only.cpp"
    source.write_text('#include "tokenspeed/lifecycle.hpp"\n')
    needs = run(cxx, *CXX_FLAGS, f"-I{HEADERS}", "-MM", source)
    found = {Path(word).name for word in needs.split() if word.endswith(".hpp")}
    assert found == {"lifecycle.hpp", "ownership.hpp"}


LEAK = """
#include "{world}"
int main(int arguments, char**) {
  auto request = create<Always>(RequestId{});
  if (arguments > 1) request.abandon();
}
"""


@each_compiler
def test_a_dropped_request_is_caught_in_checked_builds(cxx: str, tmp_path: Path) -> None:
    source, program = tmp_path / "leak.cpp", tmp_path / "leak"
    world = ROOT / "cpp" / "tests" / "compile_fail" / "world.hpp"
    source.write_text(LEAK.replace("{world}", str(world)))
    run(cxx, *CXX_FLAGS, f"-I{HEADERS}", source, "-o", program)
    dropped = subprocess.run([program], capture_output=True, text=True, check=False)
    assert dropped.returncode != 0
    assert "a request was dropped before it ended" in dropped.stderr
    abandoned = subprocess.run([program, "on purpose"], capture_output=True, check=False)
    assert abandoned.returncode == 0


def test_the_manifest_names_files_that_exist() -> None:
    for model in json.loads((SPEC.parent / "manifest.json").read_text())["models"]:
        assert (SPEC.parent / model["spec"]).exists()
        assert (SPEC.parent / model["config"]).exists()
