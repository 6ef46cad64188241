"""Tracing: a model function runs once on stand-ins, which record what feeds what.

Rule: a stand-in is either a place in the step's arguments (`Ref`) or a tensor that moves between
modules (`Value`). A model function can only index the one, and pass both to modules; it sees no
number. Shapes are those of the bucket that is compiled, as tensors on the meta device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, final

import torch
from attrs import define, field, frozen
from torch import Tensor

from tokenspeed.errors import ConfigError, PlacementError
from tokenspeed.spmd.module import Module, Traced
from tokenspeed.spmd.moves import Kind
from tokenspeed.spmd.params import Constant, Parameter, Path, Tree, leaves, path_name
from tokenspeed.spmd.placement import REPLICATED, Boundary, Layout, as_batch

__all__ = ["COUNT_MAX", "Bucket", "Call", "Ref", "Trace", "Value", "trace_model"]


ELEMENTS_MAX = 1 << 59
COUNT_MAX = 1 << 31
"""Tokens of a step; more have no number of 32 bits."""


@final
@frozen(kw_only=True)
class Bucket:
    """The step that a program is compiled for.

    Attributes:
        tokens: of all ranks together; None: any number of them. Then tokens are only cut where the
            batch or a boundary that names the axis cuts them, and costs are those of one token.
        rows: whose logits are wanted, of all ranks together.
        dtype: of parameters and activations.
        fields: shapes of further fields of the batch, as meta tensors.
    """

    tokens: int | None = None
    rows: int = 1
    dtype: torch.dtype = torch.float32
    fields: Mapping[str, Tensor] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for name, count in (("tokens", self.tokens), ("rows", self.rows)):
            if count is not None and not 1 <= count <= COUNT_MAX:
                raise ConfigError(name, count, f"1 to {COUNT_MAX:,} in a step")

    def meta(self, name: str) -> Tensor | None:
        """A field of the batch as a meta tensor, if its shape is known."""
        if name in self.fields:
            return self.fields[name]
        counts = {"sampled_rows": self.rows}
        counts |= dict.fromkeys(("token_ids", "positions", "locations"), self.tokens or 1)
        known = name in counts
        return torch.empty(counts[name], dtype=torch.int64, device="meta") if known else None


@final
@frozen(eq=False)
class Call:
    """A recorded module call.

    Attributes:
        module: that is called.
        path: in the model, for messages.
        layer: of the model, or None outside of all layers.
        arguments: by name, as they were given.
        uses: the arguments that have a placement.
        outputs: one Value a result.
        params: paths of its parameters.
        stage: of the `pp` axis; of a hop, the one that receives.
    """

    module: Module
    path: str
    layer: int | None
    arguments: Mapping[str, Any]
    uses: Mapping[str, Value]
    outputs: tuple[Value, ...]
    params: tuple[Path, ...] = ()
    stage: int = 0


@define(eq=False)
class Trace:
    """The calls of a model function in order, and where its parameters lie.

    Attributes:
        bucket: whose shapes are traced.
        calls: in order.
        values: all of them, by their numbers.
        fields: of the batch, those that have a placement.
        param_layouts: by path.
    """

    bucket: Bucket
    calls: list[Call] = field(factory=list)
    values: list[Value] = field(factory=list)
    fields: dict[str, Value] = field(factory=dict)
    param_layouts: dict[Path, Layout] = field(factory=dict)
    _metas: dict[Any, Tensor] = field(factory=dict)

    def value(self, boundary: Boundary, meta: Tensor | None, producer: str, name: str) -> Value:
        """A new value."""
        made = Value(self, len(self.values), boundary, meta, producer, name)
        self.values.append(made)
        return made

    def parameter(self, leaf: Parameter) -> Tensor:
        """A parameter's whole shape as a meta tensor."""
        key = leaf.shape, leaf.dtype or self.bucket.dtype
        if key not in self._metas:
            if math.prod(leaf.shape) >= ELEMENTS_MAX:
                raise PlacementError(
                    f"{leaf.sources[0].name} {list(leaf.shape)} has more elements than memory has "
                    "addresses; correct the configuration"
                )
            self._metas[key] = torch.empty(key[0], dtype=key[1], device="meta")
        return self._metas[key]


@final
@define(eq=False)
class Value(Traced):
    """A tensor that a recorded call produces, or a field of the batch that is moved.

    Attributes:
        number: among the trace's values.
        boundary: as its producer declares it.
        meta: shape and dtype, if known.
        producer: path of the module, or "batch".
        name: in the compiled source.
    """

    trace: Trace
    number: int
    boundary: Boundary
    meta: Tensor | None
    producer: str
    name: str

    @property
    def told(self) -> str:
        """See Traced."""
        return f"{self.name}, which {self.producer} gives"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise self.refusal(f".{name}")

    @property
    def kind(self) -> Kind:
        """What moving it depends on."""
        any_count = self.trace.bucket.tokens is None
        if self.meta is None:
            return Kind((), 0, any_count)
        return Kind(tuple(self.meta.shape), self.meta.element_size(), any_count)

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

    @property
    def told(self) -> str:
        """See Traced."""
        return self.source

    def __getitem__(self, key: str | int) -> Ref:
        known = self._keys("[]")
        if isinstance(self.tree, list) and isinstance(key, int) and key < 0:
            key += len(self.tree)  # one path for each parameter
        if key not in known:
            raise PlacementError(f"{self.source} has no {key!r}; it has {_listed(known)}")
        return Ref(self.trace, f"{self.source}[{key!r}]", self.tree[key], (*self.path, key))

    def __getattr__(self, name: str) -> Ref:
        if name.startswith("_") or self.tree is not None:
            raise AttributeError(
                f"{self.source} is a tree: index it, as in {self.source}[{name!r}]"
            )
        return Ref(self.trace, f"{self.source}.{name}")

    def __iter__(self) -> Iterator[Any]:
        keys = self._keys("iteration")
        return iter(keys) if isinstance(self.tree, dict) else (self[key] for key in keys)

    def __len__(self) -> int:
        return len(self._keys("len"))

    def __contains__(self, key: object) -> bool:
        return key in self._keys("in")

    def _keys(self, operation: str) -> Collection[Any]:
        """Of a branch. Raises PlacementError: this is a tensor, or what only a rank has."""
        if isinstance(self.tree, dict):
            return self.tree.keys()
        if isinstance(self.tree, list):
            return range(len(self.tree))
        raise self.refusal(operation)


def trace_model(
    function: Callable[[Any, Any, Any], Any], params: Tree, layers: int, bucket: Bucket
) -> tuple[Trace, Value]:
    """Run `function(params, batch, kv)` on stand-ins: the calls, and which value it returns.

    Raises:
        PlacementError: it does what a model function cannot, or its tree is none.
    """
    for path, leaf in leaves(params):
        if not isinstance(leaf, Parameter | Constant):
            raise PlacementError(
                f"{path_name(path) or 'params'} is of type {type(leaf).__name__}; the leaves of a "
                "tree of dicts and lists are Parameter and Constant"
            )
    trace = Trace(bucket)
    kv = Ref(trace, "kv", [()] * layers)
    returned = function(Ref(trace, "params", params), Ref(trace, "batch"), kv)
    match returned:
        case (Value() as result, Ref() as kept) if result.trace is trace and kept is kv:
            return trace, result
    raise PlacementError(
        f"a model returns (the output of a module, the kv it was given), not {_told(returned)}"
    )


def _told(returned: Any) -> str:
    """What a model function returned, for a message."""
    if isinstance(returned, tuple):
        return f"({', '.join(map(_told, returned))})"
    return returned.told if isinstance(returned, Traced) else type(returned).__name__


_LISTED_MAX = 8


def _listed(names: Collection[Any]) -> str:
    some = [str(name) for name in itertools.islice(names, _LISTED_MAX)]
    return ", ".join([*some, "..."] if len(names) > _LISTED_MAX else some) or "nothing"


def _record(trace: Trace, module: Module, arguments: Mapping[str, Any]) -> Any:
    first = next(iter(arguments.values()))
    at = first.path if isinstance(first, Ref) else ()
    layer = trace.calls[-1].layer if trace.calls and not at else None
    if len(at) > 1 and at[0] == "layers" and isinstance(at[1], int):
        layer = at[1]
    where = path_name(at) or ("model" if layer is None else f"layers.{layer}")
    path = f"{where}:{module.name}"
    for name, argument in arguments.items():
        _check_argument(trace, name, argument, path)
    uses = _uses(trace, module, arguments, path)
    _check_names(module, first, path)
    placed = _place_params(trace, module, arguments.values(), path)
    metas = _metas(trace, module, arguments, path)
    outputs = tuple(
        trace.value(boundary, meta, path, f"v{len(trace.values)}")
        for boundary, meta in zip(module.outputs, metas, strict=True)
    )
    trace.calls.append(Call(module, path, layer, arguments, uses, outputs, placed))
    return outputs[0] if module.single else outputs


def _uses(
    trace: Trace, module: Module, arguments: Mapping[str, Any], path: str
) -> dict[str, Value]:
    """The arguments that have a placement."""
    uses = {}
    for name, argument in arguments.items():
        if isinstance(argument, Value) and name not in module.inputs:
            raise PlacementError(
                f"{path}: argument {name} comes from {argument.producer} but has no placement; "
                f"declare it in @module(inputs={{{name!r}: ...}})"
            )
        if name not in module.inputs:
            continue
        if isinstance(argument, Value):
            uses[name] = argument
        elif isinstance(argument, Ref) and argument.source.startswith("batch."):
            source = argument.source
            if source not in trace.fields:
                meta = trace.bucket.meta(source.removeprefix("batch."))
                trace.fields[source] = trace.value(as_batch(), meta, "batch", source)
            uses[name] = trace.fields[source]
        else:
            raise PlacementError(
                f"{path}: argument {name} has a placement but no module makes it, "
                "nor is it a field of the batch"
            )
    return uses


def _metas(
    trace: Trace, module: Module, arguments: Mapping[str, Any], path: str
) -> list[Tensor | None]:
    """Shapes and dtypes of a call's results."""
    given = {name: _meta(trace, argument) for name, argument in arguments.items()}
    if module.meta is None:
        first = next((given[name] for name in arguments if name in module.inputs), None)
        results = [first] * len(module.outputs)
    elif any(isinstance(a, Value) and a.meta is None for a in arguments.values()):
        results = [None] * len(module.outputs)
    else:
        results = _by_rule(module, given, path)
    if trace.bucket.tokens is not None and None in [r if r is None else 0 for r in results]:
        raise PlacementError(
            f"{path}: the shape of its result is not known; declare @module(meta=...), a function "
            "of the same arguments that gives meta tensors"
        )
    return results


def _by_rule(module: Module, given: Mapping[str, Any], path: str) -> list[Tensor | None]:
    """What a module's own shape rule says."""
    assert module.meta is not None
    try:
        made = module.meta(**given)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise PlacementError(
            f"{path}: its meta failed with {error!r}; it is called by name as the body is, with "
            f"{_listed(given)}: meta tensors of whole shape, and None for what has no shape"
        ) from error
    results = [made] if module.single else list(made) if isinstance(made, tuple | list) else []
    if len(results) != len(module.outputs) or not all(isinstance(r, Tensor) for r in results):
        raise PlacementError(
            f"{path}: meta gives {len(results)} tensors for {len(module.outputs)} outputs"
            if all(isinstance(r, Tensor) for r in results)
            else f"{path}: meta gives {made!r}, expected a meta tensor for each output"
        )
    return results


def _meta(trace: Trace, argument: Any) -> Any:
    """What a shape rule sees of an argument."""
    if isinstance(argument, Value):
        return argument.meta
    if not isinstance(argument, Ref):
        return argument
    if argument.tree is None:
        return trace.bucket.meta(argument.source.removeprefix("batch."))
    if isinstance(argument.tree, dict):
        return {
            key: trace.parameter(leaf)
            for key, leaf in argument.tree.items()
            if isinstance(leaf, Parameter)
        }
    return trace.parameter(argument.tree) if isinstance(argument.tree, Parameter) else None


def _check_argument(trace: Trace, name: str, argument: Any, path: str) -> None:
    """Raise PlacementError for what cannot be written into the program."""
    if isinstance(argument, Traced):
        if not isinstance(argument, Value | Ref) or argument.trace is not trace:
            raise PlacementError(
                f"{path}: argument {name} is {argument.told} in another model's trace; a model "
                "function gets by with its own arguments"
            )
    elif type(argument) not in _LITERALS:
        raise PlacementError(
            f"{path}: argument {name} is of type {type(argument).__name__}, expected what a module "
            "gave, a branch of params, a field of the batch, a layer's KV, a number, a string or "
            "None; pass several one by one, and tensors as Constant leaves of params"
        )


_LITERALS = (bool, int, float, str, type(None))


def _check_names(module: Module, first: Any, path: str) -> None:
    """Raise PlacementError where names of parameters are not those of the tree."""
    if not module.params and not module.indices:
        return
    if not isinstance(first, Ref) or not isinstance(first.tree, dict):
        raise PlacementError(
            f"{path}: its parameters have placements, but its first argument is no branch of "
            "params with names"
        )
    named, held = {*module.params}, {k for k, v in first.tree.items() if isinstance(v, Parameter)}
    if named - held and held - named:
        raise PlacementError(
            f"{path}: @module places {_listed(sorted(named - held))}, which {first.source} has "
            f"not, and does not place {_listed(sorted(held - named))}, which it has; name all "
            "parameters as the tree does, with layout() those that are on every rank"
        )
    unknown = sorted({*module.indices.values()} - held)
    if unknown:
        raise PlacementError(
            f"{path}: indices count rows of {_listed(unknown)}, but {first.source} has "
            f"{_listed(sorted(held))}"
        )


def _place_params(
    trace: Trace, module: Module, arguments: Iterable[Any], path: str
) -> tuple[Path, ...]:
    """Note where the parameters that a call is given lie; their paths.

    The module's declaration is of those in its first argument; all others are on every rank.
    """
    paths = []
    for index, argument in enumerate(arguments):
        if not isinstance(argument, Ref) or argument.tree is None:
            continue
        for at, leaf in leaves(argument.tree):
            if not isinstance(leaf, Parameter):
                continue
            own = index == 0 and len(at) == 1
            lies = module.params.get(str(at[0]), REPLICATED) if own else REPLICATED
            paths.append((*argument.path, *at))
            known = trace.param_layouts.setdefault(paths[-1], lies)
            if known != lies:
                raise PlacementError(
                    f"{path}: parameter {path_name(paths[-1])} is placed {lies} here and {known} "
                    "by another module; give both the same placement, or list the parameter twice "
                    "in the tree"
                )
    return tuple(paths)
