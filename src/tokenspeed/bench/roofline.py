"""A roofline (Williams, Waterman and Patterson, 2009) of what `bench kernels` measured.

Rule: both axes are logarithmic; the roof is what a copy and a matrix product reached in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log10

from tokenspeed.bench.report import Report
from tokenspeed.fsm.svg import document, element, label

__all__ = ["plot", "roofline"]

WIDE, HIGH, LEFT, TOP, RIGHT, BOTTOM = 860, 520, 70, 56, 24, 52
STYLES = ("accent", "bad", "muted", "ink")

Place = Callable[[float, float], tuple[float, float]]


def plot(report: Report) -> str:
    """What a run measured, as SVG; results that are wrong are not in it."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for name, cell in report.cells.items():
        for backend, timing in cell.times.items():
            if report.right(timing):
                reached = cell.flops / timing.us / 1e6
                points.setdefault(backend, {})[name] = cell.flops / cell.bytes, reached
    rate = max(report.matmul_tflop_s, report.matmul_after_tflop_s)
    return roofline(points, report.copy_gb_s, rate, f"mla_decode, bf16: {report.machine}")


def roofline(
    points: Mapping[str, Mapping[str, tuple[float, float]]],
    gb_s: float,
    tflop_s: float,
    title: str,
) -> str:
    """SVG of points[backend][cell] = (FLOP per byte that must move, TFLOP/s reached).

    Args:
        points: both numbers of each point above 0.
        gb_s: of a copy, read and written.
        tflop_s: of a matrix product.
        title: above it.
    """
    ridge = tflop_s * 1000 / gb_s
    every = [point for cells in points.values() for point in cells.values()]
    span = _span([ridge / 10, ridge * 2, *(x for x, _ in every)])
    reach = _span([tflop_s, *(min(y, gb_s * x / 1000) for x, y in every)])

    def place(x: float, y: float) -> tuple[float, float]:
        across = _share(span, x) * (WIDE - LEFT - RIGHT)
        return LEFT + across, HIGH - BOTTOM - _share(reach, y) * (HIGH - TOP - BOTTOM)

    body = [label(LEFT, 30, title, "ink title"), *_axes(place, span, reach)]
    start = max(span[0], reach[0] * 1000 / gb_s)
    roof = [place(start, gb_s * start / 1000), place(ridge, tflop_s), place(span[1], tflop_s)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in roof)
    body.append(element("polyline", points=line, class_="stroke ink-line"))
    body.append(label(roof[1][0] + 8, roof[1][1] - 8, f"{tflop_s:.0f} TFLOP/s", "ink small"))
    body.append(label(roof[0][0] + 8, roof[0][1] - 14, f"{gb_s:.0f} GB/s", "ink small"))
    for i, (backend, cells) in enumerate(points.items()):
        style = STYLES[i % len(STYLES)]
        body.append(label(LEFT + 14, TOP + 16 + 18 * i, f"● {backend}", f"{style} small"))
        for cell, point in cells.items():
            x, y = place(*point)
            told = element("title", f"{cell}: {point[1]:.0f} TFLOP/s")
            body.append(element("circle", told, cx=x, cy=y, r=4, class_=style))
    return document(WIDE, HIGH, title, body)


def _span(values: list[float]) -> tuple[float, float]:
    return min(values) / 1.5, max(values) * 1.5


def _share(span: tuple[float, float], value: float) -> float:
    low, high = map(log10, span)
    return (log10(value) - low) / (high - low)


def _ticks(span: tuple[float, float]) -> list[float]:
    steps = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    return [step for step in steps if span[0] <= step <= span[1]]


def _axes(place: Place, span: tuple[float, float], reach: tuple[float, float]) -> list[str]:
    bottom, left = HIGH - BOTTOM, LEFT
    body = []
    for x in _ticks(span):
        at, _ = place(x, reach[0])
        body.append(element("line", x1=at, x2=at, y1=TOP, y2=bottom, class_="stroke line-line"))
        body.append(label(at, bottom + 18, f"{x:g}", "muted small", "middle"))
    for y in _ticks(reach):
        _, at = place(span[0], y)
        body.append(
            element("line", x1=left, x2=WIDE - RIGHT, y1=at, y2=at, class_="stroke line-line")
        )
        body.append(label(left - 8, at + 4, f"{y:g}", "muted small", "end"))
    middle = (LEFT + WIDE - RIGHT) / 2
    body.append(label(middle, HIGH - 12, "FLOP a byte that must move", "muted small", "middle"))
    body.append(label(LEFT - 8, TOP - 8, "TFLOP/s", "muted small", "end"))
    return body
