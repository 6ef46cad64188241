"""The spec compiler: the interpreter's counts, the tables that it reads, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from tokenspeed.errors import SpecError
from tokenspeed.fsm import check, compiled, read_lifecycle
from tokenspeed.fsm.check import explore, state_graph
from tokenspeed.fsm.evaluate import State
from tokenspeed.fsm.generated import STATES
from tokenspeed.fsm.manifest import Recorded, read_manifest
from tokenspeed.fsm.model import Model, load_model, parse_config
from tokenspeed.fsm.values import ordered

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"
SPEC = SPECS / "Lifecycle.tla"
MODELS = read_manifest(SPECS)
SMALL = 1_000  # states
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")


def counts(spec: Path, config: Path) -> tuple[str, int, int, int]:
    report = check(spec, config)
    return report.result, report.generated, report.distinct, report.depth


def marks(model: Recorded) -> list[pytest.MarkDecorator]:
    """Small ones take longer to compile than to interpret, which test_interpreter.py does."""
    return [pytest.mark.slow] * (model.slow or model.distinct <= SMALL)


@needs_compiler
@pytest.mark.parametrize("model", [pytest.param(m, id=m.name, marks=marks(m)) for m in MODELS])
def test_the_manifest_records_what_the_checker_finds(model: Recorded) -> None:
    report = check(SPECS / model.spec, SPECS / model.config)
    assert model.differs(report) == ""


def test_every_state_and_every_way_has_a_model_that_reaches_it() -> None:
    """Each is a model that must fail, so that no property holds because nothing happens."""
    reached = {m.violated for m in MODELS if m.result == "invariant"}
    assert {f"Never{state}" for state in STATES if state != "New"} <= reached
    assert {"NeverResumed", "NeverTwoHolders", "NeverEvicted", "NeverFull"} <= reached


def test_every_model_that_must_hold_asks_for_the_same_safety() -> None:
    """None leaves out an invariant, or that what drains stays drained."""
    lifecycle = [m for m in MODELS if m.spec == "MCLifecycle.tla" and m.result == "ok"]
    configs = {m.name: parse_config(SPECS / m.config) for m in lifecycle}
    assert {name for name, c in configs.items() if "DrainOnly" not in c.properties} == set()
    assert len({c.invariants for c in configs.values()}) == 1


@pytest.mark.parametrize("name", ["toolong", pytest.param("tiny", marks=pytest.mark.slow)])
def test_the_interpreter_takes_no_way_that_the_table_lacks(name: str) -> None:
    recorded = next(m for m in MODELS if m.name == name)
    model = load_model(SPECS / recorded.spec, SPECS / recorded.config)
    report, reached = explore(model)
    assert recorded.differs(report) == ""
    assert edges_taken(model, reached) <= {
        (a.name, edge) for a in read_lifecycle(SPEC).actions for edge in a.edges
    }


def edges_taken(model: Model, reached: Iterable[State]) -> set[tuple[str, tuple[str, str]]]:
    """The moves of requests in all steps between some states."""
    st = model.evaluator.variables.index("st")
    successors = model.evaluator.successors("Next")
    seen = set()
    for state in reached:
        for (name, args), after in successors(state):
            for request, before in state[st].items.items():
                to = after[st].items[request]
                if request in args or (name == "Complete" and before != to):
                    seen.add((name, (before, to)))
    return seen


@pytest.mark.parametrize("window", [0, 1])
def test_a_window_that_sees_no_kv_is_refused(tmp_path: Path, window: int) -> None:
    config = tmp_path / "narrow.cfg"
    text = (SPECS / "windowlong.cfg").read_text()
    assert text.count("Window = 2") == 1
    config.write_text(text.replace("Window = 2", f"Window = {window}"))
    with pytest.raises(SpecError, match=r"Window\.tla:17:.*this ASSUME is false"):
        load_model(SPECS / "MCWindow.tla", config)


@needs_compiler
def test_the_table_is_exactly_what_can_happen(tmp_path: Path) -> None:
    """No dead entry in `Edges`, and no move outside it, in all states of a model that preempts."""
    state_graph(SPECS / "MCLifecycle.tla", SPECS / "small.cfg", tmp_path / "graph")
    lines = [json.loads(line) for line in (tmp_path / "graph").read_text().splitlines()]
    states = [dict(line["state"]["st"]["map"]) for line in lines]
    seen: dict[str, set[tuple[str, str]]] = {}
    for before, line in zip(states, lines, strict=True):
        for name, args, to in line["steps"]:
            for request, state in before.items():
                if request in args or (name == "Complete" and state != states[to][request]):
                    seen.setdefault(name, set()).add((state, states[to][request]))
    for action in read_lifecycle(SPEC).actions:
        changing = {(a, b) for a, b in action.edges if a != b or action.name != "Complete"}
        assert seen[action.name] == changing, action.name


def test_a_broken_invariant_gives_a_shortest_trace(tmp_path: Path) -> None:
    """Releasing while a step is in flight is the classic; the checker must find it."""
    for name in ("Lifecycle.tla", "MCLifecycle.tla", "tiny.cfg"):
        shutil.copy(SPECS / name, tmp_path)
    spec = tmp_path / "Lifecycle.tla"
    text = spec.read_text()
    guarded = '\\E to \\in State : Move("Release", r, to)\n  /\\ ~Pinned(r)'
    assert guarded in text
    spec.write_text(text.replace(guarded, guarded.split("\n", maxsplit=1)[0]))
    report = check(tmp_path / "MCLifecycle.tla", tmp_path / "tiny.cfg")
    assert report.result == "invariant"
    assert report.trace[-1].action == "Release"


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


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("INIT Init NEXT Next\nVIEW Small\n", "VIEW"),
        ("INIT Init NEXT Next\nINVARIANT Absent\n", "Absent is not defined"),
        ("INIT Init NEXT Half\n", "does not say what y' is"),
        ("INIT Init Other NEXT Next\n", "INIT: got 2 names"),
        ("INIT Init NEXT Next CHECK_DEADLOCK MAYBE\n", "expected TRUE or FALSE"),
        ("SPECIFICATION Spec INIT Init\n", "SPECIFICATION beside INIT"),
        ("INIT Init NEXT Next CONSTANT A = {{a}, {b}}\n", "{: got this as a value"),
        ("INIT Init NEXT Next CONSTANT A = {a, b\n", "closing brace"),
        ("INIT Init NEXT Next CONSTANT A = <<1>>\n", "<: got this as a value"),
        ("INIT Init NEXT Next CONSTANT A <- [M]B\n", "expected A = value or A <- Name"),
        ("INIT Init NEXT Next CONSTANT A\n", "A nothing nothing"),
    ],
)
def test_a_configuration_is_refused_by_name(tmp_path: Path, config: str, words: str) -> None:
    spec, settings = tmp_path / "M.tla", tmp_path / "M.cfg"
    spec.write_text(
        "---- MODULE M ----\nVARIABLES x, y\nInit == x = 0 /\\ y = 0\nStep == x' = x /\\ y' = y\n"
        "Next == Step\nMove == x' = 1\nHalf == Move\n====\n"
    )
    settings.write_text(config)
    with pytest.raises(SpecError, match=words):
        check(spec, settings)


def test_an_operator_of_init_assigns(tmp_path: Path) -> None:
    """`Init == Start` is read as the standard tools read it, not as a test of nothing."""
    spec, settings = tmp_path / "M.tla", tmp_path / "M.cfg"
    spec.write_text(
        "---- MODULE M ----\nVARIABLE x\nStart == x \\in {1, 2}\nInit == Start\n"
        "Turn == x' = 3 - x\nNext == Turn\n====\n"
    )
    settings.write_text("INIT Init NEXT Next\n")
    assert counts(spec, settings) == ("ok", 4, 2, 1)


def test_a_set_of_numbers_is_not_taken_for_one_of_truth_values() -> None:
    assert repr(ordered(frozenset({False, True}))) == "(False, True)"
    assert repr(ordered(frozenset({0, 1}))) == "(0, 1)"
