"""The interpreter stands in for the compiled checker: the same verdict, counts, counterexample."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from models_here import DATA
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Report, Settings, check
from tokenspeed.fsm.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
DRAFT = DATA.parent / "design" / "spec_draft"

FORKS = r"""---- MODULE Forks ----
EXTENDS Naturals, FiniteSets
CONSTANT P
VARIABLES at, fork
vars == <<at, fork>>
Init == at = [p \in P |-> "thinks"] /\ fork \in {{}, P}
Take(p) == at[p] = "thinks" /\ fork = {} /\ at' = [at EXCEPT ![p] = "eats"] /\ fork' = {p}
Give(p) == at[p] = "eats" /\ fork = {p} /\ at' = [at EXCEPT ![p] = "thinks"] /\ fork' = {}
Rest(p) == fork = P /\ at' = [at EXCEPT ![p] = IF @ = "rests" THEN "thinks" ELSE "rests"]
             /\ UNCHANGED fork
Wake == fork = P /\ (\A p \in P : at[p] = "thinks") /\ fork' = {} /\ UNCHANGED at
Next == Wake \/ \E p \in P : Take(p) \/ Give(p) \/ Rest(p)
Gives == \A p \in P : WF_vars(Give(p))
Weak == Init /\ [][Next]_vars /\ Gives /\ WF_vars(Wake) /\ \A p \in P : WF_vars(Take(p))
Strong == /\ Init /\ [][Next]_vars /\ Gives /\ SF_vars(Wake)
          /\ \A p \in P : SF_vars(Take(p)) /\ WF_vars(Rest(p))
Eats(p) == (at[p] = "thinks" /\ fork # P) ~> at[p] = "eats"
Fed == \A p \in P : Eats(p)
Given == \A p \in P : [](at[p] = "eats" => <>(at[p] = "thinks"))
Awake == <>(fork # P)
Busy == []<>(fork # {})
Calm == <>[](fork = {})
Kept == [][fork # P => fork' # P]_vars
Few == Cardinality({p \in P : at[p] = "rests"}) < 2
Turns == \A p \in P : at[p] = "rests" => at'[p] # "rests"
====
"""


def checked(tmp_path: Path, text: str, settings: Settings) -> Report:
    spec, config = tmp_path / "Forks.tla", tmp_path / "Forks.cfg"
    spec.write_text(FORKS)
    config.write_text(f"CONSTANT P = {{p1, p2}}\nCHECK_DEADLOCK FALSE\n{text}\n")
    return check(spec, config, settings)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("SPECIFICATION Weak\nPROPERTIES Given Kept Awake", "liveness"),
        ("SPECIFICATION Weak\nPROPERTY Fed", "liveness"),
        ("SPECIFICATION Strong\nPROPERTIES Given Kept Fed Busy", "ok"),
        ("SPECIFICATION Strong\nPROPERTIES Busy Calm", "liveness"),
        ("SPECIFICATION Strong\nPROPERTY Awake\nCONSTRAINT Few", "ok"),
        ("SPECIFICATION Strong\nPROPERTY Awake\nACTION_CONSTRAINT Turns", "ok"),
    ],
)
@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")
def test_the_interpreter_says_what_the_compiled_checker_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, result: str
) -> None:
    monkeypatch.setattr(compiled, "FLAGS", ("-std=c++20", "-O0", "-DNDEBUG", "-pthread"))
    fast, slow = (
        checked(tmp_path, text, Settings(engine=engine)) for engine in ("compiled", "interpreter")
    )
    assert fast.result == slow.result == result
    assert (fast.generated, fast.distinct, fast.depth) == (
        slow.generated,
        slow.distinct,
        slow.depth,
    )
    assert (fast.violated, fast.trace, fast.loop) == (slow.violated, slow.trace, slow.loop)
    assert fast.notes == slow.notes


def recorded(most: int) -> list[str]:
    return [m.name for m in read_manifest(ROOT / "specs") if m.distinct <= most]


@pytest.mark.parametrize("name", recorded(1_000))
def test_small_models_are_as_recorded(name: str) -> None:
    model = next(m for m in read_manifest(ROOT / "specs") if m.name == name)
    specs = ROOT / "specs"
    report = check(specs / model.spec, specs / model.config, Settings(engine="interpreter"))
    assert model.differs(report) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*recorded(13_000)} - {*recorded(1_000)}))
def test_larger_models_are_as_recorded(name: str) -> None:
    test_small_models_are_as_recorded(name)


@pytest.mark.slow
@pytest.mark.skipif(not DRAFT.is_dir(), reason="the draft (shared/design/spec_draft) is not here")
@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")
def test_the_draft_is_live_to_the_interpreter_too(tmp_path: Path) -> None:
    for path in DRAFT.glob("*"):
        shutil.copy(path, tmp_path)
    model = tmp_path / "MCRequestKV.tla", tmp_path / "tiny.cfg"
    fast, slow = (check(*model, Settings(engine=e)) for e in ("compiled", "interpreter"))
    assert fast.result == slow.result == "ok"
    assert (fast.generated, fast.distinct, fast.depth) == (
        slow.generated,
        slow.distinct,
        slow.depth,
    )
