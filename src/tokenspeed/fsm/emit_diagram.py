"""Prints the lifecycle of a request as diagrams: Mermaid text, and SVG.

Rule: the states are the spec's, and so are the moves; moves between the same two states are one
arrow with the names of their actions.
"""

from __future__ import annotations

from tokenspeed.fsm import boxes, layered
from tokenspeed.fsm.lifecycle import Lifecycle

__all__ = ["emit_mermaid", "emit_svg", "moves"]


def moves(lifecycle: Lifecycle) -> dict[tuple[str, str], tuple[str, ...]]:
    """(from, to) -> the actions that lead there, in the spec's order."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for action in lifecycle.actions:
        for edge in action.edges:
            found[edge] = (*found.get(edge, ()), action.name)
    return found


def emit_mermaid(lifecycle: Lifecycle) -> str:
    """A `stateDiagram-v2`, as Markdown viewers draw it."""
    first, *_ = lifecycle.states
    ends = [state for state in lifecycle.states if not lifecycle.legal(state)]
    lines = [f"[*] --> {first}"]
    for (source, target), actions in moves(lifecycle).items():
        lines.append(f"{source} --> {target}: {', '.join(actions)}")
    lines += [f"{state} --> [*]" for state in ends]
    return "\n    ".join(["stateDiagram-v2", *lines]) + "\n"


def emit_svg(lifecycle: Lifecycle) -> str:
    """A drawing, with what a request owns in each state."""
    number = {state: at for at, state in enumerate(lifecycle.states)}
    arrows = moves(lifecycle)
    layers = layered.ranks(len(number), [(number[a], number[b]) for a, b in arrows])
    nodes = [
        boxes.Node(
            (state, " + ".join(lifecycle.owns[state])) if lifecycle.owns[state] else (state,),
            layers[number[state]],
            tone="pill" if lifecycle.owns[state] else "node",
            initial=state == lifecycle.states[0],
            final=not lifecycle.legal(state),
        )
        for state in lifecycle.states
    ]
    links = [boxes.Link(number[a], number[b], actions) for (a, b), actions in arrows.items()]
    return boxes.draw(nodes, links, f"The life of a request ({lifecycle.spec})")
