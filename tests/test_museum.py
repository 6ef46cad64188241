"""Every bug of the museum is found by its property; guards are missed, or explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenspeed.errors import ConfigError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Settings
from tokenspeed.fsm.museum import Exhibit, Guard, guards, read_museum, try_exhibit, try_guard
from tokenspeed.fsm.steps import changes

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"
MUSEUM = read_museum(SPECS)
GUARDS = guards(SPECS / "Lifecycle.tla")

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
    names = [guard.name for guard in GUARDS]
    assert len(set(names)) == len(names)
    assert {"Release: /\\ ~Pinned(r)", "Preempt: /\\ ~Pinned(r)", "Admit: /\\ SlotFree"} <= {*names}
    assert "Publish: /\\ ~Cached(KeyOf(r, i))" in names
    text = (SPECS / "Lifecycle.tla").read_text()
    for guard in GUARDS:
        assert " ".join(text[guard.start : guard.end].split()) == guard.text


def test_survivors_are_guards_of_today() -> None:
    """`make test-slow` deletes them all; here is that the list is not stale."""
    assert MUSEUM.survivors.keys() <= {guard.name for guard in GUARDS}


@pytest.mark.parametrize(
    ("name", "violated"),
    [
        ("Submit: /\\ Fits(r)", "AdmitSound"),
        ("Preempt: /\\ ~Pinned(r)", "NoReuseInFlight"),
        ("Publish: /\\ ~Cached(KeyOf(r, i))", "OneCopyPerKey"),
    ],
)
def test_a_deleted_guard_is_missed(name: str, violated: str) -> None:
    guard = next(g for g in GUARDS if g.name == name)
    report = try_guard(SPECS, MUSEUM, "Lifecycle.tla", guard, Settings(), quiet)
    assert report is not None
    assert report.violated == violated


def test_a_search_that_ends_early_says_nothing_of_a_guard() -> None:
    """It is no violation: whoever gives a search too little must not hear that all is missed."""
    guard = next(g for g in GUARDS if g.name == "Submit: /\\ Fits(r)")
    with pytest.raises(ConfigError, match=r"limit of states.*raise --memory-mb or --states-max"):
        try_guard(SPECS, MUSEUM, "Lifecycle.tla", guard, Settings(states_max=10), quiet)


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_every_guard_is_missed_or_its_absence_is_explained(guard: Guard) -> None:
    report = try_guard(SPECS, MUSEUM, "Lifecycle.tla", guard, Settings(), quiet)
    assert (report is None) == (guard.name in MUSEUM.survivors)


def test_an_exhibit_that_no_longer_fits_says_so() -> None:
    exhibit = Exhibit("X", "RefExact", "tiny.cfg", (("no such text", ""),), "", ())
    with pytest.raises(ConfigError, match="exactly once"):
        try_exhibit(SPECS, exhibit, Settings(), quiet)
