"""Random specifications mean the same compiled and interpreted: states, steps, verdict, errors,
and, where nothing is wrong up to there, what becomes of each case.

A model costs seconds to compile, so that one holds many cases; what fails is named by its text.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from specs_at_random import action, module
from tokenspeed.errors import SpecError
from tokenspeed.fsm import compiled
from tokenspeed.fsm.check import Settings, check, explore, state_graph
from tokenspeed.fsm.cpp_types import Bounds
from tokenspeed.fsm.emit_model import emit_model, read_model
from tokenspeed.fsm.evaluate import Label, State
from tokenspeed.fsm.model import Model, load_model

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_haste() -> Iterator[None]:
    """Half of the time goes by in the compiler; what the model says does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "FLAGS", ("-std=c++20", "-O0", "-DNDEBUG", "-pthread"))
        yield


Steps = dict[int, Counter[tuple[State, Label, State]]]
WAIT = "  /\\ UNCHANGED <<n, s, f, q, r>>"


def written(directory: Path, text: str) -> tuple[Path, Path]:
    spec, config = directory / "Fuzz.tla", directory / "Fuzz.cfg"
    spec.write_text(text)
    config.write_text("SPECIFICATION Fair\nINVARIANT Inv\nPROPERTY Grows\nCHECK_DEADLOCK FALSE\n")
    return spec, config


def accepted(directory: Path, text: str) -> Model | None:
    """The model, if the compiler knows what it means."""
    model = load_model(*written(directory, text))
    try:
        emit_model(read_model(model), Bounds())
    except SpecError:
        return None
    return model


def drawn(directory: Path, seed: int, count: int) -> tuple[list[str], tuple[str, str]]:
    """Actions that have a value everywhere, and one that has none somewhere (or an invariant)."""
    good: list[str] = []
    refused = 0
    for at in range(count):
        text, _ = action(seed * 1000 + at)
        model = accepted(directory, module([text], WAIT, "TRUE"))
        if model is None:
            refused += 1
        elif explore(model)[0].result == "ok":
            good.append(text)
    assert refused * 10 <= count, "what the compiler knows is well typed: little is refused"
    for at in range(count, 2 * count):
        text, invariant = action(seed * 1000 + at, partial=True)
        model = accepted(directory, module([], text, invariant))
        if model is not None and explore(model)[0].result != "ok":
            return good, (text, invariant)
    return good, (WAIT, "TRUE")


def by_case(steps: list[tuple[State, Label, State]]) -> Steps:
    out: Steps = defaultdict(Counter)
    for before, label, after in steps:
        out[before[0]][before, label, after] += 1
    return out


def compiled_steps(graph: Path) -> Steps:
    lines = [json.loads(line) for line in graph.read_text().splitlines()]
    states = [tuple(map(compiled.decode, line["state"].values())) for line in lines]
    return by_case(
        [
            (states[at], (name, tuple(map(compiled.decode, args))), states[to])
            for at, line in enumerate(lines)
            for name, args, to in line["steps"]
        ]
    )


def place(violated: str | None) -> str | None:
    """Of an error, where it is: the engines word it in their own way."""
    found = re.search(r"Fuzz\.tla:\d+:\d+", violated or "")
    return found[0] if found else violated


def both_engines_agree(seed: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        good, (last, invariant) = drawn(directory, seed, count)
        model = written(directory, module(good, last, invariant))
        fast = state_graph(*model, directory / "graph")
        _, reached = explore(load_model(*model))
        slow = check(*model, Settings(engine="interpreter"))
        found = compiled_steps(directory / "graph")
        successors = load_model(*model).evaluator.successors("Next")
        for case, text in enumerate(good):
            states = [state for state in reached if state[0] == case]
            steps = [
                (state, label, after) for state in states for label, after in successors(state)
            ]
            expected = by_case(steps)[case]
            only = [*(found[case] - expected), *(expected - found[case])]
            assert found[case] == expected, f"{text}\nnot as often by both: {only[:1]}"
    said = [(r.result, r.generated, r.distinct, r.depth, place(r.violated)) for r in (fast, slow)]
    assert said[0] == said[1], f"{last}\n{invariant}"
    assert (fast.trace, fast.loop) == (slow.trace, slow.loop)


def fuzz(examples: int) -> settings:
    """Nothing is shrunk: a case is named when it fails, and each try costs a compilation."""
    return settings(
        max_examples=examples, deadline=None, phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip


@fuzz(2)
@given(seed=st.integers(0, 1 << 20))
def test_random_specifications_mean_the_same_to_both_engines(seed: int) -> None:
    both_engines_agree(seed, count=20)


@pytest.mark.slow
@fuzz(30)
@given(seed=st.integers(0, 1 << 40))
def test_many_random_specifications_mean_the_same_to_both_engines(seed: int) -> None:
    both_engines_agree(seed, count=60)
