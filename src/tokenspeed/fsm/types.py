"""Finite types for the core: every expression gets one, by unification.

Rule: two expressions that are compared, joined or assigned have one type. The type of a variable is
whatever Init and Next can put into it; bounds that nobody states (of numbers, of sequences) are
tried at run time and widened. What cannot be typed is refused, with its place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, final

from tokenspeed.fsm.syntax import Span
from tokenspeed.fsm.values import Function, Value, domain, order_key, ordered

if TYPE_CHECKING:
    from tokenspeed.fsm.core import Node

__all__ = ["Inference", "Type", "card", "unify"]

Keys = tuple[Value, ...]


@final
class Type:
    """A node of the union-find forest; `kind` and its parts are read at the root.

    bool, int; atom (`names`); set and seq (`of`); tuple (`items`); record (`fields`, `variants`);
    fn (`keys`, `of`, and `key`, the type of the keys).
    """

    __slots__ = ("_up", "fields", "items", "key", "keys", "kind", "names", "of", "variants")

    def __init__(self, kind: str) -> None:
        self._up: Type | None = None
        self.kind = kind
        self.names: set[str] = set()
        self.of: Type
        self.key: Type
        self.keys: tuple[Value, ...] = ()
        self.items: list[Type] = []
        self.fields: dict[str, Type] = {}
        self.variants: set[frozenset[str]] = set()

    def root(self) -> Type:
        """The representative of all that it was unified with."""
        at = self
        while at._up is not None:
            at = at._up
        if at is not self:
            self._up = at
        return at

    def become(self, other: Type) -> None:
        """From now on the same as `other`."""
        self.root()._up = other.root()

    @staticmethod
    def unknown() -> Type:
        """Nothing is known yet."""
        return Type("unknown")

    @staticmethod
    def set(of: Type) -> Type:
        """SUBSET of something."""
        made = Type("set")
        made.of = of
        return made

    @staticmethod
    def seq(of: Type) -> Type:
        """Sequences of something."""
        made = Type("seq")
        made.of = of
        return made

    @staticmethod
    def tuple(items: list[Type]) -> Type:
        """A tuple; it may turn out to be a sequence."""
        made = Type("tuple")
        made.items = items
        return made

    @staticmethod
    def record(fields: dict[str, Type]) -> Type:
        """A record; it may turn out to be a function of names."""
        made = Type("record")
        made.fields = fields
        made.variants = {frozenset(fields)}
        return made

    @staticmethod
    def fn(keys: Keys, key: Type, of: Type) -> Type:
        """A function with a fixed domain."""
        made = Type("fn")
        made.keys, made.key, made.of = keys, key, of
        return made

    def parts(self) -> list[Type]:
        """The types that this one is made of."""
        at = self.root()
        named = [getattr(at, name) for name in ("of", "key") if hasattr(at, name)]
        return [*at.items, *at.fields.values(), *named]

    def __str__(self) -> str:
        at = self.root()
        match at.kind:
            case "atom":
                return "one of " + ", ".join(sorted(at.names)[:6])
            case "set" | "seq":
                return f"a {'set' if at.kind == 'set' else 'sequence'} of ({at.of})"
            case "fn":
                return f"a function to ({at.of})"
            case "record":
                return "a record with " + ", ".join(sorted(at.fields))
            case "int":
                return "a number"
        return f"a {at.kind}"


def unify(a: Type, b: Type, span: Span) -> None:
    """Make two types one.

    Raises:
        SpecError: no value has both.
    """
    a, b = a.root(), b.root()
    if a is b:
        return
    if b.kind == "unknown":
        a, b = b, a
    if a.kind == "unknown":
        if _occurs(a, b):
            raise span.error("type error: a value would have to be a part of itself")
        a.become(b)
        return
    if _RANK[a.kind] > _RANK[b.kind]:
        a, b = b, a
    join = _JOIN.get((a.kind, b.kind))
    if join is None:
        raise span.error(f"type error: {a} and {b} are used as one; they have no value in common")
    join(a, b, span)


def _occurs(part: Type, whole: Type) -> bool:
    whole = whole.root()
    return whole is part or any(_occurs(part, each) for each in whole.parts())


def _same(a: Type, b: Type, _span: Span) -> None:
    a.become(b)


def _atoms(a: Type, b: Type, _span: Span) -> None:
    b.names |= a.names
    a.become(b)


def _of(a: Type, b: Type, span: Span) -> None:
    a.become(b)
    unify(a.of, b.of, span)


def _functions(a: Type, b: Type, span: Span) -> None:
    if set(a.keys) != set(b.keys):
        raise span.error("type error: functions with different domains are used as one")
    a.become(b)
    unify(a.key, b.key, span)
    unify(a.of, b.of, span)


def _tuples(a: Type, b: Type, span: Span) -> None:
    if len(a.items) == len(b.items):
        a.become(b)
        for x, y in zip(a.items, b.items, strict=True):
            unify(x, y, span)
        return
    whole = Type.seq(Type.unknown())
    _sequence(a, whole, span)
    unify(b, whole, span)


def _sequence(a: Type, b: Type, span: Span) -> None:
    """A tuple that is a sequence."""
    a.become(b)
    for item in a.items:
        unify(item, b.of, span)


def _records(a: Type, b: Type, span: Span) -> None:
    a.become(b)
    b.variants |= a.variants
    for name, kind in a.fields.items():
        if name in b.fields:
            unify(kind, b.fields[name], span)
        else:
            b.fields[name] = kind


def _record_function(a: Type, b: Type, span: Span) -> None:
    """A constant function of names, as read; records and functions are told apart by their use."""
    if set(a.fields) != set(b.keys) or len(a.variants) != 1:
        raise span.error(f"type error: {a} is used as a function with another domain")
    a.become(b)
    for kind in a.fields.values():
        unify(kind, b.of, span)


_RANK = {k: i for i, k in enumerate(("bool", "int", "atom", "set", "tuple", "seq", "record", "fn"))}
_JOIN: dict[tuple[str, str], Callable[[Type, Type, Span], None]] = {
    ("bool", "bool"): _same, ("int", "int"): _same, ("atom", "atom"): _atoms,
    ("set", "set"): _of, ("seq", "seq"): _of, ("fn", "fn"): _functions,
    ("tuple", "tuple"): _tuples, ("tuple", "seq"): _sequence, ("record", "record"): _records,
    ("record", "fn"): _record_function,
}  # fmt: skip


@final
class Inference:
    """Types every node of some trees; what must wait for more knowledge waits."""

    def __init__(self, variables: list[Type]) -> None:
        self._variables = variables
        self._waiting: list[tuple[Span, str, Callable[[], bool]]] = []
        self._by_name: list[tuple[Type, Type, Span]] = []  # a record that may yet be a function

    def run(self, roots: Iterable[Node]) -> None:
        """Type some trees.

        Raises:
            SpecError: a type error, or something whose type nothing says.
        """
        for root in roots:
            self.infer(root)
        while self._waiting:
            before = self._waiting
            self._waiting = []
            for span, what, attempt in before:
                if not attempt():
                    self._waiting.append((span, what, attempt))
            if len(self._waiting) == len(before):
                span, what, _ = before[0]
                raise span.error(f"cannot tell the type of {what}; nothing says what it holds")
        for kind, name, span in self._by_name:
            if kind.root().kind == "fn":
                unify(name, kind.root().key, span)

    def infer(self, node: Node) -> Type:
        """Type a node and all below it."""
        rule = getattr(self, f"_{node.op}", None)
        if rule is not None:
            rule(node)
            return node.type
        for arg in node.nodes():
            self.infer(arg)
        self._operator(node)
        return node.type

    def _is(self, node: Node, kind: Type) -> None:
        unify(node.type, kind, node.span)

    def _later(self, node: Node, what: str, attempt: Callable[[], bool]) -> None:
        if not attempt():
            self._waiting.append((node.span, what, attempt))

    # --- leaves and binders ---------------------------------------------------------------------

    def _const(self, node: Node) -> None:
        self._is(node, type_of(node.args[0], node.span))

    def _local(self, node: Node) -> None:
        self._is(node, node.args[0].type)

    def _var(self, node: Node) -> None:
        self._is(node, self._variables[node.args[0]])

    _primed = _var

    def _unchanged(self, node: Node) -> None:
        self._is(node, Type("bool"))

    def _let(self, node: Node) -> None:
        local, value, body = node.args
        unify(local.type, self.infer(value), node.span)
        self._is(node, self.infer(body))

    def _among(self, node: Node) -> None:
        element, container, test = node.args
        unify(self.infer(container), Type.set(self.infer(element)), node.span)
        self.infer(test)
        self._is(node, Type("bool"))

    def _bound(self, node: Node) -> Type:
        local, container, body = node.args
        unify(self.infer(container), Type.set(local.type), node.span)
        return self.infer(body)

    def _quantifier(self, node: Node) -> None:
        unify(self._bound(node), Type("bool"), node.span)
        self._is(node, Type("bool"))

    _forall = _exists = _quantifier

    def _choose(self, node: Node) -> None:
        unify(self._bound(node), Type("bool"), node.span)
        self._is(node, node.args[0].type)

    def _filter(self, node: Node) -> None:
        unify(self._bound(node), Type("bool"), node.span)
        self._is(node, Type.set(node.args[0].type))

    def _map(self, node: Node) -> None:
        pairs, body = node.args
        for local, container in pairs:
            unify(self.infer(container), Type.set(local.type), node.span)
        self._is(node, Type.set(self.infer(body)))

    def _function(self, node: Node) -> None:
        local, container, _ = node.args
        value = self._bound(node)
        if container.op == "const":
            keys = ordered(container.args[0])
            if keys and keys != tuple(range(1, len(keys) + 1)):
                self._is(node, Type.fn(keys, local.type, value))
                return
        elif not (
            (container.op == "range" and container.args[0].op == "const"
             and container.args[0].args[0] == 1)
            or container.op == "domain"
        ):  # fmt: skip
            raise node.span.error(
                "the domain of a function must be constant, 1..n, or the DOMAIN of a sequence"
            )
        self._is(node, Type.seq(value))

    # --- structure ------------------------------------------------------------------------------

    def _record(self, node: Node) -> None:
        names, *values = node.args
        fields = {name: self.infer(v) for name, v in zip(names, values, strict=True)}
        self._is(node, Type.record(fields))

    def _is_variant(self, node: Node) -> None:
        element, names = node.args
        self.infer(element)
        unify(element.type, Type.record({n: Type.unknown() for n in names}), node.span)
        self._is(node, Type("bool"))

    def _as_sequence(self, node: Node) -> None:
        unify(self.infer(node.args[0]), Type.seq(Type.unknown()), node.span)
        self._is(node, node.args[0].type)

    def _field(self, node: Node) -> None:
        record, name = node.args
        self.infer(record)
        self._later(node, f"what .{name} is taken of", lambda: self._part(record.type, name, node))

    def _part(self, kind: Type, name: str, node: Node) -> bool:
        at = kind.root()
        if at.kind == "unknown":
            return False
        if at.kind not in ("fn", "record"):
            raise node.span.error(f"type error: {kind} has no field {name}")
        found = at.of if at.kind == "fn" else at.fields.get(name)
        if found is None:
            return False  # a variant with this field may come yet
        self._is(node, found)
        return True

    def _apply(self, node: Node) -> None:
        fn, arg = node.args
        self.infer(fn)
        self.infer(arg)
        self._later(
            node, "a function that is applied", lambda: self._value(fn.type, arg, node.type)
        )

    def _value(self, fn: Type, arg: Node, out: Type) -> bool:
        """`out` is the type of `fn[arg]`; False if nothing is known of fn yet."""
        at = fn.root()
        constant = arg.args[0] if arg.op == "const" else None
        match at.kind:
            case "unknown":
                return False
            case "tuple" if type(constant) is int and 1 <= constant <= len(at.items):
                unify(out, at.items[constant - 1], arg.span)
            case "tuple" | "seq":
                unify(at, Type.seq(out), arg.span)
                unify(arg.type, Type("int"), arg.span)
            case "record" if constant in at.fields:
                unify(out, at.fields[str(constant)], arg.span)
                self._by_name.append((fn, arg.type, arg.span))
            case "record":
                unify(at, Type.fn(tuple(sorted(at.fields)), arg.type, out), arg.span)
                unify(arg.type, type_of(frozenset(at.fields), arg.span).of, arg.span)
            case "fn":
                unify(arg.type, at.key, arg.span)
                unify(out, at.of, arg.span)
            case _:
                raise arg.span.error(f"type error: {fn} is applied to an argument")
        return True

    def _except(self, node: Node) -> None:
        base, updates = node.args
        self._is(node, self.infer(base))
        for path, old, value in updates:
            at = base.type
            for step in path:
                self.infer(step)
                inner = Type.unknown()
                attempt = functools.partial(self._value, at, step, inner)
                self._later(node, "a function that EXCEPT changes", attempt)
                at = inner
            unify(old.type, at, node.span)
            unify(self.infer(value), at, node.span)

    def _domain(self, node: Node) -> None:
        (fn,) = node.args
        self.infer(fn)
        keys = Type.unknown()
        self._is(node, Type.set(keys))

        def attempt() -> bool:
            at = fn.type.root()
            if at.kind == "unknown":
                return False
            if at.kind == "fn":
                unify(keys, at.key, node.span)
            elif at.kind == "record":
                unify(keys, type_of(frozenset(at.fields), node.span).of, node.span)
                self._by_name.append((fn.type, keys, node.span))
            else:
                unify(keys, Type("int"), node.span)
            return True

        self._later(node, "what DOMAIN is taken of", attempt)

    # --- operators ------------------------------------------------------------------------------

    def _operator(self, node: Node) -> None:
        args, span, op = node.nodes(), node.span, node.op
        first = args[0].type if args else Type.unknown()
        if op in _BOOLEAN:
            for arg in args:
                unify(arg.type, Type("bool"), arg.span)
            self._is(node, Type("bool"))
        elif op in ("eq", "ne"):
            unify(first, args[1].type, span)
            self._is(node, Type("bool"))
        elif op in _ARITHMETIC:
            for arg in args:
                unify(arg.type, Type("int"), arg.span)
            self._is(node, Type("int" if _ARITHMETIC[op] else "bool"))
        elif op == "in":
            unify(args[1].type, Type.set(first), span)
            self._is(node, Type("bool"))
        elif op in ("if", "case"):
            self._branches(node, args)
        elif op == "tuple":
            self._is(node, Type.tuple([arg.type for arg in args]))
        else:
            self._collection(node, args, first)

    def _branches(self, node: Node, args: tuple[Node, ...]) -> None:
        tests, values = (args[:1], args[1:]) if node.op == "if" else (args[::2], args[1::2])
        for test in tests:
            unify(test.type, Type("bool"), test.span)
        for value in values:
            self._is(node, value.type)

    def _collection(self, node: Node, args: tuple[Node, ...], first: Type) -> None:
        span, item = node.span, Type.unknown()
        for arg, kind in zip(args, _TAKES.get(node.op, ()), strict=False):
            unify(arg.type, _made(kind, item), arg.span)
        if node.op == "set":
            for arg in args:
                unify(arg.type, item, span)
        if node.op not in _GIVES:
            raise span.error(f"{node.op} has no type; it is outside the subset")
        self._is(node, _made(_GIVES[node.op], item))


_BOOLEAN = {"and", "or", "not", "holds", "implies", "iff", "enabled"}
_ARITHMETIC = {
    "add": True, "sub": True, "mul": True, "div": True, "mod": True, "pow": True, "neg": True,
    "lt": False, "gt": False, "le": False, "ge": False,
}  # fmt: skip
# How operators on collections take and give: by the item's type.
_TAKES: dict[str, tuple[str, ...]] = {
    "union": ("set", "set"), "intersect": ("set", "set"), "minus_set": ("set", "set"),
    "subseteq": ("set", "set"), "big_union": ("sets",), "powerset": ("set",),
    "range": ("int", "int"), "concat": ("seq", "seq"), "Len": ("seq",), "Head": ("seq",),
    "Tail": ("seq",), "Append": ("seq", "item"), "SubSeq": ("seq", "int", "int"),
    "Cardinality": ("set",),
}  # fmt: skip
_GIVES = {
    "union": "set", "intersect": "set", "minus_set": "set", "subseteq": "bool", "big_union": "set",
    "powerset": "sets", "range": "ints", "concat": "seq", "Len": "int", "Head": "item",
    "Tail": "seq", "Append": "seq", "SubSeq": "seq", "Cardinality": "int", "set": "set",
}  # fmt: skip


def _made(kind: str, item: Type) -> Type:
    match kind:
        case "item":
            return item
        case "set":
            return Type.set(item)
        case "sets":
            return Type.set(Type.set(item))
        case "ints":
            return Type.set(Type("int"))
        case "seq":
            return Type.seq(item)
    return Type(kind)


def type_of(value: Value, span: Span) -> Type:
    """The type of a constant."""
    match value:
        case bool():
            return Type("bool")
        case int():
            return Type("int")
        case str():
            made = Type("atom")
            made.names.add(value)
            return made
        case frozenset():
            item = Type.unknown()
            for member in value:
                unify(item, type_of(member, span), span)
            return Type.set(item)
        case tuple():
            return Type.tuple([type_of(item, span) for item in value])
        case Function():
            return _function_type(value, span)
    raise span.error(f"{value!r}: a constant of no type; it is infinite, or outside the subset")


def _function_type(value: Function, span: Span) -> Type:
    if all(type(key) is str for key in value.items):
        return Type.record({str(k): type_of(v, span) for k, v in value.items.items()})
    keys = tuple(sorted(domain(value), key=order_key))
    of: Type = Type.unknown()
    for item in value.items.values():
        unify(of, type_of(item, span), span)
    return Type.fn(keys, type_of(frozenset(keys), span).of, of)


def card(kind: Type, set_ints: int, seq_max: int) -> int:
    """How many values a type has.

    Args:
        set_ints: how many numbers an element of a set may be.
        seq_max: items of the longest sequence.
    """

    def each(part: Type) -> int:
        return card(part, set_ints, seq_max)

    at = kind.root()
    result: Any
    match at.kind:
        case "bool" | "unknown":
            result = 2
        case "int":
            result = set_ints
        case "atom":
            result = len(at.names)
        case "set":
            result = 2 ** each(at.of)
        case "seq":
            result = sum(each(at.of) ** n for n in range(seq_max + 1))
        case "fn":
            result = each(at.of) ** len(at.keys)
        case "tuple":
            result = math.prod(each(item) for item in at.items)
        case "record":
            result = sum(math.prod(each(at.fields[f]) for f in v) for v in at.variants)
    return int(result)
