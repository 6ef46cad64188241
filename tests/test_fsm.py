"""The spec compiler: the interpreter's counts, the tables read from the spec, refusals, the mirror."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from models_here import DATA

from tokenspeed.errors import SpecError
from tokenspeed.fsm import check, read_lifecycle
from tokenspeed.fsm.check import explore
from tokenspeed.fsm.codegen import generate, stale
from tokenspeed.fsm.emit_cpp import emit_cpp
from tokenspeed.fsm.mirror import IllegalTransition, RequestMachine, legal
from tokenspeed.fsm.model import load_model
from tokenspeed.fsm.monitor import Monitor

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "specs" / "Lifecycle.tla"
MODELS = json.loads((ROOT / "specs" / "manifest.json").read_text())["models"]
DRAFT = DATA.parent / "design" / "spec_draft"


def counts(spec: Path, config: Path) -> tuple[str, int, int, int]:
    report = check(spec, config)
    return report.result, report.generated, report.distinct, report.depth


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=m["name"], marks=[pytest.mark.slow] * m["slow"]) for m in MODELS]
)
def test_manifest_records_what_the_checker_finds(model: dict[str, object]) -> None:
    found = counts(ROOT / "specs" / str(model["spec"]), ROOT / "specs" / str(model["config"]))
    assert found == (model["result"], model["generated"], model["distinct"], model["depth"])


def test_two_phase_commit_has_its_published_counts(tmp_path: Path) -> None:
    config = tmp_path / "TwoPhase.cfg"
    config.write_text(
        "CONSTANT RM = {a, b, c}\nINIT TPInit NEXT TPNext\nINVARIANT Consistent\nCHECK_DEADLOCK FALSE\n"
    )
    spec = Path(__file__).parent / "specs" / "TwoPhase.tla"
    assert counts(spec, config) == ("ok", 1146, 288, 11)


@pytest.mark.skipif(not DRAFT.is_dir(), reason="the draft spec (shared/design/spec_draft) is not here")
def test_the_draft_has_its_recorded_counts() -> None:
    assert counts(DRAFT / "MCRequestKV.tla", DRAFT / "small.cfg") == ("ok", 60163, 18781, 25)


def test_the_table_is_exactly_what_can_happen() -> None:
    """No dead entry in `Edges`, and no move outside it, in all states of the smallest model."""
    model = load_model(ROOT / "specs" / "MCLifecycle.tla", ROOT / "specs" / "tiny.cfg")
    _, reached = explore(model)
    st = model.evaluator.variables.index("st")
    successors = model.evaluator.successors("Next")
    seen: dict[str, set[tuple[str, str]]] = {}
    for state in reached:
        for (name, args), after in successors(state):
            for request, before in state[st].items.items():
                to = after[st].items[request]
                if (args and args[0] == request) or (name == "Complete" and before != to):
                    seen.setdefault(name, set()).add((before, to))
    table = {action.name: set(action.edges) for action in read_lifecycle(SPEC).actions}
    for name, edges in table.items():
        changing = {(a, b) for a, b in edges if a != b or name != "Complete"}
        assert seen[name] == changing, name


def test_a_broken_invariant_gives_a_shortest_trace(tmp_path: Path) -> None:
    """Releasing while a step is in flight is the classic; the checker must find it."""
    for name in ("Lifecycle.tla", "MCLifecycle.tla", "tiny.cfg"):
        shutil.copy(ROOT / "specs" / name, tmp_path)
    spec = tmp_path / "Lifecycle.tla"
    text = spec.read_text()
    guarded = '\\E to \\in State : Move("Release", r, to)\n  /\\ ~Pinned(r)'
    assert guarded in text
    spec.write_text(text.replace(guarded, guarded.split("\n")[0]))
    report = check(tmp_path / "MCLifecycle.tla", tmp_path / "tiny.cfg")
    assert report.result == "invariant"
    assert report.trace[-1].startswith("Release")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A == \\E x : x = 1", "unbounded_quantification"),
        ("A == CHOOSE x : x = 1", "CHOOSE"),
        ("A == (1 +", "syntax error"),
        ("RECURSIVE F(_)\nF(n) == F(n)", "recursive"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "M.tla"
    path.write_text(f"---- MODULE M ----\n{text}\n====\n")
    with pytest.raises(SpecError) as caught:
        check(path, tmp_path / "none.cfg")
    assert words.lower() in str(caught.value).lower()
    assert f"{path}:" in str(caught.value)


def test_generated_files_are_fresh() -> None:
    assert not stale(ROOT), "run: tokenspeed codegen"


def test_illegal_moves_are_named() -> None:
    machine = RequestMachine(17)
    machine.apply("Submit")
    with pytest.raises(IllegalTransition) as caught:
        machine.apply("Preempt")
    assert str(caught.value) == (
        "Preempt is not legal in Waiting (request 17). Legal here: Admit, Abort. "
        "See specs/Lifecycle.tla"
    )
    assert machine.state == "Waiting"
    assert legal("Finished") == ()


def test_the_monitor_wants_moves_that_join() -> None:
    monitor = Monitor()
    monitor.feed([("Submit", 1, 0, "New", "Waiting"), ("Admit", 1, 0, "Waiting", "Prefilling")])
    assert [m.state for m in monitor.live()] == ["Prefilling"]
    with pytest.raises(IllegalTransition, match="claims to start in Waiting"):
        monitor.feed([("Abort", 1, 0, "Waiting", "Aborted")])


# --- the C++ side -------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")

USER = """
#include <vector>
#include "tokenspeed/lifecycle.hpp"
using namespace tokenspeed::lifecycle;
using tokenspeed::RequestId;
struct W {
  struct Slot { int index = 0; };
  using Pages = std::vector<int>;
  void moved(Action, RequestId, State, State) noexcept {}
  bool Starved() const { return true; }
  bool SlotFree() const { return true; }
  bool NoneEvictable() const { return true; }
  bool FirstQueued(RequestId) const { return true; }
  bool Wants(RequestId) const { return true; }
  bool FirstWants(RequestId) const { return true; }
  bool Youngest(RequestId) const { return true; }
  bool Alone(RequestId) const { return false; }
  bool Pinned(RequestId) const { return false; }
};
template <State S> Request<S, W> some();
"""


def compiles(directory: Path, body: str, include: Path | None = None) -> tuple[bool, str]:
    source = directory / "user.cpp"
    source.write_text(USER + body)
    command = [
        "g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fno-exceptions", "-fno-rtti",
        "-fno-diagnostics-show-caret", "-fsyntax-only", f"-I{include or ROOT / 'cpp' / 'include'}",
        f"-I{ROOT / 'cpp' / 'include'}", str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stderr


def call(action: str, source: str, to: str, *, permit: bool, gains: bool) -> str:
    """A function that makes one move."""
    target = f"<State::{to}>" if action == "Complete" else ""
    args = ["w", f"some<State::{source}>()"]
    args += [f"permit_{action}(w, some<State::{source}>()).take()"] if permit else []
    args += ["W::Slot{}", "W::Pages{}"] if gains else []
    return f"void move(W& w) {{ static_cast<void>({action}{target}({', '.join(args)})); }}\n"


@needs_compiler
@pytest.mark.parametrize("action", [a.name for a in read_lifecycle(SPEC).actions])
def test_an_illegal_move_does_not_compile_and_a_legal_one_does(tmp_path: Path, action: str) -> None:
    lifecycle = read_lifecycle(SPEC)
    row = next(a for a in lifecycle.actions if a.name == action)
    settings = {"permit": bool(row.guards), "gains": action == "Admit"}
    source, to = row.edges[0]
    good, errors = compiles(tmp_path, call(action, source, to, **settings))
    assert good, errors
    illegal = next(s for s in lifecycle.states if s not in row.sources())
    bad, errors = compiles(tmp_path, call(action, illegal, to, **settings))
    assert not bad
    assert "constraints not satisfied" in errors or "no matching function" in errors
    assert f"State::{illegal}" in errors or "required for the satisfaction" in errors


@needs_compiler
def test_deleting_an_edge_breaks_its_user(tmp_path: Path) -> None:
    text = SPEC.read_text()
    removed = ', <<"Preempted", "Prefilling">>'
    assert removed in text
    changed = tmp_path / "changed"
    (changed / "tokenspeed").mkdir(parents=True)
    (changed / "Lifecycle.tla").write_text(text.replace(removed, ""))
    header = emit_cpp(read_lifecycle(changed / "Lifecycle.tla"))
    (changed / "tokenspeed" / "lifecycle.hpp").write_text(header)
    resume = call("Admit", "Preempted", "Prefilling", permit=True, gains=True)
    assert compiles(tmp_path, resume)[0]
    assert not compiles(tmp_path, resume, include=changed)[0]


@needs_compiler
def test_the_matrix_refutes_with_a_sentence(tmp_path: Path) -> None:
    header = generate(ROOT)[ROOT / "cpp" / "include" / "tokenspeed" / "lifecycle.hpp"]
    broken = header.replace(
        "static_assert(!can(Action::Admit, State::Decoding)", "static_assert(can(Action::Admit, State::Decoding)"
    )
    assert broken != header
    path = tmp_path / "tokenspeed" / "lifecycle.hpp"
    path.parent.mkdir()
    path.write_text(broken)
    good, errors = compiles(tmp_path, "", include=tmp_path)
    assert not good
    assert "Admit is not legal in Decoding. Legal here: Schedule, Complete" in errors
