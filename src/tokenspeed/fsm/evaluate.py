"""The interpreter: what an expression of the spec means. Every printer is held against it.

Rule: evaluation is a closure per expression, over the plain values of values.py.

A state is a tuple of values in the order of the module's variables. An expression is compiled to
`f(state, next, env)`: `next` is the successor being built, with UNSET where nothing is assigned
yet; `env` holds the values of bound names, innermost last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

from tokenspeed.errors import SpecError
from tokenspeed.fsm.closures import (
    UNSET,
    Code,
    Env,
    Label,
    LabelledSteps,
    Lazy,
    Names,
    Operator,
    State,
    Steps,
    changed,
    choices,
    chosen,
    chosen_steps,
    equal,
    in_sequence,
    kept,
    listed,
    listing,
    located,
    may_fail,
    place,
    same,
    variable,
)
from tokenspeed.fsm.syntax import Bound, Definition, Expr, Module, Span
from tokenspeed.fsm.values import (
    BOOLEANS,
    BUILTIN,
    INFIX,
    INTEGERS,
    NATURALS,
    PREFIX,
    Function,
    Value,
    apply,
    function,
    functions_space,
    member,
    ordered,
    product,
    records_space,
    updated,
)

__all__ = ["NO_ARM", "UNSET", "Evaluator", "Label", "State"]

NO_ARM = "no arm of this CASE holds; add OTHER"
_STANDARD: dict[str, Value] = {"Nat": NATURALS, "Int": INTEGERS, "BOOLEAN": BOOLEANS}
ARITHMETIC = {"add", "sub", "mul", "div", "mod", "pow"}


class Evaluator:
    """One module with its constants: compiles its definitions once and keeps them.

    Args:
        module: as parsed; what it EXTENDS must be Naturals, Sequences or FiniteSets.
        constants: a value for each CONSTANT.

    Attributes:
        single: where a CHOOSE must have one element that qualifies (see SYMMETRY).
    """

    def __init__(self, module: Module, constants: Mapping[str, Value]) -> None:
        self._module = module
        self.variables = module.variables
        self._constants = dict(constants)
        self._definitions = {d.name: d for d in module.definitions}
        self._index = {name: i for i, name in enumerate(self.variables)}
        self._bodies: dict[str, Code] = {}
        self._steps: dict[tuple[str, bool], Steps] = {}
        self.single: set[Span] = set()
        self._start: State = (UNSET,) * len(self.variables)

    @property
    def definitions(self) -> Mapping[str, Definition]:
        """Every operator in scope, by name; constants that are given by name are among them."""
        return self._definitions

    # --- values ---------------------------------------------------------------------------------

    def value(self, name: str, state: State = ()) -> Value:
        """The value of a constant, or of a definition without parameters; in a state if it
        mentions variables."""
        if name in self._constants:
            return self._constants[name]
        return self._body(name)(state, self._start, ())

    def predicate(self, name: str) -> Callable[[State], bool]:
        """A definition without parameters as a function of the state."""
        body = self._body(name)
        return lambda state: bool(body(state, self._start, ()))

    def step_predicate(self, expr: Expr) -> Callable[[State, State], bool]:
        """An action as a relation between two states."""
        code = self._code(expr, ())
        return lambda state, after: bool(code(state, after, ()))

    def expression(self, expr: Expr) -> Callable[[State], Value]:
        """Any state-level expression as a function of the state."""
        code = self._code(expr, ())
        return lambda state: code(state, self._start, ())

    def constant(self, expr: Expr, bound: Mapping[str, Value]) -> Value:
        """The value of an expression that mentions no variable, with some names bound."""
        return self._code(expr, tuple(bound))(self._start, self._start, tuple(bound.values()))

    def steps(self, expr: Expr, bound: Mapping[str, Value]) -> Callable[[State], Iterator[State]]:
        """Every way to satisfy an action, with some names bound; unlabelled."""
        found, values = self._action(expr, tuple(bound)), tuple(bound.values())
        return lambda state: found(state, self._start, values)

    def definition(self, name: str) -> Definition:
        """A definition by name.

        Raises:
            SpecError: the module has none of that name.
        """
        if name not in self._definitions:
            module = self._module
            raise SpecError(module.path, 1, 1, f"{name} is not defined in {module.name}")
        return self._definitions[name]

    # --- behaviours -----------------------------------------------------------------------------

    def initial(self, name: str) -> list[State]:
        """All states that satisfy the definition `name`, in a fixed order."""
        return list(self.starts(name))

    def starts(self, name: str) -> Iterator[State]:
        """The same one by one, repetitions included."""
        steps = self._action(self.definition(name).body, (), prime=False)
        return steps(self._start, self._start, ())

    def successors(self, name: str) -> Callable[[State], Iterator[tuple[Label, State]]]:
        """Every way to satisfy the action `name`, labelled with its operator."""
        found = self._labelled(self.definition(name).body, ())
        start = self._start

        def run(state: State) -> Iterator[tuple[Label, State]]:
            for label, after in (step for each in found for step in each(state, start, ())):
                if UNSET in after:
                    missing = self.variables[after.index(UNSET)]
                    raise self.definition(label[0]).span.error(
                        f"{label[0]} does not say what {missing}' is; add it, or UNCHANGED"
                    )
                yield label, after

        return run

    def action_names(self, expr: Expr) -> tuple[str, ...]:
        """The operators that label the successors of an action, each once."""
        name = str(expr.args[0]) if expr.op in ("name", "call") else ""
        if expr.op == "name" and name in self._definitions:
            body = self._definitions[name].body
            if body.op in ("or", "exists"):
                return self.action_names(body)
        if name:
            return (name,)
        parts = expr.exprs() if expr.op == "or" else expr.exprs()[-1:]
        return tuple(dict.fromkeys(n for part in parts for n in self.action_names(part)))

    def _labelled(self, expr: Expr, names: Names) -> list[LabelledSteps]:
        """The named actions of a disjunction, in their order; each with the choices around it."""
        if expr.op == "or":
            return [each for arg in expr.exprs() for each in self._labelled(arg, names)]
        if expr.op == "exists":
            inner, sets = self._bind(expr, names)
            return [chosen_steps(sets, each) for each in self._labelled(expr.expr(-1), inner)]
        if expr.op in ("name", "call"):
            name = str(expr.args[0])
            if expr.op == "name" and name in self._definitions:
                inner_body = self._definitions[name].body
                if inner_body.op in ("or", "exists"):
                    return self._labelled(inner_body, ())
            args = [self._code(arg, names) for arg in expr.exprs()]
            steps = self._action(expr, names)
            return [
                lambda s, t, env: (
                    ((name, tuple(arg(s, t, env) for arg in args)), a) for a in steps(s, t, env)
                )
            ]
        raise expr.span.error(
            "Next is a disjunction of named actions, under \\E if they have arguments"
        )

    # --- actions --------------------------------------------------------------------------------

    def _action(self, expr: Expr, names: Names, *, prime: bool = True) -> Steps:
        """Compile to the successors that satisfy it; `prime` false reads `x = v` as the assignment,
        and a variable as what it has been assigned.

        A disjunction or an existential gives a successor for each branch that holds, guards
        included: that is how the standard tools count `generated`.
        """
        found = self._parts(expr, names, prime)
        return found if prime else lambda _, t, env: found(t, t, env)

    def _parts(self, expr: Expr, names: Names, prime: bool) -> Steps:
        match expr.op:
            case "and":
                return in_sequence([self._action(arg, names, prime=prime) for arg in expr.exprs()])
            case "or":
                branches = [self._action(arg, names, prime=prime) for arg in expr.exprs()]
                return lambda s, t, env: (a for branch in branches for a in branch(s, t, env))
            case "exists":
                inner, sets = self._bind(expr, names)
                body = self._action(expr.expr(-1), inner, prime=prime)
                return lambda s, t, env: (
                    a for bound in choices(sets, s, t, env) for a in body(s, t, bound)
                )
            case "eq" | "in" if (target := self._target(expr.expr(0), prime)) is not None:
                return self._assignment(target, expr, names)
            case "unchanged":
                return kept(self._changed_variables(expr.expr(0)))
            case "name" | "call" if expr.args[0] in self._definitions and expr.args[0] not in names:
                return self._operator_steps(expr, names, prime)
            case "call" if expr.args[0] in names:
                return self._local_steps(expr, names)
            case "if" | "case":
                return self._alternatives(expr, names, prime)
            case "angle_action":
                step = self._action(expr.expr(0), names, prime=prime)
                stays = self._unchanged(Expr("unchanged", (expr.expr(1),), expr.span), names)
                return lambda s, t, env: (a for a in step(s, t, env) if not stays(s, a, env))
            case "let":
                inner, values = self._locals(expr, names, prime=prime)
                body = self._action(expr.expr(-1), inner, prime=prime)
                return lambda s, t, env: body(s, t, values(s, t, env))
        test = self._code(expr, names)
        return lambda s, t, env: iter((t,)) if test(s, t, env) else iter(())

    def _alternatives(self, expr: Expr, names: Names, prime: bool) -> Steps:
        parts = expr.exprs()
        if expr.op == "if":
            parts = (parts[0], parts[1], Expr("bool", (True,), expr.span), parts[2])
        tests = [self._code(test, names) for test in parts[::2]]
        ways = [self._action(way, names, prime=prime) for way in parts[1::2]]

        def steps(s: State, t: State, env: Env) -> Iterator[State]:
            for test, way in zip(tests, ways, strict=True):
                if test(s, t, env):
                    return way(s, t, env)
            raise expr.span.error(NO_ARM)

        return steps

    def _target(self, expr: Expr, prime: bool) -> int | None:
        """The variable that an equation assigns, if it does."""
        if prime and expr.op == "prime":
            expr = expr.expr(0)
        elif prime:
            return None
        return self._index.get(str(expr.args[0])) if expr.op == "name" else None

    def _assignment(self, index: int, expr: Expr, names: Names) -> Steps:
        code = self._code(expr.expr(1), names)
        choose = expr.op == "in"

        def steps(s: State, t: State, env: Env) -> Iterator[State]:
            value = code(s, t, env)
            if t[index] is UNSET:
                for option in ordered(listed(expr, value)) if choose else (value,):
                    yield (*t[:index], option, *t[index + 1 :])
            elif member(t[index], value) if choose else t[index] == value:
                yield t

        return steps

    def _changed_variables(self, expr: Expr) -> list[int]:
        if expr.op == "tuple":
            return [i for arg in expr.exprs() for i in self._changed_variables(arg)]
        name = str(expr.args[0])
        if expr.op == "name" and name in self._index:
            return [self._index[name]]
        if expr.op == "name" and name in self._definitions:
            return self._changed_variables(self._definitions[name].body)
        raise expr.span.error("expected variables, or a tuple of them")

    def _operator_steps(self, expr: Expr, names: Names, prime: bool) -> Steps:
        name = str(expr.args[0])
        definition = self._definitions[name]
        if (name, prime) not in self._steps:
            body = self._action(definition.body, definition.params, prime=prime)
            self._steps[name, prime] = body
        steps = self._steps[name, prime]
        args = [self._delayed(arg, names) for arg in expr.exprs()]
        self._check_arity(expr, definition, len(args))
        return lambda s, t, env: steps(s, t, tuple(arg(s, t, env) for arg in args))

    def _local_steps(self, expr: Expr, names: Names) -> Steps:
        at = place(str(expr.args[0]), names)
        args = [self._delayed(arg, names) for arg in expr.exprs()]

        def steps(s: State, t: State, env: Env) -> Iterator[State]:
            operator: Operator = env[at]
            return operator.steps(s, t, (*operator.env, *(arg(s, t, env) for arg in args)))

        return steps

    # --- expressions ----------------------------------------------------------------------------

    def _body(self, name: str) -> Code:
        if name not in self._bodies:
            definition = self.definition(name)
            self._bodies[name] = self._code(definition.body, definition.params)
        return self._bodies[name]

    def _check_arity(self, expr: Expr, definition: Definition, got: int) -> None:
        if got != len(definition.params):
            want = len(definition.params)
            raise expr.span.error(f"{definition.name}: got {got} arguments; expected {want}")

    def _code(self, expr: Expr, names: Names) -> Code:
        build = getattr(self, f"_{expr.op}", None)
        if build is not None:
            code: Code = build(expr, names)
            return code
        if expr.op in INFIX:
            infix, (left, right) = INFIX[expr.op], self._codes(expr, names)
            if expr.op in ARITHMETIC:
                return located(expr, lambda s, t, env: infix(left(s, t, env), right(s, t, env)))
            return lambda s, t, env: infix(left(s, t, env), right(s, t, env))
        if expr.op in PREFIX:
            prefix, (only,) = PREFIX[expr.op], self._codes(expr, names)
            if expr.op == "neg":
                return located(expr, lambda s, t, env: prefix(only(s, t, env)))
            return lambda s, t, env: prefix(only(s, t, env))
        raise expr.span.error(f"{expr.op} has no value here; it is temporal, or outside the subset")

    def _codes(self, expr: Expr, names: Names) -> list[Code]:
        return [self._code(arg, names) for arg in expr.exprs()]

    def _name(self, expr: Expr, names: Names) -> Code:
        name = str(expr.args[0])
        if name in names:
            at = place(name, names)
            return lambda s, t, env: v() if type(v := env[at]) is Lazy else v
        if name in self._index:
            return variable(expr, self._index[name])
        if name in self._constants:
            value = self._constants[name]
            return lambda s, t, env: value
        if name in self._definitions:
            return self._call(expr, names)
        if name in _STANDARD:
            standard = _STANDARD[name]
            return lambda s, t, env: standard
        raise expr.span.error(f"unknown name {name}; define it, or give the constant a value")

    def _call(self, expr: Expr, names: Names) -> Code:
        name = str(expr.args[0])
        if name not in names and name not in self._definitions:
            return self._builtin(expr, names)
        args = [self._delayed(arg, names) for arg in expr.exprs()]
        if name in names:
            at = place(name, names)

            def apply_local(s: State, t: State, env: Env) -> Value:
                operator: Operator = env[at]
                return operator.code(s, t, (*operator.env, *(arg(s, t, env) for arg in args)))

            return apply_local
        self._check_arity(expr, self._definitions[name], len(args))
        body = self._body(name)
        if len(args) == 1:
            (only,) = args
            return lambda s, t, env: body(s, t, (only(s, t, env),))
        return lambda s, t, env: body(s, t, tuple(arg(s, t, env) for arg in args))

    def _builtin(self, expr: Expr, names: Names) -> Code:
        builtin, args = BUILTIN.get(str(expr.args[0])), self._codes(expr, names)
        if builtin is None:
            raise expr.span.error(f"unknown operator {expr.args[0]}")
        return located(expr, lambda s, t, env: builtin(*(arg(s, t, env) for arg in args)))

    def _delayed(self, expr: Expr, names: Names) -> Code:
        """What a name is to stand for: a value, or what will compute it if it may not exist."""
        code = self._code(expr, names)
        if not may_fail(expr, names):
            return code
        return lambda s, t, env: Lazy(lambda: code(s, t, env))

    def _prime(self, expr: Expr, names: Names) -> Code:
        code = self._code(expr.expr(0), names)
        return lambda s, t, env: code(t, t, env)

    def _enabled(self, expr: Expr, names: Names) -> Code:
        steps = self._action(expr.expr(0), names)
        return lambda s, t, env: any(True for _ in steps(s, self._start, env))

    def _angle_action(self, expr: Expr, names: Names) -> Code:
        step, indexes = self._code(expr.expr(0), names), self._changed_variables(expr.expr(1))
        return lambda s, t, env: step(s, t, env) and any(s[i] != t[i] for i in indexes)

    def _unchanged(self, expr: Expr, names: Names) -> Code:
        indexes = self._changed_variables(expr.expr(0))
        return same(expr, indexes)

    def _naturals(self, _expr: Expr, _names: Names) -> Code:
        return lambda s, t, env: NATURALS

    def _integers(self, _expr: Expr, _names: Names) -> Code:
        return lambda s, t, env: INTEGERS

    def _booleans(self, _expr: Expr, _names: Names) -> Code:
        return lambda s, t, env: BOOLEANS

    def _literal(self, expr: Expr, _names: Names) -> Code:
        value = expr.args[0]
        return lambda s, t, env: value

    _nat = _bool = _string = _value = _literal

    def _and(self, expr: Expr, names: Names) -> Code:
        codes = self._codes(expr, names)
        return lambda s, t, env: all(code(s, t, env) for code in codes)

    def _or(self, expr: Expr, names: Names) -> Code:
        codes = self._codes(expr, names)
        return lambda s, t, env: any(code(s, t, env) for code in codes)

    def _implies(self, expr: Expr, names: Names) -> Code:
        left, right = self._codes(expr, names)
        return lambda s, t, env: not left(s, t, env) or right(s, t, env)

    def _if(self, expr: Expr, names: Names) -> Code:
        test, yes, no = self._codes(expr, names)
        return lambda s, t, env: yes(s, t, env) if test(s, t, env) else no(s, t, env)

    def _case(self, expr: Expr, names: Names) -> Code:
        codes = self._codes(expr, names)
        arms = list(zip(codes[::2], codes[1::2], strict=True))

        def run(s: State, t: State, env: Env) -> Value:
            for test, value in arms:
                if test(s, t, env):
                    return value(s, t, env)
            raise expr.span.error(NO_ARM)

        return run

    def _tuple(self, expr: Expr, names: Names) -> Code:
        codes = self._codes(expr, names)
        return lambda s, t, env: tuple(code(s, t, env) for code in codes)

    def _set(self, expr: Expr, names: Names) -> Code:
        codes = self._codes(expr, names)
        return lambda s, t, env: frozenset(code(s, t, env) for code in codes)

    def _record(self, expr: Expr, names: Names) -> Code:
        keys, codes = expr.args[::2], self._codes(expr, names)
        pairs = list(zip(keys, codes, strict=True))
        return lambda s, t, env: Function({key: code(s, t, env) for key, code in pairs})

    def _records(self, expr: Expr, names: Names) -> Code:
        keys, codes = expr.args[::2], self._codes(expr, names)

        return lambda s, t, env: records_space(
            dict(zip(keys, (code(s, t, env) for code in codes), strict=True))
        )

    def _times(self, expr: Expr, names: Names) -> Code:
        codes = self._codes(expr, names)
        return lambda s, t, env: product([code(s, t, env) for code in codes])

    def _functions(self, expr: Expr, names: Names) -> Code:
        source, target = self._codes(expr, names)
        return lambda s, t, env: functions_space(source(s, t, env), target(s, t, env))

    def _apply(self, expr: Expr, names: Names) -> Code:
        fn, arg = self._codes(expr, names)
        return located(expr, lambda s, t, env: apply(fn(s, t, env), arg(s, t, env)))

    def _field(self, expr: Expr, names: Names) -> Code:
        record, name = self._code(expr.expr(0), names), expr.args[1]
        return located(expr, lambda s, t, env: record(s, t, env).items[name])

    def _except(self, expr: Expr, names: Names) -> Code:
        base = self._code(expr.expr(0), names)
        inner = (*names, "@")
        updates = []
        for update in expr.exprs()[1:]:
            *path, value = update.exprs()
            updates.append(([self._code(p, names) for p in path], self._code(value, inner)))

        def run(s: State, t: State, env: Env) -> Value:
            result = base(s, t, env)
            for path, value in updates:
                keys = tuple(code(s, t, env) for code in path)
                change = functools.partial(changed, value, s, t, env)
                result = updated(result, keys, change)
            return result

        return run

    def _at(self, expr: Expr, names: Names) -> Code:
        return self._name(Expr("name", ("@",), expr.span), names)

    def _bind(self, expr: Expr, names: Names) -> tuple[Names, list[Code]]:
        """The names in scope inside, and a set for each new one."""
        inner, sets = names, []
        for bound in expr.args:
            if isinstance(bound, Bound):
                code = listing(bound.domain, self._code(bound.domain, names))
                inner = (*inner, *bound.names)
                sets += [code] * len(bound.names)
        return inner, sets

    def _eq(self, expr: Expr, names: Names) -> Code:
        left, right = self._codes(expr, names)
        return lambda s, t, env: equal(expr, left(s, t, env), right(s, t, env))

    def _ne(self, expr: Expr, names: Names) -> Code:
        left, right = self._codes(expr, names)
        return lambda s, t, env: not equal(expr, left(s, t, env), right(s, t, env))

    def _forall(self, expr: Expr, names: Names) -> Code:
        inner, sets = self._bind(expr, names)
        body = self._code(expr.expr(-1), inner)
        return lambda s, t, env: all(body(s, t, b) for b in choices(sets, s, t, env))

    def _exists(self, expr: Expr, names: Names) -> Code:
        inner, sets = self._bind(expr, names)
        body = self._code(expr.expr(-1), inner)
        return lambda s, t, env: any(body(s, t, b) for b in choices(sets, s, t, env))

    def _choose(self, expr: Expr, names: Names) -> Code:
        inner, sets = self._bind(expr, names)
        body = self._code(expr.expr(-1), inner)
        return chosen(expr, sets, body, self.single)

    def _filter(self, expr: Expr, names: Names) -> Code:
        inner, sets = self._bind(expr, names)
        test = self._code(expr.expr(-1), inner)
        return lambda s, t, env: frozenset(b[-1] for b in choices(sets, s, t, env) if test(s, t, b))

    def _map(self, expr: Expr, names: Names) -> Code:
        inner, sets = self._bind(expr, names)
        body = self._code(expr.expr(-1), inner)
        return lambda s, t, env: frozenset(body(s, t, b) for b in choices(sets, s, t, env))

    def _function(self, expr: Expr, names: Names) -> Code:
        inner, sets = self._bind(expr, names)
        if len(sets) != 1:
            raise expr.span.error(
                "functions of several arguments are outside the subset; nest them"
            )
        body = self._code(expr.expr(-1), inner)
        return lambda s, t, env: function({b[-1]: body(s, t, b) for b in choices(sets, s, t, env)})

    def _let(self, expr: Expr, names: Names) -> Code:
        inner, values = self._locals(expr, names)
        body = self._code(expr.expr(-1), inner)
        return lambda s, t, env: body(s, t, values(s, t, env))

    def _locals(
        self, expr: Expr, names: Names, *, prime: bool = True
    ) -> tuple[Names, Callable[[State, State, Env], Env]]:
        """The names that a LET adds, and what extends the environment by their values."""
        inner, makers = names, []
        for definition in expr.args:
            if isinstance(definition, Definition):
                scope = (*inner, *definition.params)
                if definition.params:
                    makers.append(self._operator(definition.body, scope, prime))
                else:
                    makers.append(self._delayed(definition.body, scope))
                inner = (*inner, definition.name)

        def values(s: State, t: State, env: Env) -> Env:
            for make in makers:
                env = (*env, make(s, t, env))
            return env

        return inner, values

    def _operator(self, body: Expr, names: Names, prime: bool) -> Code:
        code, steps = self._code(body, names), self._action(body, names, prime=prime)
        return lambda s, t, env: Operator(code, steps, env)
