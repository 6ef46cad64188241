"""Rung four: mirror and runtime in lockstep at bounds too large to enumerate.

At each step whatever the spec does not have is tried and must be refused; then Hypothesis chooses.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.fsm.generated import ACTIONS
from tokenspeed.fsm.mirror import Action
from tokenspeed.fsm.runtime import Observed, Runtime, observed
from tokenspeed.fsm.values import Value
from walking import specification

State = tuple[Value, ...]


@cache
def allowed(prompt: int, state: State) -> dict[Action, dict[Observed, State]]:
    """What the spec allows in a state: action -> what is seen after it -> the state after it."""
    spec = specification(prompt)
    out: dict[Action, dict[Observed, State]] = {}
    for (name, args), after in spec.successors("Next")(state):
        seen = observed(dict(zip(spec.variables, after, strict=True)))
        out.setdefault(Action(name, args), {})[seen] = after
    return out


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 6), choices=st.lists(st.integers(0, 10_000), min_size=40, max_size=160)
)
def walk(seen: Counter[str], prompt: int, choices: list[int]) -> None:
    spec = specification(prompt)
    runtime, (state,) = Runtime(spec), spec.initial("Init")
    for choice in choices:
        may = allowed(prompt, state)
        attempts, before = tuple(runtime.attempts()), runtime.snapshot()
        for tried in attempts:
            if tried.action not in may:
                assert not runtime.take(tried), f"{tried} is not allowed"
        assert runtime.snapshot() == before
        options = [tried for tried in attempts if tried.action in may]
        assert {tried.action for tried in options} == may.keys()
        if not options:
            break
        # Every action as likely, whatever the number of its arguments; but few aborts, which are
        # nearly always possible and end everything, and few evictions, so that pages are short.
        names = sorted({tried.action.name for tried in options})
        common = [name for name in names if name not in ("Abort", "Evict")]
        names = common if common and choice % 19 else names
        name = "Preempt" if "Preempt" in names else names[choice % len(names)]
        mine = [tried for tried in options if tried.action.name == name]
        tried = mine[choice // len(names) % len(mine)]
        assert runtime.take(tried), f"{tried} is allowed"
        assert runtime.reported == {name}
        assert not runtime.amiss()
        state = may[tried.action][runtime.state()]
        seen[name] += 1


def test_mirror_and_runtime_walk_in_step() -> None:
    """And what the walks never did is not tested: every action must have been taken."""
    seen: Counter[str] = Counter()
    walk(seen)
    assert seen.keys() == {*ACTIONS, "Launch", "Evict"}, seen
