"""GENERATED from specs/Lifecycle.tla by `tokenspeed codegen`. Do not edit: change the spec.

Rule: these are the tables of the spec, in its own words.
"""

from __future__ import annotations

__all__ = ["ACTIONS", "EDGES", "GUARDS", "OWNS", "PAGE_KINDS", "SPEC", "SPEC_HASH", "STATES"]

SPEC = "specs/Lifecycle.tla"
SPEC_HASH = "7a4771e342183257a0a1933fbadc2fd60d3c4564f858f7b810822413f20fff4f"

STATES = (
    "New",
    "Waiting",
    "Prefilling",
    "Decoding",
    "Preempted",
    "Finishing",
    "Aborting",
    "Finished",
    "Aborted",
)
ACTIONS = ("Submit", "Admit", "Schedule", "Complete", "Publish", "Preempt", "Abort", "Release")
PAGE_KINDS = ("Free", "Exclusive", "Shared")

EDGES: dict[str, tuple[tuple[str, str], ...]] = {
    "Submit": (("New", "Waiting"),),
    "Admit": (
        ("Waiting", "Prefilling"),
        ("Preempted", "Prefilling"),
    ),
    "Schedule": (
        ("Prefilling", "Prefilling"),
        ("Decoding", "Decoding"),
    ),
    "Complete": (
        ("Prefilling", "Prefilling"),
        ("Prefilling", "Decoding"),
        ("Prefilling", "Finishing"),
        ("Decoding", "Decoding"),
        ("Decoding", "Finishing"),
        ("Finishing", "Finishing"),
        ("Aborting", "Aborting"),
    ),
    "Publish": (
        ("Prefilling", "Prefilling"),
        ("Decoding", "Decoding"),
        ("Finishing", "Finishing"),
    ),
    "Preempt": (
        ("Prefilling", "Preempted"),
        ("Decoding", "Preempted"),
    ),
    "Abort": (
        ("Waiting", "Aborted"),
        ("Prefilling", "Aborting"),
        ("Decoding", "Aborting"),
        ("Preempted", "Aborted"),
    ),
    "Release": (
        ("Finishing", "Finished"),
        ("Aborting", "Aborted"),
    ),
}
"""Action -> its moves, (from, to)."""

OWNS: dict[str, tuple[str, ...]] = {
    "New": (),
    "Waiting": (),
    "Prefilling": ("Slot", "Pages"),
    "Decoding": ("Slot", "Pages"),
    "Preempted": (),
    "Finishing": ("Slot", "Pages"),
    "Aborting": ("Slot", "Pages"),
    "Finished": (),
    "Aborted": (),
}
"""State -> what a request in it holds."""

GUARDS: dict[str, tuple[str, ...]] = {
    "Submit": (),
    "Admit": ("~Starved", "SlotFree", "FirstQueued(r)"),
    "Schedule": ("Wants(r)", "FirstWants(r)"),
    "Complete": (),
    "Publish": (),
    "Preempt": ("Starved", "NoneEvictable", "Youngest(r)", "~Alone(r)", "~Pinned(r)"),
    "Abort": (),
    "Release": ("~Pinned(r)",),
}
"""Action -> the conditions that look beyond the state of the request itself."""
