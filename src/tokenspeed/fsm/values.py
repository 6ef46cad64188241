"""TLA+ values and what its operators do to them, as plain immutable Python values.

Rule: equal values are equal in Python, so that a state can be a key.

    number, string, boolean   int, str, bool
    set                       frozenset, or a Space: one that is tested and listed only if need be
    sequence, tuple           tuple (a function whose domain is 1..n is the same value)
    function, record          Function
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, final

from attrs import frozen

__all__ = [
    "BOOLEANS",
    "BUILTIN",
    "INFIX",
    "INTEGERS",
    "NATURALS",
    "PREFIX",
    "Function",
    "Space",
    "Unlisted",
    "Value",
    "apply",
    "domain",
    "elements",
    "function",
    "functions_space",
    "member",
    "order_key",
    "ordered",
    "product",
    "records_space",
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

    def __getitem__(self, key: Value) -> Value:
        return self.items[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.items == other.items

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.items.items()))
        return self._hash

    def __repr__(self) -> str:
        return show(self)


class Unlisted(Exception):
    """A set that has no end, or too many members, was to be listed."""


@final
@frozen(eq=False)
class Space:
    """A set known by a test; `members` lists it, where it has an end."""

    text: str
    test: Callable[[Value], bool]
    members: Callable[[], Iterable[Value]] | None = None


LISTED_MAX = 1 << 17


def elements(container: Value) -> frozenset[Value]:
    """The members of a set.

    Raises:
        Unlisted: it is infinite, or has more than `LISTED_MAX` members.
    """
    if not isinstance(container, Space):
        return container  # type: ignore[no-any-return]
    if container.members is None:
        raise Unlisted(f"{container.text} is infinite and cannot be listed")
    found = list(itertools.islice(container.members(), LISTED_MAX + 1))
    if len(found) > LISTED_MAX:
        raise Unlisted(f"{container.text} has more than {LISTED_MAX} members")
    return frozenset(found)


NATURALS = Space("Nat", lambda v: type(v) is int and v >= 0)
INTEGERS = Space("Int", lambda v: type(v) is int)


def records_space(sets: Mapping[Value, Value]) -> Space:
    """`[f : S, g : T]`."""
    names = list(sets)

    def test(v: Value) -> bool:
        return (
            type(v) is Function
            and v.items.keys() == sets.keys()
            and all(member(v.items[k], each) for k, each in sets.items())
        )

    def members() -> Iterable[Value]:
        for combination in itertools.product(*(elements(sets[k]) for k in names)):
            yield Function(dict(zip(names, combination, strict=True)))

    return Space("a set of records", test, members)


def functions_space(keys: Value, values: Value) -> Space:
    """`[S -> T]`."""

    def test(v: Value) -> bool:
        return (
            isinstance(v, (tuple, Function))
            and domain(v) == elements(keys)
            and all(member(apply(v, k), values) for k in elements(keys))
        )

    def members() -> Iterable[Value]:
        names = ordered(elements(keys))
        for combination in itertools.product(ordered(elements(values)), repeat=len(names)):
            yield function(dict(zip(names, combination, strict=True)))

    return Space("a set of functions", test, members)


def order_key(value: Value) -> tuple[Any, ...]:
    """The order in which members of a set are tried; the compiled model has the same one.

    Sets compare by their greatest members first, sequences by length first.
    """
    match value:
        case bool():
            return (0, value)
        case int():
            return (1, value)
        case str():
            return (2, value)
        case frozenset():
            return (3, tuple(sorted(map(order_key, value), reverse=True)))
        case tuple():
            return (4, len(value), tuple(map(order_key, value)))
        case Function():
            keys = sorted(value.items, key=order_key)
            names = tuple(map(order_key, keys))
            return (5, names, tuple(order_key(value.items[k]) for k in keys))
    raise TypeError(f"{value!r} is no TLA+ value")


def ordered(values: frozenset[Value]) -> tuple[Value, ...]:
    """The members of a set in their order."""
    return _ordered(values, frozenset(map(type, values)))


# To Python {0, 1} is {FALSE, TRUE}: a cache has to tell them apart by the types of their members.
@lru_cache(maxsize=1 << 16)
def _ordered(values: frozenset[Value], _: frozenset[type]) -> tuple[Value, ...]:
    return tuple(sorted(values, key=order_key))


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
    if isinstance(container, Space):
        return container.test(value)
    if type(value) in (bool, int) and any(type(each) is not type(value) for each in container):
        return any(
            type(each) is type(value) and each == value for each in container
        )  # TRUE is not 1
    return value in container


def _same(a: Value, b: Value) -> bool:
    return bool(a == b)


def _subset(a: Value, b: Value) -> bool:
    return all(member(x, b) for x in elements(a))


def _union(a: Value, b: Value) -> Value:
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return a | b
    members = lambda: itertools.chain(elements(a), elements(b))  # noqa: E731
    return Space("a union", lambda v: member(v, a) or member(v, b), members)


def _intersection(a: Value, b: Value) -> Value:
    if isinstance(a, Space):
        a, b = b, a
    if isinstance(a, Space):
        return Space("an intersection", lambda v: member(v, a) and member(v, b))
    return frozenset(x for x in a if member(x, b))


def _without(a: Value, b: Value) -> Value:
    if isinstance(a, Space):
        return Space("a difference", lambda v: member(v, a) and not member(v, b))
    return frozenset(x for x in a if not member(x, b))


def _subsets(values: Value) -> Value:
    def members() -> Iterable[Value]:
        items = ordered(elements(values))
        for n in range(len(items) + 1):
            yield from map(frozenset, itertools.combinations(items, n))

    def test(v: Value) -> bool:
        return isinstance(v, frozenset) and _subset(v, values)

    return Space("a SUBSET", test, members)


def product(sets: list[Value]) -> Space:
    """`S \\X T \\X ...`: tuples, an item of each."""
    return Space(
        "a product",
        lambda v: type(v) is tuple and len(v) == len(sets) and all(map(member, v, sets)),
        lambda: itertools.product(*(ordered(elements(each)) for each in sets)),
    )


def _sequences(items: Value) -> Space:
    return Space("Seq", lambda v: type(v) is tuple and all(member(x, items) for x in v))


def _head(s: Value) -> Value:
    if not s:
        raise IndexError("Head of an empty sequence")
    return s[0]


def _tail(s: Value) -> Value:
    if not s:
        raise IndexError("Tail of an empty sequence")
    return s[1:]


def _sub_sequence(s: Value, first: int, last: int) -> Value:
    """Items `first` to `last`, as the standard module defines it: all of them must be there."""
    if first > last:
        return ()
    if first < 1 or last > len(s):
        raise IndexError(f"SubSeq({show(s)}, {first}, {last}) is beyond the sequence")
    return s[first - 1 : last]


NUMBER_MAX = 2**31 - 1


def _number(value: int) -> int:
    """A number that the standard tools have too: one of 32 bits."""
    if not -NUMBER_MAX - 1 <= value <= NUMBER_MAX:
        raise OverflowError(f"{value} is no number of 32 bits")
    return value


def _modulo(a: int, b: int) -> int:
    if b <= 0:
        raise ZeroDivisionError(f"{a} % {b}: expected a positive divisor")
    return a % b


def _power(a: int, b: int) -> int:
    if b < 0 or a == b == 0:
        raise ArithmeticError(f"{a} ^ {b} has no value")
    if abs(a) > 1 and b > 31:
        raise OverflowError(f"{a} ^ {b} is no number of 32 bits")
    return _number(a**b)


INFIX: dict[str, Callable[[Value, Value], Value]] = {
    "eq": _same,
    "ne": operator.ne,
    "in": member,
    "notin": lambda x, s: not member(x, s),
    "subseteq": _subset,
    "union": _union,
    "intersect": _intersection,
    "minus_set": _without,
    "add": lambda a, b: _number(a + b),
    "sub": lambda a, b: _number(a - b),
    "mul": lambda a, b: _number(a * b),
    "div": lambda a, b: _number(a // b),
    "mod": _modulo,
    "pow": _power,
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
    "neg": lambda a: _number(-a),
    "domain": domain,
    "powerset": _subsets,
    "big_union": lambda sets: frozenset().union(*elements(sets)),
}
BUILTIN: dict[str, Callable[..., Value]] = {
    "Len": len,
    "Head": _head,
    "Tail": _tail,
    "Append": lambda s, x: (*s, x),
    "SubSeq": _sub_sequence,
    "Seq": _sequences,
    "Cardinality": lambda s: len(elements(s)),
}
