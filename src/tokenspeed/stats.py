"""What the engine says about itself: counters, gauges, and what it is doing.

Rule: tokens unless the name says otherwise; counters only grow.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

__all__ = ["Cleared", "Health", "Stats"]


@frozen(kw_only=True)
class Stats:
    """Counters since the start, and gauges of now. Tokens unless the name says otherwise."""

    requests_running: int
    requests_waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_kept: int
    sessions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prefix_cache_hits_host: int
    host_pages_total: int
    host_pages_free: int
    host_pages_cached: int
    host_stores: int
    host_loads: int
    host_prefetches: int
    host_copies_failed: int
    preemptions: int
    drafts: int
    drafts_accepted: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    requests_finished: Mapping[str, int]
    transitions: Mapping[tuple[str, str, str], int]


@frozen
class Cleared:
    """What clearing the prefix cache did.

    Attributes:
        evicted: pages that are free now.
        held: cached pages that stay, because requests hold them; they can still be found.
    """

    evicted: int
    held: int


@frozen(kw_only=True)
class Health:
    """live: the loop turns. ready: it also takes requests. reason: what it is doing, in words."""

    live: bool
    ready: bool
    reason: str
