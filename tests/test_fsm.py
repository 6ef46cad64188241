"""The spec compiler: the interpreter's counts, the tables that it reads, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tokenspeed.errors import SpecError
from tokenspeed.fsm import check, read_lifecycle
from tokenspeed.fsm.check import explore
from tokenspeed.fsm.model import load_model

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "specs" / "Lifecycle.tla"
MODELS = json.loads((ROOT / "specs" / "manifest.json").read_text())["models"]


def counts(spec: Path, config: Path) -> tuple[str, int, int, int]:
    report = check(spec, config)
    return report.result, report.generated, report.distinct, report.depth


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=m["name"], marks=[pytest.mark.slow] * m["slow"]) for m in MODELS]
)
def test_manifest_records_what_the_checker_finds(model: dict[str, object]) -> None:
    found = counts(ROOT / "specs" / str(model["spec"]), ROOT / "specs" / str(model["config"]))
    assert found == (model["result"], model["generated"], model["distinct"], model["depth"])


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
