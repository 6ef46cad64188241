"""Prints a configuration of a specification as a C++ model for cpp/checker.

Rule: an action is a search for successors in the order in which it is written: a conjunct tests or
assigns, a disjunction or an existential goes on once for each branch that holds, guards included.
That is how the interpreter enumerates, and how the standard tools count `generated`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import final

from attrs import frozen

from tokenspeed.errors import SpecError
from tokenspeed.fsm.core import Elaborator, Local, Node, Scope, walk
from tokenspeed.fsm.cpp_types import Bounds, CppTypes
from tokenspeed.fsm.emit_expr import Expressions
from tokenspeed.fsm.evaluate import NO_ARM
from tokenspeed.fsm.model import Model
from tokenspeed.fsm.symmetry import declared, join, refuse_distinction
from tokenspeed.fsm.syntax import Expr, Span
from tokenspeed.fsm.temporal import Fairness, Properties, Temporal
from tokenspeed.fsm.types import Inference, Type, unify

__all__ = ["CompiledModel", "emit_model", "read_model"]

Then = Callable[[frozenset[int]], str]
Act = Callable[[Node, frozenset[int], Then], str]
Binders = tuple[tuple[Local, Node], ...]


@frozen(eq=False)
class Labelled:
    """A named action of Next, with the bindings around it."""

    name: str
    binders: Binders
    args: tuple[Node, ...]
    body: Node


@frozen(eq=False)
class CompiledModel:
    """A model whose every expression is in the core and typed; what the printer prints."""

    model: Model
    variables: tuple[Type, ...]
    initial: Node
    actions: tuple[Labelled, ...]
    asked: Properties[Expr]
    properties: Properties[Node]
    fairness: tuple[tuple[Fairness, Node], ...]
    constraints: tuple[Node, ...]
    step_constraints: tuple[Node, ...]
    symmetric: tuple[frozenset[str], ...]


def read_model(model: Model) -> CompiledModel:
    """Elaborate and type a model.

    Raises:
        SpecError: something is outside the subset, or has no finite type.
    """
    return _Reader(model).read()


@final
class _Reader:
    def __init__(self, model: Model) -> None:
        self._model = model
        self._definitions = dict(model.evaluator.definitions)
        self._core = Elaborator(model.evaluator, self._definitions)
        self._temporal = Temporal(self._core, self._definitions)

    def read(self) -> CompiledModel:
        config, core = self._model.config, self._core
        init = self._model.evaluator.definition(config.init)
        following = self._model.evaluator.definition(config.next)
        initial = core.initial(init.body)
        actions = tuple(self._labelled(following.body, {}, ()))
        asked = self._temporal.properties(config.properties)
        asked.invariants[:0] = [(n, self._defined(n)) for n in config.invariants]
        properties = asked.read(lambda expr: core.expr(expr, {}))
        fairness = [
            (fair, core.expr(fair.action, {}))
            for part in config.fairness
            for fair in self._temporal.fairness(part)
        ]
        if not properties.debts:
            fairness = []
        constraints = tuple(core.expr(self._defined(n), {}) for n in config.constraints)
        steps = tuple(core.expr(self._defined(n), {}) for n in config.action_constraints)
        variables = tuple(Type.unknown() for _ in self._model.evaluator.variables)
        place = Span(config.path, 1, 1)
        symmetric = declared(config.symmetry, core, self._definitions, place)
        if symmetric and properties.debts:
            raise place.error("SYMMETRY with a liveness property is unsound; leave one out")
        made = CompiledModel(
            self._model, variables, initial, actions, asked, properties, tuple(fairness),
            constraints, steps, symmetric,
        )  # fmt: skip
        _refuse_primes(made)
        self._type(made)
        return made

    def _defined(self, name: str) -> Expr:
        return self._model.evaluator.definition(name).body

    def _labelled(self, expr: Expr, scope: Scope, binders: Binders) -> list[Labelled]:
        if expr.op == "or":
            return [a for part in expr.exprs() for a in self._labelled(part, scope, binders)]
        if expr.op == "exists":
            pairs, inner = self._core.bind(expr, scope)
            return self._labelled(expr.expr(-1), inner, (*binders, *pairs))
        if expr.op in ("name", "call") and expr.args[0] in self._definitions:
            body = self._definitions[str(expr.args[0])].body
            if expr.op == "name" and body.op in ("or", "exists"):
                return self._labelled(body, scope, binders)
            args = tuple(self._core.expr(arg, scope) for arg in expr.exprs())
            return [Labelled(str(expr.args[0]), binders, args, self._core.action(expr, scope))]
        raise expr.span.error(
            "Next is a disjunction of named actions, under \\E if they have arguments"
        )

    def _type(self, made: CompiledModel) -> None:
        properties = made.properties
        predicates = [made.initial, *made.constraints, *made.step_constraints]
        predicates += [node for _, node in (*properties.initially, *properties.invariants)]
        predicates += [node for _, node in properties.steps]
        predicates += [n for d in properties.debts for n in (d.starts, d.owing, d.visited)]
        predicates += [node for _, node in made.fairness]
        inference = Inference(list(made.variables))
        roots: list[Node] = []
        for action in made.actions:
            body = action.body
            for local, domain in reversed(action.binders):
                body = Node("exists", (local, domain, body), body.span)
            predicates.append(body)
            roots.extend(action.args)
        inference.run([*roots, *predicates])
        for node in predicates:
            unify(node.type, Type("bool"), node.span)
        refuse_distinction(predicates, made.symmetric)
        join(made.symmetric, [*predicates, *roots], made.initial.span)


def _forks(node: Node) -> bool:
    """Whether the search goes on from here in several ways, each counted, though nothing moves."""
    parts = node.nodes()
    reached = {"and": parts, "if": parts[1:], "case": parts[1::2], "let": parts[-1:]}
    return node.op in ("or", "exists") or any(map(_forks, reached.get(node.op, ())))


def _refuse_primes(made: CompiledModel) -> None:
    """Refuse a prime in what is said of one state."""
    properties = made.properties
    said: list[Node] = [made.initial, *made.constraints]
    said += [node for _, node in (*properties.initially, *properties.invariants)]
    said += [n for d in properties.debts for n in (d.starts, d.owing, d.visited)]
    for node in walk(tuple(said), leaves=("const", "enabled")):
        if node.op in ("primed", "unchanged"):
            raise node.span.error("a prime in what is said of one state; it has no successor")


def emit_model(compiled: CompiledModel, bounds: Bounds) -> str:
    """The whole C++ file: a `Model`, and `main`.

    Raises:
        SpecError: a type is too large, or an action does not say what becomes of a variable.
        TooNarrow: a constant does not fit the bounds.
    """
    return _Printer(compiled, bounds).file()


@final
class _Printer:
    def __init__(self, compiled: CompiledModel, bounds: Bounds) -> None:
        self._c = compiled
        self._variables = compiled.model.evaluator.variables
        self._members = [f"v_{name.replace('!', '_')}" for name in self._variables]
        self._types = CppTypes(bounds, compiled.symmetric)
        self._e = Expressions(self._types, self._members, self._variables)
        self._e.enabled = self._enabled
        span = compiled.initial.span
        self._member_types = [self._types.name(kind, span) for kind in compiled.variables]

    def file(self) -> str:
        parts = [
            self._functions(),
            self._predicates(),
            self._fairness(),
            self._debts(),
            self._symmetry(),
        ]
        body = "\n".join(parts)
        symmetry = '#include "symmetry.hpp"\n' if self._groups() else ""
        bounds = self._types.bounds
        members = "".join(
            f"    {t} {m}{{}};\n" for t, m in zip(self._member_types, self._members, strict=True)
        )
        packs = "".join(f"checker::pack(out, s.{m}); " for m in self._members)
        unpacks = "".join(f"checker::unpack(in, s.{m}); " for m in self._members)
        widths = " + ".join(f"width<{t}>()" for t in self._member_types)
        shows = "".join(
            f'out += "{", " if i else ""}\\"{name}\\": "; show<Model>(out, s.{m});\n'
            for i, (name, m) in enumerate(zip(self._variables, self._members, strict=True))
        )
        return f"""\
// GENERATED by `tokenspeed check` from a specification and its configuration.
#define TS_INT_LO {bounds.int_low}
#define TS_INT_HI {bounds.int_high}
#define TS_SET_LO {bounds.set_low}
#define TS_SET_HI {bounds.set_high}
#include "erased.hpp"
#include "show.hpp"
{symmetry}
namespace {{
using namespace tokenspeed::checker;
namespace checker = tokenspeed::checker;

{"".join(self._types.declarations)}
struct Model {{
  struct State {{
{members}    static constexpr std::size_t kVariants = 1;
    static constexpr int tag() {{ return 0; }}
    static constexpr void set_tag(int) {{}}
    static constexpr auto all = std::make_tuple({", ".join(f"&State::{m}" for m in self._members)});
    friend bool operator==(const State&, const State&) = default;
  }};
  static constexpr int kBits = {widths or "1"};
  using Key = Packed<static_cast<std::size_t>((kBits + 63) / 64)>;
  static Key pack(const State& s) {{
    Key key;
    Writer out{{key.w.data()}};
    {packs}
    return key;
  }}
  static State unpack(const Key& key) {{
    State s;
    Reader in{{key.w.data()}};
    {unpacks}
    return s;
  }}
  static void show(std::string& out, const State& s) {{
    using checker::show;
    out += "{{";
{shows}    out += "}}";
  }}
{self._atom_names()}
{body}
}};
}}  // namespace

int main(int argc, char** argv) {{ return run(Erased<Model>(), argc, argv); }}
"""

    def _atom_names(self) -> str:
        rows = ", ".join(
            "std::array<const char*, 256>{" + ", ".join(f'"{n}"' for n in names) + "}"
            for names in self._types.atoms
        )
        count = len(self._types.atoms)
        return (
            f"  static constexpr std::array<std::array<const char*, 256>, {max(count, 1)}> kAtomNames"
            f"{{{{{rows}}}}};"
        )

    # --- behaviours -----------------------------------------------------------------------------

    def _functions(self) -> str:
        every = frozenset(range(len(self._variables)))
        names = list(dict.fromkeys(a.name for a in self._c.actions))

        def done(assigned: frozenset[int]) -> str:
            if assigned != every:
                raise self._missing("Init", self._c.initial, every - assigned)
            return "out(&t);\n"

        initial = self._act(self._c.initial, frozenset(), done, primed=False)
        calls = "".join(f"    step_{i}(s, out);\n" for i in range(len(self._c.actions)))
        steps = "\n".join(
            f"  static void step_{i}(const State& s, Visit out) {{\n"
            f"    State t;\n{self._action(a, names.index(a.name))}  }}"
            for i, a in enumerate(self._c.actions)
        )
        return f"""\
{_names("kActionNames", names)}\
  static constexpr bool kCheckDeadlock = {str(self._c.model.config.check_deadlock).lower()};
  static void initial(Reach out) {{
    State t;
    [[maybe_unused]] State& s = t;
{initial}  }}
{steps}
  static void next([[maybe_unused]] const State& s, [[maybe_unused]] Visit out) {{
{calls}  }}
"""

    def _action(self, action: Labelled, number: int) -> str:
        every = frozenset(range(len(self._variables)))

        def done(assigned: frozenset[int]) -> str:
            if assigned != every:
                raise self._missing(action.name, action.body, every - assigned)
            shows = ' o += ", ";'.join(
                f" checker::show<Model>(o, {self._e.expr(a)});" for a in action.args
            )
            return f"out({number}, &t, [&]([[maybe_unused]] std::string& o) {{{shows} }});\n"

        text = self._act(action.body, frozenset(), done)
        for local, domain in reversed(action.binders):
            self._e.assigned = frozenset()
            text = self._e.loop(local, domain, text)
        return text

    def _missing(self, name: str, node: Node, missing: frozenset[int]) -> SpecError:
        variable = self._variables[min(missing)]
        return node.span.error(f"{name} does not say what {variable}' is; add it, or UNCHANGED")

    def _enabled(self, node: Node) -> str:
        before, after = self._e.assigned, self._e.after
        inner = self._e.after = self._e.fresh("t")
        text = self._act(node.args[0], frozenset(), lambda _: "found = true;\n", target=inner)
        self._e.assigned, self._e.after = before, after
        return f"[&] {{ bool found = false; State {inner};\n{text} return found; }}()"

    def _act(
        self, node: Node, assigned: frozenset[int], then: Then, *, primed: bool = True,
        target: str = "t",
    ) -> str:  # fmt: skip
        """The statements that try to satisfy `node` and go on with `then`."""
        self._e.assigned = assigned if primed else None
        goes = "primed" if primed else "var"

        def inner(part: Node, so_far: frozenset[int], after: Then) -> str:
            return self._act(part, so_far, after, primed=primed, target=target)

        match node.op:
            case "and":
                return self._all(list(node.nodes()), assigned, then, inner)
            case "or":
                return self._branches([(None, n) for n in node.nodes()], assigned, then, inner)
            case "if" if self._moves(node, goes) or _forks(node):
                test = self._e.expr(node.args[0])
                cases = [(test, node.args[1]), (f"!({test})", node.args[2])]
                return self._branches(cases, assigned, then, inner)
            case "case" if self._moves(node, goes) or _forks(node):
                arms, none = self._arms(node)
                where = self._e.where(node.span, NO_ARM)
                return (
                    self._branches(arms, assigned, then, inner)
                    + f"if ({none}) undefined({where});\n"
                )
            case "exists":
                local, domain, body = node.args
                text = inner(body, assigned, then)
                self._e.assigned = assigned if primed else None
                return self._e.loop(local, domain, text)
            case "let":
                declaration = self._e.let(node)
                return f"{{ {declaration}{inner(node.args[2], assigned, then)} }}\n"
            case "eq" if node.args[0].op == goes:
                index, value = node.args[0].args[0], self._e.expr(node.args[1])
                if index not in assigned:
                    return f"{target}.{self._members[index]} = {value};\n" + then(
                        assigned | {index}
                    )
            case "among" if node.args[0].args[0] not in assigned:
                return self._chosen(node, assigned, then, target)
            case "unchanged" if primed:
                return self._kept(node, assigned, then, target)
        return f"if ({self._e.expr(node)}) {{\n{then(assigned)}}}\n"

    def _all(self, parts: list[Node], assigned: frozenset[int], then: Then, inner: Act) -> str:
        if not parts:
            return then(assigned)
        return inner(parts[0], assigned, lambda so_far: self._all(parts[1:], so_far, then, inner))

    def _branches(
        self,
        cases: Sequence[tuple[str | None, Node]],
        assigned: frozenset[int],
        then: Then,
        inner: Act,
    ) -> str:
        """One way on for each branch; what follows is printed once if all assign the same."""
        ends: list[frozenset[int]] = []

        def note(so_far: frozenset[int]) -> str:
            ends.append(so_far)
            return ""

        for _, node in cases:
            inner(node, assigned, note)
        if len(set(ends)) == 1 and len(cases) > 1:
            name = self._e.fresh("rest")
            rest = then(ends[0])
            call: Then = lambda _: f"{name}();\n"  # noqa: E731
            texts = [self._guarded(test, inner(node, assigned, call)) for test, node in cases]
            return f"{{ const auto {name} = [&] {{\n{rest}}};\n{''.join(texts)}}}\n"
        return "".join(self._guarded(test, inner(node, assigned, then)) for test, node in cases)

    def _arms(self, node: Node) -> tuple[list[tuple[str | None, Node]], str]:
        """The arms of a CASE, each with the test that it is the first to hold; the test for none."""
        args, out = node.nodes(), []
        before = "true"
        for test, value in zip(args[::2], args[1::2], strict=True):
            this = self._e.expr(test)
            out.append((f"{before} && ({this})", value))
            before += f" && !({this})"
        return list(out), before

    @staticmethod
    def _guarded(test: str | None, text: str) -> str:
        return f"if ({test}) {{\n{text}}}\n" if test else text

    def _chosen(self, node: Node, assigned: frozenset[int], then: Then, target: str) -> str:
        element, domain, _ = node.args
        local = Local("choice", element.type)
        index = element.args[0]
        name = self._e.local(local)
        text = f"{target}.{self._members[index]} = {name};\n" + then(assigned | {index})
        self._e.assigned = assigned
        return self._e.loop(local, domain, text)

    def _kept(self, node: Node, assigned: frozenset[int], then: Then, target: str) -> str:
        out = "".join(
            f"{target}.{self._members[i]} = s.{self._members[i]};\n"
            for i in node.args
            if i not in assigned
        )
        tests = [
            f"{target}.{self._members[i]} == s.{self._members[i]}"
            for i in node.args
            if i in assigned
        ]
        rest = then(assigned | set(node.args))
        return out + (f"if ({' && '.join(tests)}) {{\n{rest}}}\n" if tests else rest)

    def _moves(self, node: Node, goes: str) -> bool:
        return any(n.op in (goes, "unchanged") for n in walk(node))

    # --- properties -----------------------------------------------------------------------------

    def _predicates(self) -> str:
        c, p = self._c, self._c.properties
        self._e.assigned = None
        state = "([[maybe_unused]] const State& s)"
        pair = "([[maybe_unused]] const State& s, [[maybe_unused]] const State& t)"
        return "\n".join(
            [
                self._numbered("violated", "kInvariants", p.invariants, state),
                self._numbered("violated_initially", "kInitially", p.initially, state),
                self._numbered("broken_step", "kStepNames", p.steps, pair),
                self._test("inside", c.constraints, state),
                self._test("step_inside", c.step_constraints, pair),
            ]
        )

    def _numbered(self, name: str, names: str, tests: list[tuple[str, Node]], params: str) -> str:
        body = "".join(
            f"    if (!({self._e.expr(node)})) return {i};\n" for i, (_, node) in enumerate(tests)
        )
        return (
            _names(names, [n for n, _ in tests])
            + f"  static int {name}{params} {{\n{body}    return -1;\n  }}"
        )

    def _test(self, name: str, tests: tuple[Node, ...], params: str) -> str:
        body = " && ".join(f"({self._e.expr(node)})" for node in tests) or "true"
        return f"  static bool {name}{params} {{ return {body}; }}"

    def _fairness(self) -> str:
        cases = []
        for i, (fair, node) in enumerate(self._c.fairness):
            end = functools.partial(self._fair_step, fair, node)
            cases.append(
                f"      case {i}: {{\n{self._act(node, frozenset(), end)}      break; }}\n"
            )
        count = len(self._c.fairness)
        if count > 64:
            raise self._c.initial.span.error(f"{count} fairness conditions; expected at most 64")
        return (
            _flags("kStrong", [fair.strong for fair, _ in self._c.fairness])
            + "  static void fair([[maybe_unused]] int k, "
            "[[maybe_unused]] const State& s, [[maybe_unused]] Reach out) {\n"
            f"    [[maybe_unused]] State t;\n    switch (k) {{\n{''.join(cases)}    }}\n  }}"
        )

    def _fair_step(self, fair: Fairness, node: Node, assigned: frozenset[int]) -> str:
        missing = frozenset(range(len(self._variables))) - assigned
        if missing:
            raise self._missing(fair.name, node, missing)
        tests = (f"!(t.{self._members[v]} == s.{self._members[v]})" for v in fair.subscript)
        return f"if ({' || '.join(tests)}) out(&t);\n"

    def _debts(self) -> str:
        self._e.assigned = None
        debts = self._c.properties.debts

        def choose(function: str, nodes: list[Node]) -> str:
            cases = "".join(
                f"      case {i}: return {self._e.expr(n)};\n" for i, n in enumerate(nodes)
            )
            return (
                f"  static bool {function}([[maybe_unused]] int k, [[maybe_unused]] const State& s) {{\n"
                f"    switch (k) {{\n{cases}    }}\n    return false;\n  }}\n"
            )

        return (
            _names("kLivenessNames", [d.name for d in debts])
            + _flags("kFromStart", [d.from_start for d in debts])
            + choose("starts", [d.starts for d in debts])
            + choose("owing", [d.owing for d in debts])
            + choose("visited", [d.visited for d in debts])
        )

    def _groups(self) -> list[tuple[int, list[int]]]:
        """Interchangeable names: of which kind, at which ranks."""
        return [
            (kind, ranks)
            for names in self._c.symmetric
            for kind, every in enumerate(self._types.atoms)
            if (ranks := [i for i, name in enumerate(every) if name in names])
        ]

    def _symmetry(self) -> str:
        groups, atoms = self._groups(), self._types.atoms
        if not groups:
            return (
                "  static constexpr bool kReduced = false;\n"
                "  static Keyer* keyer() { return new Plain<Model>; }"
            )
        rows = ", ".join(f"{{{kind}, {{{', '.join(map(str, r))}}}}}" for kind, r in groups)
        tests = " || ".join(f"id == {kind}" for kind in sorted({kind for kind, _ in groups}))
        sizes = ", ".join(str(len(a)) for a in atoms)
        return (
            "  static constexpr bool kReduced = true;\n"
            f"  static constexpr std::size_t kGroups = {len(groups)};\n"
            f"  static constexpr std::size_t kInterchangeable = {sum(len(r) for _, r in groups)};\n"
            f"  static constexpr int kKinds = {len(atoms)};\n"
            f"  static constexpr std::array<int, {len(atoms)}> kNames{{{sizes}}};\n"
            f"  static constexpr bool symmetric([[maybe_unused]] int id) {{ return {tests}; }}\n"
            "  struct Group {\n    int id;\n    std::vector<int> members;\n  };\n"
            "  static const std::vector<Group>& groups() {\n"
            f"    static const std::vector<Group> all{{{rows}}};\n    return all;\n  }}\n"
            "  static Keyer* keyer() { return new Canonical<Model>; }"
        )


def _names(name: str, items: list[str]) -> str:
    return _array("const char*", name, [f'"{item}"' for item in items])


def _flags(name: str, items: list[bool]) -> str:
    return _array("bool", name, [str(item).lower() for item in items])


def _array(kind: str, name: str, items: list[str]) -> str:
    count, row = len(items), ", ".join(items)
    return f"  static constexpr std::array<{kind}, {count}> {name}{{{row}}};\n"
