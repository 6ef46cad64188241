"""What a construct of TLA+ means is what the standard tools say, in both engines; or it is refused.

A refusal names file, line, column and the construct. Nothing is guessed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tokenspeed.errors import SpecError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Settings, check, explore, state_graph
from tokenspeed.fsm.cpp_types import Bounds
from tokenspeed.fsm.emit_model import emit_model, read_model
from tokenspeed.fsm.model import load_model

# What is written, and its value.
VALUES = {
    r"-1 \div 2": 0,  # the minus is of the quotient
    r"(-7) \div 2": -4,  # towards minus infinity
    r"7 \div (-2)": -4,
    r"(-3) % 2": 1,  # never negative
    r"7 % 4 * 2": 7,
    r"2 ^ 10 - 1": 1023,
    r"10 - 2 - 3": 5,
    r"[[a |-> [b |-> [k \in {2} |-> 0]]] EXCEPT !.a.b[2] = 5].a.b[2]": 5,
    r"[[k \in {5} |-> [b |-> [c |-> 1]]] EXCEPT ![5].b.c = @ + 1][5].b.c": 2,
    r"[<<1, 2>> EXCEPT ![3] = 9][2]": 2,  # outside the domain nothing changes
    r"[<<1, 2>> EXCEPT ![1] = @ + 1, ![1] = @ * 5][1]": 10,
    r"Cardinality({1, 2} \X {3} \X {4, 5})": 4,
    r"(CHOOSE p \in {1} \X {2} \X {3} : TRUE)[3]": 3,
    r"(CHOOSE p \in ({1} \X {2}) \X {3} : TRUE)[1][2]": 2,
    r"Cardinality(SUBSET {1, 2, 3})": 8,
    r"Cardinality([{1, 2} -> {3, 4}])": 4,
    r"Cardinality({S \in SUBSET {1, 2} : S # {}})": 3,
    r"IF 1 \in Nat \cup {-1} /\ -2 \notin Nat THEN 1 ELSE 0": 1,
    r"IF \E S \in SUBSET {1, 2} : S = {1} THEN 1 ELSE 0": 1,
    r"LET late == Head(<<>>) IN IF x = 0 THEN 3 ELSE late": 3,  # computed when asked for
    r"Second(Head(<<>>), 4)": 4,
    r"CASE x = 0 -> 1 [] x = 0 -> 2": 1,
    r"CHOOSE y \in {3, 1, 2} : y > 1": 2,
    r"Len(Tail(<<1, 5>>) \o <<2>>)": 2,
    r"IF <<>> = [y \in {} |-> 1] THEN 1 ELSE 0": 1,
    r"IF ENABLED (x' = 1) THEN 1 ELSE 0": 1,
}
HEAD = "---- MODULE M ----\nEXTENDS Integers, Sequences, FiniteSets, TLC\nVARIABLE x\n"


def written(path: Path, text: str, config: str = "") -> tuple[Path, Path]:
    spec, settings = path / "M.tla", path / "M.cfg"
    spec.write_text(f"{HEAD}{text}\n====\n")
    settings.write_text(f"INIT Init NEXT Next\nCHECK_DEADLOCK FALSE\n{config}")
    return spec, settings


def results(path: Path) -> tuple[Path, Path]:
    """A model with a step for each row of the table."""
    steps = [f"S{i} == x = 0 /\\ x' = ({text})" for i, text in enumerate(VALUES)]
    names = " \\/ ".join(f"S{i}" for i in range(len(steps)))
    text = ["Second(a, b) == b", "Init == x = 0", *steps, f"Next == {names}"]
    return written(path, "\n".join(text))


def test_the_interpreter_gives_the_value(tmp_path: Path) -> None:
    model = load_model(*results(tmp_path))
    found = {label[0]: after[0] for label, after in model.evaluator.successors("Next")((0,))}
    assert found == {f"S{i}": value for i, value in enumerate(VALUES.values())}


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")
def test_the_compiled_model_gives_the_value(tmp_path: Path) -> None:
    state_graph(*results(tmp_path), tmp_path / "graph")
    lines = [json.loads(line) for line in (tmp_path / "graph").read_text().splitlines()]
    found = {name: lines[to]["state"]["x"] for name, _, to in lines[0]["steps"]}
    assert found == {f"S{i}": value for i, value in enumerate(VALUES.values())}


REFUSED = [
    # definitions, the step, where, the words
    (r"RECURSIVE F(_)", "x' = x", "4:1", "recursive_declaration"),
    (r"F(k) == F(k - 1)", "x' = F(2)", "4:1", "F is recursive"),
    (r"A == B" "\n" r"B == A", "x' = A", "4:1", "A is recursive"),
    (r"G[k \in 0..3] == k", "x' = G[2]", "4:1", "function_definition"),
    (r"Ap(F(_), a) == F(a)", "x' = x", "4:4", "higher-order"),
    (r"Two == SelectSeq(<<1>>, LAMBDA e : e > 1)", "x' = x", "4:25", "lambda"),
    (r"THEOREM 1 = 1", "x' = x", "4:1", "theorem"),
    ("---- MODULE Inner ----\n====", "x' = x", "4:1", "module"),
    (r"ASSUME 1 = 2", "x' = x", "4:8", "ASSUME is false"),
    (r"P == x \cdot x", "x' = x", "4:8", "cdot"),
    (r"P == [](x = 0) -+-> [](x = 1)", "x' = x", "4:16", "plus_arrow"),
    (r"P == \AA y : x = 0", "x' = x", "4:6", "unbounded_quantification"),
    (r"P == \EE y : x = 0", "x' = x", "4:6", "unbounded_quantification"),
    (r"", r"\E y : x' = y", "6:9", "unbounded_quantification"),
    (r"", r"x' = CHOOSE y : y = 1", "6:14", "unbounded CHOOSE"),
    (r"", r"x' \in Nat", "6:9", "Nat|before it is assigned"),
    (r"", r"x' = Cardinality(Int)", "6:", "infinite"),
    (r"", r"x' = Cardinality({1} \cup Nat)", "6:", "infinite"),
    (r"", r"x' = [k \in {1}, j \in {1} |-> 0][1, 1]", "6:14", "nest"),
    (r"", r"x' = [f EXCEPT ![1, 1] = 3]", "6:", "except_update_fn_appl"),
    (r"", r"x' = Cardinality({<<a, b>> \in {1} \X {2} : TRUE})", "6:27", "plain names"),
    (r"", r"\E <<a, b>> \in {1} \X {2} : x' = a", "6:12", "plain names"),
    (r"", r"x' = 1.5", "6:14", "real_number"),
    (r"", r"x' = 1 / 2", "6:16", "slash"),
    (r"", r"x' = 99999999999", "6:14", "32 bits"),
    (r"", r"x' = (1 :> 2)[1]", "6:17", "map_to"),
    (r"", r"x' = Print(1, 1)", "6:14", "Print"),
    (r"", r"x' = IF {} = STRING THEN 1 ELSE 0", "6:22", "string_set"),
    (r"", r"x' = [a |-> 1, a |-> 2].a", "6:24", "given twice"),
    (r"", r"x' = @", "6:14", "@"),
    (r"", r"x'' = 1", "6:9", "prime within a prime"),
    (r"Id(a) == a'", r"x' = 1 /\ Id(x) = 1", "6:22", "takes the prime"),
    (r"", r"x' = 1 /\ (LET y == x IN y' = 1)", "6:34", "prime of y"),
    (r"", r"x' = 1 /\ (x + 1)' # x''", "6:30", "prime within a prime"),
    (r"", r"x' # 1", "6:9", "before it is assigned"),
    (r"", r"~(x' = 1)", "6:11", "before it is assigned"),
    (r"", r"x = 0 => x' = 1", "6:18", "before it is assigned"),
    (r"", r"UNCHANGED (x + 0)", "6:19", "expected variables"),
    (r"", r"x' = x /\ [](x = 0)", "6:19", "temporal"),
    (r"Nat == {1}", "x' = x", "4:1", "built in"),
    (r"F(x) == x", "x' = x", "4:1", "means something else"),
    ("A == 1\nA == 2", "x' = x", "5:1", "means something else"),
    (r"", r"x' = Cardinality({y \in {1} : \E y \in {1} : TRUE})", "6:39", "something else"),
    (r"", r"x' = IF TRUE = 1 THEN 1 ELSE 0", "6:17", "type error|differ in kind"),
    (r"S == SUBSET 0..2", "x' = x", "4:6", "ambiguous"),
    (r"S == {1} \cup {2} \cap {3}", "x' = x", "4:6", "ambiguous"),
    (r"B == x = 1 /\ x = 2 \/ x = 3", "x' = x", "4:6", "ambiguous"),
    (r"N == 1 % 2 + 3", "x' = x", "4:6", "ambiguous"),
    (r"C == INSTANCE Absent", "x' = x", "4:6", "Absent.tla beside it"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "step", "place", "words"), REFUSED)
def test_what_is_outside_the_subset_is_refused_by_both_engines(
    tmp_path: Path, text: str, step: str, place: str, words: str
) -> None:
    model = written(tmp_path, f"{text}\nInit == x = 0\nStep == {step}\nNext == Step")
    with pytest.raises(SpecError, match=words) as caught:
        emit_model(read_model(load_model(*model)), Bounds())
    assert f"M.tla:{place}" in str(caught.value)
    assert re.search(rf"M\.tla:\d+:\d+: .*({words})", interpreted(*model), re.DOTALL)


def interpreted(spec: Path, config: Path) -> str:
    """What the interpreter has to say of a model that means nothing."""
    try:
        report, _ = explore(load_model(spec, config))
    except SpecError as error:
        return str(error)
    assert report.result == "error"
    return str(report.violated)


@pytest.mark.parametrize("config", ["INVARIANT Ahead", "CONSTRAINT Ahead", "PROPERTY Ahead"])
def test_a_prime_has_no_place_in_what_is_said_of_one_state(tmp_path: Path, config: str) -> None:
    text = "Init == x = 0\nStep == x' = x\nNext == Step\nAhead == x' = 0"
    model = written(tmp_path, text, config)
    with pytest.raises(SpecError, match="one state"):
        check(*model, Settings(engine="compiled"))


def test_a_string_is_no_model_value(tmp_path: Path) -> None:
    """To the standard tools "a" and a differ; here they would be one."""
    text = 'CONSTANT A\nInit == x \\in A\nNext == Step\nStep == x = "a" /\\ x\' = x'
    with pytest.raises(SpecError, match=r"M\.tla:7:13: the string a is spelled as a model value"):
        load_model(*written(tmp_path, text, "CONSTANT A = {a, b} (* a comment *)"))
    load_model(*written(tmp_path, text, 'CONSTANT A = {"a", "b"} \\* strings'))


@pytest.mark.parametrize(
    ("guard", "ways"),
    [
        (r"x \in {0, x}", 1),  # a member is there once, whatever it is equal to
        (r"x \in {0} \cup {x}", 1),
        (r"x = 0 \/ x < 1", 2),  # each branch is a way on, as the standard tools count
        (r"IF x = 0 THEN x = 0 \/ x < 1 ELSE FALSE", 2),
        (r"CASE x = 0 -> x = 0 \/ x < 1", 2),
        (r"~(x = 1 \/ x > 1)", 1),
    ],
)
def test_a_guard_is_counted_once_for_each_way_it_holds(
    tmp_path: Path, guard: str, ways: int
) -> None:
    files = written(tmp_path, f"Init == x = 0\nStep == ({guard}) /\\ x' = 0\nNext == Step")
    for engine in ("compiled", "interpreter"):
        assert check(*files, Settings(engine=engine)).generated == 1 + ways
