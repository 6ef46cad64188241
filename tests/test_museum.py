"""Every bug of the museum is found by its property; guards are missed, or explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenspeed.errors import ConfigError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Report, Settings
from tokenspeed.fsm.museum import Exhibit, guards, read_museum, try_exhibit, try_guard
from tokenspeed.fsm.steps import changes

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"
MUSEUM = read_museum(SPECS)
GUARDS = {(spec, g.name): g for spec in MUSEUM.guards for g in guards(SPECS / spec)}

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")


def quiet(_: dict[str, int]) -> None: ...


@pytest.mark.parametrize("exhibit", MUSEUM.exhibits, ids=lambda e: e.id)
def test_every_exhibit_is_found_by_the_property_that_it_names(exhibit: Exhibit) -> None:
    report = try_exhibit(SPECS, exhibit, Settings(), quiet)
    assert report.violated == exhibit.property
    assert len(report.trace) > 1
    assert (report.loop is not None) == exhibit.liveness
    if not exhibit.liveness:  # a step that changed something led there
        assert changes(*report.trace[-2:])
    if exhibit.cpp and exhibit.cpp.startswith("compile_fail/"):
        assert (ROOT / "cpp" / "tests" / exhibit.cpp).exists()


def test_guards_are_found_where_they_stand() -> None:
    assert len(GUARDS) == sum(len(guards(SPECS / spec)) for spec in MUSEUM.guards)
    lifecycle = {name for spec, name in GUARDS if spec == "Lifecycle.tla"}
    assert {"Release: ~Pinned(r)", "Preempt: ~Pinned(r)", "Admit: SlotFree"} <= lifecycle
    assert "Publish: ~Cached(KeyOf(r, i))" in lifecycle
    host = {name for spec, name in GUARDS if spec == "HostTier.tla"}
    assert {"TierAcquire: ~MovingPage(p)", "TierEvict: Untouched(p)"} <= host
    assert "LoadStart: Root(k) \\/ Cached(k) \\/ Loading(k)" in host
    draft = {name for spec, name in GUARDS if spec == "Draft.tla"}
    assert {"Reserve: ~MovingPage(p)", "Trim: Room(r) >= PageSize + Needed(r)"} <= draft
    window = {name for spec, name in GUARDS if spec == "Window.tla"}
    assert {"Slide: ~Seen(i, done[r])", "SlidingEvict: p \\in Unheld"} <= window
    assert not [name for _, name in GUARDS if "Spec:" in name or "Init:" in name]
    for (spec, _), guard in GUARDS.items():
        text = (SPECS / spec).read_bytes()[guard.lies].decode()
        assert " ".join(text.split()) == guard.text


def test_survivors_are_guards_of_today() -> None:
    """`make test-slow` deletes them all; here is that the list is not stale."""
    for spec, judged in MUSEUM.guards.items():
        assert judged.survivors.keys() <= {name for of, name in GUARDS if of == spec}


def without(spec: str, name: str, how: Settings | None = None) -> Report | None:
    return try_guard(SPECS, MUSEUM, spec, GUARDS[spec, name], how or Settings(), quiet)


@pytest.mark.parametrize(
    ("spec", "name", "violated"),
    [
        ("Lifecycle.tla", "Submit: Fits(r)", "AdmitSound"),
        ("Lifecycle.tla", "Preempt: ~Pinned(r)", "NoReuseInFlight"),
        ("Lifecycle.tla", "Publish: ~Cached(KeyOf(r, i))", "OneCopyPerKey"),
        ("HostTier.tla", "TierAcquire: ~MovingPage(p)", "MovesPinned"),
        ("Draft.tla", "Speculate: 1 + k <= Room(r)", "ContentMatches"),
        ("Window.tla", "SlidingSubmit: FitsWindow(r)", "LetInSound"),
    ],
)
def test_a_deleted_guard_is_missed(spec: str, name: str, violated: str) -> None:
    report = without(spec, name)
    assert report is not None
    assert report.violated == violated


def test_one_program_has_every_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins in a state of its own, so that a program is built for a model and not a guard."""
    sources = []
    built = compiled._built
    monkeypatch.setattr(compiled, "_built", lambda source: sources.append(source) or built(source))
    for name in ("Release: ~Pinned(r)", "Acquire: p \\in FreePages"):
        report = without("Lifecycle.tla", name)
        assert report is not None
        assert {step.state["off"] for step in report.trace} == {report.trace[0].state["off"]}
    assert len(sources) == 2
    assert sources[0] == sources[1]


def test_a_search_that_ends_early_says_nothing_of_a_guard() -> None:
    """It is no violation: whoever gives a search too little must not hear that all is missed."""
    with pytest.raises(ConfigError, match=r"limit of states.*raise --memory-mb or --states-max"):
        without("Lifecycle.tla", "Submit: Fits(r)", Settings(states_max=10))


@pytest.mark.slow
@pytest.mark.xdist_group("guards")
@pytest.mark.parametrize(("spec", "name"), GUARDS, ids=lambda part: part)
def test_every_guard_is_missed_or_its_absence_is_explained(spec: str, name: str) -> None:
    assert (without(spec, name) is None) == (name in MUSEUM.guards[spec].survivors)


def test_an_exhibit_that_no_longer_fits_says_so() -> None:
    exhibit = Exhibit("X", "RefExact", "tiny.cfg", (("no such text", ""),), "", ())
    with pytest.raises(ConfigError, match="exactly once"):
        try_exhibit(SPECS, exhibit, Settings(), quiet)
