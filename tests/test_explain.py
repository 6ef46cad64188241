"""Counterexamples in sentences and pictures: exact words for real ones, laws for any."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.cli import cli
from tokenspeed.errors import ConfigError
from tokenspeed.fsm import compiled, layered
from tokenspeed.fsm.check import Report, Settings, check, explore
from tokenspeed.fsm.emit_diagram import emit_mermaid, emit_svg
from tokenspeed.fsm.explain import TEMPLATES, collides, sentences
from tokenspeed.fsm.generated import ACTIONS, EDGES, STATES
from tokenspeed.fsm.graph import StateGraph, read_state_graph
from tokenspeed.fsm.lifecycle import read_lifecycle
from tokenspeed.fsm.model import Model, load_model
from tokenspeed.fsm.museum import read_museum, try_exhibit
from tokenspeed.fsm.pictures import (
    COLUMNS_MAX,
    LIFELINES_MAX,
    STATES_MAX,
    described,
    graph_dot,
    graph_svg,
    sequence_svg,
    sequence_text,
)
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


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (frozenset({1}), frozenset({1, 2}), "x gains 2"),
        (frozenset({1, 3}), frozenset({2}), "x gains 2 and loses 1 and 3"),
        (("a",), ("a", "b"), 'x ends in "b"'),
        (("a", "b"), ("b",), 'x becomes <<"b">>'),
        (Function({"a": 1, "b": 2}), Function({"a": 1, "b": 3}), "x[b] becomes 3"),
        (1, Function({"a": True}), "x becomes [a |-> TRUE]"),
        ((1,), (1,), "nothing changes"),
    ],
)
def test_changes_in_words(old: Value, new: Value, said: str) -> None:
    before, after = Step("", (), {"x": old}), Step("Go", (7, "a"), {"x": new})
    assert sentences([before, after])[1] == f"Go(7, a); {said}"


def test_a_step_that_changes_much_is_cut_short() -> None:
    before, after = (Step("Go", (), {f"x{n}": at for n in range(9)}) for at in range(2))
    assert sentences([before, after])[1].endswith("x3 becomes 1, 5 more changes")


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


# --- graphs ---------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> StateGraph:
    count = draw(st.integers(1, 9))
    states = [{"x": draw(values), "at": at} for at in range(count)]
    ends = st.integers(0, count - 1)
    steps = draw(st.lists(st.tuples(ends, st.text(max_size=6), ends), max_size=14, unique=True))
    violating = draw(st.frozensets(ends, max_size=2))
    return StateGraph(tuple(states), tuple(steps), frozenset({0}), violating)


def unquoted(text: str) -> str:
    """What Graphviz shows for the inside of a quoted label."""
    meaning = {"l": "\n", '"': '"', "\\": "\\"}
    shown = re.sub(r"\\(.)", lambda found: meaning[found[1]], text, flags=re.DOTALL)
    return shown.removesuffix("\n")


STRING = r'"((?:[^"\\]|\\.)*)"'


@given(graphs())
def test_dot_has_every_state_and_step_under_its_own_name(graph: StateGraph) -> None:
    dot = graph_dot(graph)
    found = re.findall(rf"(?ms)^  (\d+) \[label={STRING}([^\]]*)\];$", dot)
    assert [int(at) for at, _, _ in found] == list(range(len(graph.states)))
    shown = [unquoted(text) for _, text, _ in found]
    assert shown == [described(state).removesuffix("\n") for state in graph.states]
    assert {int(at) for at, _, marks in found if "red" in marks} == graph.violating
    edges = re.findall(rf"(?ms)^  (\d+) -> (\d+) \[label={STRING}\];$", dot)
    drawn = [(int(a), unquoted(name), int(b)) for a, b, name in edges]
    assert drawn == [(a, name.removesuffix("\n"), b) for a, name, b in graph.steps]


@given(graphs(), st.text(max_size=6))
def test_a_drawn_graph_has_every_box_and_arrow(graph: StateGraph, title: str) -> None:
    root = ElementTree.fromstring(graph_svg(graph, title))
    pairs = {(a, b) for a, _, b in graph.steps}
    heads = list(root.iter(f"{SVG}polygon"))
    assert len(heads) == len(pairs) + len(graph.initial)
    texts = ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]
    assert texts[0] == printable(title)
    assert {str(at) for at in range(len(graph.states))} <= set(texts)
    for _, name, _ in graph.steps:
        assert printable(name) in texts
    alarms = [e for e in root.iter(f"{SVG}rect") if "alarm" in e.attrib["class"]]
    assert len(alarms) == len(graph.violating)


@given(st.data())
def test_nothing_is_drawn_over_anything(data: st.DataObject) -> None:
    """Boxes and labels, loops aside, are apart; arrows begin and end at the border of a box."""
    sizes = st.floats(10, 90)
    boxes = data.draw(
        st.lists(st.builds(layered.Box, sizes, sizes, st.integers(0, 4)), min_size=1, max_size=8)
    )
    ends = st.integers(0, len(boxes) - 1)
    arrows = data.draw(st.lists(st.builds(layered.Arrow, ends, ends, sizes, sizes), max_size=12))
    drawing = layered.layout(boxes, arrows)
    taken = [(*at, box.wide, box.high) for box, at in zip(boxes, drawing.boxes, strict=True)]
    for arrow, route in zip(arrows, drawing.routes, strict=True):
        if arrow.source != arrow.target:
            taken.append((*route.label, arrow.wide, arrow.high))
        for number, point in ((arrow.source, route.points[0]), (arrow.target, route.points[-1])):
            (x, y), box = drawing.boxes[number], boxes[number]
            assert abs(point[0] - x) <= box.wide / 2 + 1e-6
            assert abs(point[1] - y) <= box.high / 2 + 1e-6
    for one, other in combinations(taken, 2):
        (x0, y0, w0, h0), (x1, y1, w1, h1) = one, other
        assert abs(x0 - x1) >= (w0 + w1) / 2 - 1e-6 or abs(y0 - y1) >= (h0 + h1) / 2 - 1e-6
    for x, y, wide, high in taken:
        assert x - wide / 2 >= -1e-6
        assert x + wide / 2 <= drawing.wide + 1e-6
        assert y - high / 2 >= -1e-6
        assert y + high / 2 <= drawing.high + 1e-6


def test_a_crossing_that_need_not_be_is_not_drawn() -> None:
    boxes = [layered.Box(20, 20, layer) for layer in (0, 0, 1, 1)]
    arrows = [layered.Arrow(0, 3, 9, 9), layered.Arrow(1, 2, 9, 9)]
    (a, b, c, d) = (x for x, _ in layered.layout(boxes, arrows).boxes)
    assert (a < b) == (d < c)


def test_a_graph_that_nobody_could_see_is_refused() -> None:
    states = tuple({"x": n} for n in range(STATES_MAX + 1))
    with pytest.raises(ConfigError, match="--dot FILE"):
        graph_svg(StateGraph(states, (), frozenset({0})))
    assert "at most" not in graph_dot(StateGraph(states, (), frozenset({0})))


@needs_compiler
def test_a_graph_ends_where_the_check_ended(broken_two_phase: Path) -> None:
    config, how = broken_two_phase.with_suffix(".cfg"), Settings(states_max=9)
    report = check(broken_two_phase, config, how)
    graph = read_state_graph(broken_two_phase, config, how, report)
    assert report.result == "error"
    assert len(graph.states) == report.distinct == 9
    assert graph.violating == frozenset()


@needs_compiler
def test_both_engines_have_one_graph(broken_two_phase: Path) -> None:
    config = broken_two_phase.with_suffix(".cfg")
    config.write_text(config.read_text().replace("INVARIANT Consistent", "CHECK_DEADLOCK FALSE"))
    found = []
    for engine in ("compiled", "interpreter"):
        how = Settings(engine=engine)
        graph = read_state_graph(
            broken_two_phase, config, how, check(broken_two_phase, config, how)
        )
        shown = [described(state) for state in graph.states]
        found.append({(shown[a], name, shown[b]) for a, name, b in graph.steps})
        assert [shown[at] for at in graph.initial] == shown[:1]
    assert found[0] == found[1]
    assert len(found[0]) > 100


def test_the_lifecycle_is_drawn_from_its_table() -> None:
    lifecycle = read_lifecycle(SPECS / "Lifecycle.tla")
    lines = re.findall(r"(?m)^    (\w+) --> (\w+): (.+)$", emit_mermaid(lifecycle))
    drawn = {(action, a, b) for a, b, names in lines for action in names.split(", ")}
    assert drawn == {(action, a, b) for action, edges in EDGES.items() for a, b in edges}
    assert len({(a, b) for a, b, _ in lines}) == len(lines)
    root = ElementTree.fromstring(emit_svg(lifecycle))
    texts = ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]
    assert {*STATES, *ACTIONS} <= set(texts)
    assert len(list(root.iter(f"{SVG}polygon"))) == len(lines) + 1


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


@needs_compiler
def test_the_command_draws_what_it_found(broken_two_phase: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"x.{name}" for name in ("sequence", "svg", "dot")}
    options = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    done = CliRunner().invoke(cli, ["check", str(broken_two_phase), *options])
    assert done.exit_code == 1
    assert "RcvCommit(rm2)" in files["sequence"].read_text()
    assert "mistyrose" in files["dot"].read_text()
    assert 'class="alarm' in files["svg"].read_text()


@needs_compiler
def test_the_command_refuses_what_it_cannot_draw(broken_two_phase: Path, tmp_path: Path) -> None:
    config = broken_two_phase.with_suffix(".cfg")
    config.write_text(
        config.read_text()
        .replace("rm1, rm2", "a, b, c, d")
        .replace("INVARIANT", "")
        .replace("Consistent", "CHECK_DEADLOCK FALSE")
    )
    options = ["check", str(broken_two_phase), "--svg", str(tmp_path / "x.svg")]
    done = CliRunner().invoke(cli, options)
    assert isinstance(done.exception, ConfigError)
    assert not (tmp_path / "x.svg").exists()
    done = CliRunner().invoke(cli, [*options, "--simulate", "3"])
    assert isinstance(done.exception, ConfigError)
    done = CliRunner().invoke(cli, [*options[:2], "--dot", str(tmp_path / "no" / "x.dot")])
    assert "No such file or directory" in str(done.exception)


@needs_compiler
def test_the_command_says_when_there_is_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "TwoPhase.cfg").write_text("CONSTANT RM = {a}\nINIT TPInit NEXT TPNext\n")
    drawing = ["--sequence", str(tmp_path / "x.svg")]
    config = ["--config", str(tmp_path / "TwoPhase.cfg")]
    done = CliRunner().invoke(cli, ["check", str(TWO_PHASE), *config, *drawing])
    assert "no counterexample" in done.stderr
    assert not (tmp_path / "x.svg").exists()
    assert isinstance(CliRunner().invoke(cli, ["check", *drawing]).exception, ConfigError)
