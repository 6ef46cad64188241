"""SYMMETRY is exact, or refused: what tells interchangeable names apart is found."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from tokenspeed.errors import SpecError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Report, Settings, check, state_graph

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")

LEADERS = r"""---- MODULE Leaders ----
EXTENDS FiniteSets, Naturals, TLC
CONSTANTS A, B, C, First
VARIABLES turn, seen
vars == <<turn, seen>>
Init == turn \in A /\ seen = {}
See == seen' = seen \cup {turn} /\ UNCHANGED turn
Pass(a) == turn' = a /\ UNCHANGED seen
Lead == turn = First /\ See
Weight == [a \in A |-> IF a = First THEN 1 ELSE 0]
Heavy == Weight[turn] = 1 /\ See
Any == seen # {} /\ turn' = (CHOOSE a \in seen : TRUE) /\ UNCHANGED seen
Same == turn' = (CHOOSE a \in A : a = turn) /\ UNCHANGED seen
Fewest == Cardinality(seen) = (CHOOSE n \in 0..3 : n >= Cardinality(seen)) /\ See

Alike == See \/ Same \/ Fewest \/ \E a \in A : Pass(a)
Led == Lead \/ \E a \in A : Pass(a)
Weighed == Heavy \/ \E a \in A : Pass(a)
Chosen == See \/ Any \/ \E a \in A : Pass(a)
Started == turn \in B /\ seen = {}
Never == ~(seen = B)
Keeps == [][seen \subseteq seen']_vars
Ends == <>(seen = A)
Small == First \notin seen

Full == Permutations(A)
Part == Permutations(B)
Chain == Permutations(B) \cup Permutations(C)
====
"""


def leaders(tmp_path: Path, text: str) -> tuple[Path, Path]:
    spec, config = tmp_path / "Leaders.tla", tmp_path / "Leaders.cfg"
    spec.write_text(LEADERS)
    constants = "CONSTANTS A = {a1, a2, a3} B = {a1, a2} C = {a2, a3} First = a1\n"
    defaults = "" if "INIT" in text else "INIT Init\n"
    config.write_text(f"{constants}{defaults}CHECK_DEADLOCK FALSE\n{text}\n")
    return spec, config


Engine = Literal["compiled", "interpreter"]
both_engines = pytest.mark.parametrize("engine", ["compiled", "interpreter"])


def checked(tmp_path: Path, text: str, engine: Engine = "compiled") -> Report:
    return check(*leaders(tmp_path, text), Settings(engine=engine))


@both_engines
def test_what_treats_names_alike_is_reduced_exactly(tmp_path: Path, engine: Engine) -> None:
    """Of 3 turns and 8 sets seen: by how many were seen, and whether the turn is one of them."""
    whole = checked(tmp_path, "NEXT Alike", engine)
    assert whole.distinct == 24
    text = "NEXT Alike\nSYMMETRY Full\nPROPERTY Keeps"
    assert (checked(tmp_path, text, engine).result, checked(tmp_path, text, engine).distinct) == (
        "ok",
        6,
    )


@both_engines
def test_sets_that_overlap_generate_one_group(tmp_path: Path, engine: Engine) -> None:
    """Whoever may swap a1 with a2 and a2 with a3 may swap all of them."""
    chain, full = (
        checked(tmp_path, f"NEXT Alike\nSYMMETRY {name}", engine) for name in ("Chain", "Full")
    )
    assert (chain.generated, chain.distinct) == (full.generated, full.distinct)


@both_engines
def test_a_part_of_the_names_may_be_interchangeable(tmp_path: Path, engine: Engine) -> None:
    """a1 and a2 are, a3 is not: 24 states in classes of 1 or 2."""
    assert checked(tmp_path, "NEXT Alike\nSYMMETRY Part", engine).distinct == 14


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("NEXT Led\nSYMMETRY Full", ":9:16", '"a1"'),
        ("NEXT Weighed\nSYMMETRY Full", ":11:10", '("a1" :> 1 @@ "a2" :> 0 @@ "a3" :> 0)'),
        ("INIT Started\nNEXT Alike\nSYMMETRY Full", ":20:21", '{"a1", "a2"}'),
        ("NEXT Alike\nSYMMETRY Full\nINVARIANT Never", ":21:19", '{"a1", "a2"}'),
        ("NEXT Alike\nSYMMETRY Full\nCONSTRAINT Small", ":24:10", '"a1"'),
    ],
)
def test_a_constant_that_tells_names_apart_is_refused(
    tmp_path: Path, text: str, place: str, what: str
) -> None:
    with pytest.raises(SpecError, match="SYMMETRY is unsound") as caught:
        checked(tmp_path, text)
    assert what in str(caught.value)
    assert f"Leaders.tla{place}" in str(caught.value)


@both_engines
def test_a_choice_between_names_is_an_error_where_it_is_made(
    tmp_path: Path, engine: Engine
) -> None:
    report = checked(tmp_path, "NEXT Chosen\nSYMMETRY Full", engine)
    assert report.result == "error"
    assert "CHOOSE: several qualify, so SYMMETRY is unsound" in str(report.violated)
    assert checked(tmp_path, "NEXT Chosen", engine).result == "ok"


def test_liveness_is_refused_by_every_entrance(tmp_path: Path) -> None:
    spec, config = leaders(tmp_path, "NEXT Alike\nSYMMETRY Full\nPROPERTY Ends")
    for enter in (check, lambda *model: state_graph(*model, tmp_path / "graph")):
        with pytest.raises(SpecError, match="SYMMETRY with a liveness property"):
            enter(spec, config)


@both_engines
def test_no_engine_ignores_symmetry(tmp_path: Path, engine: Engine) -> None:
    model = leaders(tmp_path, "NEXT Led\nSYMMETRY Full")
    with pytest.raises(SpecError, match="SYMMETRY"):
        check(*model, Settings(engine=engine))


def test_a_field_that_is_spelled_as_a_name_is_refused(tmp_path: Path) -> None:
    """The interpreter could not rename the one without the other."""
    spec, config = leaders(tmp_path, "NEXT Alike\nSYMMETRY Full")
    spec.write_text(
        LEADERS.replace("VARIABLES turn, seen", "VARIABLES turn, seen, rec")
        .replace("seen = {}\n", "seen = {} /\\ rec = [a1 |-> seen]\n", 1)
        .replace("UNCHANGED turn", "UNCHANGED <<turn, rec>>")
        .replace("UNCHANGED seen", "UNCHANGED <<seen, rec>>")
    )
    with pytest.raises(SpecError, match="a1: a name that SYMMETRY makes interchangeable"):
        check(spec, config, Settings(engine="interpreter"))
