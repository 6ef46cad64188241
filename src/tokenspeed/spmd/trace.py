"""Tracing: a model function runs once on stand-ins, which record what feeds what.

Rule: a stand-in is either a place in the step's arguments (`Ref`) or the output of a module
(`Value`). A model function can only index the one, and pass both to modules; it sees no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from attrs import define, field, frozen

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.module import Module, Traced
from tokenspeed.spmd.params import Parameter, Path, Tree, path_name
from tokenspeed.spmd.placement import REPLICATED, Layout

__all__ = ["Call", "Ref", "Trace", "Value"]


@final
@frozen(eq=False)
class Call:
    """A recorded module call: its path in the model, its arguments and its outputs."""

    module: Module
    path: str
    arguments: Mapping[str, Any]
    outputs: tuple[Value, ...]


@define(eq=False)
class Trace:
    """The calls of a model function in order, and where its parameters lie."""

    calls: list[Call] = field(factory=list)
    param_layouts: dict[Path, Layout] = field(factory=dict)


@final
@define(eq=False)
class Value(Traced):
    """A tensor that a recorded call produces."""

    trace: Trace
    number: int
    layout: Layout
    producer: str

    def call(self, module: Module, arguments: Mapping[str, Any]) -> Any:
        """See Traced."""
        return _record(self.trace, module, arguments)


@final
@define(eq=False)
class Ref(Traced):
    """A place in the step's arguments: a parameter subtree, a batch field or a layer's KV."""

    trace: Trace
    source: str
    tree: Tree = None
    path: Path = ()

    def call(self, module: Module, arguments: Mapping[str, Any]) -> Any:
        """See Traced."""
        return _record(self.trace, module, arguments)

    def __getitem__(self, key: str | int) -> Ref:
        return Ref(self.trace, f"{self.source}[{key!r}]", self.tree[key], (*self.path, key))

    def __getattr__(self, name: str) -> Ref:
        if name.startswith("_") or self.tree is not None:
            raise AttributeError(
                f"{self.source} is a tree: index it, as in {self.source}[{name!r}]"
            )
        return Ref(self.trace, f"{self.source}.{name}")

    def __iter__(self) -> Iterator[Ref]:
        return (self[index] for index in range(len(self.tree)))

    def __len__(self) -> int:
        return len(self.tree)


def _record(trace: Trace, module: Module, arguments: Mapping[str, Any]) -> Any:
    first = next(iter(arguments.values()))
    where = path_name(first.path) if isinstance(first, Ref) and first.path else "model"
    path = f"{where}:{module.name}"
    for name, argument in arguments.items():
        if isinstance(argument, Value) and name not in module.inputs:
            raise PlacementError(
                f"{path}: argument {name} comes from {argument.producer} but has no placement; "
                f"declare it in @module(inputs={{{name!r}: ...}})"
            )
        if name in module.inputs and not isinstance(argument, Value):
            raise PlacementError(f"{path}: argument {name} has a placement but no module makes it")
    if isinstance(first, Ref) and isinstance(first.tree, dict):
        _place_params(trace, module, first, path)
    lies = module.outputs if isinstance(module.outputs, tuple) else (module.outputs,)
    count = sum(len(call.outputs) for call in trace.calls)
    outputs = tuple(Value(trace, count + i, one, path) for i, one in enumerate(lies))
    trace.calls.append(Call(module, path, arguments, outputs))
    return outputs if isinstance(module.outputs, tuple) else outputs[0]


def _place_params(trace: Trace, module: Module, subtree: Ref, path: str) -> None:
    for key, leaf in subtree.tree.items():
        if not isinstance(leaf, Parameter):
            continue
        lies = module.params.get(key, REPLICATED)
        known = trace.param_layouts.setdefault((*subtree.path, key), lies)
        if known != lies:
            raise PlacementError(
                f"{path}: parameter {key} is placed {lies} here and {known} by another module; "
                "give both the same placement, or list the parameter twice in the tree"
            )
