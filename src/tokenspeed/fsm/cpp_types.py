"""Types and constants of a model as C++ text, over cpp/checker/values.hpp.

Rule: the order of values is that of `values.order_key`, so that a rank means the same in C++ and in
the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import final

from attrs import frozen

from tokenspeed.fsm.syntax import Span
from tokenspeed.fsm.types import Type, card
from tokenspeed.fsm.values import Function, Value, order_key

__all__ = ["Bounds", "CppTypes", "TooNarrow"]

SET_MAX = 1 << 14  # values of an element type: a set of them is that many bits


@frozen
class Bounds:
    """What no specification says, tried and widened: see `values.hpp`."""

    int_low: int = 0
    int_high: int = 127
    set_low: int = 0
    set_high: int = 15
    seq_max: int = 4

    @property
    def set_ints(self) -> int:
        """How many numbers may be elements of sets."""
        return self.set_high - self.set_low + 1


@final
class CppTypes:
    """Names each type once, and prints constants of it.

    Args:
        bounds: of numbers and sequences.
        symmetric: the sets of interchangeable names.
    """

    def __init__(self, bounds: Bounds, symmetric: tuple[frozenset[str], ...]) -> None:
        self.bounds = bounds
        self.symmetric = symmetric
        self.declarations: list[str] = []
        self.atoms: list[tuple[str, ...]] = []
        self._atoms: dict[int, int] = {}
        self._structs: dict[str, str] = {}
        self._domains: dict[str, str] = {}
        self._constants: dict[str, str] = {}
        self._keep: list[Type] = []

    def name(self, kind: Type, span: Span) -> str:
        """The C++ type."""
        at = kind.root()
        match at.kind:
            case "bool" | "unknown":
                return "bool"
            case "int":
                return "int"
            case "atom":
                return f"Atom<{len(at.names)}, {self.atom(at)}>"
            case "set":
                return f"Set<{self.name(at.of, span)}, {self.universe(at.of, span)}>"
            case "seq":
                return f"Seq<{self.name(at.of, span)}, {self.bounds.seq_max}>"
            case "fn":
                return f"Fn<{self.domain(at, span)}, {self.name(at.of, span)}>"
            case "tuple" if not at.items:
                return f"Seq<bool, {self.bounds.seq_max}>"
        return self._struct(at, span)

    def universe(self, kind: Type, span: Span) -> int:
        """How many bits a set of this type has."""
        if not self.fits(kind):
            raise span.error(
                f"a set whose elements are {kind} could have too many elements; expected at most "
                f"{SET_MAX}: choose smaller constants, or another representation"
            )
        return self.card(kind)

    def fits(self, kind: Type) -> bool:
        """Whether a set of values of this type can be had as bits."""
        try:
            return self.card(kind) <= SET_MAX
        except OverflowError:
            return False

    def card(self, kind: Type) -> int:
        """How many values a type has."""
        return card(kind, self.bounds.set_ints, self.bounds.seq_max)

    def atom(self, at: Type) -> int:
        """The number of a kind of names."""
        at = at.root()
        if id(at) not in self._atoms:
            self._keep.append(at)
            self._atoms[id(at)] = len(self.atoms)
            self.atoms.append(tuple(sorted(at.names)))
        return self._atoms[id(at)]

    def domain(self, at: Type, span: Span) -> str:
        """The C++ struct that describes a function's domain."""
        at = at.root()
        key = self.name(at.key, span)
        ranks = [self.rank(k, at.key, span) for k in sorted(at.keys, key=order_key)]
        total = self.card(at.key)
        text = f"{key}:{ranks}"
        if text not in self._domains:
            name = self._domains[text] = f"D{len(self._domains)}"
            full = ranks == list(range(total))
            places = [ranks.index(r) if r in ranks else -1 for r in range(total)]
            rank = (
                "r"
                if full
                else f"std::array<short, {len(ranks)}>{{{_list(ranks)}}}[static_cast<std::size_t>(r)]"
            )
            place = (
                "r"
                if full
                else f"std::array<short, {total}>{{{_list(places)}}}[static_cast<std::size_t>(r)]"
            )
            self.declarations.append(
                f"struct {name} {{\n  using Key = {key};\n"
                f"  static constexpr int n = {len(ranks)};\n"
                f"  static constexpr bool full = {str(full).lower()};\n"
                f"  static constexpr int rank(int r) {{ return {rank}; }}\n"
                f"  static constexpr int place(int r) {{ return {place}; }}\n}};\n"
            )  # fmt: skip
        return self._domains[text]

    def fields(self, at: Type) -> list[tuple[str, Type]]:
        """The C++ members of a tuple or record, in their order."""
        at = at.root()
        if at.kind == "tuple":
            return [(f"f{i}", item) for i, item in enumerate(at.items, 1)]
        return [(f"f_{name}", at.fields[name]) for name in sorted(at.fields)]

    def variants(self, at: Type) -> list[tuple[str, ...]]:
        """The sets of fields that a record may have, in the order of their tags."""
        return sorted(tuple(sorted(v)) for v in at.root().variants)

    def _struct(self, at: Type, span: Span) -> str:
        members = [(name, self.name(kind, span)) for name, kind in self.fields(at)]
        record = at.kind == "record"
        variants = self.variants(at) if record else [()]
        text = f"{at.kind}:{members}:{variants}"
        if text in self._structs:
            return self._structs[text]
        name = self._structs[text] = f"R{len(self._structs)}"
        lines = [f"  {kind} {member}{{}};" for member, kind in members]
        several = len(variants) > 1
        lines.append(
            "  std::uint8_t tag_ = 0;\n  int tag() const { return tag_; }\n"
            "  void set_tag(int t) { tag_ = static_cast<std::uint8_t>(t); }"
            if several
            else "  static constexpr int tag() { return 0; }\n  static constexpr void set_tag(int) {}"
        )
        lines.append(f"  static constexpr std::size_t kVariants = {len(variants)};")
        lines.append(f"  static constexpr bool kRecord = {str(record).lower()};")
        pointers = {member: f"&{name}::{member}" for member, _ in members}
        lines.append(f"  static constexpr auto all = std::make_tuple({_list(pointers.values())});")
        groups = [
            f"std::make_tuple({_list(pointers[f'f_{f}'] for f in v)})" for v in variants
        ] if record else ["all"]  # fmt: skip
        lines.append(f"  static constexpr auto fields = std::make_tuple({_list(groups)});")
        quoted = _list(f'"{member.removeprefix("f_")}"' for member, _ in members)
        lines.append(
            f"  static constexpr std::array<const char*, {len(members)}> kFieldNames{{{quoted}}};"
        )
        lines.append(f"  friend bool operator==(const {name}&, const {name}&) = default;")
        self.declarations.append(f"struct {name} {{\n" + "\n".join(lines) + "\n};\n")
        return name

    # --- constants ------------------------------------------------------------------------------

    def rank(self, value: Value, kind: Type, span: Span) -> int:
        """Where a value comes in the order of its type."""
        at = kind.root()
        match at.kind:
            case "int":
                if not self.bounds.set_low <= value <= self.bounds.set_high:
                    raise TooNarrow("number in a set", value)
                return int(value) - self.bounds.set_low
            case "atom":
                return sorted(at.names).index(value)
            case "set":
                return sum(1 << self.rank(v, at.of, span) for v in value)
            case "seq":
                each = self.card(at.of)
                before = sum(each**n for n in range(len(value)))
                return int(before + self._mixed([(v, at.of) for v in value], span))
            case "fn":
                keys = sorted(at.keys, key=order_key)
                return self._mixed([(_applied(value, k), at.of) for k in keys], span)
            case "tuple":
                return self._mixed(list(zip(value, at.items, strict=True)), span)
            case "record":
                names = tuple(sorted(value.items))
                base = 0
                for variant in self.variants(at):
                    if variant == names:
                        pairs = [(value.items[n], at.fields[n]) for n in names]
                        return base + self._mixed(pairs, span)
                    base += math.prod(self.card(at.fields[n]) for n in variant)
        return int(value)

    def _mixed(self, parts: list[tuple[Value, Type]], span: Span) -> int:
        out = 0
        for value, kind in parts:
            out = out * self.card(kind) + self.rank(value, kind, span)
        return out

    def constant(self, value: Value, kind: Type, span: Span) -> str:
        """A constant of a type, as an expression."""
        at = kind.root()
        if at.kind in ("bool", "unknown"):
            return "true" if value else "false"
        if at.kind == "int":
            return str(value)
        name = self.name(at, span)
        text = f"{name}{self._literal(value, at, span)}"
        if at.kind == "atom":
            return text
        if text not in self._constants:
            self._constants[text] = f"c{len(self._constants)}"
            self.declarations.append(
                f"inline constexpr {name} {self._constants[text]} = {text.removeprefix(name)};\n"
            )
        return self._constants[text]

    def _literal(self, value: Value, at: Type, span: Span) -> str:
        """Braces only: the initialiser of an aggregate."""
        at = at.root()
        match at.kind:
            case "bool" | "unknown":
                return "true" if value else "false"
            case "int":
                return str(value)
            case "atom":
                return f"{{{self.rank(value, at, span)}}}"
            case "set":
                bits = sum(1 << self.rank(v, at.of, span) for v in value)
                words = max(1, (self.universe(at.of, span) + 63) // 64)
                parts = [f"{bits >> (64 * i) & (2**64 - 1):#x}ull" for i in range(words)]
                return f"{{{{{_list(parts)}}}}}"
            case "seq":
                if len(value) > self.bounds.seq_max:
                    raise TooNarrow("sequence", len(value))
                items = [self._literal(v, at.of, span) for v in value]
                return f"{{{{{{{_list(items)}}}}}, {len(value)}}}"
            case "fn":
                keys = sorted(at.keys, key=order_key)
                items = [self._literal(_applied(value, k), at.of, span) for k in keys]
                return f"{{{{{{{_list(items)}}}}}}}"
            case "tuple" if not at.items:
                return "{{}, 0}"
            case "tuple":
                pairs = zip(value, at.items, strict=True)
                return f"{{{_list(self._literal(v, k, span) for v, k in pairs)}}}"
        assert isinstance(value, Function)
        parts = [
            self._literal(value.items[n], k, span) if n in value.items else "{}"
            for n, k in ((name.removeprefix("f_"), k) for name, k in self.fields(at))
        ]
        variants = self.variants(at)
        if len(variants) > 1:
            parts.append(str(variants.index(tuple(sorted(value.items)))))
        return f"{{{_list(parts)}}}"


class TooNarrow(Exception):
    """A constant does not fit the bounds: which bound, and the value."""

    def __init__(self, bound: str, value: int) -> None:
        super().__init__(bound, value)
        self.bound = bound
        self.value = value


def _applied(fn: Value, key: Value) -> Value:
    return fn[key - 1] if isinstance(fn, tuple) else fn.items[key]


def _list(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
