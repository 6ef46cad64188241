"""Interchangeable names: which ones a SYMMETRY declares, and whether the model treats them alike.

Rule: a renaming must leave what the model says as it is. The operators of TLA+ cannot tell names
apart; a constant can, which is refused here, and so can a CHOOSE between several, which is refused
where it is made (emit_expr.py).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise, permutations, product

from tokenspeed.fsm.core import Elaborator, Node, walk
from tokenspeed.fsm.syntax import Definition, Expr, Span
from tokenspeed.fsm.types import Type, unify
from tokenspeed.fsm.values import Function, Value, function, order_key, show

__all__ = ["canonical", "declared", "join", "mentions", "refuse_distinction"]

Groups = tuple[frozenset[str], ...]


def declared(
    name: str | None, core: Elaborator, definitions: Mapping[str, Definition], place: Span
) -> Groups:
    """The disjoint sets of names that may be permuted freely.

    Args:
        place: where the name is asked for.

    Raises:
        SpecError: the definition is no union of Permutations of constant sets of names.
    """
    found: list[frozenset[str]] = []

    def read(expr: Expr) -> None:
        if expr.op == "union":
            for part in expr.exprs():
                read(part)
        elif expr.op == "name" and expr.args[0] in definitions:
            read(definitions[str(expr.args[0])].body)
        elif expr.op == "call" and expr.args[0] == "Permutations":
            folded = core.fold(expr.exprs()[0], {})
            if folded is None or not all(type(v) is str for v in folded.args[0]):
                raise expr.span.error("Permutations of a set that is no constant set of names")
            found.append(folded.args[0])
        else:
            raise expr.span.error("SYMMETRY: expected Permutations(S), or a \\cup of them")

    if name is not None:
        read(Expr("name", (name,), place))
    return _generated(found)


def _generated(sets: Iterable[frozenset[str]]) -> Groups:
    """Sets that overlap are one: renamings compose."""
    out: list[frozenset[str]] = []
    for each in sets:
        apart = [other for other in out if not other & each]
        out = [*apart, each.union(*(other for other in out if other & each))]
    return tuple(group for group in out if len(group) > 1)


def refuse_distinction(roots: Iterable[Node], groups: Groups) -> None:
    """Refuse a constant that singles out some of the interchangeable names.

    Raises:
        SpecError: there is one; it names the constant and two names that it tells apart.
    """
    swaps = [pair for group in groups for pair in pairwise(sorted(group))]
    for node in walk(tuple(roots)):
        if node.op != "const":
            continue
        for a, b in swaps:
            if _renamed(node.args[0], {a: b, b: a}) != node.args[0]:
                raise node.span.error(
                    f"SYMMETRY is unsound: this is {_short(node.args[0])}, which tells {a} from "
                    f"{b}; treat all interchangeable names alike, or leave SYMMETRY out"
                )


def _short(value: Value) -> str:
    text = show(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _renamed(value: Value, to: Mapping[str, str]) -> Value:
    match value:
        case str():
            return to.get(value, value)
        case frozenset():
            return frozenset(_renamed(item, to) for item in value)
        case tuple():
            return tuple(_renamed(item, to) for item in value)
        case Function():
            pairs = value.items.items()
            return function({_renamed(k, to): _renamed(v, to) for k, v in pairs})
    return value


def canonical(
    groups: Groups, kinds: Iterable[Type], place: Span
) -> Callable[[tuple[Value, ...]], tuple[Value, ...]]:
    """Which state stands for a state: of all that differ by a renaming, the first in their order.

    Args:
        kinds: of the variables.
        place: where SYMMETRY is asked for.

    Raises:
        SpecError: a field is spelled as a name, and would be renamed with it.
    """
    if not groups:
        return lambda state: state
    names = frozenset().union(*groups)
    fields: set[str] = set()
    for kind in kinds:
        _each(kind, lambda at: fields.update(at.fields if at.kind == "record" else ()))
    if names & fields:
        raise place.error(
            f"{', '.join(sorted(names & fields))}: a name that SYMMETRY makes interchangeable, and "
            "a field of a record; choose another name"
        )
    orders = [[dict(zip(g, p, strict=True)) for p in permutations(g)] for g in map(sorted, groups)]
    renamings = [dict(ChainMap(*each)) for each in product(*orders)]
    return lambda state: min((_renamed(state, to) for to in renamings), key=order_key)


def join(groups: Groups, roots: Iterable[Node], span: Span) -> None:
    """One type for all the places where interchangeable names stand, so that they move together."""
    kinds: dict[int, Type] = {}
    for node in walk(tuple(roots)) if groups else ():
        _each(node.type, lambda at: kinds.setdefault(id(at), at))
    for names in groups:
        touched = [at for at in kinds.values() if at.root().names & names]
        for other in touched[1:]:
            unify(touched[0], other, span)


def mentions(kind: Type, groups: Groups) -> bool:
    """Whether values of a type may hold interchangeable names."""
    names = frozenset().union(*groups)
    found: list[bool] = []
    _each(kind, lambda at: found.append(bool(at.names & names)))
    return any(found)


def _each(kind: Type, visit: Callable[[Type], object]) -> None:
    """Visit a type and its parts."""
    at = kind.root()
    visit(at)
    for part in at.parts():
        _each(part, visit)
