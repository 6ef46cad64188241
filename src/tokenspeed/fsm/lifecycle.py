"""The intermediate representation: a lifecycle's states, edges, ownership and guards, as data.

Rule: everything here is read out of the spec by evaluation or from its syntax, and printers add
nothing. The spec must define `State`, `Edges`, `Owns`, and write each request action as a
conjunction that moves through the table: `Move("Admit", r, ...)`. Beside it lies `VERSION`,
for those who embed what is printed: major if a caller may have to change, minor if there is more.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from attrs import frozen

from tokenspeed.errors import SpecError
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.model import load_module
from tokenspeed.fsm.syntax import Definition, Expr
from tokenspeed.fsm.values import Function

__all__ = ["Action", "Guard", "Lifecycle", "read_lifecycle"]


@frozen
class Guard:
    """A named condition of an action: `name` or `~name`, of the request or of the whole system."""

    name: str
    negated: bool
    of_request: bool

    @property
    def text(self) -> str:
        """As the spec writes it."""
        return ("~" if self.negated else "") + self.name + ("(r)" if self.of_request else "")


@frozen
class Action:
    """An action that moves a request.

    Attributes:
        edges: (from, to), in the order of `State`.
        guards: what types cannot say, in the spec's order.
    """

    name: str
    edges: tuple[tuple[str, str], ...]
    guards: tuple[Guard, ...]

    def sources(self) -> tuple[str, ...]:
        """States in which it is legal."""
        return tuple(dict.fromkeys(source for source, _ in self.edges))

    def targets(self, source: str) -> tuple[str, ...]:
        """Where it may lead from a state."""
        return tuple(to for origin, to in self.edges if origin == source)


@frozen
class Lifecycle:
    """What the printers print.

    Attributes:
        spec: path of the module relative to the repository.
        digest: SHA-256 of the module's text.
        version: semantic, of the tables and guards.
        states: in the spec's order.
        actions: in the order of `Edges`.
        owns: state -> resources, in a fixed order.
        resources: all resources that some state owns.
        page_kinds: of a KV page.
    """

    spec: str
    digest: str
    version: str
    states: tuple[str, ...]
    actions: tuple[Action, ...]
    owns: dict[str, tuple[str, ...]]
    resources: tuple[str, ...]
    page_kinds: tuple[str, ...]

    def owners(self, resource: str) -> tuple[str, ...]:
        """States that own a resource."""
        return tuple(state for state in self.states if resource in self.owns[state])

    def legal(self, state: str) -> tuple[str, ...]:
        """Actions that are legal in a state."""
        return tuple(action.name for action in self.actions if state in action.sources())

    def refusal(self, action: Action, state: str) -> str:
        """The sentence, in every language, on a move of an action that a state does not have."""
        to = ", ".join(action.targets(state))
        if to:
            return f"{action.name} leads from {state} only to {to}. See {self.spec}"
        legal = ", ".join(self.legal(state)) or "nothing"
        return f"{action.name} is not legal in {state}. Legal here: {legal}. See {self.spec}"


def read_lifecycle(path: Path) -> Lifecycle:
    """Read the lifecycle out of a spec.

    Raises:
        SpecError: a table is missing, or names a state or an action that the spec does not have;
            or `VERSION` beside it is missing or not `major.minor.patch`.
    """
    module = load_module(path)
    evaluator = Evaluator(module, {})
    definitions = {d.name: d for d in module.definitions}
    for name in ("State", "Edges", "Owns", "PageKind"):
        if name not in definitions:
            raise SpecError(path, 1, 1, f"{name} is not defined; the lifecycle is read from it")
    states = _strings(definitions["State"])
    edges, owns = evaluator.value("Edges"), evaluator.value("Owns")
    order = {state: at for at, state in enumerate(states)}
    _check_states(
        definitions["Edges"], order, {s for e in edges.items.values() for p in e for s in p}
    )
    _check_states(definitions["Owns"], order, set(owns.items), complete=True)
    actions = []
    for name, pairs in edges.items.items():
        if name not in definitions:
            raise definitions["Edges"].span.error(
                f"{name} has edges but is not defined as an action"
            )
        ordered = tuple(sorted(pairs, key=lambda pair: (order[pair[0]], order[pair[1]])))
        actions.append(Action(name, ordered, _guards(definitions[name], definitions)))
    resources = _resources(definitions["Owns"], owns)
    return Lifecycle(
        spec=f"specs/{path.name}",
        digest=hashlib.sha256(module.text.encode()).hexdigest(),
        version=_version(path.with_name("VERSION")),
        states=states,
        actions=tuple(actions),
        owns={s: tuple(r for r in resources if r in owns.items[s]) for s in states},
        resources=resources,
        page_kinds=_strings(definitions["PageKind"]),
    )


def _version(path: Path) -> str:
    text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not re.fullmatch(r"\d+\.\d+\.\d+", text):
        raise SpecError(path, 1, 1, f"expected the version of the spec, 1.2.3; found {text!r}")
    return text


def _strings(definition: Definition) -> tuple[str, ...]:
    """A set of strings in the order in which it is written."""
    items = definition.body.exprs()
    if definition.body.op != "set" or any(item.op != "string" for item in items):
        raise definition.span.error(f'{definition.name}: expected a set of strings, {{"A", "B"}}')
    return tuple(str(item.args[0]) for item in items)


def _check_states(
    definition: Definition, known: dict[str, int], found: set[str], *, complete: bool = False
) -> None:
    unknown = sorted(found - known.keys())
    missing = sorted(known.keys() - found) if complete else []
    if unknown or missing:
        text = (
            f"not in State: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        )
        raise definition.span.error(f"{definition.name}: {text}")


def _resources(definition: Definition, owns: Function) -> tuple[str, ...]:
    """All resources, in the order in which `Owns` first names them."""
    found: dict[str, None] = {}

    def walk(expr: Expr) -> None:
        if expr.op == "string":
            found[str(expr.args[0])] = None
        for arg in expr.exprs():
            walk(arg)

    walk(definition.body)
    used: set[Any] = set().union(*owns.items.values())
    return tuple(name for name in found if name in used)


def _guards(action: Definition, definitions: dict[str, Definition]) -> tuple[Guard, ...]:
    """Conjuncts that are a defined operator of the request or of nothing, perhaps negated."""
    if not action.params:
        return ()
    request = action.params[0]
    body = action.body.exprs() if action.body.op == "and" else (action.body,)
    found = []
    for conjunct in body:
        negated = conjunct.op == "not"
        inner = conjunct.expr(0) if negated else conjunct
        name = str(inner.args[0]) if inner.op in ("name", "call") else ""
        args = inner.exprs()
        of_request = len(args) == 1 and args[0].op == "name" and args[0].args[0] == request
        if name in definitions and (of_request or not args) and not _assigns(name, definitions):
            found.append(Guard(name, negated, of_request))
    return tuple(found)


def _assigns(name: str, definitions: dict[str, Definition]) -> bool:
    """Does the operator speak of the successor? Then it is an effect, not a guard."""

    def walk(expr: Expr) -> bool:
        if expr.op in ("prime", "unchanged"):
            return True
        called = str(expr.args[0]) if expr.op in ("name", "call") else ""
        if called in definitions and walk(definitions[called].body):
            return True
        parts = (a.body if isinstance(a, Definition) else a for a in expr.args)
        return any(walk(part) for part in parts if isinstance(part, Expr))

    return walk(definitions[name].body)
