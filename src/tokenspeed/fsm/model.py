"""A module with a configuration: constants bound, Init, Next and the properties named.

Rule: a `.cfg` means what the standard tools take it to mean; a keyword that is not understood is
refused. EXTENDS of the standard modules costs nothing, of one's own reads the file beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import attrs
from attrs import field, frozen

from tokenspeed.errors import SpecError
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.names import check_names
from tokenspeed.fsm.syntax import (
    Bound,
    Definition,
    Expr,
    Instance,
    Module,
    Span,
    parse_module,
    read_text,
)

__all__ = ["Config", "Model", "load_model", "load_module", "parse_config"]

STANDARD = ("Naturals", "Integers", "Sequences", "FiniteSets", "TLC")
"""Modules whose operators are built in."""


@frozen
class Config:
    """What a `.cfg` says."""

    path: Path
    constants: dict[str, Any] = field(factory=dict)
    overrides: dict[str, str] = field(factory=dict)
    init: str = "Init"
    next: str = "Next"
    invariants: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    symmetry: str | None = None
    check_deadlock: bool = True
    constraints: tuple[str, ...] = ()
    action_constraints: tuple[str, ...] = ()
    fairness: tuple[Expr, ...] = ()
    model_values: frozenset[str] = frozenset()


@frozen
class Model:
    """A module that can run."""

    evaluator: Evaluator
    config: Config


def load_module(path: Path) -> Module:
    """A module with what it EXTENDS and INSTANCEs put before its own definitions.

    Raises:
        SpecError: a module is malformed, or extends one that is neither standard nor beside it.
    """
    return _merged(path, set())


def _merged(path: Path, seen: set[str]) -> Module:
    module = parse_module(path)
    seen.add(module.name)
    bases = [
        _merged(_beside(path, name, Span(path, 1, 1)), seen)
        for name in module.extends
        if name not in STANDARD and name not in seen
    ]
    copies = [d for each in module.instances for d in _instantiated(path, module, each)]
    return attrs.evolve(
        module,
        constants=tuple(c for b in bases for c in b.constants) + module.constants,
        variables=tuple(v for b in bases for v in b.variables) + module.variables,
        assumptions=tuple(a for b in bases for a in b.assumptions) + module.assumptions,
        definitions=tuple(d for b in bases for d in b.definitions)
        + tuple(copies)
        + module.definitions,
    )


def _beside(path: Path, name: str, asked: Span) -> Path:
    found = path.with_name(f"{name}.tla")
    if not found.exists():
        known = ", ".join(STANDARD)
        raise asked.error(f"{name}: expected {found.name} beside it, or {known}")
    return found


def _instantiated(path: Path, outer: Module, instance: Instance) -> list[Definition]:
    """The definitions of another module, its parameters replaced, under `name!`."""
    if instance.module in STANDARD:
        return []
    inner = _merged(_beside(path, instance.module, instance.span), set())
    prefix = f"{instance.name}!" if instance.name else ""
    unknown = sorted(set(instance.substitutions) - {*inner.constants, *inner.variables})
    if unknown:
        raise instance.span.error(f"{inner.name} declares no {', '.join(unknown)} to substitute")
    renamed = {d.name: prefix + d.name for d in inner.definitions}
    out = []
    for parameter in (*inner.constants, *inner.variables):
        given = instance.substitutions.get(parameter)
        if given is None:
            continue  # the name means what it means outside
        renamed[parameter] = f"{prefix}{parameter}" if prefix else f"{inner.name}!{parameter}"
        out.append(Definition(renamed[parameter], (), given, instance.span))
    for d in inner.definitions:
        hidden = {n: to for n, to in renamed.items() if n not in d.params}
        out.append(Definition(renamed[d.name], d.params, _rename(d.body, hidden), d.span))
    return out


def _rename(expr: Expr, names: dict[str, str]) -> Expr:
    """An expression with some free names replaced by others."""
    if expr.op in ("name", "call"):
        own = names.get(str(expr.args[0]), expr.args[0])
        rest = (_rename(a, names) if isinstance(a, Expr) else a for a in expr.args[1:])
        return attrs.evolve(expr, args=(own, *rest))
    bound = {n for a in expr.args if isinstance(a, Bound) for n in a.names}
    bound |= {a.name for a in expr.args if isinstance(a, Definition)}
    inner = {n: to for n, to in names.items() if n not in bound}
    return attrs.evolve(expr, args=tuple(_renamed_part(a, names, inner) for a in expr.args))


def _renamed_part(part: object, names: dict[str, str], inner: dict[str, str]) -> object:
    match part:
        case Bound():
            return Bound(part.names, _rename(part.domain, names))
        case Definition():
            own = {n: to for n, to in inner.items() if n not in part.params}
            return attrs.evolve(part, body=_rename(part.body, own))
        case Expr():
            return _rename(part, inner)
    return part


def load_model(spec: Path, config: Path) -> Model:
    """Bind the constants of `config`, resolve Init and Next, and check the ASSUMEs."""
    module, settings = load_module(spec), parse_config(config)
    check_names(module)
    for definition in module.definitions:
        _refuse_confusion(definition.body, settings)
    names = {d.name: d for d in module.definitions}
    if "SPECIFICATION" in settings.overrides:
        settings = _behaviour(settings, names)
    _refuse_undefined(settings, names, module.name)
    constants = {**settings.constants}
    for name in constants:
        if name not in module.constants:
            said = f"{name} = ...: {name} is no CONSTANT of {module.name}"
            raise _error(config, name, said)
    plain = Evaluator(module, constants)
    for name, source in settings.overrides.items():
        if name not in module.constants:
            said = f"{name} <- {source}: {name} is no CONSTANT of {module.name}"
            raise _error(config, name, said)
        constants[name] = plain.value(source)
    missing = [name for name in module.constants if name not in constants]
    if missing:
        raise SpecError(config, 1, 1, f"CONSTANTS without a value: {', '.join(missing)}")
    evaluator = Evaluator(module, constants)
    for assumption in module.assumptions:
        if not evaluator.expression(assumption)(()):
            raise assumption.span.error(
                "this ASSUME is false for the constants of the configuration"
            )
    return Model(evaluator, settings)


def _refuse_undefined(settings: Config, names: Mapping[str, Definition], module: str) -> None:
    """Refuse a name that the module does not define, where the configuration asks for it."""
    symmetry = (settings.symmetry,) if settings.symmetry else ()
    asked = (*settings.invariants, *settings.properties, *settings.constraints)
    for name in (*asked, *settings.action_constraints, *symmetry):
        if name not in names:
            raise _error(settings.path, name, f"{name} is not defined in {module}")
    for name in (settings.init, settings.next):
        if isinstance(name, _Word) and name not in names:
            raise name.span.error(f"{name} is not defined in {module}")


def _refuse_confusion(part: object, settings: Config) -> None:
    """A string that is spelled as a model value is another value; here they would be one."""
    if isinstance(part, Definition):
        _refuse_confusion(part.body, settings)
    if isinstance(part, Bound):
        _refuse_confusion(part.domain, settings)
    if not isinstance(part, Expr):
        return
    if part.op == "string" and part.args[0] in settings.model_values:
        raise part.span.error(
            f"the string {part.args[0]} is spelled as a model value of {settings.path.name}, and "
            "is another value; choose another name"
        )
    for each in part.args[-1:] if part.op == "update" else part.args:
        _refuse_confusion(each, settings)


def _behaviour(settings: Config, names: dict[str, Definition]) -> Config:
    """Init, Next and fairness out of `Spec == Init /\\ [][Next]_vars /\\ ...`."""
    source = settings.overrides["SPECIFICATION"]
    if source not in names:
        raise _error(settings.path, source, f"SPECIFICATION {source} is not defined")
    spec = names[source]
    parts = _conjuncts(spec.body)
    boxes = [p for p in parts if p.op == "always" and p.expr(0).op == "box_action"]
    if len(boxes) != 1 or parts[0].op != "name" or boxes[0].expr(0).expr(0).op != "name":
        raise spec.span.error("expected Spec == Init /\\ [][Next]_vars /\\ Fairness")
    return attrs.evolve(
        settings,
        init=str(parts[0].args[0]),
        next=str(boxes[0].expr(0).expr(0).args[0]),
        overrides={k: v for k, v in settings.overrides.items() if k != "SPECIFICATION"},
        fairness=tuple(p for p in parts[1:] if p is not boxes[0]),
    )


def _conjuncts(expr: Expr) -> list[Expr]:
    if expr.op == "and":
        return [part for arg in expr.exprs() for part in _conjuncts(arg)]
    return [expr]


_COMMENT = re.compile(r"\\\*[^\n]*|\(\*.*?\*\)", re.DOTALL)
_WORD = re.compile(r'"[^"]*"|<-|[{}=,]|[^\s{}=,<"]+|\S')
_VALUE = re.compile(r'-?\d+|"[^"]*"|\w+')
_KEYWORDS = {
    "CONSTANT", "CONSTANTS", "INIT", "NEXT", "SPECIFICATION", "INVARIANT", "INVARIANTS", "PROPERTY",
    "PROPERTIES", "SYMMETRY", "CHECK_DEADLOCK", "CONSTRAINT", "CONSTRAINTS", "ACTION_CONSTRAINT",
    "ACTION_CONSTRAINTS",
}  # fmt: skip
_REFUSED = {"VIEW", "ALIAS", "POSTCONDITION"}


@final
class _Word(str):
    """A word of a `.cfg`, and where it stands."""

    __slots__ = ("span",)
    span: Span


def _words(path: Path) -> list[_Word]:
    """The words of a `.cfg`, comments left out."""
    blank = lambda comment: re.sub(r"[^\n]", " ", comment[0])  # noqa: E731
    out = []
    for number, line in enumerate(_COMMENT.sub(blank, read_text(path)).split("\n"), 1):
        for found in _WORD.finditer(line):
            word = _Word(found[0])
            word.span = Span(path, number, found.start() + 1)
            out.append(word)
    return out


def _error(path: Path, word: str, message: str) -> SpecError:
    """The refusal of a word of a `.cfg`, where it stands; at its start if it is not there."""
    return (word.span if isinstance(word, _Word) else Span(path, 1, 1)).error(message)


def parse_config(path: Path) -> Config:
    """Read a `.cfg`. Model values (`r1 = r1`) are their own names."""
    words = _words(path)
    sections: dict[str, list[str]] = {}
    opened: dict[str, _Word] = {}
    current: list[str] | None = None
    for word in words:
        if word in _KEYWORDS:
            keyword = word.rstrip("S") if word != "PROPERTIES" else "PROPERTY"
            current = sections.setdefault(keyword, [])
            opened.setdefault(keyword, word)
        elif current is None or word in _REFUSED:
            raise word.span.error(f"{word}: expected one of {', '.join(sorted(_KEYWORDS))}")
        else:
            current.append(word)
    given = sections.get("CONSTANT", [])
    constants, overrides = _constants(path, given)
    _refuse_half(opened)
    if "SPECIFICATION" in sections:
        overrides["SPECIFICATION"] = _only(opened, sections, "SPECIFICATION", "")
    return Config(
        path=path,
        constants=constants,
        overrides=overrides,
        init=_only(opened, sections, "INIT", "Init"),
        next=_only(opened, sections, "NEXT", "Next"),
        invariants=tuple(sections.get("INVARIANT", [])),
        properties=tuple(sections.get("PROPERTY", [])),
        symmetry=_only(opened, sections, "SYMMETRY", "") or None,
        check_deadlock=_truth(path, _only(opened, sections, "CHECK_DEADLOCK", "TRUE")),
        constraints=tuple(sections.get("CONSTRAINT", [])),
        action_constraints=tuple(sections.get("ACTION_CONSTRAINT", [])),
        model_values=frozenset(
            value
            for each in constants.values()
            for value in (each if isinstance(each, frozenset) else {each})
            if type(value) is str and f'"{value}"' not in given
        ),
    )


def _refuse_half(opened: Mapping[str, _Word]) -> None:
    """Refuse a behaviour that is said twice, or by half."""
    init, following = opened.get("INIT"), opened.get("NEXT")
    half = init or following
    if half is not None and "SPECIFICATION" in opened:
        raise half.span.error("SPECIFICATION beside INIT or NEXT; expected one of them")
    if half is not None and (init is None or following is None):
        other = "NEXT" if half == "INIT" else "INIT"
        raise half.span.error(f"{half} without {other}; expected both, or SPECIFICATION")


def _only(
    opened: Mapping[str, _Word], sections: Mapping[str, list[str]], keyword: str, default: str
) -> str:
    """The one word after a keyword."""
    words = sections.get(keyword, [default])
    if len(words) != 1:
        message = f"{keyword}: got {len(words)} names; expected one"
        raise opened[keyword].span.error(message)
    return words[0]


def _truth(path: Path, word: str) -> bool:
    if word not in ("TRUE", "FALSE"):
        raise _error(path, word, f"CHECK_DEADLOCK: got {word}; expected TRUE or FALSE")
    return word == "TRUE"


def _constants(path: Path, words: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    constants: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    rest = iter(words)
    for name in rest:
        if name in constants or name in overrides:
            raise _error(path, name, f"{name} has two values; expected one")
        sign, value = next(rest, "nothing"), next(rest, "nothing")
        if sign == "<-" and value.isidentifier():
            overrides[name] = value
        elif sign == "=":
            constants[name] = _set(path, rest, value) if value == "{" else _constant(path, value)
        else:
            said = f"{name} {sign} {value}"
            raise _error(path, name, f"{said}: expected {name} = value or {name} <- Name")
    return constants, overrides


def _set(path: Path, rest: Iterator[str], brace: str) -> frozenset[Any]:
    """The members up to the closing brace."""
    members: list[str] = []
    for word in rest:
        if word == "}":
            return frozenset(_constant(path, member) for member in members)
        if word != ",":
            members.append(word)
    raise _error(path, brace, "a set without its closing brace")


def _constant(path: Path, word: str) -> Any:
    if not _VALUE.fullmatch(word):
        expected = "a number, a string, TRUE, FALSE, a model value, or a set of them"
        raise _error(path, word, f"{word}: got this as a value; expected {expected}")
    if word.lstrip("-").isdigit():
        return int(word)
    return {"TRUE": True, "FALSE": False}.get(word, str(word.strip('"')))
