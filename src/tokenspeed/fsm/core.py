"""From syntax to the core: operators inlined, constants folded, names resolved.

Rule: an operator of TLA+ is a macro; what mentions no variable is computed by the interpreter, so
that a constant means the same everywhere. What is left is a tree of `Node`s over local names,
variables and primed variables, ready to be typed (types.py) and printed (emit_model.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from attrs import define, field, frozen

from tokenspeed.errors import SpecError
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.syntax import Bound, Definition, Expr, Span
from tokenspeed.fsm.types import Type
from tokenspeed.fsm.values import BUILTIN, Space, Unlisted, Value, elements

__all__ = ["Closure", "Elaborator", "Local", "Node", "Scope", "walk"]


@define(eq=False)
class Local:
    """A bound name; each binding is its own."""

    name: str
    type: Type = field(factory=Type.unknown)


@define(eq=False)
class Node:
    """One expression of the core. `args` are nodes, or what the construct says (see `infer`)."""

    op: str
    args: tuple[Any, ...]
    span: Span
    type: Type = field(factory=Type.unknown)

    def nodes(self) -> tuple[Node, ...]:
        """The arguments that are nodes."""
        return tuple(arg for arg in self.args if isinstance(arg, Node))


def walk(node: object, leaves: tuple[str, ...] = ("const",)) -> list[Node]:
    """A node, or a tuple of them, and all below; but not below the constructs in `leaves`."""
    found: list[Node] = []
    stack: list[object] = [node]
    while stack:
        at = stack.pop()
        if isinstance(at, Node):
            found.append(at)
            if at.op not in leaves:
                stack.extend(at.args)
        elif isinstance(at, tuple):
            stack.extend(at)
    return found


@frozen(eq=False)
class Closure:
    """An operator that a LET defines, with the names around it."""

    definition: Definition
    scope: Scope


Scope = Mapping[str, "Node | Closure"]

_STRUCTURAL = {
    "powerset", "functions", "records", "naturals", "integers", "booleans", "union", "minus_set",
    "intersect", "range", "filter", "set", "times",
}  # fmt: skip
_ATOMIC = {"const", "local", "var", "primed"}


@final
class Elaborator:
    """Reads expressions of one model.

    Args:
        evaluator: the model's interpreter, which computes what is constant.
        definitions: every operator in scope.
    """

    def __init__(self, evaluator: Evaluator, definitions: Mapping[str, Definition]) -> None:
        self._evaluator = evaluator
        self._definitions = definitions
        self._variables = {name: i for i, name in enumerate(evaluator.variables)}
        self._free: dict[int, tuple[Expr, frozenset[str]]] = {}
        self._constant: dict[str, bool] = {}
        self._primed = False
        self._assigning = False
        self._acting = False

    # --- entrances ------------------------------------------------------------------------------

    def expr(self, expr: Expr, scope: Scope) -> Node:
        """A value, a predicate, or an action."""
        folded = self.fold(expr, scope)
        if folded is not None:
            return folded
        build = getattr(self, f"_{expr.op}", None)
        if build is not None:
            built: Node = build(expr, scope)
            return built
        if expr.op in _PLAIN:
            return Node(expr.op, tuple(self.expr(a, scope) for a in expr.exprs()), expr.span)
        raise expr.span.error(
            f"{expr.op} has no value here; it is temporal, infinite, or outside the subset"
        )

    def initial(self, expr: Expr) -> Node:
        """An initial predicate: `x \\in S` may choose the value of a variable."""
        self._assigning = True
        try:
            return self.action(expr, {})
        finally:
            self._assigning = False

    def action(self, expr: Expr, scope: Scope) -> Node:
        """What is to be searched for successors: a branch counts even if it is constant."""
        self._acting = True
        try:
            return self.expr(expr, scope)
        finally:
            self._acting = False

    def variables(self, expr: Expr) -> tuple[int, ...]:
        """The variables that a subscript or UNCHANGED names, by index."""
        if expr.op == "tuple":
            return tuple(i for arg in expr.exprs() for i in self.variables(arg))
        name = str(expr.args[0])
        if expr.op == "name" and name in self._variables:
            return (self._variables[name],)
        if expr.op == "name" and name in self._definitions:
            return self.variables(self._definitions[name].body)
        raise expr.span.error("expected variables, or a tuple of them")

    # --- constants ------------------------------------------------------------------------------

    def fold(self, expr: Expr, scope: Scope) -> Node | None:
        """The expression as a constant, if it is one that can be computed and listed."""
        if expr.op in ("const", "unchanged", "enabled", "prime"):
            return None
        if self._acting and self._branches(expr):
            return None
        bound: dict[str, Value] = {}
        for name in self.free(expr):
            if name in scope:
                node = scope[name]
                if isinstance(node, Closure) or node.op != "const":
                    return None
                bound[name] = node.args[0]
            elif name in self._variables or not self._is_constant(name):
                return None
        try:
            value = elements_if_set(self._evaluator.constant(expr, bound))
        except (SpecError, Unlisted, LookupError, TypeError):
            return None  # it may stand where it is never reached; if not, the interpreter says why
        return Node("const", (value,), expr.span)

    def _branches(self, expr: Expr) -> bool:
        """Whether a search for successors may go on from here in several ways."""
        exprs = expr.exprs()
        parts = {"and": exprs, "if": exprs[1:], "case": exprs[1::2], "let": exprs[-1:]}
        reached = parts.get(expr.op, ())
        if expr.op in ("name", "call") and expr.args[0] in self._definitions:
            reached = (self._definitions[str(expr.args[0])].body,)
        return expr.op in ("or", "exists") or any(map(self._branches, reached))

    def free(self, expr: Expr) -> frozenset[str]:
        """The names that an expression mentions and does not bind."""
        found = self._free.get(id(expr))
        if found is None:
            found = self._free[id(expr)] = (expr, frozenset(_free(expr)))
        return found[1]

    def _is_constant(self, name: str) -> bool:
        if name not in self._definitions:
            return True
        if name not in self._constant:
            self._constant[name] = True  # a cycle would be refused by the interpreter
            definition = self._definitions[name]
            names = self.free(definition.body) - set(definition.params)
            self._constant[name] = all(
                n not in self._variables and self._is_constant(n) for n in names
            ) and not _mentions_steps(definition.body)
        return self._constant[name]

    # --- names ----------------------------------------------------------------------------------

    def _name(self, expr: Expr, scope: Scope) -> Node:
        name = str(expr.args[0])
        if name in scope:
            found = scope[name]
            if isinstance(found, Closure):
                raise expr.span.error(f"{name} wants arguments")
            return found
        if name in self._variables:
            return Node("primed" if self._primed else "var", (self._variables[name],), expr.span)
        if name in self._definitions:
            return self._call(expr, scope)
        raise expr.span.error(f"unknown name {name}; define it, or give the constant a value")

    def _call(self, expr: Expr, scope: Scope) -> Node:
        name = str(expr.args[0])
        known = scope.get(name)
        if isinstance(known, Closure):
            return self.apply(known.definition, known.scope, expr, scope)
        if name in self._definitions:
            return self.apply(self._definitions[name], {}, expr, scope)
        if name not in BUILTIN or name == "Seq":
            raise expr.span.error(f"{name} has no value here; it is unknown, or infinite")
        return Node(name, tuple(self.expr(a, scope) for a in expr.exprs()), expr.span)

    def apply(self, definition: Definition, around: Scope, call: Expr, scope: Scope) -> Node:
        """An operator's body with its arguments put in; each argument is computed at most once."""
        args = call.exprs()
        if len(args) != len(definition.params):
            raise call.span.error(
                f"{definition.name}: got {len(args)} arguments; expected {len(definition.params)}"
            )
        inner, lets = dict(around), []
        for name, arg in zip(definition.params, args, strict=True):
            node = self.expr(arg, scope)
            if node.op not in _ATOMIC:
                local = Local(name)
                lets.append((local, node))
                node = Node("local", (local,), arg.span)
            inner[name] = node
        body = self.expr(definition.body, inner)
        for local, value in reversed(lets):
            body = Node("let", (local, value, body), call.span)
        return body

    def _at(self, expr: Expr, scope: Scope) -> Node:
        found = scope.get("@")
        if not isinstance(found, Node):
            raise expr.span.error("@ stands outside an EXCEPT")
        return found

    def _prime(self, expr: Expr, scope: Scope) -> Node:
        if self._primed:
            raise expr.span.error("a prime within a prime")
        self._primed = True
        try:
            return self.expr(expr.expr(0), scope)
        finally:
            self._primed = False

    def _unchanged(self, expr: Expr, _scope: Scope) -> Node:
        return Node("unchanged", self.variables(expr.expr(0)), expr.span)

    def _angle_action(self, expr: Expr, scope: Scope) -> Node:
        same = Node("unchanged", self.variables(expr.expr(1)), expr.span)
        different = Node("not", (same,), expr.span)
        return Node("and", (self.expr(expr.expr(0), scope), different), expr.span)

    # --- membership -----------------------------------------------------------------------------

    def _in(self, expr: Expr, scope: Scope) -> Node:
        element = self.expr(expr.expr(0), scope)
        test = self.member(element, expr.expr(1), scope)
        chooses = element.op == ("var" if self._assigning else "primed")
        if not chooses:  # however many members are equal to it, it is there once
            return Node("holds", (test,), expr.span)
        try:
            domain = self.expr(expr.expr(1), scope)
        except SpecError:
            return test
        return Node("among", (element, domain, test), expr.span)

    def _notin(self, expr: Expr, scope: Scope) -> Node:
        test = self.member(self.expr(expr.expr(0), scope), expr.expr(1), scope)
        return Node("not", (test,), expr.span)

    def _subseteq(self, expr: Expr, scope: Scope) -> Node:
        return self._subset(self.expr(expr.expr(0), scope), expr.expr(1), scope, expr.span)

    def _subset(self, small: Node, big: Expr, scope: Scope, span: Span) -> Node:
        source = self._source(big, scope)
        if source[0].op in ("records", "functions", "powerset", "call", "naturals", "integers"):
            local = Local("e")
            test = self.member(Node("local", (local,), span), big, scope)
            return Node("forall", (local, small, test), span)
        return Node("subseteq", (small, self.expr(big, scope)), span)

    def _source(self, expr: Expr, scope: Scope) -> tuple[Expr, Scope]:
        """Through names to the expression that a set is defined by."""
        while expr.op == "name" and expr.args[0] not in scope:
            definition = self._definitions.get(str(expr.args[0]))
            if definition is None or definition.params:
                break
            expr, scope = definition.body, {}
        return expr, scope

    def member(self, element: Node, container: Expr, scope: Scope) -> Node:
        """`element \\in container`, by parts where the set is infinite or large."""
        source, inner = self._source(container, scope)
        span = container.span
        if element.op not in _ATOMIC and source.op in _STRUCTURAL:
            local = Local("e")
            test = self.member(Node("local", (local,), span), container, scope)
            return Node("let", (local, element, test), span)
        if source.op == "name" and source.args[0] in ("Nat", "Int", "BOOLEAN"):
            kind = {"Nat": "naturals", "Int": "integers", "BOOLEAN": "booleans"}
            source = Expr(kind[str(source.args[0])], (), span)
        if source.op == "call" and source.args[0] == "Seq":
            local = Local("i")
            item = Node("apply", (element, Node("local", (local,), span)), span)
            every = self.member(item, source.exprs()[0], inner)
            domain = Node("domain", (Node("as_sequence", (element,), span),), span)
            return Node("forall", (local, domain, every), span)
        build = getattr(self, f"_member_{source.op}", None)
        if build is not None:
            built: Node = build(element, source, inner)
            return built
        return Node("in", (element, self.expr(container, scope)), span)

    def _member_powerset(self, element: Node, source: Expr, scope: Scope) -> Node:
        return self._subset(element, source.expr(0), scope, source.span)

    def _member_functions(self, element: Node, source: Expr, scope: Scope) -> Node:
        span, local = source.span, Local("k")
        keys = self.expr(source.expr(0), scope)
        value = Node("apply", (element, Node("local", (local,), span)), span)
        every = Node("forall", (local, keys, self.member(value, source.expr(1), scope)), span)
        same = Node("eq", (Node("domain", (element,), span), keys), span)
        return Node("and", (same, every), span)

    def _member_records(self, element: Node, source: Expr, scope: Scope) -> Node:
        span = source.span
        names = tuple(str(name) for name in source.args[::2])
        parts = [Node("is_variant", (element, names), span)]
        for name, domain in zip(names, source.exprs(), strict=True):
            parts.append(self.member(Node("field", (element, name), span), domain, scope))
        return Node("and", tuple(parts), span)

    def _member_naturals(self, element: Node, source: Expr, _scope: Scope) -> Node:
        return Node("ge", (element, Node("const", (0,), source.span)), source.span)

    def _member_integers(self, element: Node, source: Expr, _scope: Scope) -> Node:
        return Node("eq", (element, Node("add", (element, Node("const", (0,), source.span)),
                                         source.span)), source.span)  # fmt: skip

    def _member_booleans(self, element: Node, source: Expr, _scope: Scope) -> Node:
        return Node("or", (element, Node("not", (element,), source.span)), source.span)

    def _member_union(self, element: Node, source: Expr, scope: Scope) -> Node:
        return Node("or", self._members(element, source, scope), source.span)

    def _member_intersect(self, element: Node, source: Expr, scope: Scope) -> Node:
        return Node("and", self._members(element, source, scope), source.span)

    def _member_minus_set(self, element: Node, source: Expr, scope: Scope) -> Node:
        yes, no = self._members(element, source, scope)
        return Node("and", (yes, Node("not", (no,), source.span)), source.span)

    def _members(self, element: Node, source: Expr, scope: Scope) -> tuple[Node, Node]:
        first, second = source.exprs()
        return self.member(element, first, scope), self.member(element, second, scope)

    def _member_range(self, element: Node, source: Expr, scope: Scope) -> Node:
        low, high = (self.expr(e, scope) for e in source.exprs())
        tests = (Node("ge", (element, low), source.span), Node("le", (element, high), source.span))
        return Node("and", tests, source.span)

    def _member_times(self, element: Node, source: Expr, scope: Scope) -> Node:
        tests = []
        for i, part in enumerate(source.exprs(), 1):
            index = Node("const", (i,), source.span)
            tests.append(self.member(Node("apply", (element, index), source.span), part, scope))
        return Node("and", tuple(tests), source.span)

    def _member_filter(self, element: Node, source: Expr, scope: Scope) -> Node:
        bound = source.args[0]
        assert isinstance(bound, Bound)
        first = self.member(element, bound.domain, scope)
        test = self.expr(source.expr(-1), {**scope, bound.names[0]: element})
        return Node("and", (first, test), source.span)

    def _member_set(self, element: Node, source: Expr, scope: Scope) -> Node:
        folded = self.fold(source, scope)
        if folded is not None:
            return Node("in", (element, folded), source.span)
        same = tuple(Node("eq", (element, self.expr(e, scope)), e.span) for e in source.exprs())
        return Node("or", same, source.span)

    # --- binders --------------------------------------------------------------------------------

    def bind(self, expr: Expr, scope: Scope) -> tuple[list[tuple[Local, Node]], dict[str, Any]]:
        """The names that a construct binds, each over its set, and the scope inside."""
        inner: dict[str, Any] = dict(scope)
        pairs: list[tuple[Local, Node]] = []
        for bound in expr.args:
            if isinstance(bound, Bound):
                for name in bound.names:
                    local = Local(name)
                    pairs.append((local, self.expr(bound.domain, scope)))
                    inner[name] = Node("local", (local,), expr.span)
        return pairs, inner

    def _quantifier(self, expr: Expr, scope: Scope) -> Node:
        pairs, inner = self.bind(expr, scope)
        body = self.expr(expr.expr(-1), inner)
        for local, domain in reversed(pairs):
            body = Node(expr.op, (local, domain, body), expr.span)
        return body

    _forall = _exists = _quantifier

    def _single(self, expr: Expr, scope: Scope) -> Node:
        pairs, inner = self.bind(expr, scope)
        if len(pairs) != 1:
            raise expr.span.error(f"{expr.op} over several names is outside the subset; nest it")
        (local, domain) = pairs[0]
        return Node(expr.op, (local, domain, self.expr(expr.expr(-1), inner)), expr.span)

    _choose = _filter = _function = _single

    def _map(self, expr: Expr, scope: Scope) -> Node:
        pairs, inner = self.bind(expr, scope)
        return Node("map", (tuple(pairs), self.expr(expr.expr(-1), inner)), expr.span)

    def _times(self, expr: Expr, scope: Scope) -> Node:
        """`S \\X T`: the pairs of their members."""
        pairs = tuple((Local("item"), self.expr(e, scope)) for e in expr.exprs())
        items = tuple(Node("local", (local,), expr.span) for local, _ in pairs)
        return Node("map", (pairs, Node("tuple", items, expr.span)), expr.span)

    def _let(self, expr: Expr, scope: Scope) -> Node:
        inner: dict[str, Any] = dict(scope)
        lets: list[tuple[Local, Node]] = []
        for definition in expr.args:
            if not isinstance(definition, Definition):
                continue
            if definition.params:
                inner[definition.name] = Closure(definition, dict(inner))
                continue
            node = self.expr(definition.body, inner)
            if node.op not in _ATOMIC:
                local = Local(definition.name)
                lets.append((local, node))
                node = Node("local", (local,), definition.span)
            inner[definition.name] = node
        body = self.expr(expr.expr(-1), inner)
        for local, value in reversed(lets):
            body = Node("let", (local, value, body), expr.span)
        return body

    # --- records, functions ---------------------------------------------------------------------

    def _record(self, expr: Expr, scope: Scope) -> Node:
        names = tuple(str(name) for name in expr.args[::2])
        return Node("record", (names, *(self.expr(e, scope) for e in expr.exprs())), expr.span)

    def _field(self, expr: Expr, scope: Scope) -> Node:
        return Node("field", (self.expr(expr.expr(0), scope), str(expr.args[1])), expr.span)

    def _except(self, expr: Expr, scope: Scope) -> Node:
        updates = []
        for update in expr.exprs()[1:]:
            *path, value = update.exprs()
            old = Local("old")
            inner = {**scope, "@": Node("local", (old,), update.span)}
            steps = tuple(self.expr(step, scope) for step in path)
            updates.append((steps, old, self.expr(value, inner)))
        return Node("except", (self.expr(expr.expr(0), scope), tuple(updates)), expr.span)

    def _enabled(self, expr: Expr, scope: Scope) -> Node:
        return Node("enabled", (self.expr(expr.expr(0), scope),), expr.span)


_PLAIN = {
    "and", "or", "not", "implies", "iff", "if", "case", "eq", "ne", "set", "tuple", "apply",
    "domain", "union", "intersect", "minus_set", "big_union", "powerset", "range", "add", "sub",
    "mul", "div", "mod", "pow", "neg", "lt", "gt", "le", "ge", "concat",
}  # fmt: skip


def elements_if_set(value: Value) -> Value:
    """A set that is known by a test, listed."""
    return elements(value) if isinstance(value, Space) else value


def _free(expr: Expr) -> set[str]:
    if expr.op == "name":
        return {str(expr.args[0])}
    found: set[str] = {str(expr.args[0])} if expr.op == "call" else set()
    bound: set[str] = set()
    inner: set[str] = set()
    if expr.op == "at":
        found.add("@")
    for arg in expr.args:
        match arg:
            case Bound(names, domain):
                found |= _free(domain)
                bound |= set(names)
            case Definition(name, params, body, _):
                inner |= _free(body) - set(params)
                bound.add(name)
            case Expr():
                inner |= _free(arg)
    if expr.op == "except":
        inner.discard("@")
        base = expr.expr(0)
        inner |= _free(base)
    return found | (inner - bound)


def _mentions_steps(expr: Expr) -> bool:
    if expr.op in ("prime", "unchanged", "enabled", "always", "eventually"):
        return True
    parts: Sequence[object] = [a.body if isinstance(a, Definition) else a for a in expr.args]
    return any(_mentions_steps(part) for part in parts if isinstance(part, Expr))
