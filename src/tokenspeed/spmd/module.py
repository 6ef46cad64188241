"""Modules: pure functions that say at their boundary how values lie on the mesh.

Rule: a module body is single-device code on the rank's own slices; it holds no collective and no
rank. A module is never called with tensors: `compile_model` records the calls and links them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, final

from attrs import frozen

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.placement import REPLICATED, Layout

__all__ = ["Module", "Traced", "module"]


class Traced:
    """What stands for a value while a model is traced (abstract)."""

    def call(self, module: Module, arguments: Mapping[str, Any]) -> Any:
        """Record a module call and return what stands for its outputs."""
        raise NotImplementedError


@final
@frozen(eq=False)
class Module:
    """A function with declared boundaries; made by the decorator `module`.

    Attributes:
        function: the body.
        inputs: layout of each tensor argument that another module produces.
        outputs: layout of the result, or of each result of a tuple.
        params: layout of each parameter, by its key in the first argument's tree.
        signature: of the body.
    """

    function: Callable[..., Any]
    inputs: Mapping[str, Layout]
    outputs: Layout | tuple[Layout, ...]
    params: Mapping[str, Layout]
    signature: inspect.Signature

    @property
    def name(self) -> str:
        """The body's name."""
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record a call in the trace that its arguments belong to."""
        bound = self.signature.bind(*args, **kwargs)
        traced = next((a for a in bound.arguments.values() if isinstance(a, Traced)), None)
        if traced is None:
            raise PlacementError(
                f"{self.name} was called outside a trace: modules run only as part of a model that "
                "tokenspeed.spmd.compile_model has built"
            )
        return traced.call(self, bound.arguments)


def module(
    *,
    inputs: Mapping[str, Layout] | None = None,
    outputs: Layout | tuple[Layout, ...] = REPLICATED,
    params: Mapping[str, Layout] | None = None,
) -> Callable[[Callable[..., Any]], Module]:
    """Declare how a pure function's inputs, outputs and parameters lie on the mesh.

    The first argument is the module's parameter subtree (a mapping of tensors). Arguments that are
    neither declared in `inputs` nor parameters come from the batch or the KV, as the rank has them.

    Raises:
        PlacementError: a declared input is not an argument of the function.
    """

    def declare(function: Callable[..., Any]) -> Module:
        signature = inspect.signature(function)
        unknown = sorted(set(inputs or {}) - set(signature.parameters))
        if unknown:
            raise PlacementError(
                f"{function.__name__}: placements for {', '.join(unknown)}, but its arguments are "
                f"{', '.join(signature.parameters)}"
            )
        return Module(function, inputs or {}, outputs, params or {}, signature)

    return declare
