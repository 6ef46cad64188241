"""The compiled checker against published counts, against the interpreter, and against mutants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from models_here import DATA
from tokenspeed.cli import cli
from tokenspeed.errors import SpecError, TokenSpeedError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Report, Settings, check, explore, simulate, state_graph
from tokenspeed.fsm.evaluate import Label, State
from tokenspeed.fsm.model import load_model

ROOT = Path(__file__).resolve().parents[1]
SPECS = Path(__file__).parent / "specs"
DRAFT = DATA.parent / "design" / "spec_draft"

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")
needs_draft = pytest.mark.skipif(
    not DRAFT.is_dir(), reason="the draft spec (shared/design/spec_draft) is not here"
)

Triple = tuple[State, Label, State]
Engine = Literal["compiled", "interpreter"]
both_engines = pytest.mark.parametrize("engine", ["compiled", "interpreter"])


def counts(report: Report) -> tuple[str, int, int, int]:
    return report.result, report.generated, report.distinct, report.depth


def configured(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- counts that others have published ------------------------------------------------------------

TWO_PHASE = {
    3: (1_146, 288, 11, 318, 80),
    4: (8_258, 1_568, 14, 869, 166),
    5: (58_146, 8_832, 17, 2_048, 314),
    6: (402_306, 50_816, 20, 4_328, 553),
    7: (2_744_706, 296_448, 23, 8_410, 920),
    8: (18_507_778, 1_745_408, 26, 15_287, 1_461),
    9: (123_558_402, 10_340_352, 29, 26_316, 2_232),
}


def two_phase(tmp_path: Path, managers: int, more: str = "") -> Path:
    names = ", ".join("abcdefghi"[:managers])
    text = (
        f"CONSTANT RM = {{{names}}}\nINIT TPInit NEXT TPNext\nINVARIANT Consistent\n"
        f"CHECK_DEADLOCK FALSE\n{more}"
    )
    return configured(tmp_path / "TwoPhase.cfg", text)


@pytest.mark.parametrize(
    "managers", [pytest.param(n, marks=[pytest.mark.slow] * (n > 7)) for n in TWO_PHASE]
)
def test_two_phase_commit_has_its_published_counts(tmp_path: Path, managers: int) -> None:
    generated, distinct, depth, fewer, classes = TWO_PHASE[managers]
    spec = SPECS / "TwoPhase.tla"
    assert counts(check(spec, two_phase(tmp_path, managers))) == ("ok", generated, distinct, depth)
    config = two_phase(tmp_path, managers, "SYMMETRY Symmetric\n")
    assert counts(check(spec, config)) == ("ok", fewer, classes, depth)


@needs_draft
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("small", (60_163, 18_781, 25)),
        ("small_sym", (5_637, 1_741, 25)),
        ("mid", (514_913, 149_985, 27)),
        ("mid_sym", (12_766, 3_643, 27)),
        ("big_sym", (180_236, 42_203, 34)),
        ("tiny", (60_163, 18_781, 25)),
    ],
)
def test_the_draft_has_its_recorded_counts(config: str, expected: tuple[int, int, int]) -> None:
    report = check(DRAFT / "MCRequestKV.tla", DRAFT / f"{config}.cfg")
    assert counts(report) == ("ok", *expected)
    assert len(report.actions) == 14
    assert report.dead == ()


# --- the interpreter is the oracle ----------------------------------------------------------------


def compiled_graph(spec: Path, config: Path, path: Path) -> set[Triple]:
    """The labelled state graph, as the compiled model writes it."""
    state_graph(spec, config, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    states = [tuple(map(compiled.decode, line["state"].values())) for line in lines]
    return {
        (states[at], (action, tuple(map(compiled.decode, args))), states[to])
        for at, line in enumerate(lines)
        for action, args, to in line["steps"]
    }


def interpreted_graph(spec: Path, config: Path) -> set[Triple]:
    model = load_model(spec, config)
    _, reached = explore(model)
    successors = model.evaluator.successors(model.config.next)
    return {
        (state, label, after)
        for state in reached
        for label, after in successors(state)
        if after in reached
    }


CONSTRUCTS = "CONSTANTS A = {a, b} None = None\nSPECIFICATION Spec\nCHECK_DEADLOCK FALSE\n"


@pytest.mark.parametrize("more", ["CONSTRAINT Few\n", pytest.param("", marks=pytest.mark.slow)])
def test_every_construct_means_the_same_compiled_and_interpreted(tmp_path: Path, more: str) -> None:
    spec, config = SPECS / "Constructs.tla", configured(tmp_path / "c.cfg", CONSTRUCTS + more)
    graph = compiled_graph(spec, config, tmp_path / "graph")
    assert graph == interpreted_graph(spec, config)
    assert len(graph) > 5_000
    assert {action for _, (action, *_), _ in graph} == {
        "Set", "Turn", "Stop", "Drain", "Count", "Idle",
    }  # fmt: skip


# A function of names looks like a record until it is applied, updated, or asked for its domain.
SIDES = """---- MODULE Sides ----
EXTENDS Naturals
VARIABLES alive, left
Die(side) == /\\ \\A each \\in DOMAIN alive : alive[each]
             /\\ alive' = [alive EXCEPT ![side] = FALSE]
             /\\ UNCHANGED left
Fence == /\\ alive["Sender"] # alive["Receiver"]
         /\\ left' = {side \\in left : alive[side]}
         /\\ UNCHANGED alive
Wake == /\\ ~alive["Sender"]
        /\\ alive' = [alive EXCEPT !["Sender"] = TRUE]
        /\\ UNCHANGED left
Init == alive = [side \\in {"Sender", "Receiver"} |-> TRUE] /\\ left = DOMAIN alive
Next == Fence \\/ Wake \\/ \\E side \\in DOMAIN alive : Die(side)
====
"""


def test_a_function_of_names_is_applied_by_name(tmp_path: Path) -> None:
    spec = tmp_path / "Sides.tla"
    spec.write_text(SIDES)
    config = configured(tmp_path / "Sides.cfg", "INIT Init\nNEXT Next\n")
    graph = compiled_graph(spec, config, tmp_path / "graph")
    assert graph == interpreted_graph(spec, config)
    assert {action for _, (action, *_), _ in graph} == {"Die", "Fence", "Wake"}


@needs_draft
def test_the_draft_has_its_recorded_graph(tmp_path: Path) -> None:
    """59,802 distinct (state, action, state') triples; see the draft's README."""
    graph = compiled_graph(DRAFT / "MCRequestKV.tla", DRAFT / "small.cfg", tmp_path / "graph")
    assert len(graph) == 59_802


@pytest.mark.parametrize("more", ["", "CONSTRAINT Small\n", "CONSTRAINT Few\nSYMMETRY Symmetric\n"])
def test_counts_do_not_depend_on_the_workers(tmp_path: Path, more: str) -> None:
    spec = SPECS / "Constructs.tla"
    text = CONSTRUCTS + "INVARIANT TypeOK Sums\n" + more
    config = configured(tmp_path / "c.cfg", text)
    reports = [check(spec, config, Settings(workers=n)) for n in (1, 2, 3)]
    assert len({counts(r) for r in reports}) == 1
    assert reports[0].result == "ok"
    assert reports[0].actions == reports[2].actions
    failing = configured(tmp_path / "f.cfg", text + "INVARIANT Never\n")
    broken = [check(spec, failing, Settings(workers=n)) for n in (1, 2)]
    assert {r.violated for r in broken} == {"Never"}
    assert broken[0].trace == broken[1].trace
    assert counts(broken[0]) == counts(broken[1])


def test_a_violation_is_the_interpreters(tmp_path: Path) -> None:
    """The same shortest counterexample, the same counts when it is found."""
    spec = SPECS / "Constructs.tla"
    config = configured(tmp_path / "c.cfg", CONSTRUCTS + "INVARIANT Never\n")
    fast, slow = (check(spec, config, Settings(engine=e)) for e in ("compiled", "interpreter"))
    assert counts(fast) == counts(slow)
    assert fast.trace == slow.trace
    assert fast.violated == slow.violated == "Never"


# --- temporal properties --------------------------------------------------------------------------


def test_an_instance_is_a_refinement(tmp_path: Path) -> None:
    """`Counter!Spec` of another module holds, and stops holding when the module is narrowed."""
    for name in ("Constructs.tla", "Counter.tla"):
        shutil.copy(SPECS / name, tmp_path)
    config = configured(tmp_path / "c.cfg", CONSTRUCTS + "PROPERTY Counts\n")
    assert check(tmp_path / "Constructs.tla", config).result == "ok"
    counter = tmp_path / "Counter.tla"
    counter.write_text(counter.read_text().replace("value' > value", "value' = value + 1"))
    report = check(tmp_path / "Constructs.tla", config)
    assert (report.result, report.violated) == ("invariant", "Counts")
    assert report.trace[-1].action == "Count"
    before, after = report.trace[-2:]
    assert after.state["n"] == before.state["n"] + 2


LIGHTS = """---- MODULE Lights ----
EXTENDS Naturals
VARIABLES x, y
vars == <<x, y>>
Init == x = 0 /\\ y = 0
Up == x < 3 /\\ x' = x + 1 /\\ UNCHANGED y
Reset == x = 3 /\\ x' = 0 /\\ UNCHANGED y
Flip == x = 2 /\\ y' = 1 /\\ UNCHANGED x
Next == Up \\/ Reset \\/ Flip
Weak == Init /\\ [][Next]_vars /\\ WF_vars(Up) /\\ WF_vars(Reset) /\\ WF_vars(Flip)
Strong == Init /\\ [][Next]_vars /\\ WF_vars(Up) /\\ WF_vars(Reset) /\\ SF_vars(Flip)
Unfair == Init /\\ [][Next]_vars
Lit == x = 0 ~> y = 1
Often == []<>(x = 3)
Once == <>(x = 2)
Stays == <>[](y = 1)
Grows == [][x' >= x]_vars
====
"""


@both_engines
@pytest.mark.parametrize(
    ("spec", "formula", "result"),
    [
        ("Strong", "Lit", "ok"),
        ("Weak", "Lit", "liveness"),  # Flip is enabled again and again, and never for good
        ("Weak", "Often", "ok"),
        ("Unfair", "Often", "liveness"),
        ("Weak", "Once", "ok"),
        ("Unfair", "Once", "liveness"),
        ("Strong", "Stays", "ok"),
        ("Weak", "Stays", "liveness"),
        ("Weak", "Grows", "invariant"),
    ],
)
def test_fairness_decides(
    tmp_path: Path, engine: Engine, spec: str, formula: str, result: str
) -> None:
    path = tmp_path / "Lights.tla"
    path.write_text(LIGHTS)
    config = configured(tmp_path / "Lights.cfg", f"SPECIFICATION {spec}\nPROPERTY {formula}\n")
    report = check(path, config, Settings(engine=engine))
    assert report.result == result
    assert report.violated == (None if result == "ok" else formula)
    if result == "liveness":
        assert report.loop is not None
        assert report.trace[report.loop].state == report.trace[-1].state
        lasso = report.trace[report.loop + 1 :]
        if spec == "Weak":  # the loop is fair: it keeps going up and starting again
            assert {"Up", "Reset"} <= {step.action for step in lasso}
        assert all(step.state["y"] == 0 for step in lasso) or formula == "Often"


@both_engines
@pytest.mark.parametrize(
    ("spec", "formula", "constraint", "result"),
    [
        ("Weak", "Lit", "ACTION_CONSTRAINT Rising", "ok"),  # fair, it would have to Reset
        ("Unfair", "Lit", "ACTION_CONSTRAINT Rising", "liveness"),
        ("Weak", "Once", "CONSTRAINT Low", "ok"),  # fair, it would have to go Up, out of it
    ],
)
def test_liveness_within_a_constraint_is_of_the_behaviours_that_keep_to_it(
    tmp_path: Path, engine: Engine, spec: str, formula: str, constraint: str, result: str
) -> None:
    path = tmp_path / "Lights.tla"
    path.write_text(LIGHTS.replace("====", "Rising == x' >= x\nLow == x < 2\n===="))
    text = f"SPECIFICATION {spec}\nPROPERTY {formula}\n{constraint}\n"
    config = configured(tmp_path / "Lights.cfg", text)
    report = check(path, config, Settings(engine=engine))
    assert report.result == result
    assert "keep to the CONSTRAINT" in report.notes[0]
    if result == "liveness":
        values = [step.state["x"] for step in report.trace]
        assert values == sorted(values), "no step breaks the constraint"


@needs_draft
def test_the_livelock_of_the_draft_is_found_again(tmp_path: Path) -> None:
    """A prefetch that takes the page which was just evicted for somebody who starves."""
    for path in DRAFT.glob("*"):
        shutil.copy(path, tmp_path)
    spec = tmp_path / "RequestKV.tla"
    guard = "  /\\ Cardinality(FreePages) > Cardinality({r \\in Req : Wants(r)})\n"
    text = spec.read_text()
    assert text.count(guard) == 1
    spec.write_text(text.replace(guard, ""))
    report = check(tmp_path / "MCRequestKV.tla", tmp_path / "tiny.cfg")
    assert (report.result, report.violated) == ("liveness", "EveryRequestEnds")
    assert report.loop is not None
    assert {"Evict", "LoadStart"} <= {step.action for step in report.trace[report.loop + 1 :]}


SEEDED = [
    ("M1", "  /\\ st[r] \\in Draining\n  /\\ ~Pinned(r)\n", "  /\\ st[r] \\in Draining\n",
     "WritesOwned", 6),
    ("M2", "  /\\ Running # {r}\n  /\\ ~Pinned(r)\n", "  /\\ Running # {r}\n", "WritesOwned", 10),
    ("M3", "THEN [page[p] EXCEPT !.ref = @ - 1]", "THEN page[p]", "Conservation", 12),
    ("M4", 'page[p].kind = "cached" /\\ page[p].ref = 0}', 'page[p].kind = "cached"}',
     "Conservation", 11),
    ("M5", "/\\ p \\in Evictable /\\ ~Starved", '/\\ page[p].kind = "cached" /\\ ~Starved',
     "Conservation", 11),
    ("M6", "  /\\ \\A p \\in Page : page[p].key # Prompt[r][i]\n", "", "OneCopyPerKey", 13),
    ("M7", '[] OTHER                                                    -> st[r]',
     '[] OTHER -> IF st[r] \\in Draining THEN "Decoding" ELSE st[r]', "DrainOnly", 7),
    ("M8", ' == {p \\in Page : page[p].kind = "cached" /\\ page[p].key = k}',
     ' == {p \\in Page : page[p].kind \\in {"cached", "loading"} /\\ page[p].key = k}',
     "Conservation", 14),
]  # fmt: skip


@needs_draft
@pytest.mark.parametrize(("find", "replace", "violated", "length"), [
    pytest.param(*row[1:], id=row[0]) for row in SEEDED
])  # fmt: skip
def test_seeded_bugs_of_the_draft_are_found_by_name(
    tmp_path: Path, find: str, replace: str, violated: str, length: int
) -> None:
    for path in DRAFT.glob("*"):
        shutil.copy(path, tmp_path)
    spec = tmp_path / "RequestKV.tla"
    text = spec.read_text()
    assert text.count(find) == 1
    spec.write_text(text.replace(find, replace))
    names = (
        "NoDoubleMap Conservation OneCopyPerKey OneWriter WritesOwned ReadsHeld RetractSafe "
        "HostAgrees TypeOK"
    )
    small = (DRAFT / "small.cfg").read_text().replace("INVARIANT Safety", f"INVARIANT {names}")
    config = configured(tmp_path / "m.cfg", small + "PROPERTY DrainOnly\n")
    report = check(tmp_path / "MCRequestKV.tla", config)
    assert (report.violated, len(report.trace)) == (violated, length)


# --- bounds, limits, refusals ---------------------------------------------------------------------

COUNTING = """---- MODULE Up ----
EXTENDS Integers, Sequences
CONSTANT Limit
VARIABLES x, s
Init == x = 0 /\\ s = {}
Next == Step
Step == x < Limit /\\ x' = x + 1 /\\ s' = s \\cup {-x}
Below == x < 9
====
"""


def test_bounds_that_nobody_states_are_widened(tmp_path: Path) -> None:
    path = tmp_path / "Up.tla"
    path.write_text(COUNTING)
    config = configured(
        tmp_path / "Up.cfg", "CONSTANT Limit = 300\nINIT Init NEXT Next\nCHECK_DEADLOCK FALSE\n"
    )
    assert counts(check(path, config)) == ("ok", 301, 301, 301)
    stuck = configured(tmp_path / "d.cfg", "CONSTANT Limit = 5\nINIT Init NEXT Next\n")
    report = check(path, stuck)
    assert (report.result, len(report.trace)) == ("deadlock", 6)


def test_limits_keep_partial_counts(tmp_path: Path) -> None:
    config = two_phase(tmp_path, 7)
    report = check(SPECS / "TwoPhase.tla", config, Settings(states_max=1_000))
    assert (report.result, report.distinct) == ("error", 1_000)
    assert "limit of states" in str(report.violated)
    report = check(SPECS / "TwoPhase.tla", two_phase(tmp_path, 7), Settings(memory_mb=1))
    assert report.result == "error"
    assert report.distinct > 1_000
    assert "memory" in str(report.violated)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(TokenSpeedError, match="XDG_CACHE_HOME"):
        check(SPECS / "TwoPhase.tla", two_phase(tmp_path, 3))
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(TokenSpeedError, match="cannot write"):
        state_graph(SPECS / "TwoPhase.tla", two_phase(tmp_path, 3), tmp_path / "none" / "graph")


def test_without_a_compiler_it_interprets_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    spec = SPECS / "TwoPhase.tla"
    report = check(spec, two_phase(tmp_path, 3))
    assert counts(report) == ("ok", 1_146, 288, 11)
    assert report.engine == "interpreter"
    assert "no C++ compiler" in report.notes[0]
    report = check(spec, two_phase(tmp_path, 3, "SYMMETRY Symmetric\n"))
    assert counts(report) == ("ok", 318, 80, 11)


@pytest.mark.parametrize(
    ("body", "config", "words"),
    [
        ('Init == x = 0\nNext == Step\nStep == x\' = "a"', "", "type error"),
        ("Init == x = 0\nNext == Step\nStep == x' = y", "", "unknown name y"),
        ("Init == x = 0\nNext == Step\nStep == x' \\in Nat", "", "read before it is assigned"),
        ("Init == x = 0\nNext == Step\nStep == x' = F(1)\nF(a, b) == a", "", "got 1 arguments"),
        ("Init == x = {}\nNext == Step\nStep == x' = SUBSET x", "", "type error"),
        ("Init == x = 0\nNext == Step\nStep == \\E i \\in Int : x' = i", "", "Int|infinite"),
        ("Init == x = 0\nNext == Step\nStep == x' = 1 - x\nP == <>([]<>(x = 1))",
         "PROPERTY P", "nested"),
        ("Init == x = 0\nNext == Step\nStep == x' = 1 - x\nS == {}\nP == <>(x = 1)",
         "PROPERTY P\nSYMMETRY S", "SYMMETRY"),
    ],
)  # fmt: skip
def test_broken_specs_are_refused_with_their_place(
    tmp_path: Path, body: str, config: str, words: str
) -> None:
    path = tmp_path / "M.tla"
    path.write_text(f"---- MODULE M ----\nEXTENDS Integers\nVARIABLE x\n{body}\n====\n")
    settings = configured(tmp_path / "M.cfg", f"INIT Init NEXT Next\n{config}\n")
    with pytest.raises(SpecError, match=words) as caught:
        check(path, settings)
    assert ".tla:" in str(caught.value) or ".cfg:" in str(caught.value)


@both_engines
@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("x' = Append(Tail(x), Head(x)) /\\ x[3] = 1", "outside"),
        ("x' = Tail(x)", "Tail of an empty sequence"),
        ("x' = SubSeq(x, 2, 3)", "beyond the sequence"),
        ("x' = Append(SubSeq(x, 0, 1), 1)", "beyond the sequence"),
        ("x' = SubSeq(x, Head(x), Len(x) - 1)", "Head of an empty sequence"),
        ("x' = <<1 \\div (Head(x) - 1)>>", "no value"),
        ("x' = <<1 % (Head(x) - 3)>>", "no value"),
        ("x' = <<65536 * (Head(x) + 65535)>>", "no value"),
        ("x' = <<CHOOSE y \\in {1, 2} : y > 2>>", "CHOOSE"),
        ("x' = <<CASE x[1] > 1 -> 1 [] x[1] < 1 -> 2>>", "no arm of this CASE"),
        ("CASE x[1] > 1 -> x' = x [] x[1] < 1 -> x' = x", "no arm of this CASE"),
    ],
)
def test_what_has_no_value_is_an_error_with_its_place(
    tmp_path: Path, engine: Engine, step: str, words: str
) -> None:
    path = tmp_path / "M.tla"
    path.write_text(
        "---- MODULE M ----\nEXTENDS Naturals, Sequences\nVARIABLE x\nInit == x = <<1, 2>>\n"
        f"Next == Step\nStep == {step}\n====\n"
    )
    settings = configured(tmp_path / "M.cfg", "INIT Init NEXT Next\n")
    report = check(path, settings, Settings(engine=engine))
    assert report.result == "error"
    assert report.distinct >= 1, "what was found before stands"
    assert "M.tla:6:" in str(report.violated)
    assert words in str(report.violated)


# --- simulation, command line ---------------------------------------------------------------------


def test_walks_are_behaviours_and_repeat_by_seed(tmp_path: Path) -> None:
    spec = SPECS / "Constructs.tla"
    config = configured(tmp_path / "c.cfg", CONSTRUCTS + "INVARIANT Never\n")
    reports = [simulate(spec, config, walks=400, depth=60, seed=7) for _ in range(2)]
    assert reports[0].trace == reports[1].trace
    assert reports[0].violated == "Never"
    successors = load_model(spec, config).evaluator.successors("Next")
    states = [tuple(step.state.values()) for step in reports[0].trace]
    for before, step, after in zip(states, reports[0].trace[1:], states[1:], strict=False):
        assert ((step.action, step.args), after) in set(successors(before))


def test_the_command_reports_in_json(tmp_path: Path) -> None:
    spec, config = str(SPECS / "TwoPhase.tla"), str(two_phase(tmp_path, 3))
    done = CliRunner().invoke(cli, ["check", spec, "--config", config, "--json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert {"result", "generated", "distinct", "depth", "seconds", "actions", "violated",
            "trace"} <= report.keys()  # fmt: skip
    assert report["distinct"] == 288
    failing = configured(tmp_path / "f.cfg", Path(config).read_text() + "INVARIANT Undecided\n")
    done = CliRunner().invoke(cli, ["check", spec, "--config", str(failing), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["violated"] == "Undecided"


def test_the_monitor_command_names_the_rule(tmp_path: Path) -> None:
    stored = {
        "type": "BlockStored", "block_hashes": [1], "parent_block_hash": None,
        "token_ids": [5, 6], "block_size": 2, "lora_id": None,
    }  # fmt: skip
    events = tmp_path / "events.ndjson"
    events.write_text(json.dumps({"ts": 0.0, "events": [stored]}) + "\n")
    done = CliRunner().invoke(cli, ["monitor", str(events), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["result"] == "ok"
    other = {**stored, "token_ids": [7, 8]}  # the same hash for other tokens
    events.write_text(json.dumps({"ts": 0.0, "events": [stored, other]}) + "\n")
    done = CliRunner().invoke(cli, ["monitor", str(events), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["violated"] == "KeyInjective"
