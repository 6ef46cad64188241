"""Rungs two and three: one labelled graph from compiled model, mirror and real runtime."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner, Result

from tokenspeed.cli import cli
from tokenspeed.errors import ConfigError
from tokenspeed.fsm import commands, compiled
from tokenspeed.fsm.check import Settings, check
from tokenspeed.fsm.conform import Graph, conform, mirrored, read_graph
from tokenspeed.fsm.manifest import read_manifest
from tokenspeed.fsm.mirror import Action, Mirror
from tokenspeed.fsm.model import load_model
from tokenspeed.fsm.museum import read_museum, try_exhibit
from tokenspeed.fsm.runtime import Observed, Runtime, Tried, observed, replay

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"
LIFECYCLE = SPECS / "MCLifecycle.tla"
TIER = SPECS / "MCHostTier.tla"
RECORDED = {model.name: model for model in read_manifest(SPECS)}

DRAFT = SPECS / "MCDraft.tla"
WINDOW = SPECS / "MCWindow.tla"
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("pages", "host", "draftone", "draftroom", "draftslot", "windowslot")
]

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "pages",
        "toolong",
        "priorities",
        "draftslot",
        "draftone",
        "draftroom",
        "windowslot",
        "windowlong",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "keys",
                "oneslot",
                "host",
                "draftpages",
                "drafthostslot",
                "windowpages",
                "windowhole",
                "windowback",
            )
        ),
    ],
)
def test_the_runtime_is_the_model_in_every_state(name: str) -> None:
    model = RECORDED[name]
    found = conform(SPECS / model.spec, SPECS / model.config)
    assert found.divergence is None, str(found.divergence)
    assert found.states == model.distinct
    assert found.refused > found.states, "what is illegal was tried too"
    assert found.graph == model.graph


@needs_compiler
@pytest.mark.parametrize("name", ["tiny", "toolong", "windowlong", *SLOW])
def test_compiled_model_and_mirror_have_the_recorded_graph(name: str) -> None:
    model = RECORDED[name]
    compiled_graph = read_graph(SPECS / model.spec, SPECS / model.config)
    assert compiled_graph.digest() == model.graph
    assert mirrored(SPECS / model.spec, SPECS / model.config).digest() == model.graph


def test_what_cannot_be_looked_at_is_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control plane gone wrong may show what is no state of any spec, or raise."""
    state = Runtime.state

    def impossible(runtime: Runtime) -> Observed:
        if any(request[1] for request in runtime.snapshot()["requests"].values()):
            raise IndexError("page 7 of 2")
        return state(runtime)

    monkeypatch.setattr(Runtime, "state", impossible)
    found = conform(LIFECYCLE, SPECS / "toolong.cfg")
    assert found.graph == ""
    assert str(found.divergence) == (
        'after Submit("r1") > Admit("r1"): Acquire("r1", "p1"): it raises IndexError: page 7 of 2'
    )


@needs_compiler
def test_a_digest_tells_one_step_from_another() -> None:
    graph = read_graph(LIFECYCLE, SPECS / "toolong.cfg")
    last = len(graph.steps) - 1
    without = attrs.evolve(graph, steps=(graph.steps[0], (), *graph.steps[2:]))
    moved = tuple((action, last) for action, _ in graph.steps[1])
    elsewhere = attrs.evolve(graph, steps=(graph.steps[0], moved, *graph.steps[2:]))
    digests = {g.digest() for g in (graph, without, elsewhere, Graph((), ()))}
    assert len(digests) == 4


def test_without_a_compiler_the_mirror_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    found = conform(LIFECYCLE, SPECS / "toolong.cfg")
    assert (found.divergence, found.graph) == (None, RECORDED["toolong"].graph)


def test_another_spec_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"age, done, inflight, known.*missing"):
        observed({"rmState": (), "tmState": "init"})


# --- along a behaviour --------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (LIFECYCLE, "NeverEvicted"),
        (LIFECYCLE, "NeverPreempted"),
        (LIFECYCLE, "NeverDropped"),
        (TIER, "NeverLoaded"),
        (TIER, "NeverAlreadyComputed"),
        (DRAFT, "NeverSomeWrong"),
        (DRAFT, "NeverDroppedGuess"),
        (WINDOW, "NeverSharedHole"),
        (WINDOW, "NeverHitBehindHole"),
    ],
)
def test_the_runtime_follows_what_the_spec_allows(spec: Path, name: str) -> None:
    config = SPECS / "reach" / f"{name}.cfg"
    report = check(spec, config, Settings())
    found = replay(load_model(spec, config).evaluator, report.trace)
    assert (found.steps, found.why) == (len(report.trace) - 1, "")


@needs_compiler
@pytest.mark.parametrize(
    ("bug", "why"),
    [
        ("NoReuseInFlight", 'Release("r1"): it refuses'),
        ("ContentMatches", 'Publish("r1"): it refuses'),
        ("MatchPins", "it does this, with another outcome"),
    ],
)
def test_the_runtime_does_not_follow_a_bug(bug: str, why: str) -> None:
    exhibit = next(e for e in read_museum(SPECS).exhibits if e.id == bug)
    report = try_exhibit(SPECS, exhibit, Settings(), lambda _: None)
    found = replay(load_model(LIFECYCLE, SPECS / exhibit.config).evaluator, report.trace)
    assert found.steps == len(report.trace) - 2, "all but the last step, which is the bug"
    assert why in found.why


def drive(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["check", *map(str, words)])


@needs_compiler
def test_the_command_drives_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    done = drive(LIFECYCLE, "--config", SPECS / "toolong.cfg", "--runtime", "--json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["states"] == RECORDED["toolong"].distinct
    assert (row["graph"], row["differs"]) == (RECORDED["toolong"].graph, None)

    stale = attrs.evolve(RECORDED["toolong"], graph="0" * 64)
    monkeypatch.setattr(commands, "read_manifest", lambda _: [stale, RECORDED["large"]])
    done = drive("--runtime", "--json")
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)
    assert row["differs"] == f"graph {RECORDED['toolong'].graph}, recorded {'0' * 64}"


@needs_compiler
def test_the_command_replays_a_counterexample() -> None:
    done = drive(LIFECYCLE, "--config", SPECS / "reach" / "NeverEvicted.cfg", "--replay")
    assert done.exit_code == 1
    assert "the runtime took 9 steps as told: all of them" in done.stderr
    done = drive(LIFECYCLE, "--config", SPECS / "reach" / "NeverEvicted.cfg", "--replay", "--json")
    assert json.loads(done.stdout)["replay"] == {"steps": 9, "why": ""}


@needs_compiler
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("wide.cfg", "wide.cfg with Symmetric"),
        ("reach/NeverEvicted.cfg", "NeverEvicted.cfg: invariant, NeverEvicted"),
    ],
)
def test_a_part_of_a_graph_proves_nothing(config: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        conform(LIFECYCLE, SPECS / config)
    with pytest.raises(ConfigError, match="error, the limit of states was reached"):
        conform(LIFECYCLE, SPECS / "tiny.cfg", Settings(states_max=100))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--replay"], "--replay"),
        ([LIFECYCLE, "--runtime", "--replay"], "--replay"),
        (["--museum", "--runtime"], "--museum --runtime"),
        ([LIFECYCLE, "--museum"], "none with --museum"),
        (["--trace", LIFECYCLE, "--simulate", "5"], "--trace --simulate"),
        (["--simulate", "5"], "a check of one SPEC"),
        ([LIFECYCLE, "--simulate", "5", "--svg", "unwritten.svg"], "leave it out to draw"),
        (["--config", SPECS / "tiny.cfg"], "a SPEC before it"),
        ([LIFECYCLE, "--config", SPECS / "tiny.cfg", "--record"], "--record"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: list[str | Path], named: str) -> None:
    error = drive(*words).exception
    assert isinstance(error, ConfigError)
    assert named in str(error)


# --- the mirror, for research -------------------------------------------------------------------


def test_the_mirror_is_two_pure_functions() -> None:
    mirror = Mirror.load(LIFECYCLE, SPECS / "tiny.cfg")
    (start,) = mirror.initial
    before = start.values
    (after,) = mirror.step(start, Action("Submit", ("r1",)))
    assert (start.st["r1"], after.st["r1"]) == ("New", "Waiting")
    assert start.values is before
    assert mirror.step(start, Action("Admit", ("r1",))) == ()
    with pytest.raises(ConfigError, match="'Admitt'; expected one of Submit, Admit"):
        mirror.step(start, Action("Admitt", ("r1",)))
    assert str(after).splitlines()[0] == '/\\ st = ("r1" :> "Waiting" @@ "r2" :> "New")'
    assert mirror.step(start, Action("Submit", ("r1",))) == (after,)
    assert {after: "a state is a key"}[after]
    assert {*map(str, mirror.enabled(after))} == {'Submit("r2")', 'Admit("r1")', 'Abort("r1")'}
    assert mirror.broken(after) == ()
    with pytest.raises(AttributeError, match="no variable colour"):
        after.colour  # noqa: B018
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        after.values = ()  # type: ignore[misc]


def test_a_choice_leads_to_several_states() -> None:
    """`Complete` chooses who stops; the runtime is told the choice."""
    spec = load_model(LIFECYCLE, SPECS / "tiny.cfg").evaluator
    way = [Action("Submit", ("r1",)), Action("Admit", ("r1",)), Action("Acquire", ("r1", "p1")),
           Action("Schedule", ("r1", 1)), Action("Launch")]  # fmt: skip
    mirror = Mirror.load(LIFECYCLE, SPECS / "tiny.cfg")
    (state,) = mirror.initial
    for action in way:
        (state,) = mirror.step(state, action)
    ends = {after.st["r1"] for after in mirror.step(state, Action("Complete"))}
    assert ends == {"Decoding", "Finishing"}
    for stop, end in ((frozenset[str](), "Decoding"), (frozenset({"r1"}), "Finishing")):
        runtime = Runtime(spec)
        assert all(runtime.take(Tried(action)) for action in way)
        assert runtime.take(Tried(Action("Complete"), stop))
        assert runtime.state()[0]["r1"] == end
