"""The blocks of models with experts: a router, the experts it chooses, and those always chosen.

Rule: as in blocks.py. Experts are dealt out along `ep`, each split along `tp`; whether tokens
travel to them or are brought to all ranks is the compiler's business.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.models.blocks import TOKENS, Params, gated, mlp
from tokenspeed.spmd.module import module
from tokenspeed.spmd.params import Parameter, Source
from tokenspeed.spmd.placement import Partial, Replicate, Shard, alike, layout, tokens

__all__ = ["moe", "moe_parameters"]

AT_EXPERTS = tokens(tp=Replicate(), ep=Replicate())
"""Each token wherever some of its experts are."""


def moe(layer: Any, routing: kernels.Routing, x: Any, *, shared: bool) -> Any:
    """What a layer's experts make of x[tokens, hidden]; `layer` has what `moe_parameters` makes."""
    chosen, weights = route(layer["router"], x, **attrs.asdict(routing))
    mixed = experts(layer["experts"], x, chosen, weights)
    return add(mixed, mlp(layer["shared"], x)) if shared else mixed


def moe_parameters(
    at: str, hidden: int, ffn: int, count: int, *, shared: int = 0, bias: bool = False
) -> dict[str, Any]:
    """The weights of a layer's experts under a name in the checkpoint.

    Args:
        at: as in "model.layers.3.mlp".
        hidden, ffn: widths of the residual stream and of an expert.
        count: of routed experts.
        shared: experts that are always chosen; together one MLP of so many times their width.
        bias: whether the router has one for the choice.
    """
    router = {"weight": _float32(f"{at}.gate.weight", count, hidden)}
    if bias:
        router["bias"] = _float32(f"{at}.gate.e_score_correction_bias", count)
    each = [gated(f"{at}.experts.{expert}", ffn, hidden) for expert in range(count)]
    stacks = {
        name: Parameter(tuple(s for own in each for s in own[name].sources), stacked=count)
        for name in ("gate_up", "down")
    }
    tree: dict[str, Any] = {"router": router, "experts": stacks}
    if shared:
        tree["shared"] = gated(f"{at}.shared_experts", shared * ffn, hidden)
    return tree


def _float32(name: str, *shape: int) -> Parameter:
    return Parameter((Source(name, shape),), dtype=torch.float32)


def _routed(params: Params, x: Tensor, *, chosen: int, **_how: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], chosen)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


@module(inputs={"x": TOKENS}, outputs=(TOKENS, TOKENS), meta=_routed)
def route(
    params: Params,
    x: Tensor,
    *,
    scoring: str,
    chosen: int,
    groups: int,
    groups_chosen: int,
    normalised: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Experts int64[tokens, chosen] and their weights float32 of x[tokens, hidden].

    In float32, whatever the model's dtype: a rounding here chooses another expert.
    """
    logits = kernels.linear(x.float(), params["weight"])
    how = kernels.Routing(
        scoring=scoring,
        chosen=chosen,
        groups=groups,
        groups_chosen=groups_chosen,
        normalised=normalised,
        scale=scale,
    )
    return kernels.moe_route(logits, params.get("bias"), how)


@module(
    inputs={"x": AT_EXPERTS, "chosen": AT_EXPERTS, "weights": AT_EXPERTS},
    outputs=tokens(tp=Partial(), ep=Partial()),
    params={"gate_up": layout(ep=Shard(0), tp=Shard(1)), "down": layout(ep=Shard(0), tp=Shard(2))},
    indices={"chosen": "gate_up"},
    routed="chosen",
)
def experts(params: Params, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the chosen experts make of x[tokens, hidden], weighted and added up."""
    return kernels.moe_mlp(x, chosen, weights, params["gate_up"], params["down"])


@module(inputs={"a": alike(), "b": alike()}, outputs=alike())
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, also where each rank has summands of both."""
    total: Tensor = a + b
    return total
