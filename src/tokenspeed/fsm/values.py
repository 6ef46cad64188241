"""TLA+ values and what its operators do to them, as plain immutable Python values.

Rule: equal values are equal in Python, so that a state can be a key.

    number, string, boolean   int, str, bool
    set                       frozenset; one too large to list is a function that tests membership
    sequence, tuple           tuple (a function whose domain is 1..n is the same value)
    function, record          Function
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, final

__all__ = [
    "BOOLEANS",
    "BUILTIN",
    "INFIX",
    "PREFIX",
    "Function",
    "Value",
    "apply",
    "domain",
    "function",
    "member",
    "show",
    "updated",
]

Value = Any

BOOLEANS = frozenset((True, False))


@final
class Function:
    """A function with a finite domain that is not 1..n; records are functions of field names."""

    __slots__ = ("_hash", "items")

    def __init__(self, items: dict[Value, Value]) -> None:
        self.items = items
        self._hash: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.items == other.items

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.items.items()))
        return self._hash

    def __repr__(self) -> str:
        return show(self)


def function(items: dict[Value, Value]) -> Value:
    """A function as a value: a tuple if its domain is 1..n."""
    n = len(items)
    if all(type(k) is int for k in items) and all(i in items for i in range(1, n + 1)):
        return tuple(items[i] for i in range(1, n + 1))
    return Function(items)


def show(value: Value) -> str:
    """A value in TLA+ syntax, sets and functions in a fixed order."""
    match value:
        case bool():
            return "TRUE" if value else "FALSE"
        case str():
            return f'"{value}"'
        case frozenset():
            return "{" + ", ".join(sorted(map(show, value))) + "}"
        case tuple():
            return "<<" + ", ".join(map(show, value)) + ">>"
        case Function():
            pairs = sorted((show(k), show(v)) for k, v in value.items.items())
            return "(" + " @@ ".join(f"{k} :> {v}" for k, v in pairs) + ")"
    return str(value)


def apply(fn: Value, arg: Value) -> Value:
    """`fn[arg]`."""
    if type(fn) is tuple:
        if not 1 <= arg <= len(fn):
            raise KeyError(f"{show(fn)}[{arg}] is outside the domain")
        return fn[arg - 1]
    return fn.items[arg]


def domain(fn: Value) -> frozenset[Value]:
    """`DOMAIN fn`."""
    return frozenset(range(1, len(fn) + 1)) if type(fn) is tuple else frozenset(fn.items)


def updated(fn: Value, path: tuple[Value, ...], change: Callable[[Value], Value]) -> Value:
    """`[fn EXCEPT !path = change(@)]`; a path outside the domain leaves the function as it is."""
    if not path:
        return change(fn)
    key, rest = path[0], path[1:]
    if key not in domain(fn):
        return fn
    if type(fn) is tuple:
        return (*fn[: key - 1], updated(fn[key - 1], rest, change), *fn[key:])
    return Function({**fn.items, key: updated(fn.items[key], rest, change)})


def member(value: Value, container: Value) -> bool:
    """`value \\in container`, where the container may be a set that is not enumerated."""
    return bool(container(value)) if callable(container) else value in container


def _same(a: Value, b: Value) -> bool:
    return bool(a == b)


def _subset(a: Value, b: Value) -> bool:
    return all(member(x, b) for x in a) if callable(b) else a <= b


def _without(a: Value, b: Value) -> Value:
    return (lambda v: member(v, a) and not member(v, b)) if callable(a) else a - b


def _subsets(values: frozenset[Value]) -> frozenset[Value]:
    items = sorted(values, key=show)
    sizes = range(len(items) + 1)
    return frozenset(frozenset(c) for n in sizes for c in itertools.combinations(items, n))


INFIX: dict[str, Callable[[Value, Value], Value]] = {
    "eq": _same,
    "ne": operator.ne,
    "in": member,
    "notin": lambda x, s: not member(x, s),
    "subseteq": _subset,
    "union": operator.or_,
    "intersect": operator.and_,
    "minus_set": _without,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "lt": operator.lt,
    "gt": operator.gt,
    "le": operator.le,
    "ge": operator.ge,
    "range": lambda a, b: frozenset(range(a, b + 1)),
    "concat": operator.add,
    "iff": _same,
}
PREFIX: dict[str, Callable[[Value], Value]] = {
    "not": operator.not_,
    "neg": operator.neg,
    "domain": domain,
    "powerset": _subsets,
    "big_union": lambda sets: frozenset().union(*sets),
}
BUILTIN: dict[str, Callable[..., Value]] = {
    "Len": len,
    "Head": operator.itemgetter(0),
    "Tail": lambda s: s[1:],
    "Append": lambda s, x: (*s, x),
    "SubSeq": lambda s, a, b: s[a - 1 : b],
    "Seq": lambda s: lambda v: type(v) is tuple and all(member(x, s) for x in v),
    "Cardinality": len,
}
