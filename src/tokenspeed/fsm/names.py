"""Names and levels of a module, before anything runs: what the standard tools refuse, so do we.

Rule: a name means one thing. It is declared once, what is built in stays, nothing is recursive, and
a prime is of variables: not of a name that stands for an expression over them.
"""

from __future__ import annotations

from typing import final

from tokenspeed.fsm.syntax import Bound, Definition, Expr, Module, Span
from tokenspeed.fsm.values import BUILTIN

__all__ = ["check_names"]

_BUILT_IN = {*BUILTIN, "Nat", "Int", "Permutations"}
Locals = dict[str, bool]
"""The bound names in scope: whether each stands for something that a prime would change."""


def check_names(module: Module) -> None:
    """Refuse clashes of names, recursion and primes of what is no variable.

    Raises:
        SpecError: there is one; it names the place.
    """
    _Names(module).check()


@final
class _Names:
    def __init__(self, module: Module) -> None:
        self._variables = set(module.variables)
        self._declared = {*module.constants, *module.variables}
        self._definitions: dict[str, Definition] = {}
        self._flexible: dict[str, bool] = {}
        self._primed: dict[str, frozenset[str]] = {}
        for each in module.definitions:
            self._fresh(each.name, {}, each.span)
            self._definitions[each.name] = each
        self._open: list[str] = []

    def check(self) -> None:
        for definition in self._definitions.values():
            self._primed_parameters(definition)

    def _fresh(self, name: str, scope: Locals, span: Span) -> None:
        """Refuse a name that already means something."""
        if name in _BUILT_IN:
            raise span.error(f"{name} is built in; choose another name")
        if name in scope or name in self._declared or name in self._definitions:
            raise span.error(f"{name} means something else already; choose another name")

    def _primed_parameters(self, definition: Definition) -> frozenset[str]:
        """The parameters of which an operator takes the prime."""
        name = definition.name
        if name in self._open:
            raise definition.span.error(f"{name} is recursive; that is outside the subset of fsm/")
        if name not in self._primed:
            self._open.append(name)
            self._primed[name] = self._opened(definition, {})
            self._open.pop()
        return self._primed[name]

    def _opened(self, definition: Definition, scope: Locals) -> frozenset[str]:
        inner = dict(scope)
        for param in definition.params:
            if "!" not in definition.name:  # what is instantiated has the scope of its own module
                self._fresh(param, inner, definition.span)
            inner[param] = False
        found: set[str] = set()
        self._read(definition.body, inner, found, primed=False)
        return frozenset(found & set(definition.params))

    def _read(self, expr: Expr, scope: Locals, found: set[str], *, primed: bool) -> bool:
        """Whether a prime would change the value; `found` gets the names that are primed."""
        if expr.op in ("name", "call"):
            return self._named(expr, scope, found, primed=primed)
        if primed and expr.op == "prime":
            raise expr.span.error("a prime within a prime")
        primed = primed or expr.op == "prime"
        inner, changes = dict(scope), False
        for arg in expr.args:
            match arg:
                case Bound(names, domain):
                    over = self._read(domain, scope, found, primed=primed)
                    changes = changes or over
                    for name in names:
                        self._fresh(name, inner, expr.span)
                        inner[name] = False
                case Definition():
                    changes = self._local(arg, inner, found, primed=primed) or changes
                case Expr():
                    changes = self._read(arg, inner, found, primed=primed) or changes
        return changes

    def _local(
        self, definition: Definition, scope: Locals, found: set[str], *, primed: bool
    ) -> bool:
        """A definition of a LET: from here on its name is in scope."""
        inner = dict(scope)
        for param in definition.params:
            self._fresh(param, inner, definition.span)
            inner[param] = False
        changes = self._read(definition.body, inner, found, primed=primed)
        self._fresh(definition.name, scope, definition.span)
        scope[definition.name] = changes
        return changes

    def _named(self, expr: Expr, scope: Locals, found: set[str], *, primed: bool) -> bool:
        name = str(expr.args[0])
        if name in scope and primed:
            if scope[name]:
                raise expr.span.error(
                    f"a prime of {name}, which stands for an expression over variables; write the "
                    "prime there"
                )
            found.add(name)
        definition = None if name in scope else self._definitions.get(name)
        taken = self._primed_parameters(definition) if definition else frozenset()
        params = definition.params if definition else ()
        changes = name in self._variables or scope.get(name, False)
        for at, arg in enumerate(expr.exprs()):
            prime = primed or (at < len(params) and params[at] in taken)
            over = self._read(arg, scope, found, primed=prime)
            if over and prime and not primed:
                raise arg.span.error(
                    f"{name} takes the prime of this expression over variables; pass its prime"
                )
            changes = changes or over
        return changes or (definition is not None and self._changes(definition))

    def _changes(self, definition: Definition) -> bool:
        """Whether an operator mentions variables."""
        name = definition.name
        if name not in self._flexible:
            scope = dict.fromkeys(definition.params, False)
            self._flexible[name] = self._read(definition.body, scope, set(), primed=False)
        return self._flexible[name]
