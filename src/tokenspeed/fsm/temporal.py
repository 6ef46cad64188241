"""Temporal formulas as what a checker can check: invariants, steps, debts and fairness.

Rule: a formula is reduced only where the reduction is exact; any other is refused by name. What is
left are expressions of states and of steps, closed: the names around them are put in by LET.

    P, Init                 holds initially
    []P                     an invariant
    [][A]_v                 a property of steps
    P ~> Q, [](P => <>Q)    a debt: from P on, Q is owed
    []<>Q, <>Q, <>[]Q       debts too (owed always; from the start; and broken by visits to ~Q)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar, final

from attrs import define, frozen

from tokenspeed.fsm.core import Elaborator
from tokenspeed.fsm.syntax import Bound, Definition, Expr
from tokenspeed.fsm.values import ordered, show

__all__ = ["Debt", "Fairness", "Properties", "Temporal", "is_temporal"]

Said = TypeVar("Said")
Read = TypeVar("Read")


@frozen(eq=False)
class Debt(Generic[Said]):
    """Refuted by a fair behaviour that starts, owes, and meets `visited` for ever."""

    name: str
    starts: Said
    owing: Said
    visited: Said
    from_start: bool = False


@frozen(eq=False)
class Fairness:
    """WF or SF of an action."""

    name: str
    action: Expr
    subscript: tuple[int, ...]
    strong: bool


@define
class Properties(Generic[Said]):
    """What a configuration asks for, sorted by how it is checked; expressions, or nodes of them."""

    initially: list[tuple[str, Said]]
    invariants: list[tuple[str, Said]]
    steps: list[tuple[str, Said]]
    debts: list[Debt[Said]]

    def read(self, read: Callable[[Said], Read]) -> Properties[Read]:
        """The same, each expression read."""
        return Properties(
            [(name, read(each)) for name, each in self.initially],
            [(name, read(each)) for name, each in self.invariants],
            [(name, read(each)) for name, each in self.steps],
            [
                Debt(d.name, read(d.starts), read(d.owing), read(d.visited), d.from_start)
                for d in self.debts
            ],
        )


Scope = Mapping[str, Expr]
"""The names around a formula, and what they stand for: closed expressions."""


@final
class Temporal:
    """Reads temporal formulas of one model."""

    def __init__(self, core: Elaborator, definitions: dict[str, Definition]) -> None:
        self._core = core
        self._definitions = definitions

    # --- properties -----------------------------------------------------------------------------

    def properties(self, names: tuple[str, ...]) -> Properties[Expr]:
        """Reduce the named formulas.

        Raises:
            SpecError: one is not defined, or has a form that is not supported.
        """
        out: Properties[Expr] = Properties([], [], [], [])
        for name in names:
            self._property(name, self._definitions[name].body, {}, out)
        return out

    def _property(self, name: str, expr: Expr, scope: Scope, out: Properties[Expr]) -> None:
        match expr.op:
            case "and":
                for part in expr.exprs():
                    self._property(name, part, scope, out)
                return
            case "forall" if is_temporal(expr.expr(-1), self._definitions):
                for inner in self._instances(expr, scope):
                    self._property(name, expr.expr(-1), inner, out)
                return
            case "name" | "call" if self._is_temporal_operator(expr):
                body, inner = self._opened(expr, scope)
                self._property(name, body, inner, out)
                return
            case "always":
                self._always(name, expr.expr(0), scope, out)
                return
            case "eventually":
                self._eventually(name, expr.expr(0), scope, out)
                return
            case "leads_to":
                first, second = (self._state(e, scope) for e in expr.exprs())
                out.debts.append(self._leads_to(name, first, second))
                return
        if is_temporal(expr, self._definitions):
            raise expr.span.error(
                f"{expr.op} of temporal formulas as a property; expected [], <>, ~>, [][A]_v, "
                "conjunctions and \\A of them"
            )
        out.initially.append((name, _closed(expr, scope)))

    def _always(self, name: str, inner: Expr, scope: Scope, out: Properties[Expr]) -> None:
        if inner.op == "box_action":
            same = Expr("unchanged", (inner.expr(1),), inner.span)
            step = Expr("or", (inner.expr(0), same), inner.span)
            out.steps.append((name, _closed(step, scope)))
        elif inner.op == "eventually":
            body = inner.expr(0)
            if body.op == "always":  # []<>[]Q is <>[]Q
                self._eventually(name, body, scope, out)
                return
            goal = self._state(body, scope)
            out.debts.append(self._leads_to(name, _true(goal), goal))
        elif inner.op == "implies" and inner.expr(1).op == "eventually":
            first = self._state(inner.expr(0), scope)
            goal = self._state(inner.expr(1).expr(0), scope)
            out.debts.append(self._leads_to(name, first, goal))
        else:
            out.invariants.append((name, self._state(inner, scope)))

    def _eventually(self, name: str, inner: Expr, scope: Scope, out: Properties[Expr]) -> None:
        if inner.op == "always":
            goal = self._state(inner.expr(0), scope)
            out.debts.append(Debt(name, _true(goal), _true(goal), _not(goal)))
            return
        goal = self._state(inner, scope)
        debt = Debt(name, _true(goal), _not(goal), _true(goal), from_start=True)
        out.debts.append(debt)

    def _state(self, expr: Expr, scope: Scope) -> Expr:
        if is_temporal(expr, self._definitions):
            raise expr.span.error(
                f"{expr.op}: temporal operators nested like this are not supported; "
                "expected a predicate of states"
            )
        return _closed(expr, scope)

    @staticmethod
    def _leads_to(name: str, first: Expr, goal: Expr) -> Debt[Expr]:
        return Debt(name, first, _not(goal), _true(goal))

    # --- fairness -------------------------------------------------------------------------------

    def fairness(self, expr: Expr, scope: Scope | None = None) -> list[Fairness]:
        """The fairness conditions in a conjunct of a specification.

        Raises:
            SpecError: the conjunct says something else.
        """
        scope = scope or {}
        match expr.op:
            case "and":
                return [f for part in expr.exprs() for f in self.fairness(part, scope)]
            case "forall":
                inner = self._instances(expr, scope)
                return [f for each in inner for f in self.fairness(expr.expr(-1), each)]
            case "weak_fairness" | "strong_fairness":
                subscript = self._core.variables(expr.expr(0))
                name = _described(expr, scope)
                strong = expr.op == "strong_fairness"
                return [Fairness(name, _closed(expr.expr(1), scope), subscript, strong)]
            case "name" | "call" if expr.args[0] in self._definitions:
                body, around = self._opened(expr, scope)
                return self.fairness(body, around)
        raise expr.span.error(
            f"{expr.op} beside Init and [][Next]_vars; expected WF_v(A), SF_v(A), /\\, \\A"
        )

    # --- names ----------------------------------------------------------------------------------

    def _instances(self, expr: Expr, scope: Scope) -> list[Scope]:
        """The scopes of a \\A over constant sets, one for each choice of values."""
        scopes: list[Scope] = [scope]
        for bound in expr.args:
            if not isinstance(bound, Bound):
                continue
            domain = self._core.fold(_closed(bound.domain, scope), {})
            if domain is None:
                raise bound.domain.span.error("\\A around a temporal formula: its set is constant")
            for name in bound.names:
                scopes = [
                    {**each, name: Expr("value", (value,), expr.span)}
                    for each in scopes
                    for value in ordered(domain.args[0])
                ]
        return scopes

    def _is_temporal_operator(self, expr: Expr) -> bool:
        definition = self._definitions.get(str(expr.args[0]))
        return definition is not None and is_temporal(definition.body, self._definitions)

    def _opened(self, expr: Expr, scope: Scope) -> tuple[Expr, Scope]:
        definition = self._definitions[str(expr.args[0])]
        args = [_closed(arg, scope) for arg in expr.exprs()]
        return definition.body, dict(zip(definition.params, args, strict=True))


def _closed(expr: Expr, scope: Scope) -> Expr:
    """The expression with what the names around it stand for."""
    if expr.op == "name" and expr.args[0] in scope:
        return scope[str(expr.args[0])]
    if not scope:
        return expr
    names = (Definition(name, (), value, value.span) for name, value in scope.items())
    return Expr("let", (*names, expr), expr.span)


def _described(expr: Expr, scope: Scope) -> str:
    kind = "SF" if expr.op == "strong_fairness" else "WF"
    action = expr.expr(1)
    while action.op in ("and", "exists"):
        action = action.expr(0) if action.op == "and" else action.expr(-1)
    name = str(action.args[0]) if action.op in ("name", "call") else action.op
    values = [each.args[0] for each in scope.values() if each.op == "value"]
    return f"{kind}({name}{'(' + ', '.join(map(show, values)) + ')' if values else ''})"


def is_temporal(expr: Expr, definitions: Mapping[str, Definition]) -> bool:
    """Does it speak of behaviours, itself or through an operator?"""
    if expr.op in ("always", "eventually", "leads_to", "weak_fairness", "strong_fairness"):
        return True
    if expr.op in ("name", "call") and expr.args[0] in definitions:
        return is_temporal(definitions[str(expr.args[0])].body, definitions)
    parts = [a.body if isinstance(a, Definition) else a for a in expr.args]
    return any(is_temporal(part, definitions) for part in parts if isinstance(part, Expr))


def _true(like: Expr) -> Expr:
    return Expr("bool", (True,), like.span)


def _not(expr: Expr) -> Expr:
    return Expr("not", (expr,), expr.span)
