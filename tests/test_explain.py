"""Counterexamples in sentences and pictures: exact words for real ones, laws for any."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.cli import cli
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Report, Settings, check, explore
from tokenspeed.fsm.explain import TEMPLATES, collides, sentences
from tokenspeed.fsm.model import Model, load_model
from tokenspeed.fsm.museum import read_museum, try_exhibit
from tokenspeed.fsm.pictures import COLUMNS_MAX, LIFELINES_MAX, sequence_svg, sequence_text
from tokenspeed.fsm.steps import Step
from tokenspeed.fsm.svg import printable
from tokenspeed.fsm.values import Function, Value

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"
EXHIBITS = {exhibit.id: exhibit for exhibit in read_museum(SPECS).exhibits}
TWO_PHASE = Path(__file__).parent / "specs" / "TwoPhase.tla"

SVG = "{http://www.w3.org/2000/svg}"

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")


def museum(name: str) -> Report:
    return try_exhibit(SPECS, EXHIBITS[name], Settings(), lambda _: None)


@pytest.fixture
def broken_two_phase(tmp_path: Path) -> Path:
    """Two-phase commit whose managers commit without being told."""
    guard = '  /\\ [type |-> "Commit"] \\in msgs\n'
    text = TWO_PHASE.read_text()
    assert guard in text
    (tmp_path / "TwoPhase.tla").write_text(text.replace(guard, ""))
    config = "CONSTANT RM = {rm1, rm2}\nINIT TPInit NEXT TPNext\nINVARIANT Consistent\n"
    (tmp_path / "TwoPhase.cfg").write_text(config)
    return tmp_path / "TwoPhase.tla"


# --- exact words ----------------------------------------------------------------------------------


@needs_compiler
def test_a_page_that_returns_too_early_is_told_in_these_words() -> None:
    assert sentences(museum("NoReuseInFlight").trace) == (
        "initially r1 and r2 are New; p1 and p2 are Free",
        "r1 is submitted and becomes Waiting",
        "r1 is admitted from Waiting with nothing from the prefix cache",
        "page p1 is given to r1",
        "the plan takes in 1 token of r1 (number 1) to write and read p1",
        "r1 is aborted in Prefilling and becomes Aborting",
        "r1 becomes Aborted and gives back p1 (now Free) "
        "while a planned step of r1 still writes p1",
    )


def test_a_spec_that_is_not_ours_is_told_by_its_changes(broken_two_phase: Path) -> None:
    report = check(broken_two_phase, broken_two_phase.with_suffix(".cfg"), Settings(workers=1))
    assert report.violated == "Consistent"
    assert sentences(report.trace) == (
        'initially rmState = [rm1 |-> "working", rm2 |-> "working"], tmState = "init", '
        "tmPrepared = {}, msgs = {}",
        'ChooseToAbort(rm1); rmState[rm1] becomes "aborted"',
        'RcvCommit(rm2); rmState[rm2] becomes "committed"',
    )


@needs_compiler
@pytest.mark.parametrize(
    ("name", "clause"),
    [
        ("FreeUnique", "while p1 is Free and in the table of r2"),
        ("RefExact", "while p1 counts 1 reference and is in no tables"),
        ("MatchPins", "while p2 counts no references and is in 1 table"),
        ("ContentMatches", 'while p1 is cached as <<"common">> and holds nothing'),
        ("TerminalReleasesAll", "while r1 still holds p1"),
        ("AccountingExact", "while p1 is Exclusive and in no table"),
        (
            "NoDangling",
            'while p2 is cached as <<"common", "common">>, which continues <<"common">>',
        ),
    ],
)
def test_a_known_bug_collides_in_its_last_step(name: str, clause: str) -> None:
    *before, last = sentences(museum(name).trace)
    assert last.endswith(f" {clause}")
    assert not any(" while " in sentence for sentence in before)


def moved(
    step: Step, *, tab: dict[str, Value], writes: str = "p1", action: str = "Acquire"
) -> Step:
    """A state in which a launched step of r1 writes a page."""
    idle = Function({"from": 0, "n": 0, "reads": frozenset(), "writes": frozenset()})
    work = Function({"from": 0, "n": 1, "reads": frozenset(), "writes": frozenset({writes})})
    page = Function({"key": (), "kind": "Exclusive", "ref": 0})
    state = {
        **step.state,
        "st": Function({"r1": "Decoding", "r2": "Decoding"}),
        "tab": Function(tab),
        "planned": Function({"r1": 1, "r2": 0}),
        "page": Function({"p1": page, "p2": page}),
        "content": Function({"p1": (), "p2": ()}),
        "plan": Function({"r1": idle, "r2": idle}),
        "inflight": (Function({"r1": work, "r2": idle}),),
    }
    return Step(action, ("r2", "p1"), state)


def test_a_page_given_to_another_while_it_is_written() -> None:
    nothing = Step("", (), {})
    before = moved(nothing, tab={"r1": ("p1",), "r2": ("p2",)})
    after = moved(before, tab={"r1": (), "r2": ("p2", "p1")})
    assert sentences([before, after])[1] == (
        "page p1 is given to r2 while a launched step of r1 still writes p1"
    )
    assert collides(before, before) == ()  # what was there before is no news
    twice = moved(before, tab={"r1": ("p1", "p1"), "r2": ("p2",)})
    assert collides(before, twice) == ("while p1 is twice in the table of r1",)
    elsewhere = moved(before, tab={"r1": ("p1",), "r2": ("p2",)}, writes="p2")
    assert collides(before, elsewhere) == ("while p2 is held by r2",)


@needs_compiler
def test_a_shared_page_that_is_freed_is_drawn_in_these_rows() -> None:
    assert sequence_text(museum("FreeUnique").trace) == DIAGRAM.strip("\n")


DIAGRAM = """
                       r1                r2                steps             pages
     0 initially       │ New             │ New             │                 │
     1 Submit(r1)      ● Waiting         │                 │                 │
     2 Submit(r2)      │                 ● Waiting         │                 │
     3 Admit(r1)       ● Prefilling      │                 │                 │
     4 Acquire(r1, p1) │◄────────────────┼─────────────────┼─────────────────●
     5 Admit(r2)       │                 ● Prefilling      │                 │
     6 Acquire(r2, p2) │                 │◄────────────────┼─────────────────●
     7 Schedule(r1, 1) ●─────────────────┼────────────────►│                 │
     8 Schedule(r2, 1) │                 ●────────────────►│                 │
     9 Launch          │                 │                 ●                 │
    10 Complete        │◄ Decoding ──────│◄ Decoding ──────●                 │
    11 Preempt(r2)     │                 ● Preempted ──────┼────────────────►│
    12 Publish(r1)     ●─────────────────┼─────────────────┼────────────────►│
    13 Abort(r1)       ● Aborting        │                 │                 │
    14 Admit(r2)       │                 │◄ Prefilling ────┼─────────────────●
  ✗ 15 Release(r1)     ● Aborted ────────┼─────────────────┼────────────────►│
"""


def test_a_crowd_shares_a_lifeline() -> None:
    steps = [Step("Go" if n else "", (f"actor{n:02}",) if n else (), {"x": n}) for n in range(12)]
    head, *rows = sequence_text(steps).split("\n")
    assert head.split() == [*(f"actor{n:02}" for n in range(1, LIFELINES_MAX)), "others"]
    assert rows[-1].endswith("●")
    assert rows[11].index("●") == rows[8].index("●") == head.index("others")


def test_steps_that_repeat_are_bracketed() -> None:
    steps = [Step("Turn" if n else "", (), {"x": n % 2}) for n in range(5)]
    marks = [row[:2] for row in sequence_text(steps, loop=2).split("\n")]
    assert marks == ["  ", "  ", "  ", "  ", "┌►", "└─"]
    assert "and back to step 2, for ever" in sequence_svg(steps, loop=2)
    assert "for ever" not in sequence_svg(steps)


# --- laws -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, list[tuple[Step, Step]]]:
    """Every step of the smallest model of the lifecycle."""
    model = load_model(SPECS / "MCLifecycle.tla", SPECS / "tiny.cfg")
    _, reached = explore(model, 1_500)
    names = model.evaluator.variables
    successors = model.evaluator.successors(model.config.next)
    steps = []
    for state in reached:
        before = Step("", (), dict(zip(names, state, strict=True)))
        for (action, args), after in successors(state):
            steps.append((before, Step(action, args, dict(zip(names, after, strict=True)))))
    return model, steps


def test_every_action_of_the_lifecycle_has_its_words(
    tiny: tuple[Model, list[tuple[Step, Step]]],
) -> None:
    model, steps = tiny
    following = model.evaluator.definition(model.config.next)
    assert {*model.evaluator.action_names(following.body)} == TEMPLATES.keys()
    told = {step.action for _, step in steps}
    assert told == TEMPLATES.keys()


def test_steps_of_the_lifecycle_name_their_arguments_and_collide_with_nothing(
    tiny: tuple[Model, list[tuple[Step, Step]]],
) -> None:
    for before, step in tiny[1]:
        sentence = sentences([before, step])[1]
        assert all(str(arg) in sentence for arg in step.args)
        assert collides(before, step) == (), sentence


scalars = st.integers(-3, 3) | st.booleans() | st.text(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.frozensets(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(Function),
    ),
    max_leaves=6,
)


@st.composite
def behaviours(draw: st.DrawFn) -> list[Step]:
    """Any steps over the same variables."""
    names = draw(st.lists(st.sampled_from(["st", "page", "tab", "x", "plan"]), min_size=1))
    states = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, values)), min_size=1))
    actions = st.tuples(st.sampled_from(["Go", "Stop", *TEMPLATES]), st.lists(values, max_size=2))
    steps = [Step("", (), states[0])]
    for state in states[1:]:
        action, args = draw(actions)
        steps.append(Step(action, tuple(args), state))
    return steps


@given(behaviours())
def test_any_step_has_one_sentence_that_names_it(steps: list[Step]) -> None:
    told = sentences(steps)
    assert len(told) == len(steps)
    assert told[0].startswith("initially ")
    for step, sentence in zip(steps[1:], told[1:], strict=True):
        assert sentence.startswith(step.action)
        assert all(arg in sentence for arg in step.args if isinstance(arg, str))


@given(behaviours(), st.integers(0, 3))
def test_any_diagram_has_a_row_a_step(steps: list[Step], loop: int) -> None:
    head, *rows = sequence_text(steps, loop if loop < len(steps) - 1 else None).split("\n")
    assert [int(row[3:6]) for row in rows] == list(range(len(steps)))
    assert max(map(len, [head, *rows])) <= COLUMNS_MAX
    assert all(step.action[:20] in row for step, row in zip(steps[1:], rows[1:], strict=True))


@given(behaviours(), st.text(max_size=9))
def test_any_drawing_is_xml_that_shows_its_text(steps: list[Step], title: str) -> None:
    root = ElementTree.fromstring(sequence_svg(steps, title))
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == printable(title)
    shown = "".join("".join(root.itertext()).split())
    for sentence in sentences(steps):
        assert "".join(printable(sentence).split()) in shown


# --- the command ----------------------------------------------------------------------------------


@needs_compiler
def test_the_command_tells_and_reports_sentences(broken_two_phase: Path) -> None:
    done = CliRunner().invoke(cli, ["check", str(broken_two_phase), "--json"])
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["trace"][2]["sentence"] == 'RcvCommit(rm2); rmState[rm2] becomes "committed"'
    assert report["trace"][2]["action"] == "RcvCommit"
    assert '2  RcvCommit(rm2); rmState[rm2] becomes "committed"' in done.stderr
    assert 'rmState["rm2"]: "working" -> "committed"' in done.stderr
