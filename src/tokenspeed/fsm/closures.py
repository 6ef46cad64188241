"""What the interpreter's closures are made of: lazy names, choices in order, located errors.

Rule: an expression is a `Code`, an action `Steps`; both close over nothing but other closures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import final

from tokenspeed.fsm.syntax import Expr, Span
from tokenspeed.fsm.values import Function, Space, Unlisted, Value, elements, ordered, show

__all__ = [
    "UNSET", "Code", "Env", "Label", "LabelledSteps", "Lazy", "Names", "Operator", "State", "Steps",
    "changed", "choices", "chosen", "chosen_steps", "equal", "in_sequence", "kept", "listed",
    "listing", "located", "may_fail", "place", "same", "variable",
]  # fmt: skip

State = tuple[Value, ...]
Env = tuple[Value, ...]
Code = Callable[[State, State, Env], Value]
Steps = Callable[[State, State, Env], Iterator[State]]
Label = tuple[str, tuple[Value, ...]]
LabelledSteps = Callable[[State, State, Env], Iterator[tuple[Label, State]]]
Names = tuple[str, ...]


# Constructs whose value may not exist: what a name stands for is computed when it is asked for.
PARTIAL = {"choose", "apply", "case", "div", "mod", "pow", "field", "call", "name"}


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET = _Unset()
"""A variable of the successor that no conjunct has assigned yet."""


@final
class Lazy:
    """What a LET or a parameter stands for, computed when it is first asked for."""

    __slots__ = ("_code", "_value")

    def __init__(self, code: Callable[[], Value]) -> None:
        self._code: Callable[[], Value] | None = code
        self._value: Value = None

    def __call__(self) -> Value:
        """The value."""
        if self._code is not None:
            self._value, self._code = self._code(), None
        return self._value


@final
class Operator:
    """What a LET with parameters defines: a value and, in an action, the successors."""

    __slots__ = ("code", "env", "steps")

    def __init__(self, code: Code, steps: Steps, env: Env) -> None:
        self.code = code
        self.steps = steps
        self.env = env


def place(name: str, names: Names) -> int:
    """Where the value of a bound name stands, from the end of the environment."""
    return -1 - names[::-1].index(name)


def may_fail(expr: Expr, names: Names) -> bool:
    """Whether an expression may have no value somewhere."""
    if expr.op == "name" and expr.args[0] in names:
        return False
    return expr.op in PARTIAL or any(may_fail(part, names) for part in expr.exprs())


def choices(sets: list[Code], s: State, t: State, env: Env) -> Iterator[Env]:
    """Every extension of `env` by one element of each set, in their order."""
    if len(sets) == 1:
        return ((*env, v) for v in ordered(sets[0](s, t, env)))
    every = [ordered(code(s, t, env)) for code in sets]
    return ((*env, *combination) for combination in itertools.product(*every))


def chosen(expr: Expr, sets: list[Code], body: Code, single: Collection[Span]) -> Code:
    """CHOOSE: the first that qualifies; the only one, if the place is among `single`."""

    def run(s: State, t: State, env: Env) -> Value:
        qualified = (bound for bound in choices(sets, s, t, env) if body(s, t, bound))
        found = next(qualified, None)
        if found is None:
            raise expr.span.error("CHOOSE: no element qualifies")
        if single and expr.span in single and next(qualified, None) is not None:
            raise expr.span.error("CHOOSE: several qualify, so SYMMETRY is unsound")
        return found[-1]

    return run


def chosen_steps(sets: list[Code], steps: LabelledSteps) -> LabelledSteps:
    """The steps for each choice of members."""
    return lambda s, t, env: (
        step for bound in choices(sets, s, t, env) for step in steps(s, t, bound)
    )


def equal(expr: Expr, a: Value, b: Value) -> bool:
    """Values of two kinds are not compared, names aside: to Python TRUE is 1."""
    if type(a) is type(b):
        return bool(a == b)
    kinds = {type(a), type(b)}
    if str in kinds or kinds == {tuple, Function}:
        return False
    if Space in kinds:
        return listed(expr, a) == listed(expr, b)
    raise expr.span.error(f"no value: {show(a)} and {show(b)} are compared; they differ in kind")


def listed(expr: Expr, container: Value) -> frozenset[Value]:
    """The members of the set that an expression gives; an error with its place if it has no end."""
    try:
        return elements(container)
    except Unlisted as error:
        raise expr.span.error(str(error)) from error


def listing(expr: Expr, code: Code) -> Code:
    """The same as code."""
    return lambda s, t, env: listed(expr, code(s, t, env))


def in_sequence(parts: list[Steps]) -> Steps:
    """All conjuncts, left to right: each extends the successors of those before it."""

    def steps(s: State, t: State, env: Env) -> Iterator[State]:
        def rest(at: int, after: State) -> Iterator[State]:
            if at == len(parts):
                yield after
                return
            for more in parts[at](s, after, env):
                yield from rest(at + 1, more)

        yield from rest(0, t)

    return steps


def changed(code: Code, s: State, t: State, env: Env, old: Value) -> Value:
    """The new value of an EXCEPT, where `@` is the old one."""
    return code(s, t, (*env, old))


def variable(expr: Expr, index: int) -> Code:
    """A variable: of the state, or under a prime of the successor, where it must be assigned."""

    def read(s: State, t: State, env: Env) -> Value:
        value = s[index]
        if value is UNSET:
            raise expr.span.error(f"{expr.args[0]} is read before it is assigned")
        return value

    return read


def same(expr: Expr, indexes: list[int]) -> Code:
    """UNCHANGED as a test of two states."""

    def test(s: State, t: State, env: Env) -> bool:
        if any(t[i] is UNSET for i in indexes):
            raise expr.span.error("UNCHANGED is tested before its variables are assigned")
        return all(s[i] == t[i] for i in indexes)

    return test


def kept(indexes: list[int]) -> Steps:
    """UNCHANGED: assigns what is unassigned, and tests what is not."""

    def steps(s: State, t: State, env: Env) -> Iterator[State]:
        after = list(t)
        for index in indexes:
            if after[index] is not UNSET and after[index] != s[index]:
                return
            after[index] = s[index]
        yield tuple(after)

    return steps


def located(expr: Expr, code: Code) -> Code:
    """An operator that has no value for some arguments: then an error that names its place."""

    def run(s: State, t: State, env: Env) -> Value:
        try:
            return code(s, t, env)
        except (LookupError, ArithmeticError, Unlisted) as error:
            raise expr.span.error(f"no value: {error}") from error

    return run
