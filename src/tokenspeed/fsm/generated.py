"""GENERATED from specs/Lifecycle.tla by `tokenspeed codegen`. Do not edit: change the spec.

Rule: these are the tables of the spec, in its own words.
"""

from __future__ import annotations

__all__ = [
    "ACTIONS", "EDGES", "GUARDS", "OWNS", "PAGE_KINDS", "SPEC", "SPEC_HASH", "SPEC_VERSION",
    "STATES",
]  # fmt: skip

SPEC = "specs/Lifecycle.tla"
SPEC_HASH = "26ab8f68eb7683c2e7500ac4e48bb5d9f3a508b6035e7f4a67cae58eb1ab6155"
SPEC_VERSION = "2.0.1"

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
ACTIONS = (
    "Submit",
    "Admit",
    "Acquire",
    "Schedule",
    "Complete",
    "Publish",
    "Preempt",
    "Abort",
    "Release",
)
PAGE_KINDS = ("Free", "Exclusive", "Shared")

EDGES: dict[str, tuple[tuple[str, str], ...]] = {
    "Submit": (("New", "Waiting"),),
    "Admit": (
        ("Waiting", "Prefilling"),
        ("Preempted", "Prefilling"),
    ),
    "Acquire": (
        ("Prefilling", "Prefilling"),
        ("Decoding", "Decoding"),
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
    "Submit": ("Fits(r)",),
    "Admit": ("NoneLacks", "SlotFree", "FirstQueued(r)"),
    "Acquire": ("Lacks(r)",),
    "Schedule": ("Wants(r)",),
    "Complete": (),
    "Publish": (),
    "Preempt": ("Starved", "NoneEvictable", "LastRunning(r)", "~Alone(r)", "~Pinned(r)"),
    "Abort": (),
    "Release": ("~Pinned(r)",),
}
"""Action -> the conditions that look beyond the state of the request itself."""
