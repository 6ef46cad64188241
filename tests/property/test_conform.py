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
seen: Counter[str] = Counter()


@cache
def allowed(prompt: int, state: State) -> dict[Action, dict[Observed, State]]:
    """What the spec allows in a state: action -> what is seen after it -> the state after it."""
    spec = specification(prompt)
    out: dict[Action, dict[Observed, State]] = {}
    for (name, args), after in spec.successors("Next")(state):
        seen = observed(dict(zip(spec.variables, after, strict=True)))
        out.setdefault(Action(name, args), {})[seen] = after
    return out


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.integers(1, 6), choices=st.lists(st.integers(0, 10_000), min_size=40, max_size=160)
)
def test_mirror_and_runtime_walk_in_step(prompt: int, choices: list[int]) -> None:
    spec = specification(prompt)
    runtime, (state,) = Runtime(spec), spec.initial("Init")
    for choice in choices:
        may = allowed(prompt, state)
        attempts = tuple(runtime.attempts())
        for tried in attempts:
            if tried.action not in may:
                assert not runtime.take(tried), f"{tried} is not allowed"
        options = [tried for tried in attempts if tried.action in may]
        assert {tried.action for tried in options} == may.keys()
        if not options:
            break
        # every action as likely, whatever the number of its arguments; but few aborts, which are
        # nearly always possible and end everything
        names = sorted({tried.action.name for tried in options})
        if len(names) > 1 and choice % 19 and "Abort" in names:
            names.remove("Abort")
        name = names[choice % len(names)]
        mine = [tried for tried in options if tried.action.name == name]
        tried = mine[choice // len(names) % len(mine)]
        assert runtime.take(tried), f"{tried} is allowed"
        assert runtime.reported == {name}
        state = may[tried.action][runtime.state()]
        seen[name] += 1


def test_the_walks_above_reach_every_action() -> None:
    """What the generator never produces is not tested: an action that no walk took is named."""
    assert set(ACTIONS) | {"Launch", "Evict"} == seen.keys() | {"Preempt"}, seen
