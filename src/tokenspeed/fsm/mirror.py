"""The lifecycle in Python: the whole spec as pure functions, and one request as a live machine.

Rule: the spec decides and this file has no opinion: `Mirror` evaluates it, `RequestMachine` is a
`transitions` machine over the tables that are printed from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

from attrs import field, frozen
from transitions import Machine

from tokenspeed.errors import ConfigError
from tokenspeed.fsm.generated import ACTIONS, EDGES, OWNS, SPEC, STATES
from tokenspeed.fsm.model import Model, load_model
from tokenspeed.fsm.values import Value, show

__all__ = [
    "ENDED", "Action", "IllegalTransition", "Mirror", "RequestMachine", "State", "legal", "targets",
]  # fmt: skip


@frozen
class State:
    """A state of a spec: immutable, hashable, its variables as attributes (`state.st["r1"]`)."""

    variables: tuple[str, ...] = field(eq=False, repr=False)
    values: tuple[Value, ...]

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__") or name not in self.variables:
            raise AttributeError(f"the spec has no variable {name}; it has {self.variables}")
        return self.values[self.variables.index(name)]

    def __str__(self) -> str:
        """As TLA+ writes it, a line a variable."""
        pairs = zip(self.variables, self.values, strict=True)
        return "\n".join(f"/\\ {name} = {show(value)}" for name, value in pairs)


@frozen
class Action:
    """An action with its arguments, by the spec's names: `Action("Schedule", ("r1", 2))`."""

    name: str
    args: tuple[Value, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(show, self.args))})" if self.args else self.name


@final
class Mirror:
    """A spec as two pure functions over immutable states: what may happen, and what it leads to.

    Args:
        model: a spec with a configuration, as `load_model` reads them.

    Example:
        >>> specs = specs_directory()
        >>> mirror = Mirror.load(specs / "MCLifecycle.tla", specs / "tiny.cfg")
        >>> (state,) = mirror.initial
        >>> [str(action) for action in mirror.enabled(state)]
        ['Submit("r1")', 'Submit("r2")']
        >>> (after,) = mirror.step(state, Action("Submit", ("r1",)))
        >>> state.st["r1"], after.st["r1"], mirror.broken(after)
        ('New', 'Waiting', ())

    Attributes:
        initial: the states that a behaviour may start in.
        variables: in the spec's order.
        actions: by name, in the spec's order.
    """

    def __init__(self, model: Model) -> None:
        evaluator, config = model.evaluator, model.config
        self.variables = evaluator.variables
        self.actions = evaluator.action_names(evaluator.definition(config.next).body)
        self._successors = evaluator.successors(config.next)
        self._invariants = {name: evaluator.predicate(name) for name in config.invariants}
        self.initial = tuple(State(self.variables, s) for s in evaluator.initial(config.init))

    @classmethod
    def load(cls, spec: Path, config: Path) -> Mirror:
        """Of a spec and a `.cfg`.

        Raises:
            SpecError: one of them is outside the subset.
        """
        return cls(load_model(spec, config))

    def steps(self, state: State) -> tuple[tuple[Action, State], ...]:
        """Every step out of a state, in the spec's order."""
        return tuple(
            (Action(name, args), State(self.variables, after))
            for (name, args), after in self._successors(state.values)
        )

    def enabled(self, state: State) -> tuple[Action, ...]:
        """The actions that a state allows, each once."""
        return tuple(dict.fromkeys(action for action, _ in self.steps(state)))

    def step(self, state: State, action: Action) -> tuple[State, ...]:
        """Where an action leads: nowhere if it is not enabled, to several states if it leaves a
        choice (`Complete` chooses who stops).

        Raises:
            ConfigError: the spec has no action of that name.
        """
        if action.name not in self.actions:
            raise ConfigError("action", action.name, f"one of {', '.join(self.actions)}")
        return tuple(after for taken, after in self.steps(state) if taken == action)

    def broken(self, state: State) -> tuple[str, ...]:
        """The configuration's invariants that do not hold in a state."""
        return tuple(name for name, holds in self._invariants.items() if not holds(state.values))


class IllegalTransition(Exception):
    """An action that the spec does not have in a state."""


def legal(state: str) -> tuple[str, ...]:
    """Actions that the spec has in a state."""
    return tuple(
        action for action in ACTIONS if any(source == state for source, _ in EDGES[action])
    )


def targets(action: str, state: str) -> tuple[str, ...]:
    """Where an action may lead from a state; empty if it is not legal there."""
    return tuple(to for source, to in EDGES[action] if source == state)


ENDED = frozenset(state for state in STATES if not legal(state))
"""States that nothing leads out of."""

# One trigger an edge: in `transitions` a trigger has one target, an action may have several.
_MACHINE = Machine(
    model=None,
    states=list(STATES),
    transitions=[
        {"trigger": f"{action}_{to}", "source": source, "dest": to}
        for action in ACTIONS
        for source, to in EDGES[action]
    ],
    initial=STATES[0],
    auto_transitions=False,
)


@final
class RequestMachine:
    """The live view of one request: its state, and the moves that it can make.

    Example:
        >>> machine = RequestMachine(17)
        >>> machine.apply("Submit"), machine.apply("Admit"), machine.apply("Complete", "Decoding")
        ('Waiting', 'Prefilling', 'Decoding')

    Args:
        request: a name for messages.

    Attributes:
        state: where the request is, by the spec's name.
    """

    def __init__(self, request: object) -> None:
        self.request = request
        self.state: str = STATES[0]

    def apply(self, action: str, to: str | None = None) -> str:
        """Move; `to` chooses where the spec leaves a choice. Returns the new state.

        Raises:
            IllegalTransition: the move is not in the spec's table, or needs a choice of `to`. The
                request stays where it is.
            KeyError: the spec has no such action at all.
        """
        choices = targets(action, self.state)
        where = f"{self.state} (request {self.request})"
        if not choices:
            allowed = ", ".join(legal(self.state)) or "nothing"
            raise IllegalTransition(
                f"{action} is not legal in {where}. Legal here: {allowed}. See {SPEC}"
            )
        target = choices[0] if to is None and len(choices) == 1 else to
        if target not in choices:
            raise IllegalTransition(
                f"{action} to {target} is not legal in {where}. "
                f"It leads to: {', '.join(choices)}. See {SPEC}"
            )
        _MACHINE.events[f"{action}_{target}"].trigger(self)
        return self.state

    @property
    def holds(self) -> tuple[str, ...]:
        """What the request holds in its state."""
        return OWNS[self.state]
