"""How long calls take on this GPU, and what it can copy and multiply. Rule: medians, by events.

A CUDA graph goes through all calls, so that launching costs little; calls with other data, together
more than the L2 holds, find it cold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

__all__ = ["COLD_BYTES", "copy_gb_s", "eager_us", "matmul_tflop_s", "timed_us"]

COLD_BYTES = 300_000_000
"""In rotation: several times the L2 of any GPU so far."""

REPLAYS = 9
GRAPH_US = 2000
"""About what a graph takes; it holds 2 to 64 calls."""


def timed_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call, cold: the median of replays of a graph that goes through all calls."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        once = _event_us(lambda: [call() for call in calls]) / len(calls)
        rounds = max(1, round(min(64.0, max(2.0, GRAPH_US / once)) / len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in list(calls) * rounds:
                call()
        graph.replay()
        times = [_event_us(graph.replay) for _ in range(REPLAYS)]
    return median(times) / (len(calls) * rounds)


def eager_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call, cold, of calls that wait for the device and cannot be captured."""
    for call in calls:
        call()
    return median(_event_us(lambda: [call() for call in calls]) for _ in range(3)) / len(calls)


def _event_us(run: Callable[[], object]) -> float:
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000


def copy_gb_s() -> float:
    """Of a large copy within the device's memory, read and written."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    size = 2 * source.numel() * source.element_size()
    return size / median(_event_us(lambda: target.copy_(source)) for _ in range(REPLAYS)) / 1000


def matmul_tflop_s() -> float:
    """Of a product of two 8192 x 8192 matrices in bfloat16, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * 8192**3 / median(_event_us(lambda: a @ b) for _ in range(REPLAYS)) / 1e6
