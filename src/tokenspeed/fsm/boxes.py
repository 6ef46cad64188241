"""A directed graph of labelled boxes, drawn as SVG in layers.

Rule: whoever has a graph says which boxes and arrows there are; here is only how they look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from attrs import frozen

from tokenspeed.fsm import layered
from tokenspeed.fsm.svg import MONO, arrow, document, element, label, text, width

__all__ = ["Link", "Node", "draw"]

_LINE, _PAD, _MARGIN, _TOP = 15.0, 11.0, 26.0, 74.0


@frozen
class Node:
    """A box.

    Attributes:
        lines: its text, the first one bold.
        layer: from 0 at the top.
        tone: `node`, `pill` or `alarm`: plain, tinted, or red.
        initial: something may start here.
        final: nothing leads out.
        tooltip: shown by a viewer that knows how.
    """

    lines: tuple[str, ...]
    layer: int
    tone: str = "node"
    initial: bool = False
    final: bool = False
    tooltip: str = ""


@frozen
class Link:
    """An arrow between two boxes, by number, and its lines of text."""

    source: int
    target: int
    lines: tuple[str, ...]


def draw(nodes: Sequence[Node], links: Sequence[Link], title: str) -> str:
    """The graph under a title."""
    drawing = layered.layout(
        [layered.Box(*_size(node.lines, _PAD), node.layer) for node in nodes],
        [layered.Arrow(link.source, link.target, *_size(link.lines, 0)) for link in links],
    )
    wide = max(drawing.wide + 2 * _MARGIN, width(title, size=17) + 2 * _MARGIN)
    shift = (wide - drawing.wide) / 2
    inside: list[str] = []
    for link, route in zip(links, drawing.routes, strict=True):
        inside += _arrow(link, route, _tone(nodes[link.target]))
    for node, (x, y) in zip(nodes, drawing.boxes, strict=True):
        inside += _box(node, x, y)
    for link, route in zip(links, drawing.routes, strict=True):
        inside += _words(link, route)
    moved = element("g", "\n".join(inside), transform=f"translate({shift:.1f},{_TOP:.1f})")
    return document(
        wide, drawing.high + _TOP + _MARGIN, title, [label(_MARGIN, 34, title, "title ink"), moved]
    )


def _size(lines: Sequence[str], pad: float) -> tuple[float, float]:
    wide = max((width(line, MONO) for line in lines), default=0.0)
    return wide + 2 * pad, _LINE * len(lines) + pad


def _tone(node: Node) -> str:
    return "bad" if node.tone == "alarm" else "muted"


def _box(node: Node, x: float, y: float) -> Iterator[str]:
    """A box and its text; two lines around it if it is final, a point above it if initial."""
    wide, high = _size(node.lines, _PAD)
    left, top = x - wide / 2, y - high / 2
    edge = "bad-line" if node.tone == "alarm" else "accent-line" if node.initial else "line-line"
    shapes = element(
        "rect", x=left, y=top, width=wide, height=high, rx=8,
        class_=f"{node.tone} {edge}", stroke_width=1.6 if node.initial else 1.2,
    )  # fmt: skip
    if node.final:
        shapes += element(
            "rect", x=left + 3, y=top + 3, width=wide - 6, height=high - 6, rx=6,
            class_=f"stroke {edge}", stroke_width=1,
        )  # fmt: skip
    if node.initial:
        shapes += element("circle", cx=x, cy=top - 17, r=4, class_="accent")
        shapes += element(
            "line", x1=x, y1=top - 13, x2=x, y2=top - 7, class_="accent-line stroke"
        ) + arrow(x, top, 0, 1, "accent")
    if node.tooltip:
        shapes = element("title", text(node.tooltip)) + shapes
    yield element("g", shapes)
    for at, line in enumerate(node.lines):
        weight = "bold ink" if at == 0 else "ink"
        yield label(x, top + _PAD / 2 + _LINE * (at + 0.76), line, f"mono {weight}", "middle")


def _arrow(link: Link, route: layered.Route, tone: str) -> Iterator[str]:
    """A smooth line through the route, and its head."""
    first, *inner, last = route.points
    line = "bad-line" if tone == "bad" else "muted-line"
    if link.source == link.target:
        (x, y), (_, below) = route.points
        bulge = x + layered.LOOP
        path = f"M{_at(x, y)}C{_at(bulge, y - 8)} {_at(bulge, below + 8)} {_at(x + 7, below)}"
        yield element("path", d=path, class_=f"stroke {line}")
        yield arrow(x, below, -1, 0, tone)
        return
    way = 1.0 if inner[-1][1] < last[1] else -1.0
    stops = [first, *inner, (last[0], last[1] - 7 * way)]
    path = f"M{_at(*first)}"
    turns = (inner[0][1] - first[1]) * way < 0  # down to its label and up again
    for (x0, y0), (x1, y1) in pairwise(stops):
        if turns:
            bend = (x0, y1) if (x0, y0) == first else (x1, y0)
            path += f"Q{_at(*bend)} {_at(x1, y1)}"
        else:
            middle = (y0 + y1) / 2
            path += f"C{_at(x0, middle)} {_at(x1, middle)} {_at(x1, y1)}"
    yield element("path", d=path, class_=f"stroke {line}")
    yield arrow(*last, 0, way, tone)


def _words(link: Link, route: layered.Route) -> Iterator[str]:
    x, y = route.label
    top = y - _LINE * len(link.lines) / 2
    for at, line in enumerate(link.lines):
        yield label(x, top + _LINE * (at + 0.76), line, "mono small halo ink", "middle")


def _at(x: float, y: float) -> str:
    return f"{x:.1f},{y:.1f}"
