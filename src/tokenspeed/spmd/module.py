"""Modules: pure functions that say at their boundary how values lie on the mesh.

Rule: a module body is single-device code on the rank's own slices; it holds no collective and no
rank. A module is never called with tensors: `compile_model` records the calls and links them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, final

from attrs import frozen

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.placement import REPLICATED, Boundary, Layout, Partial, boundary

__all__ = ["Module", "Traced", "module"]

Declared = Layout | Boundary


class Traced:
    """What stands for a value while a model is traced (abstract).

    A model function can pass it on. Whatever would depend on its numbers is a PlacementError, `==`
    and `if` too, which Python would else answer by identity.
    """

    @property
    def told(self) -> str:
        """What this is, for messages."""
        raise NotImplementedError

    def call(self, module: Module, arguments: Mapping[str, Any]) -> Any:
        """Record a module call and return what stands for its outputs."""
        raise NotImplementedError

    def refusal(self, operation: str) -> PlacementError:
        """What to raise where a model function does more than that."""
        return PlacementError(
            f"{operation} of {self.told}: a model function passes on what it is given and is "
            "traced once, without numbers; do it in the body of a @module, or decide by the "
            "configuration"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        """Called by torch for its functions of stand-ins."""
        several = (
            a if isinstance(a, tuple | list) else (a,) for a in (*args, *(kwargs or {}).values())
        )
        given = next(a for some in several for a in some if isinstance(a, Traced))
        raise given.refusal(f"torch.{function.__name__}")


_OPERATIONS = """
bool call eq ne lt le gt ge neg pos abs invert float int index contains iter len getitem
add sub mul truediv floordiv mod pow matmul and or xor lshift rshift
radd rsub rmul rtruediv rfloordiv rmod rpow rmatmul rand ror rxor
"""


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Traced, *_: Any, **__: Any) -> NoReturn:
        raise self.refusal(name)

    return refuse


for _name in _OPERATIONS.split():
    setattr(Traced, f"__{_name}__", _refusing(_name))


@final
@frozen(eq=False)
class Module:
    """A function with declared boundaries; made by the decorator `module`.

    Attributes:
        function: the body.
        inputs: boundary of each tensor argument that another module or the batch produces.
        outputs: boundary of each result.
        single: whether the body returns one result and no tuple.
        params: layout of each parameter, by its key in the first argument's tree.
        indices: argument -> the key of the parameter whose rows it counts.
        routed: the argument among `indices` that says which ranks a token has to visit, or None.
        meta: shapes and dtypes of the results.
        signature: of the body.
    """

    function: Callable[..., Any]
    inputs: Mapping[str, Boundary]
    outputs: tuple[Boundary, ...]
    single: bool
    params: Mapping[str, Layout]
    indices: Mapping[str, str]
    routed: str | None
    meta: Callable[..., Any] | None
    signature: inspect.Signature

    @property
    def name(self) -> str:
        """The body's name."""
        return self.function.__name__

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Of inputs and outputs."""
        return (*self.inputs.values(), *self.outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record a call in the trace that its arguments belong to."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise PlacementError(
                f"{self.name}: {error}; it takes {', '.join(self.signature.parameters)}"
            ) from error
        traced = next((a for a in bound.arguments.values() if isinstance(a, Traced)), None)
        if traced is None:
            raise PlacementError(
                f"{self.name} was called outside a trace: modules run only as part of a model that "
                "tokenspeed.spmd.compile_model has built"
            )
        return traced.call(self, bound.arguments)


def module(
    *,
    inputs: Mapping[str, Declared] | None = None,
    outputs: Declared | tuple[Declared, ...] = REPLICATED,
    params: Mapping[str, Layout] | None = None,
    indices: Mapping[str, str] | None = None,
    routed: str | None = None,
    meta: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Module]:
    """Declare how a pure function's inputs, outputs and parameters lie on the mesh.

    The first argument is the module's parameter subtree (a mapping of tensors). Arguments that are
    neither declared in `inputs` nor parameters come from the batch or the KV, as the rank has them.

    Args:
        inputs: of the arguments that other modules make, and of fields of the batch that are to be
            moved to where the module wants them.
        outputs: of the result, or of each result of a tuple.
        params: of parameters; one that is not named is on every rank. Names that a tree has not
            are for other configurations; then every parameter that it has must be named.
        indices: argument -> parameter: the argument holds row numbers of that parameter. Where its
            rows are sharded, a rank sees numbers of its own rows, from 0, and -1 for all others.
        routed: one of `indices`, [tokens, choices]. A token whose choices are all -1 has the result
            0 here: so instead of bringing every token to every rank, the compiler may send tokens
            to where their rows are, and the summands back.
        meta: called as the body is, with tensors on the meta device (of whole, unsharded shape) for
            its tensors and None for what has no shape; gives the results' shapes and dtypes as meta
            tensors. Left out, every result is like the first argument that `inputs` names.

    Raises:
        PlacementError: what is declared does not fit the function or each other.
    """

    def declare(function: Callable[..., Any]) -> Module:
        signature = inspect.signature(function)
        single = not isinstance(outputs, tuple)
        for given, what in ((inputs, "inputs"), (params, "params"), (indices, "indices")):
            if not isinstance(given, Mapping | None):
                raise PlacementError(
                    f"{function.__name__}: {what} is {given!r}, expected a mapping by name"
                )
        made = Module(
            function=function,
            inputs={name: boundary(one) for name, one in (inputs or {}).items()},
            outputs=tuple(
                boundary(o) for o in (outputs if isinstance(outputs, tuple) else [outputs])
            ),
            single=single,
            params=params or {},
            indices=indices or {},
            routed=routed,
            meta=meta,
            signature=signature,
        )
        _check(made)
        return made

    return declare


def _check(made: Module) -> None:
    """Raise PlacementError for declarations that contradict the function or each other."""
    unknown = sorted((set(made.inputs) | set(made.indices)) - set(made.signature.parameters))
    if unknown:
        raise PlacementError(
            f"{made.name}: placements for {', '.join(unknown)}, but its arguments are "
            f"{', '.join(made.signature.parameters)}"
        )
    for name, parameter in made.signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PlacementError(
                f"{made.name}: its argument {parameter} is {parameter.kind.description}; every "
                "argument of a module has a name, by which it is called"
            )
        if name in made.indices and name not in made.inputs:
            raise PlacementError(
                f"{made.name}: {name} counts rows of {made.indices[name]} but has no placement; "
                f"declare it in @module(inputs={{{name!r}: ...}})"
            )
    for name, lies in made.params.items():
        if not isinstance(lies, Layout) or any(isinstance(p, Partial) for _, p in lies.axes):
            raise PlacementError(
                f"{made.name}: parameter {name} is placed {lies}, expected layout(...) of "
                "Shard(dim) and Replicate(): a parameter is read, cut or whole, never in summands"
            )
    free = [one for one in made.boundaries if one.is_free]
    named = {tuple(axis for axis, _ in one.named) for one in free}
    if len(named) > 1 or len({one.rest for one in free}) > 1:
        raise PlacementError(
            f"{made.name}: its boundaries {', '.join(map(str, free))} leave different axes open; "
            "what the compiler chooses holds for the whole call: name the same axes in all of them"
        )
    if made.routed is not None and made.routed not in made.indices:
        raise PlacementError(
            f"{made.name}: routed is {made.routed!r}, expected an argument that `indices` names"
        )
