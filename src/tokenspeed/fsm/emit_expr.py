"""Core expressions as C++ expressions.

Rule: one method a construct, no semantics of its own: what a construct means is what evaluate.py
does with it, and a test holds the two state graphs together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from tokenspeed.fsm.core import Local, Node, walk
from tokenspeed.fsm.cpp_types import CppTypes
from tokenspeed.fsm.evaluate import NO_ARM
from tokenspeed.fsm.symmetry import mentions
from tokenspeed.fsm.syntax import Span
from tokenspeed.fsm.types import Type
from tokenspeed.fsm.values import ordered

__all__ = ["Expressions"]

_INFIX = {
    "lt": "<", "gt": ">", "le": "<=", "ge": ">=", "union": "|", "intersect": "&", "minus_set": "-",
}  # fmt: skip
_ARITHMETIC = {
    "add": "sum", "sub": "difference", "mul": "product", "pow": "power", "div": "floor_div",
    "mod": "floor_mod",
}  # fmt: skip
# Constructs whose value may not exist: a LET of one is computed when it is first asked for.
_PARTIAL = {
    "choose", "apply", "Head", "Tail", "SubSeq", "case", "div", "mod", "pow", "field", "call",
}  # fmt: skip


@final
class Expressions:
    """Prints expressions over `s` (the state) and a successor that is being built.

    Args:
        types: names C++ types and constants.
        members: the C++ member of each variable.
    """

    def __init__(self, types: CppTypes, members: list[str], variables: tuple[str, ...]) -> None:
        self.types = types
        self.members = members
        self._variables = variables
        self._names: dict[int, str] = {}
        self._lazy: set[int] = set()
        self._count = 0
        self._kept: list[Local] = []
        self.enabled: Callable[[Node], str] | None = None
        self.after = "t"
        self.assigned: frozenset[int] | None = None  # None: the successor is complete

    def fresh(self, stem: str) -> str:
        """A C++ name that nobody else has."""
        self._count += 1
        return f"{stem}{self._count}"

    def local(self, local: Local) -> str:
        """The C++ name of a bound name."""
        if id(local) not in self._names:
            self._kept.append(local)
            plain = "".join(c if c.isalnum() else "_" for c in local.name)
            self._names[id(local)] = self.fresh(f"{plain}_")
        return self._names[id(local)]

    def type(self, node: Node) -> str:
        """The C++ type of an expression."""
        return self.types.name(node.type, node.span)

    def expr(self, node: Node) -> str:
        """The expression as C++."""
        if node.op in _INFIX:
            left, right = map(self.expr, node.nodes())
            return f"({left} {_INFIX[node.op]} {right})"
        if node.op in _ARITHMETIC:
            left, right = map(self.expr, node.nodes())
            where = self.where(node.span, f"no value: {node.op} of these numbers")
            return f"{_ARITHMETIC[node.op]}({left}, {right}, {where})"
        build: Callable[[Node], str] = getattr(self, f"_{node.op}")
        return build(node)

    # --- leaves ---------------------------------------------------------------------------------

    def _const(self, node: Node) -> str:
        return self.types.constant(node.args[0], node.type, node.span)

    def _local(self, node: Node) -> str:
        name = self.local(node.args[0])
        return f"{name}()" if id(node.args[0]) in self._lazy else name

    def _var(self, node: Node) -> str:
        return f"s.{self.members[node.args[0]]}"

    def _primed(self, node: Node) -> str:
        index = node.args[0]
        if self.assigned is not None and index not in self.assigned:
            name = self._variables[index]
            raise node.span.error(f"{name}' is read before it is assigned; assign it first")
        return f"{self.after}.{self.members[index]}"

    def let(self, node: Node) -> str:
        """The declaration of a LET, as a statement."""
        local, value, _ = node.args
        name, text = self.local(local), self.expr(value)
        if _partial(value):
            self._lazy.add(id(local))
            kind = self.type(value)
            return f"const auto {name} = Lazy([&]() -> {kind} {{ return {text}; }});\n"
        return f"const {self.type(value)} {name} = {text};\n"

    def _let(self, node: Node) -> str:
        declaration = self.let(node)
        body = self.expr(node.args[2])
        return f"[&]() -> {self.type(node)} {{ {declaration} return {body}; }}()"

    # --- logic ----------------------------------------------------------------------------------

    def _and(self, node: Node) -> str:
        return "(" + (" && ".join(map(self.expr, node.nodes())) or "true") + ")"

    def _or(self, node: Node) -> str:
        return "(" + (" || ".join(map(self.expr, node.nodes())) or "false") + ")"

    def _holds(self, node: Node) -> str:
        return self.expr(node.args[0])

    def _not(self, node: Node) -> str:
        return f"!({self.expr(node.args[0])})"

    def _implies(self, node: Node) -> str:
        left, right = map(self.expr, node.nodes())
        return f"(!({left}) || {right})"

    def _iff(self, node: Node) -> str:
        left, right = map(self.expr, node.nodes())
        return f"(bool({left}) == bool({right}))"

    def _if(self, node: Node) -> str:
        test, yes, no = map(self.expr, node.nodes())
        return f"({test} ? {yes} : {no})"

    def _case(self, node: Node) -> str:
        args = node.nodes()
        where = self.where(node.span, NO_ARM)
        text = f"(undefined({where}), {self.type(node)}{{}})"
        for test, value in reversed(list(zip(args[::2], args[1::2], strict=True))):
            always = test.op == "const" and test.args[0] is True
            text = (
                self.expr(value) if always else f"({self.expr(test)} ? {self.expr(value)} : {text})"
            )
        return text

    def _eq(self, node: Node) -> str:
        left, right = node.nodes()
        for one, other in ((left, right), (right, left)):
            if other.op == "const" and other.args[0] == frozenset() and one.op == "filter":
                local, domain, test = one.args
                exists = Node("exists", (local, domain, test), node.span)
                return f"!{self._exists(exists)}"
        return f"({self.expr(left)} == {self.expr(right)})"

    def _ne(self, node: Node) -> str:
        return f"!{self._eq(node)}"

    def where(self, span: Span, why: str) -> str:
        """A C++ string that says what has no value, and where."""
        text = f"{span.path.name}:{span.line}:{span.column}: {why}"
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    # --- sets -----------------------------------------------------------------------------------

    def loop(self, local: Local, domain: Node, body: str) -> str:
        """A loop over the members of a set, in their order."""
        name, kind = self.local(local), self.types.name(local.type, domain.span)
        if domain.op == "const":
            return self._constant_loop(name, kind, local, domain, body)
        if domain.op == "range":
            low, high = map(self.expr, domain.nodes())
            end = self.fresh("end")
            return f"for (int {name} = {low}, {end} = {high}; {name} <= {end}; ++{name}) {{\n{body}}}\n"
        if domain.op == "domain" and domain.args[0].type.root().kind == "seq":
            size = f"({self.expr(domain.args[0])}).size()"
            end = self.fresh("end")
            return f"for (int {name} = 1, {end} = {size}; {name} <= {end}; ++{name}) {{\n{body}}}\n"
        if domain.op == "filter":
            inner, source, test = domain.args
            self._names[id(inner)] = name
            return self.loop(local, source, f"if ({self.expr(test)}) {{\n{body}}}\n")
        if domain.op == "powerset":
            return self._subsets_loop(name, kind, domain, body)
        bits = self.fresh("bits")
        return f"{{ const auto {bits} = {self.expr(domain)};\n{_bits_loop(bits, name, kind, body)} }}\n"

    def _constant_loop(self, name: str, kind: str, local: Local, domain: Node, body: str) -> str:
        values = ordered(domain.args[0])
        if local.type.root().kind == "int" and values == tuple(
            range(values[0], values[-1] + 1) if values else ()
        ):
            low, high = (values[0], values[-1]) if values else (1, 0)
            return f"for (int {name} = {low}; {name} <= {high}; ++{name}) {{\n{body}}}\n"
        if len(values) == self.types.card(local.type):
            at = self.fresh("at")
            return (
                f"for (int {at} = 0; {at} < {len(values)}; ++{at}) {{\n"
                f"const {kind} {name} = Rank<{kind}>::at({at});\n{body}}}\n"
            )
        if not self.types.fits(
            local.type
        ):  # the set has too many bits, but its members can be told
            members = ", ".join(self.types.constant(v, local.type, domain.span) for v in values)
            return f"for (const {kind}& {name} : {{{members}}}) {{\n{body}}}\n"
        return _bits_loop(self.expr(domain), name, kind, body)

    def _subsets_loop(self, name: str, kind: str, domain: Node, body: str) -> str:
        inner = domain.args[0]
        if self.types.universe(inner.type.root().of, domain.span) > 64:
            raise domain.span.error("SUBSET of a set with more than 64 possible members")
        mask, sub = self.fresh("mask"), self.fresh("sub")
        return (
            f"{{ const std::uint64_t {mask} = ({self.expr(inner)}).w[0];\n"
            f"for (std::uint64_t {sub} = 0;; {sub} = ({sub} - {mask}) & {mask}) {{\n"
            f"{kind} {name}; {name}.w[0] = {sub};\n{body}if ({sub} == {mask}) break;\n}} }}\n"
        )

    def _forall(self, node: Node) -> str:
        local, domain, body = node.args
        inner = self.loop(local, domain, f"if (!({self.expr(body)})) return false;\n")
        return f"[&] {{ {inner} return true; }}()"

    def _exists(self, node: Node) -> str:
        local, domain, body = node.args
        inner = self.loop(local, domain, f"if ({self.expr(body)}) return true;\n")
        return f"[&] {{ {inner} return false; }}()"

    def _choose(self, node: Node) -> str:
        local, domain, body = node.args
        name, kind = self.local(local), self.type(node)
        none = self.where(node.span, "CHOOSE: no element qualifies")
        if not mentions(node.type, self.types.symmetric):
            inner = self.loop(local, domain, f"if ({self.expr(body)}) return {name};\n")
            return f"[&]() -> {kind} {{ {inner} undefined({none}); }}()"
        only = self.fresh("only")
        several = self.where(node.span, "CHOOSE: several qualify, so SYMMETRY is unsound")
        keep = f"if ({self.expr(body)}) {{ if ({only}) undefined({several}); {only} = {name}; }}\n"
        return (
            f"[&]() -> {kind} {{ std::optional<{kind}> {only}; {self.loop(local, domain, keep)} "
            f"if (!{only}) undefined({none}); return *{only}; }}()"
        )

    def _filter(self, node: Node) -> str:
        local, domain, body = node.args
        add = f"if ({self.expr(body)}) out.add({self.local(local)});\n"
        return f"[&] {{ {self.type(node)} out; {self.loop(local, domain, add)} return out; }}()"

    def _map(self, node: Node) -> str:
        pairs, body = node.args
        text = f"out.add({self.expr(body)});\n"
        for local, domain in reversed(pairs):
            text = self.loop(local, domain, text)
        return f"[&] {{ {self.type(node)} out; {text} return out; }}()"

    def _set(self, node: Node) -> str:
        adds = "".join(f"out.add({self.expr(item)}); " for item in node.nodes())
        return f"[&] {{ {self.type(node)} out; {adds}return out; }}()"

    def _in(self, node: Node) -> str:
        element, container = node.nodes()
        return f"({self.expr(container)}).contains({self.expr(element)})"

    def _among(self, node: Node) -> str:
        return self.expr(node.args[2])

    def _subseteq(self, node: Node) -> str:
        small, big = map(self.expr, node.nodes())
        return f"({small}).within({big})"

    def _big_union(self, node: Node) -> str:
        inner = node.args[0]
        if inner.op == "set":  # nor need a few sets be put together first
            return (
                "(" + " | ".join([f"{self.type(node)}{{}}", *map(self.expr, inner.nodes())]) + ")"
            )
        if inner.op == "map":  # the set of sets itself may be too large to have
            pairs, body = inner.args
            text = f"out = out | {self.expr(body)};\n"
            for local, domain in reversed(pairs):
                text = self.loop(local, domain, text)
        else:
            local = Local("each", inner.type.root().of)
            text = self.loop(local, inner, f"out = out | {self.local(local)};\n")
        return f"[&] {{ {self.type(node)} out; {text} return out; }}()"

    def _collected(self, node: Node) -> str:
        """A set that is otherwise looped over, put together."""
        local = Local("each", node.type.root().of)
        text = self.loop(local, node, f"out.add({self.local(local)});\n")
        return f"[&] {{ {self.type(node)} out; {text} return out; }}()"

    _range = _powerset = _collected

    def _domain(self, node: Node) -> str:
        at = node.args[0].type.root()
        if at.kind == "seq":
            return self._collected(node)
        if at.kind == "fn":
            keys = frozenset(at.keys)
        else:
            keys = (
                frozenset(at.fields)
                if at.kind == "record"
                else frozenset(range(1, len(at.items) + 1))
            )
        return self.types.constant(keys, node.type, node.span)

    def _Cardinality(self, node: Node) -> str:  # noqa: N802  an operator's own name
        inner = node.args[0]
        if inner.op != "filter":
            return f"({self.expr(inner)}).size()"
        local, domain, body = inner.args
        text = self.loop(local, domain, f"if ({self.expr(body)}) ++n;\n")
        return f"[&] {{ int n = 0; {text} return n; }}()"

    # --- numbers --------------------------------------------------------------------------------

    def _neg(self, node: Node) -> str:
        where = self.where(node.span, "no value: neg of this number")
        return f"difference(0, {self.expr(node.args[0])}, {where})"

    # --- structure ------------------------------------------------------------------------------

    def _tuple(self, node: Node) -> str:
        items = ", ".join(map(self.expr, node.nodes()))
        kind = self.type(node)
        if node.type.root().kind == "seq" or not node.nodes():
            if len(node.nodes()) > self.types.bounds.seq_max:
                pushes = "".join(f"out.push({self.expr(n)}); " for n in node.nodes())
                return f"[&] {{ {kind} out; {pushes}return out; }}()"
            return f"{kind}{{{{{{{items}}}}}, {len(node.nodes())}}}"
        return f"{kind}{{{items}}}"

    def _record(self, node: Node) -> str:
        names, *values = node.args
        at = node.type.root()
        if at.kind == "fn":
            pairs = sorted(zip(names, values, strict=True), key=lambda pair: str(pair[0]))
            items = ", ".join(self.expr(value) for _, value in pairs)
            return f"{self.type(node)}{{{{{{{items}}}}}}}"
        given = dict(zip((f"f_{name}" for name in names), values, strict=True))
        parts = [
            self.expr(given[member])
            if member in given
            else f"{self.types.name(kind, node.span)}{{}}"
            for member, kind in self.types.fields(at)
        ]
        variants = self.types.variants(at)
        if len(variants) > 1:
            parts.append(str(variants.index(tuple(sorted(names)))))
        return f"{self.type(node)}{{{', '.join(parts)}}}"

    def _is_variant(self, node: Node) -> str:
        element, names = node.args
        variants = self.types.variants(element.type)
        return f"(({self.expr(element)}).tag() == {variants.index(tuple(sorted(names)))})"

    def _as_sequence(self, node: Node) -> str:
        return self.expr(node.args[0])

    def _field(self, node: Node) -> str:
        record, name = node.args
        at = record.type.root()
        if at.kind == "fn":
            return f"({self.expr(record)})[{sorted(at.keys).index(name)}]"
        variants = self.types.variants(at)
        having = [i for i, variant in enumerate(variants) if name in variant]
        text = self.expr(record)
        if len(having) < len(variants):
            value = self.fresh("record")
            tests = " || ".join(f"{value}.tag() == {i}" for i in having)
            where = self.where(node.span, f"the record has no field {name}")
            return f"[&] {{ const auto& {value} = {text}; if (!({tests})) undefined({where}); return {value}.f_{name}; }}()"
        return f"({text}).f_{name}"

    def _apply(self, node: Node) -> str:
        fn, arg = node.args
        return self.item(self.expr(fn), fn, arg, node.span)

    def item(self, text: str, fn: Node, arg: Node, span: Span) -> str:
        """`fn[arg]`, where `text` is fn."""
        at = fn.type.root()
        if at.kind == "seq":
            where = self.where(span, "an index outside the sequence")
            return f"({text}).at({self.expr(arg)}, {where})"
        if at.kind == "tuple":
            return f"({text}).f{arg.args[0]}"
        if at.kind == "record":
            return f"({text}).f_{arg.args[0]}"
        return f"({text})[{self._place(fn, arg, span)}]"

    def _place(self, fn: Node, arg: Node, span: Span) -> str:
        at = fn.type.root()
        domain, key = self.types.domain(at, span), self.types.name(at.key, span)
        if at.key.root().kind == "atom" and len(at.keys) == len(at.key.root().names):
            return f"static_cast<const {key}&>({self.expr(arg)}).v"  # no other type's index
        where = self.where(span, "an argument outside the function's domain")
        return f"place_of<{domain}>(Rank<{key}>::find({self.expr(arg)}), {where})"

    def _function(self, node: Node) -> str:
        local, domain, body = node.args
        kind = self.type(node)
        if node.type.root().kind == "seq":
            text = self.loop(local, domain, f"out.push({self.expr(body)});\n")
            return f"[&] {{ {kind} out; {text} return out; }}()"
        text = self.loop(local, domain, f"out[place++] = {self.expr(body)};\n")
        return f"[&] {{ {kind} out; int place = 0; {text} return out; }}()"

    def _except(self, node: Node) -> str:
        base, updates = node.args
        out = self.fresh("out")
        lines = [f"{self.type(node)} {out} = {self.expr(base)};"]
        lines += [self._update(out, base, *update) for update in updates]
        return f"[&] {{ {' '.join(lines)} return {out}; }}()"

    def _update(self, out: str, base: Node, path: tuple[Node, ...], old: Local, value: Node) -> str:
        opening, closing, text, holder = "", "", out, base
        for step in path:
            at = holder.type.root()
            if at.kind == "seq":
                index = self.fresh("index")
                opening += (
                    f"{{ const long {index} = {self.expr(step)}; if ({text}.holds({index})) {{ "
                )
                closing += "} }"
                text = f"{text}.item({index})"
            else:
                text = self.item(text, holder, step, step.span)
            holder = Node("slot", (), step.span, _inner(at, step))
        slot = self.fresh("slot")
        name = self.local(old)
        kind = self.types.name(holder.type, value.span)
        return (
            f"{opening}{{ auto& {slot} = {text}; [[maybe_unused]] const {kind} {name} = {slot}; "
            f"{slot} = {self.expr(value)}; }}{closing}"
        )

    def _Len(self, node: Node) -> str:  # noqa: N802
        return f"({self.expr(node.args[0])}).size()"

    def _Head(self, node: Node) -> str:  # noqa: N802
        return f"({self.expr(node.args[0])}).at(1, {self.where(node.span, 'Head of an empty sequence')})"

    def _Tail(self, node: Node) -> str:  # noqa: N802
        return f"({self.expr(node.args[0])}).tail({self.where(node.span, 'Tail of an empty sequence')})"

    def _Append(self, node: Node) -> str:  # noqa: N802
        items, item = map(self.expr, node.nodes())
        return f"({items}).append({item})"

    def _SubSeq(self, node: Node) -> str:  # noqa: N802
        items, low, high = map(self.expr, node.nodes())
        where = self.where(node.span, "SubSeq beyond the sequence")
        return f"({items}).slice({low}, {high}, {where})"

    def _concat(self, node: Node) -> str:
        left, right = map(self.expr, node.nodes())
        return f"({left}).concat({right})"

    # --- steps ----------------------------------------------------------------------------------

    def _unchanged(self, node: Node) -> str:
        if self.assigned is not None and not set(node.args) <= self.assigned:
            raise node.span.error("UNCHANGED is tested before its variables are assigned")
        tests = (f"{self.after}.{self.members[i]} == s.{self.members[i]}" for i in node.args)
        return "(" + " && ".join(tests) + ")"

    def _enabled(self, node: Node) -> str:
        assert self.enabled is not None
        return self.enabled(node)


def _bits_loop(bits: str, name: str, kind: str, body: str) -> str:
    return (
        f"for (std::size_t w_{name} = 0; w_{name} < {bits}.w.size(); ++w_{name})\n"
        f"for (std::uint64_t r_{name} = {bits}.w[w_{name}]; r_{name}; r_{name} &= r_{name} - 1) {{\n"
        f"const {kind} {name} = Rank<{kind}>::at(static_cast<int>(w_{name} * 64) + std::countr_zero(r_{name}));\n"
        f"{body}}}\n"
    )


def _inner(at: Type, step: Node) -> Type:
    """The type of what `[step]` selects."""
    if at.kind in ("seq", "fn"):
        return at.of
    if at.kind == "tuple":
        return at.items[int(step.args[0]) - 1]
    return at.fields[str(step.args[0])]


def _partial(value: Node) -> bool:
    for node in walk(value):
        if node.op in _PARTIAL:
            total = node.op == "apply" and node.args[0].type.root().kind in (
                "fn",
                "record",
                "tuple",
            )
            plain = node.op == "field" and len(node.args[0].type.root().variants) <= 1
            if not (total or plain):
                return True
    return False
