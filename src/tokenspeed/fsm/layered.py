"""Where the boxes and arrows of a directed graph go: layers from top to bottom, few crossings.

Rule: geometry only, and the same for the same graph. After Sugiyama, Tagawa and Toda ("Methods for
visual understanding of hierarchical system structures", 1981): every arrow is a chain of places in
successive layers, and a label is a place of its own in a layer between two layers of boxes, so that
nothing is written over anything. Places keep their order by the least squares of their distances to
their neighbours, which pooling adjacent violators solves exactly.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise

from attrs import define, field, frozen

__all__ = ["Arrow", "Box", "Drawing", "Route", "depths", "layout", "ranks"]

Point = tuple[float, float]

GAP_X, GAP_Y, LOOP = 20.0, 27.0, 26.0
SWEEPS = 16


@frozen
class Box:
    """A node: its size, and its layer from 0 at the top."""

    wide: float
    high: float
    layer: int


@frozen
class Arrow:
    """An edge between two boxes by number, and the size of its label."""

    source: int
    target: int
    wide: float
    high: float


@frozen
class Route:
    """Where an arrow goes.

    Attributes:
        points: from the border of its source to that of its target; of an arrow from a box to
            itself, where it leaves and where it enters, both on the right side.
        label: the middle of its label.
    """

    points: tuple[Point, ...]
    label: Point


@frozen
class Drawing:
    """A laid out graph: the middles of its boxes, the routes of its arrows, and its size."""

    boxes: tuple[Point, ...]
    routes: tuple[Route, ...]
    wide: float
    high: float


@define(eq=False)
class _Place:
    """A box, or what an arrow takes in a layer: nothing, or its label."""

    layer: int
    left: float
    right: float
    high: float
    box: bool
    x: float = 0.0
    y: float = 0.0
    at: int = 0
    up: list[_Place] = field(factory=list)
    down: list[_Place] = field(factory=list)


def depths(count: int, arrows: Sequence[tuple[int, int]], roots: Sequence[int]) -> list[int]:
    """Layers by the length of the shortest path from the roots; what they do not reach is at 0."""
    following: list[list[int]] = [[] for _ in range(count)]
    for source, target in arrows:
        following[source].append(target)
    found = dict.fromkeys(roots, 0)
    frontier = list(roots)
    for at in frontier:
        for after in following[at]:
            if after not in found:
                found[after] = found[at] + 1
                frontier.append(after)
    return [found.get(at, 0) for at in range(count)]


def ranks(count: int, arrows: Sequence[tuple[int, int]]) -> list[int]:
    """Layers by the length of the longest path, arrows that close a cycle left out."""
    following: list[list[int]] = [[] for _ in range(count)]
    for source, target in arrows:
        following[source].append(target)
    forward: list[tuple[int, int]] = []
    entered, left = set[int](), list[int]()

    def visit(at: int) -> None:
        entered.add(at)
        for after in following[at]:
            if after not in entered:
                visit(after)
            if after in left:
                forward.append((at, after))
        left.append(at)

    for at in range(count):
        if at not in entered:
            visit(at)
    found = [0] * count
    for at in reversed(left):
        for source, target in forward:
            if source == at:
                found[target] = max(found[target], found[at] + 1)
    return found


def layout(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> Drawing:
    """Lay a graph out.

    Args:
        boxes: the nodes, in the order in which they are preferred from left to right.
        arrows: the edges; several may join the same two boxes.
    """
    loops = [0.0] * len(boxes)
    for arrow in arrows:
        if arrow.source == arrow.target:
            loops[arrow.source] = max(loops[arrow.source], LOOP + arrow.wide)
    places = [
        _Place(2 * box.layer, box.wide / 2, box.wide / 2 + loop, box.high, True)
        for box, loop in zip(boxes, loops, strict=True)
    ]
    layers: list[list[_Place]] = [
        [] for _ in range(2 * max((b.layer for b in boxes), default=0) + 2)
    ]
    for place in places:
        layers[place.layer].append(place)
    chains = [_chain(arrow, places, layers) for arrow in arrows]
    _order(layers)
    _spread(layers)
    high = _stack(layers)
    wide = max((place.x + place.right for layer in layers for place in layer), default=0.0)
    ports = _ports(chains)
    routes = tuple(
        _loop(places[a.source], boxes[a.source], a) if not chain else _route(chain, ports, number)
        for number, (a, chain) in enumerate(zip(arrows, chains, strict=True))
    )
    return Drawing(tuple((p.x, p.y) for p in places), routes, wide, high)


def _chain(arrow: Arrow, places: list[_Place], layers: list[list[_Place]]) -> list[_Place]:
    """The places of an arrow from its source to its target; none if they are the same."""
    if arrow.source == arrow.target:
        return []
    source, target = places[arrow.source], places[arrow.target]
    low, high = sorted((source.layer, target.layer))
    between = list(range(low + 1, high)) or [low + 1]
    labelled = between[len(between) // 4 * 2]  # labels are in odd layers, about the middle
    inner = []
    for layer in between:
        wide, tall = (arrow.wide, arrow.high) if layer == labelled else (0.0, 0.0)
        inner.append(_Place(layer, wide / 2, wide / 2, tall, False))
        layers[layer].append(inner[-1])
    chain = [source, *(inner if source.layer <= target.layer else reversed(inner)), target]
    for one, other in pairwise(chain):
        upper, lower = (one, other) if one.layer < other.layer else (other, one)
        upper.down.append(lower)
        lower.up.append(upper)
    return chain


# --- from left to right ---------------------------------------------------------------------------


def _order(layers: list[list[_Place]]) -> None:
    """Sort each layer by the mean of its neighbours, up and down, and keep what crosses least."""
    best, fewest = [list(layer) for layer in layers], -1
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        _number(layers)
        for layer in layers if downwards else reversed(layers):
            means = {id(p): _mean_place(p, p.up if downwards else p.down) for p in layer}
            layer.sort(key=lambda p: means[id(p)])
            _number([layer])
        crossings = sum(map(_crossings, layers))
        if fewest < 0 or crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best
    _number(layers)


def _number(layers: list[list[_Place]]) -> None:
    for layer in layers:
        for at, place in enumerate(layer):
            place.at = at


def _mean_place(place: _Place, neighbours: list[_Place]) -> float:
    return sum(n.at for n in neighbours) / len(neighbours) if neighbours else place.at


def _crossings(layer: list[_Place]) -> int:
    """How many pairs of links to the next layer cross."""
    found, seen = 0, list[int]()
    for place in layer:
        below = sorted(lower.at for lower in place.down)
        found += sum(len(seen) - bisect_right(seen, at) for at in below)
        for at in below:
            insort(seen, at)
    return found


def _spread(layers: list[list[_Place]]) -> None:
    """Give each place its x: near its neighbours, in order, and apart."""
    for layer in layers:
        _apart(layer, [0.0] * len(layer))
    for sweep in range(4 * SWEEPS):
        downwards, settling = sweep % 2 == 0, sweep >= 3 * SWEEPS
        for layer in layers if downwards else reversed(layers):
            _apart(
                layer,
                [
                    _mean_x(place, downwards or settling, not downwards or settling)
                    for place in layer
                ],
            )
    shift = min((place.x - place.left for layer in layers for place in layer), default=0.0)
    for layer in layers:
        for place in layer:
            place.x -= shift


def _mean_x(place: _Place, up: bool, down: bool) -> float:
    """Where a place would like to be; long arrows are kept straight, so they pull more."""
    near = [*(place.up if up else ()), *(place.down if down else ())]
    pulls = [1.0 if place.box or other.box else 16.0 for other in near]
    pulled = sum(pull * other.x for pull, other in zip(pulls, near, strict=True))
    return pulled / sum(pulls) if near else place.x


def _apart(layer: list[_Place], wanted: list[float]) -> None:
    """The x nearest to what is wanted that keep the order and the gaps."""
    gaps = [one.right + GAP_X + other.left for one, other in pairwise(layer)]
    offsets = list(accumulate(gaps, initial=0.0))[: len(layer)]
    blocks: list[tuple[float, int]] = []  # (mean, places) of runs that touch
    for want, by in zip(wanted, offsets, strict=True):
        mean, size = want - by, 1
        while blocks and blocks[-1][0] > mean:
            before_mean, before_size = blocks.pop()
            mean = (mean * size + before_mean * before_size) / (size + before_size)
            size += before_size
        blocks.append((mean, size))
    means = [mean for mean, size in blocks for _ in range(size)]
    for place, mean, by in zip(layer, means, offsets, strict=True):
        place.x = mean + by


# --- from top to bottom, and the arrows -----------------------------------------------------------


def _stack(layers: list[list[_Place]]) -> float:
    """Give each place its y; returns the height."""
    y = -GAP_Y
    for layer in filter(None, layers):
        high = max(place.high for place in layer)
        for place in layer:
            place.y = y + GAP_Y + high / 2
        y += GAP_Y + high
    return y


def _ports(chains: list[list[_Place]]) -> dict[tuple[int, int], float]:
    """(arrow, end) -> x where it meets its box: side by side, in the order of what is there."""
    sides: dict[tuple[int, bool], list[tuple[float, int, int]]] = {}
    for number, chain in enumerate(chains):
        for end, (box, near) in enumerate((chain[:2], chain[-1:-3:-1]) if chain else ()):
            sides.setdefault((id(box), near.layer > box.layer), []).append((near.x, number, end))
    half = {id(place): (place.x, place.left) for chain in chains for place in chain}
    found = {}
    for (box_id, _), ends in sides.items():
        x, left = half[box_id]
        step = min(18.0, 1.6 * left / len(ends))
        for at, (_, number, end) in enumerate(sorted(ends)):
            found[number, end] = x + (at - (len(ends) - 1) / 2) * step
    return found


def _route(chain: list[_Place], ports: dict[tuple[int, int], float], number: int) -> Route:
    first, *inner, last = chain
    begin = _border(first, inner[0], ports[number, 0])
    end = _border(last, inner[-1], ports[number, 1])
    label = max(inner, key=lambda place: place.high)
    return Route((begin, *((p.x, p.y) for p in inner), end), (label.x, label.y))


def _border(box: _Place, near: _Place, x: float) -> Point:
    way = 1 if near.layer > box.layer else -1
    return x, box.y + way * box.high / 2


def _loop(place: _Place, box: Box, arrow: Arrow) -> Route:
    x, by = place.x + box.wide / 2, min(box.high / 4, 10.0)
    middle = (x + LOOP + arrow.wide / 2, place.y)
    return Route(((x, place.y - by), (x, place.y + by)), middle)
