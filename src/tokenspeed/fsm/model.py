"""A module with a configuration: constants bound, Init, Next and the properties named.

Rule: a `.cfg` means what the standard tools take it to mean; a keyword that is not understood is
refused. EXTENDS of the standard modules costs nothing, of one's own reads the file beside it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from tokenspeed.errors import SpecError
from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.syntax import Definition, Expr, Module, parse_module

__all__ = ["Config", "Model", "load_model", "load_module", "parse_config"]

STANDARD = ("Naturals", "Integers", "Sequences", "FiniteSets", "TLC")


@frozen
class Config:
    """What a `.cfg` says."""

    constants: dict[str, Any] = field(factory=dict)
    overrides: dict[str, str] = field(factory=dict)
    init: str = "Init"
    next: str = "Next"
    invariants: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    symmetry: str | None = None
    check_deadlock: bool = True


@frozen
class Model:
    """A module that can run."""

    evaluator: Evaluator
    config: Config


def load_module(path: Path) -> Module:
    """A module with the definitions of the modules that it extends put before its own.

    Raises:
        SpecError: a module is malformed, or extends one that is neither standard nor beside it.
    """
    module = parse_module(path)
    for name in module.extends:
        if name in STANDARD:
            continue
        beside = path.with_name(f"{name}.tla")
        if not beside.exists():
            known = ", ".join(STANDARD)
            raise SpecError(
                path, 1, 1, f"EXTENDS {name}: expected {beside.name} beside it, or {known}"
            )
        base = load_module(beside)
        module = attrs.evolve(
            module,
            constants=base.constants + module.constants,
            variables=base.variables + module.variables,
            assumptions=base.assumptions + module.assumptions,
            definitions=base.definitions + module.definitions,
        )
    return module


def load_model(spec: Path, config: Path) -> Model:
    """Bind the constants of `config`, resolve Init and Next, and check the ASSUMEs."""
    module, settings = load_module(spec), parse_config(config)
    names = {d.name: d for d in module.definitions}
    extra: dict[str, Definition] = {}
    if "SPECIFICATION" in settings.overrides:
        settings = _behaviour(settings, names)
    constants = {**settings.constants}
    plain = Evaluator(module, constants, extra)
    for name, source in settings.overrides.items():
        if name not in module.constants:
            raise SpecError(
                config, 1, 1, f"{name} <- {source}: {name} is no CONSTANT of {module.name}"
            )
        constants[name] = plain.value(source)
    missing = [name for name in module.constants if name not in constants]
    if missing:
        raise SpecError(config, 1, 1, f"CONSTANTS without a value: {', '.join(missing)}")
    evaluator = Evaluator(module, constants, extra)
    for assumption in module.assumptions:
        if not evaluator.expression(assumption)(()):
            raise assumption.span.error(
                "this ASSUME is false for the constants of the configuration"
            )
    return Model(evaluator, settings)


def _behaviour(settings: Config, names: dict[str, Definition]) -> Config:
    """Init and Next out of `Spec == Init /\\ [][Next]_vars /\\ ...`."""
    spec = names[settings.overrides["SPECIFICATION"]]
    parts = _conjuncts(spec.body)
    boxes = [p for p in parts if p.op == "always" and p.expr(0).op == "box_action"]
    if len(boxes) != 1 or parts[0].op != "name":
        raise spec.span.error("expected Spec == Init /\\ [][Next]_vars /\\ Fairness")
    rest = {k: v for k, v in settings.overrides.items() if k != "SPECIFICATION"}
    following = str(boxes[0].expr(0).expr(0).args[0])
    return attrs.evolve(settings, init=str(parts[0].args[0]), next=following, overrides=rest)


def _conjuncts(expr: Expr) -> list[Expr]:
    if expr.op == "and":
        return [part for arg in expr.exprs() for part in _conjuncts(arg)]
    return [expr]


_WORD = re.compile(r'"[^"]*"|<-|[{}=,]|[^\s{}=,<]+')
_KEYWORDS = {
    "CONSTANT", "CONSTANTS", "INIT", "NEXT", "SPECIFICATION", "INVARIANT", "INVARIANTS", "PROPERTY",
    "PROPERTIES", "SYMMETRY", "CHECK_DEADLOCK",
}  # fmt: skip
_REFUSED = {
    "CONSTRAINT", "CONSTRAINTS", "ACTION_CONSTRAINT", "ACTION_CONSTRAINTS", "VIEW", "ALIAS",
    "POSTCONDITION",
}  # fmt: skip


def parse_config(path: Path) -> Config:
    """Read a `.cfg`. Model values (`r1 = r1`) are their own names."""
    text = re.sub(r"\\\*.*", "", path.read_text(encoding="utf-8"))
    words = _WORD.findall(text)
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word in _KEYWORDS:
            current = sections.setdefault(
                word.rstrip("S") if word != "PROPERTIES" else "PROPERTY", []
            )
        elif current is None or word in _REFUSED:
            raise SpecError(path, 1, 1, f"{word}: expected one of {', '.join(sorted(_KEYWORDS))}")
        else:
            current.append(word)
    constants, overrides = _constants(path, sections.get("CONSTANT", []))
    if "SPECIFICATION" in sections:
        overrides["SPECIFICATION"] = sections["SPECIFICATION"][0]
    return Config(
        constants=constants,
        overrides=overrides,
        init=sections.get("INIT", ["Init"])[0],
        next=sections.get("NEXT", ["Next"])[0],
        invariants=tuple(sections.get("INVARIANT", [])),
        properties=tuple(sections.get("PROPERTY", [])),
        symmetry=next(iter(sections.get("SYMMETRY", [])), None),
        check_deadlock=sections.get("CHECK_DEADLOCK", ["TRUE"])[0] == "TRUE",
    )


def _constants(path: Path, words: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    constants: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    at = 0
    while at < len(words):
        name, sign = words[at], words[at + 1] if at + 1 < len(words) else "nothing"
        if sign == "<-":
            overrides[name] = words[at + 2]
            at += 3
        elif sign == "=" and words[at + 2] == "{":
            end = words.index("}", at)
            members = [w for w in words[at + 3 : end] if w != ","]
            constants[name] = frozenset(_constant(w) for w in members)
            at = end + 1
        elif sign == "=":
            constants[name] = _constant(words[at + 2])
            at += 3
        else:
            raise SpecError(path, 1, 1, f"{name} {sign}: expected {name} = value or {name} <- Name")
    return constants, overrides


def _constant(word: str) -> Any:
    if word.isdigit():
        return int(word)
    return {"TRUE": True, "FALSE": False}.get(word, word.strip('"'))
