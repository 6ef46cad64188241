"""TLA+ text to a syntax tree with source positions. The grammar is tree-sitter-tlaplus.

Rule: what is not understood is refused by name, with file, line and column; nothing is guessed.

An expression is an `Expr(op, args, span)`. Operators of the language keep their usual names
(`and`, `in`, `union` ...); `args` are expressions, or plain strings and `Bound`s where the shape of
the construct says so (see the functions below, one a construct).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import tree_sitter
import tree_sitter_tlaplus
from attrs import field, frozen

from tokenspeed.errors import SpecError

__all__ = ["Bound", "Definition", "Expr", "Instance", "Module", "Span", "parse_module", "read_text"]


@frozen
class Span:
    """Where a construct starts: file, line and column from 1; and where it lies, in bytes."""

    path: Path
    line: int
    column: int
    lies: slice = field(default=slice(0, 0), eq=False, repr=False)

    def error(self, message: str) -> SpecError:
        """The refusal of the construct here."""
        return SpecError(self.path, self.line, self.column, message)


@frozen
class Expr:
    """One expression. Two are equal if they say the same, wherever they stand."""

    op: str
    args: tuple[object, ...]
    span: Span = field(eq=False, repr=False)

    def expr(self, index: int) -> Expr:
        """The argument at `index`, which is an expression."""
        arg = self.args[index]
        assert isinstance(arg, Expr), f"{self.op}: argument {index} is no expression"
        return arg

    def exprs(self) -> tuple[Expr, ...]:
        """All arguments that are expressions."""
        return tuple(arg for arg in self.args if isinstance(arg, Expr))


@frozen
class Bound:
    """`names \\in domain` of a quantifier, a function or a set."""

    names: tuple[str, ...]
    domain: Expr


@frozen
class Definition:
    """`name(params) == body`."""

    name: str
    params: tuple[str, ...]
    body: Expr
    span: Span


@frozen
class Instance:
    """`name == INSTANCE module WITH a <- e`; the name may be absent."""

    name: str
    module: str
    substitutions: dict[str, Expr]
    span: Span


@frozen
class Module:
    """One module as written: nothing resolved yet."""

    name: str
    path: Path
    text: str
    extends: tuple[str, ...]
    constants: tuple[str, ...]
    variables: tuple[str, ...]
    assumptions: tuple[Expr, ...]
    definitions: tuple[Definition, ...]
    instances: tuple[Instance, ...] = ()


Node = tree_sitter.Node

_LANGUAGE = tree_sitter.Language(tree_sitter_tlaplus.language())

_IGNORED = {
    "comment",
    "block_comment",
    "single_line",
    "header_line",
    "double_line",
    "extramodular_text",
}

_INFIX = {
    "land": "and", "lor": "or", "implies": "implies", "iff": "iff", "equiv": "iff", "eq": "eq",
    "neq": "ne", "in": "in", "notin": "notin", "subseteq": "subseteq", "cup": "union",
    "cap": "intersect", "setminus": "minus_set", "plus": "add", "minus": "sub", "mul": "mul",
    "lt": "lt", "gt": "gt", "leq": "le", "geq": "ge", "dots_2": "range", "leads_to": "leads_to",
    "circ": "concat", "div": "div", "mod": "mod", "pow": "pow", "times": "times",
}  # fmt: skip
_PREFIX = {
    "lnot": "not", "negative": "neg", "unchanged": "unchanged", "domain": "domain",
    "powerset": "powerset", "union": "big_union", "always": "always", "eventually": "eventually",
    "enabled": "enabled",
}  # fmt: skip

# How tightly operators bind, from lowest to highest ("Specifying Systems", table 6). What overlaps
# is ambiguous, and wants parentheses; a few may follow themselves.
_BINDS = {
    "implies": (1, 1), "iff": (2, 2), "leads_to": (2, 2), "and": (3, 3), "or": (3, 3),
    "not": (4, 4), "always": (4, 15), "eventually": (4, 15), "enabled": (4, 15),
    "unchanged": (4, 15), "eq": (5, 5), "ne": (5, 5), "in": (5, 5), "notin": (5, 5),
    "subseteq": (5, 5), "lt": (5, 5), "gt": (5, 5), "le": (5, 5), "ge": (5, 5),
    "powerset": (8, 8), "big_union": (8, 8), "union": (8, 8), "intersect": (8, 8),
    "minus_set": (8, 8), "domain": (9, 9), "range": (9, 9), "add": (10, 10), "mod": (10, 11),
    "times": (10, 13), "sub": (11, 11), "neg": (12, 12), "mul": (13, 13), "div": (13, 13),
    "concat": (13, 13), "pow": (14, 14),
}  # fmt: skip
_CHAINED = {"and", "or", "union", "intersect", "add", "sub", "mul", "concat", "times"}


def parse_module(path: Path) -> Module:
    """Read one `.tla` file.

    Raises:
        SpecError: the text is no TLA+, or uses a construct outside the subset.
    """
    text = read_text(path)
    root = tree_sitter.Parser(_LANGUAGE).parse(text.encode()).root_node
    reader = _Reader(path)
    reader.refuse_errors(root)
    modules = [child for child in root.children if child.type == "module"]
    if len(modules) != 1:
        raise SpecError(path, 1, 1, f"got {len(modules)} modules; expected one a file")
    try:
        return reader.module(modules[0], text)
    except RecursionError as error:
        raise SpecError(path, 1, 1, "nested too deeply; give parts of it names") from error


def read_text(path: Path) -> str:
    """The text of a module or a configuration.

    Raises:
        SpecError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SpecError(path, line, 1, "this line is no text in UTF-8") from error


class _Reader:
    """Turns tree-sitter nodes of one file into our tree."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def span(self, node: Node) -> Span:
        row, column = node.start_point
        return Span(self._path, row + 1, column + 1, slice(node.start_byte, node.end_byte))

    def refuse(self, node: Node, instead: str = "it is outside the subset of fsm/") -> SpecError:
        words = _text(node).split("\n")[0][:60]
        return self.span(node).error(f"{node.type} `{words}`: {instead}")

    def refuse_ambiguous(self, op: str, operand: Node, *, chained: bool = False) -> None:
        """Refuse an operand that does not bind more tightly than the operator around it."""
        if operand.type not in ("bound_infix_op", "bound_prefix_op"):
            return
        symbol = _field(operand, "symbol")
        names = _INFIX if operand.type == "bound_infix_op" else _PREFIX
        inner = names.get(symbol.type, "")
        if inner in _BINDS and _BINDS[inner][0] <= _BINDS[op][1] and not (chained and inner == op):
            raise self.refuse(operand, "ambiguous without parentheses, to the standard tools too")

    def refuse_errors(self, node: Node) -> None:
        if not node.has_error:
            return
        if node.type == "ERROR" or node.is_missing:
            raise self.span(node).error(f"syntax error at `{_text(node)[:60]}`")
        for child in node.children:
            self.refuse_errors(child)

    def module(self, node: Node, text: str) -> Module:
        extends: list[str] = []
        constants: list[str] = []
        variables: list[str] = []
        assumptions: list[Expr] = []
        definitions: list[Definition] = []
        instances: list[Instance] = []
        children = [
            _code(child)[0] if child.type == "local_definition" else child
            for child in node.named_children
        ]
        for child in children:
            match child.type:
                case "extends":
                    extends += [_text(n) for n in child.named_children]
                case "constant_declaration":
                    constants += [_text(n) for n in _kept(child, "identifier")]
                case "variable_declaration":
                    variables += [_text(n) for n in _kept(child, "identifier")]
                case "assumption":
                    assumptions.append(self.expr(_code(child)[-1]))
                case "operator_definition":
                    definitions.append(self.definition(child))
                case "instance":
                    instances.append(self.instance("", child))
                case "module_definition":
                    instances.append(self.named_instance(child))
                case "identifier":
                    pass  # the module's own name
                case kind if kind in _IGNORED:
                    pass
                case _:
                    raise self.refuse(child)
        name = node.child_by_field_name("name")
        assert name is not None
        return Module(
            name=_text(name),
            path=self._path,
            text=text,
            extends=tuple(extends),
            constants=tuple(constants),
            variables=tuple(variables),
            assumptions=tuple(assumptions),
            definitions=tuple(definitions),
            instances=tuple(instances),
        )

    def named_instance(self, node: Node) -> Instance:
        if [n for n in node.children_by_field_name("parameter") if n.is_named]:
            raise self.refuse(node, "an INSTANCE with parameters is outside the subset of fsm/")
        return self.instance(_text(_field(node, "name")), _field(node, "definition"))

    def instance(self, name: str, node: Node) -> Instance:
        module, *substitutions = _code(node)
        found: dict[str, Expr] = {}
        for each in substitutions:
            parts = [part for part in _code(each) if part.type != "gets"]
            found[_text(parts[0])] = self.expr(parts[1])
        return Instance(name, _text(module), found, self.span(node))

    def definition(self, node: Node) -> Definition:
        name, body = node.child_by_field_name("name"), node.child_by_field_name("definition")
        assert name is not None
        assert body is not None
        params = [n for n in node.children_by_field_name("parameter") if n.is_named]
        for param in params:
            if param.type != "identifier":
                raise self.refuse(param, "higher-order parameters are outside the subset")
        names = tuple(_text(param) for param in params)
        return Definition(_text(name), names, self.expr(body), self.span(node))

    def expr(self, node: Node) -> Expr:
        build = _BUILD.get(node.type)
        if build is None:
            raise self.refuse(node)
        op, args = build(self, node)
        return Expr(op, tuple(args), self.span(node))

    def bound(self, node: Node) -> Bound:
        domain = node.child_by_field_name("set")
        intro = [n for n in node.children_by_field_name("intro") if n.type == "identifier"]
        if domain is None or not intro:
            raise self.refuse(node, "bind plain names over a set: `x \\in S`")
        return Bound(tuple(_text(n) for n in intro), self.expr(domain))

    def bounds(self, node: Node, name: str) -> tuple[Bound, ...]:
        found = [n for n in node.children_by_field_name(name) if n.type == "quantifier_bound"]
        return tuple(self.bound(n) for n in found)


Built = tuple[str, Iterable[object]]


def _text(node: Node) -> str:
    return (node.text or b"").decode()


def _code(node: Node) -> list[Node]:
    """Named children that are not comments."""
    return [child for child in node.named_children if child.type not in _IGNORED]


def _kept(node: Node, kind: str) -> list[Node]:
    return [child for child in node.named_children if child.type == kind]


def _field(node: Node, name: str) -> Node:
    found = node.child_by_field_name(name)
    assert found is not None, f"{node.type} without {name}"
    return found


def _items(op: str) -> Callable[[_Reader, Node], Built]:
    """A bulleted list of conjuncts or disjuncts."""

    def build(reader: _Reader, node: Node) -> Built:
        items = [child for child in _code(node) if child.type in ("conj_item", "disj_item")]
        return op, [reader.expr(_code(item)[-1]) for item in items]

    return build


def _infix(reader: _Reader, node: Node) -> Built:
    symbol = _field(node, "symbol")
    op = _INFIX.get(symbol.type)
    if op is None:
        raise reader.refuse(symbol)
    first, second = _field(node, "lhs"), _field(node, "rhs")
    reader.refuse_ambiguous(op, first, chained=op in _CHAINED)
    if second.type == "bound_infix_op":  # a prefix operator on the right can only go this way
        reader.refuse_ambiguous(op, second)
    left, right = reader.expr(first), reader.expr(second)
    if op == "times" and left.op == op and first.type != "parentheses":
        return op, [*left.exprs(), right]  # A \X B \X C has triples, (A \X B) \X C has pairs
    return op, [left, right]


def _prefix(reader: _Reader, node: Node) -> Built:
    symbol = _field(node, "symbol")
    op = _PREFIX.get(symbol.type)
    if op is None:
        raise reader.refuse(symbol)
    operand = _field(node, "rhs")
    if operand.type == "bound_infix_op":
        reader.refuse_ambiguous(op, operand)
    return op, [reader.expr(operand)]


def _postfix(reader: _Reader, node: Node) -> Built:
    if _field(node, "symbol").type != "prime":
        raise reader.refuse(node)
    return "prime", [reader.expr(_field(node, "lhs"))]


def _call(reader: _Reader, node: Node) -> Built:
    args = [n for n in node.children_by_field_name("parameter") if n.is_named]
    return "call", [_text(_field(node, "name")), *(reader.expr(arg) for arg in args)]


def _prefixed(reader: _Reader, node: Node) -> Built:
    """`Name!Op(args)`: the definition `Name!Op`."""
    components = [_code(component)[0] for component in _code(_field(node, "prefix"))]
    if any(component.type != "identifier_ref" for component in components):
        raise reader.refuse(node, "an INSTANCE with parameters is outside the subset of fsm/")
    inner = reader.expr(_field(node, "op"))
    path = "!".join([*map(_text, components), str(inner.args[0])])
    return inner.op, [path, *inner.args[1:]]


def _quantified(reader: _Reader, node: Node) -> Built:
    op = _field(node, "quantifier").type
    return op, [*reader.bounds(node, "bound"), reader.expr(_field(node, "expression"))]


def _choose(reader: _Reader, node: Node) -> Built:
    if node.child_by_field_name("set") is None:
        raise reader.refuse(node, "an unbounded CHOOSE; choose from a finite set")
    return "choose", [reader.bound(node), reader.expr(_field(node, "expression"))]


def _set_filter(reader: _Reader, node: Node) -> Built:
    return "filter", [*reader.bounds(node, "generator"), reader.expr(_field(node, "filter"))]


def _set_map(reader: _Reader, node: Node) -> Built:
    return "map", [*reader.bounds(node, "generator"), reader.expr(_field(node, "map"))]


def _function(reader: _Reader, node: Node) -> Built:
    parts = _code(node)
    bounds = [reader.bound(part) for part in parts if part.type == "quantifier_bound"]
    return "function", [*bounds, reader.expr(parts[-1])]


def _pairs(op: str) -> Callable[[_Reader, Node], Built]:
    """Record literals and sets of records: field, value, field, value."""

    def build(reader: _Reader, node: Node) -> Built:
        parts = [part for part in _code(node) if part.type != "all_map_to"]
        out: list[object] = []
        for name, value in zip(parts[::2], parts[1::2], strict=True):
            if _text(name) in out:
                raise reader.refuse(name, "this field is given twice")
            out += [_text(name), reader.expr(value)]
        return op, out

    return build


def _except(reader: _Reader, node: Node) -> Built:
    updates: list[object] = []
    for update in _kept(node, "except_update"):
        spec = next(n for n in _code(update) if n.type == "except_update_specifier")
        path: list[Expr] = []
        for step in _code(spec):
            inner = _code(step)
            if step.type == "except_update_record_field":
                path.append(Expr("string", (_text(inner[0]),), reader.span(step)))
            elif step.type == "except_update_fn_appl" and len(inner) == 1:
                path.append(reader.expr(inner[0]))
            else:
                raise reader.refuse(step)
        value = reader.expr(_field(update, "new_val"))
        updates.append(Expr("update", (*path, value), reader.span(update)))
    return "except", [reader.expr(_field(node, "expr_to_update")), *updates]


def _case(reader: _Reader, node: Node) -> Built:
    out: list[object] = []
    for arm in _code(node):
        parts = [part for part in _code(arm) if part.type != "case_arrow"]
        if arm.type == "case_arm":
            out += [reader.expr(parts[0]), reader.expr(parts[1])]
        elif arm.type == "other_arm":
            out += [Expr("bool", (True,), reader.span(arm)), reader.expr(parts[-1])]
    return "case", out


def _let(reader: _Reader, node: Node) -> Built:
    definitions = [n for n in node.children_by_field_name("definitions") if n.is_named]
    for definition in definitions:
        if definition.type != "operator_definition":
            raise reader.refuse(definition)
    body = reader.expr(_field(node, "expression"))
    return "let", [*(reader.definition(d) for d in definitions), body]


def _fairness(reader: _Reader, node: Node) -> Built:
    parts = _code(node)
    kind = "weak_fairness" if _text(node).startswith("WF") else "strong_fairness"
    return kind, [reader.expr(parts[0]), reader.expr(parts[-1])]


def _several(op: str) -> Callable[[_Reader, Node], Built]:
    skip = ("langle_bracket", "rangle_bracket", "maps_to", "all_map_to")
    return lambda reader, node: (op, [reader.expr(n) for n in _code(node) if n.type not in skip])


def _angle(reader: _Reader, node: Node) -> Built:
    """`<<A>>_v`."""
    skip = ("langle_bracket", "rangle_bracket_sub")
    return "angle_action", [reader.expr(n) for n in _code(node) if n.type not in skip]


def _record_value(reader: _Reader, node: Node) -> Built:
    value, name = _code(node)
    return "field", [reader.expr(value), _text(name)]


def _if(reader: _Reader, node: Node) -> Built:
    return "if", [reader.expr(_field(node, name)) for name in ("if", "then", "else")]


def _parentheses(reader: _Reader, node: Node) -> Built:
    inner = reader.expr(_code(node)[0])
    return inner.op, inner.args


def _number(reader: _Reader, node: Node) -> Built:
    value = int(_text(node))
    if value >= 1 << 31:
        raise reader.refuse(node, "expected a number of 32 bits, as the standard tools do")
    return "nat", (value,)


_BUILD: dict[str, Callable[[_Reader, Node], Built]] = {
    "conj_list": _items("and"),
    "disj_list": _items("or"),
    "bound_infix_op": _infix,
    "bound_prefix_op": _prefix,
    "bound_postfix_op": _postfix,
    "bound_op": _call,
    "prefixed_op": _prefixed,
    "bounded_quantification": _quantified,
    "choose": _choose,
    "set_filter": _set_filter,
    "set_map": _set_map,
    "function_literal": _function,
    "function_evaluation": _several("apply"),
    "record_literal": _pairs("record"),
    "set_of_records": _pairs("records"),
    "set_of_functions": _several("functions"),
    "record_value": _record_value,
    "except": _except,
    "prev_func_val": lambda _reader, _node: ("at", ()),
    "case": _case,
    "let_in": _let,
    "if_then_else": _if,
    "tuple_literal": _several("tuple"),
    "finite_set_literal": _several("set"),
    "parentheses": _parentheses,
    "fairness": _fairness,
    "step_expr_or_stutter": _several("box_action"),
    "step_expr_no_stutter": _angle,
    "identifier_ref": lambda _reader, node: ("name", (_text(node),)),
    "nat_number": _number,
    "boolean": lambda _reader, node: ("bool", (_text(node) == "TRUE",)),
    "string": lambda _reader, node: ("string", (_text(node)[1:-1],)),
    "nat_number_set": lambda _reader, _node: ("naturals", ()),
    "int_number_set": lambda _reader, _node: ("integers", ()),
    "boolean_set": lambda _reader, _node: ("booleans", ()),
}
