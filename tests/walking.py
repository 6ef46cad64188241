"""The lifecycle at bounds too large to enumerate: what properties walk in.

Three requests of eight tokens share five device pages of two tokens and two slots, with three steps
in flight.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenspeed.fsm.evaluate import Evaluator
from tokenspeed.fsm.model import load_module
from tokenspeed.fsm.values import function

__all__ = ["REQUESTS", "specification"]

SPECS = Path(__file__).resolve().parents[1] / "specs"
REQUESTS = ("r1", "r2", "r3")
PAGES = ("p1", "p2", "p3", "p4", "p5")
ALIKE = ("a", "b", "c", "d", "e", "f", "g", "h")
OTHER = ("a", "b", "c", "x", "y", "z", "z", "z")


@cache
def specification(prompt: int) -> Evaluator:
    """The spec with prompts of `prompt` tokens: two requests alike, one that soon differs."""
    constants = {
        "Req": frozenset(REQUESTS),
        "Page": frozenset(PAGES),
        "Token": frozenset((*ALIKE, *OTHER)),
        "Content": function({"r1": ALIKE, "r2": ALIKE, "r3": OTHER}),
        "PromptLen": function(dict.fromkeys(REQUESTS, prompt)),
        "Salt": function(dict.fromkeys(REQUESTS, "a")),
        "Patience": function(dict(zip(REQUESTS, (1, 0, 2), strict=True))),
        "PageSize": 2,
        "Chunk": 3,
        "Slots": 2,
        "MaxInFlight": 3,
    }
    return Evaluator(load_module(SPECS / "Lifecycle.tla"), constants)
