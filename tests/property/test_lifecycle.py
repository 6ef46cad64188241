"""Walks of the lifecycle at bounds too large to enumerate: safe at each step, the mirror beside it.

The interpreter says what is enabled, Hypothesis chooses, the mirror must follow.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.fsm.evaluate import Label
from tokenspeed.fsm.generated import ACTIONS, OWNS
from tokenspeed.fsm.mirror import RequestMachine, legal
from tokenspeed.fsm.values import Function, show
from walking import REQUESTS, specification


def moving(label: Label, before: Function, after: Function) -> list[str]:
    """The requests that an action moves: its own, or for a step's end those that changed."""
    _, args = label
    changed = [r for r in REQUESTS if before.items[r] != after.items[r]]
    own = [r for r in REQUESTS if r in args]
    assert not own or set(changed) <= set(own)
    return own or changed


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.integers(1, 6),
    choices=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=10, max_size=70),
)
def test_every_walk_is_safe_and_the_mirror_follows(
    prompt: int, choices: list[tuple[int, int]]
) -> None:
    spec = specification(prompt)
    safe, successors = spec.predicate("Safety"), spec.successors("Next")
    st_at, tab_at = spec.variables.index("st"), spec.variables.index("tab")
    (state,) = spec.initial("Init")
    machines = {request: RequestMachine(request) for request in REQUESTS}
    for action, which in choices:
        enabled = sorted(successors(state), key=lambda item: show(item[0]))
        for (name, args), _ in enabled:
            if args and args[0] in REQUESTS:
                assert name in legal(machines[args[0]].state)
        if not enabled:
            break
        names = sorted({label[0] for label, _ in enabled})
        options = [item for item in enabled if item[0][0] == names[action % len(names)]]
        label, after = options[which % len(options)]
        for request in moving(label, state[st_at], after[st_at]):
            machines[request].apply(label[0], after[st_at].items[request])
        state = after
        assert safe(state)
        for request, machine in machines.items():
            assert machine.state == state[st_at].items[request]
            assert not state[tab_at].items[request] or "Pages" in OWNS[machine.state]


def test_a_walk_can_reach_every_action() -> None:
    """The bounds are no fence: walking by rote, each action of the spec gets its turn."""
    spec = specification(4)
    successors, seen, state = spec.successors("Next"), dict[str, int](), spec.initial("Init")[0]
    for turn in range(400):
        options = list(successors(state))
        if not options:
            break
        rarest = min(seen.get(label[0], 0) for label, _ in options)
        rare = [item for item in options if seen.get(item[0][0], 0) == rarest]
        (name, _), state = rare[turn % len(rare)]
        seen[name] = seen.get(name, 0) + 1
    assert set(ACTIONS) - {"Preempt"} <= seen.keys()
