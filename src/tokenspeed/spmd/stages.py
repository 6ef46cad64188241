"""The `pp` axis: layers in stages, one after the other, and what is sent between them.

Rule: layers are split evenly along the axis; what comes before the first layer belongs to the first
stage, what comes after the last one to the last. A value that a later stage wants goes from stage
to stage. Every rank holds the parameters and the KV of its own stage only; the result is sent from
the last stage to all.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve

from tokenspeed.errors import PlacementError
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.module import module
from tokenspeed.spmd.placement import alike
from tokenspeed.spmd.trace import Call, Trace, Value

__all__ = ["AXIS", "HOP", "held_layers", "split"]

AXIS = "pp"


def send(x: Any) -> Any:
    """What stands in a trace for sending a value to the next stage; its body never runs."""
    return x


HOP = module(inputs={"x": alike()}, outputs=alike())(send)
"""The call that a value takes from one stage to the next."""


def stage_of(layer: int, layers: int, mesh: Mesh) -> int:
    """The stage that a layer belongs to."""
    return layer * mesh.size(AXIS) // layers


def held_layers(layers: int, mesh: Mesh) -> range:
    """The layers of this rank's stage.

    Raises:
        PlacementError: there are more stages than layers.
    """
    stages, here = mesh.size(AXIS), mesh.coordinate(AXIS)
    if layers < 0 or stages > max(layers, 1):
        raise PlacementError(
            f"{layers} layers cannot be split over {stages} stages on the mesh {mesh}; choose "
            f"{AXIS} from 1 to {max(layers, 1)}"
        )
    held = [layer for layer in range(layers) if stage_of(layer, layers, mesh) == here]
    return range(held[0], held[-1] + 1) if held else range(0)


def split(trace: Trace, layers: int, mesh: Mesh) -> None:
    """Give the calls of a trace their stages, with hops where values go to a later one.

    Raises:
        PlacementError: a value that would be sent has no row for each token.
    """
    stages = mesh.size(AXIS)
    if stages == 1:
        return
    held_layers(layers, mesh)
    layered = [at for at, call in enumerate(trace.calls) if call.layer is not None]
    calls, stage = list[Call](), 0
    for at, call in enumerate(trace.calls):
        if call.layer is not None:
            stage = max(stage, min(stage_of(call.layer, layers, mesh), stages - 1))
        elif layered and at > layered[-1]:
            stage = stages - 1
        calls.append(evolve(call, stage=stage))
    last_use = {value.number: call.stage for call in calls for value in call.uses.values()}
    made_in = {value.number: call.layer for call in calls for value in call.outputs}
    trace.calls.clear()
    here: dict[int, Value] = {}  # what a module made, by its number -> what this stage has of it
    stage = 0
    for call in calls:
        while stage < call.stage:
            stage += 1
            for number, value in here.items():
                if last_use.get(number, -1) >= stage:
                    here[number] = _hop(trace, value, stage, made_in[number])
        uses = {name: here.get(value.number, value) for name, value in call.uses.items()}
        trace.calls.append(evolve(call, uses=uses))
        here |= {value.number: value for value in call.outputs}


def _hop(trace: Trace, value: Value, stage: int, layer: int | None) -> Value:
    rows = trace.bucket.tokens or 1
    if value.meta is None or value.meta.shape[0] != rows:
        shape = "of unknown shape" if value.meta is None else list(value.meta.shape)
        raise PlacementError(
            f"{value.producer} gives a value {shape} that stage {stage} of {AXIS} wants; only what "
            f"has a row for each of the {rows} tokens is sent: declare @module(meta=...), or split "
            "the model elsewhere"
        )
    path = f"{AXIS}.{stage}:send {value.producer}"
    sent = trace.value(HOP.outputs[0], value.meta, path, f"v{len(trace.values)}")
    trace.calls.append(Call(HOP, path, layer, {"x": value}, {"x": value}, (sent,), (), stage))
    return sent
