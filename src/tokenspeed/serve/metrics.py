"""Prometheus metrics: the engine's counters, and the times that a client sees.

Rule: names are vLLM's with our prefix, so that dashboards port by replacing a word. The engine's
numbers are read when somebody scrapes; only latencies are observed as they happen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenspeed.engine import Engine
from tokenspeed.request import Delta
from tokenspeed.stats import Stats

__all__ = ["Metrics", "Stopwatch"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = stats.pages_total - stats.pages_free - stats.pages_cached
        gauges = {
            "num_requests_running": (stats.requests_running, "requests that hold a slot"),
            "num_requests_waiting": (stats.requests_waiting, "requests that wait"),
            "kv_cache_usage_perc": (used / stats.pages_total, "share of pages held by requests"),
            "kv_pages_total": (stats.pages_total, "pages of the pool"),
            "kv_pages_free": (stats.pages_free, "pages that hold nothing"),
            "kv_host_pages_total": (stats.host_pages_total, "pages of host memory for the cache"),
            "kv_host_pages_free": (stats.host_pages_free, "host pages that hold nothing"),
            "kv_host_pages_cached": (stats.host_pages_cached, "host pages of the prefix cache"),
            "kv_pages_cached": (stats.pages_cached, "pages of the prefix cache held by nobody"),
            "kv_pages_kept": (stats.pages_kept, "of these, pages kept by the wish of a session"),
            "sessions": (stats.sessions, "sessions that are remembered"),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"tokenspeed:{name}", text, value=value)
        counters = {
            "prefix_cache_queries": (stats.prefix_cache_queries, "prompt tokens looked up"),
            "prefix_cache_hits": (stats.prefix_cache_hits, "prompt tokens found"),
            "prefix_cache_hits_host": (stats.prefix_cache_hits_host, "of them, from host memory"),
            "kv_host_stores": (stats.host_stores, "pages copied to host memory"),
            "kv_host_loads": (stats.host_loads, "pages copied back"),
            "kv_host_prefetches": (stats.host_prefetches, "of them, for turns that had not come"),
            "kv_host_copies_failed": (stats.host_copies_failed, "copies that failed, either way"),
            "num_preemptions": (stats.preemptions, "requests that gave their pages up"),
            "spec_decode_num_draft_tokens": (stats.drafts, "tokens guessed"),
            "spec_decode_num_accepted_tokens": (stats.drafts_accepted, "of them, tokens right"),
            "prompt_tokens": (stats.prompt_tokens, "prompt tokens taken"),
            "generation_tokens": (stats.generation_tokens, "tokens generated"),
            "engine_steps": (stats.steps, "steps launched"),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"tokenspeed:{name}", text, value=value)
        yield from _labelled(stats)


def _labelled(stats: Stats) -> Iterator[Metric]:
    finished = CounterMetricFamily(
        "tokenspeed:request_success", "requests that ended", labels=["finished_reason"]
    )
    for reason, count in stats.requests_finished.items():
        finished.add_metric([reason], count)
    yield finished
    moves = CounterMetricFamily(
        "tokenspeed:fsm_transitions", "moves of the lifecycle", labels=["from", "event", "to"]
    )
    for (action, source, to), count in stats.transitions.items():
        moves.add_metric([source, action, to], count)
    yield moves


@final
class Metrics:
    """One application's registry."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.first_token = self._histogram("time_to_first_token", "arrival to first text")
        self.inter_token = self._histogram("inter_token_latency", "between tokens of a sequence")
        self.whole = self._histogram("e2e_request_latency", "arrival to end")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(
            f"tokenspeed:{name}_seconds", text, registry=self._registry, buckets=_SECONDS
        )

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)


@final
class Stopwatch:
    """The times of one sequence, started on arrival."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived_s = self._last_s = time.monotonic()
        self._tokens = 0

    def observe(self, delta: Delta) -> None:
        """A delta has come."""
        now_s = time.monotonic()
        if delta.token_ids and not self._tokens:
            self._metrics.first_token.observe(now_s - self._arrived_s)
        elif delta.token_ids:
            share_s = (now_s - self._last_s) / len(delta.token_ids)
            for _ in delta.token_ids:
                self._metrics.inter_token.observe(share_s)
        self._tokens += len(delta.token_ids)
        self._last_s = now_s
        if delta.finish_reason is not None:
            self._metrics.whole.observe(now_s - self._arrived_s)
