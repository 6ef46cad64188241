"""Behaviours and state graphs as pictures, in text, SVG and DOT.

Rule: values in, text out. A picture shows what the values say and leaves out only what it counts.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from attrs import frozen

from tokenspeed.errors import ConfigError
from tokenspeed.fsm import boxes, layered
from tokenspeed.fsm.explain import collides, is_lifecycle, sentences
from tokenspeed.fsm.graph import StateGraph
from tokenspeed.fsm.steps import Step, called, named, spoken
from tokenspeed.fsm.svg import MONO, arrow, document, element, label, printable, width
from tokenspeed.fsm.values import Function, Value, ordered

__all__ = [
    "COLUMNS_MAX", "LIFELINES_MAX", "STATES_MAX", "described", "graph_dot", "graph_svg",
    "refuse_large", "sequence_svg", "sequence_text",
]  # fmt: skip

COLUMNS_MAX = 120
"""Of a diagram in text."""

LIFELINES_MAX = 7
"""Of a diagram; further actors share the one called `others`."""

STATES_MAX = 300
"""Of a state graph in SVG; beyond it nobody sees anything."""

LINES_MAX, LETTERS_MAX = 6, 48
"""Of the text of a state in SVG; what is left out is in its tooltip."""

SYSTEM, OTHERS = "system", "others"

_ENDS = {
    "Submit": ("request", "request"),
    "Admit": ("pages", "request"),
    "Acquire": ("pages", "request"),
    "Schedule": ("request", "steps"),
    "Launch": ("steps", "steps"),
    "Complete": ("steps", "batch"),
    "Publish": ("request", "pages"),
    "Preempt": ("request", "pages"),
    "Abort": ("request", "request"),
    "Release": ("request", "pages"),
    "Evict": ("pages", "pages"),
}
"""Action of our lifecycle -> from whom to whom it goes."""


@frozen
class _Event:
    """A step as a row: who moves whom, and the states that actors are in since."""

    number: int
    label: str
    source: str
    targets: tuple[str, ...]
    states: Mapping[str, str]
    sentence: str
    bad: bool


@frozen
class _Sequence:
    lifelines: tuple[str, ...]
    events: tuple[_Event, ...]


# --- who does what to whom ------------------------------------------------------------------------


def _sequence(steps: Sequence[Step]) -> _Sequence:
    """The lifelines and rows of a behaviour."""
    told = sentences(steps)
    ends = [_ends(before, step) for before, step in pairwise(steps)]
    actors = dict.fromkeys(source for source, _ in ends)
    if steps and is_lifecycle(steps[0].state):
        involved = {name for source, targets in ends for name in (source, *targets)}
        requests = [r for r in ordered(frozenset(steps[0].state["st"].items)) if r in involved]
        actors = dict.fromkeys((*requests, "steps", "pages", *actors))
    lifelines = tuple(actors) or (SYSTEM,)
    if len(lifelines) > LIFELINES_MAX:
        lifelines = (*lifelines[: LIFELINES_MAX - 1], OTHERS)
    place = {name: name if name in lifelines else OTHERS for name in actors}
    events = []
    for number, step in enumerate(steps):
        before = steps[number - 1] if number else None
        source, targets = ends[number - 1] if before else ("", ())
        events.append(
            _Event(
                number,
                called(step) if before else "initially",
                place.get(source, ""),
                tuple(dict.fromkeys(place[name] for name in targets if name in place)),
                _states(before, step, lifelines),
                told[number],
                bool(before and collides(before, step)),
            )
        )
    return _Sequence(lifelines, tuple(events))


def _ends(before: Step, step: Step) -> tuple[str, tuple[str, ...]]:
    """From whom to whom a step goes; to itself if nothing passes."""
    names = [arg for arg in step.args if isinstance(arg, str) and arg]
    if step.action in _ENDS and is_lifecycle(before.state):
        source, target = _ENDS[step.action]
        if all(before.state[name] == step.state[name] for name in ("tab", "page", "plan")):
            source = source if target == "batch" else target  # nothing passes between the two
        if target == "batch":
            work = before.state["inflight"][0]
            return source, tuple(r for r in ordered(frozenset(work.items)) if work[r]["n"] > 0)
        ends = {"request": names[0] if names else ""}
        return ends.get(source, source), (ends.get(target, target),)
    source, *others = names or [SYSTEM]
    return source, tuple(others[:1])


def _states(before: Step | None, step: Step, lifelines: Sequence[str]) -> dict[str, str]:
    """The states that actors are in since a step: of the first variable that has one for each."""
    found: dict[str, str] = {}
    for variable, value in step.state.items():
        if not isinstance(value, Function):
            continue
        old = before.state[variable] if before else None
        for name in lifelines:
            state = value.items.get(name)
            same = isinstance(old, Function) and old.items.get(name) == state
            if isinstance(state, str) and not same:
                found.setdefault(name, state)
    return found


# --- a behaviour as text --------------------------------------------------------------------------


def sequence_text(steps: Sequence[Step], loop: int | None = None) -> str:
    """A row a step, a lifeline an actor: requests, steps and pages, or whom the actions name.

    Args:
        steps: a behaviour, the initial state first.
        loop: the step to which the last one leads back, if the behaviour has no end.

    Returns:
        Lines of at most `COLUMNS_MAX` characters. A state stands behind the actor that entered it;
        a row that collides with something is marked with a cross.
    """
    sequence = _sequence(steps)
    count = len(sequence.lifelines)
    left = 8 + min(30, max((len(event.label) for event in sequence.events), default=0))
    gap = min(18, (COLUMNS_MAX - left) // count)
    at = {name: left + gap * i for i, name in enumerate(sequence.lifelines)}
    head = [" "] * (left + gap * count)
    for name, x in at.items():
        _write(head, x, _cut(name, gap - 1))
    lines = ["".join(head)]
    for event in sequence.events:
        row = [" "] * (left + gap * count)
        _write(row, 0, _bracket(event.number, len(sequence.events) - 1, loop))
        mark = "✗" if event.bad else " "
        _write(row, 2, f"{mark}{event.number:>3} {_cut(event.label, left - 8)}")
        _draw(row, event, at, gap)
        lines.append("".join(row))
    return "\n".join(line.rstrip() for line in lines)


def _draw(row: list[str], event: _Event, at: Mapping[str, int], gap: int) -> None:
    """Lifelines, the arrows of an event across them, and the states behind their actors."""
    for x in at.values():
        row[x] = "│"
    for target in event.targets:
        begin, end = at[event.source], at[target]
        low, high = min(begin, end), max(begin, end)
        for x in range(low + 1, high):
            row[x] = "┼" if row[x] in "│┼" else "─"
    for target in event.targets:
        begin, end = at[event.source], at[target]
        if begin != end:
            row[end] = "│"
            row[end - 1 if begin < end else end + 1] = "►" if begin < end else "◄"
    if event.source:
        row[at[event.source]] = "●"
    for name, state in event.states.items():
        x = at[name] + (2 if row[at[name] + 1] == "◄" else 1)
        crossed = row[x] == "─"
        _write(row, x, f" {_cut(state, gap - 5)}{' ' if crossed else ''}")


def _write(row: list[str], x: int, text: str) -> None:
    row[x : x + len(text)] = text


def _cut(text: str, size: int) -> str:
    """A printable text of at most so many characters."""
    text = printable(text)
    return text if len(text) <= size else text[: size - 1] + "…"


def _bracket(number: int, last: int, loop: int | None) -> str:
    """The mark of steps that repeat for ever."""
    if loop is None or number <= loop:
        return "  "
    return "└─" if number == last else "┌►" if number == loop + 1 else "│ "


# --- a behaviour as SVG ---------------------------------------------------------------------------

_GAP, _LEFT, _TOP, _MARGIN = 136.0, 84.0, 92.0, 24.0
_LINE, _TELLING = 18.0, 54  # height of a line of prose, and its letters


def sequence_svg(steps: Sequence[Step], title: str = "A behaviour", loop: int | None = None) -> str:
    """The same as a drawing, with the sentence of each step beside it.

    Args:
        steps: a behaviour, the initial state first.
        title: what it shows; spoken by screen readers.
        loop: the step to which the last one leads back, if the behaviour has no end.
    """
    sequence = _sequence(steps)
    at = {name: _LEFT + _GAP * (i + 0.3) for i, name in enumerate(sequence.lifelines)}
    last = sequence.lifelines[-1]
    beside = [_short(e) for e in sequence.events if {e.source, *e.targets} == {last}]
    prose = at[last] + max([70.0, *(width(text, MONO) + 40 for text in beside)])
    wide = prose + width("x" * _TELLING) + _MARGIN
    rows, y = [], _TOP
    for event in sequence.events:
        letters = _TELLING - 6 if event.bad else _TELLING  # bold ones are wider
        lines = textwrap.wrap(printable(event.sentence), letters)
        high = max(_LINE * len(lines) + 14, 58 if event.states and event.source else 40)
        rows.append((event, y, high, lines))
        y += high
    body = [label(_MARGIN, 34, title, "title ink")]
    for event, top, high, _ in rows:
        if event.bad:
            body.append(_band(top, high, wide))
    body += [_lifeline(name, x, y) for name, x in at.items()]
    for event, top, _, lines in rows:
        body += _row(event, top, at, prose, lines)
    if loop is not None and loop + 1 < len(rows):
        body += _ever(rows[loop + 1][1] + 24, rows[-1][1] + 24, y + 14, loop)
        y += 14
    return document(wide, y + _MARGIN, title, body)


def _band(top: float, high: float, wide: float) -> str:
    return element("rect", x=8, y=top, width=wide - 16, height=high, rx=6, class_="alarm")


def _lifeline(name: str, x: float, bottom: float) -> str:
    """The head of a lifeline and its line."""
    text = _cut(name, 14)
    half = max(width(text, MONO) / 2 + 12, 30.0)
    box = element(
        "rect", x=x - half, y=_TOP - 38, width=2 * half, height=26, rx=6,
        class_="node line-line", stroke_width=1,
    )  # fmt: skip
    line = element(
        "line", x1=x, y1=_TOP - 12, x2=x, y2=bottom, class_="line-line", stroke_width=1.2
    )
    return line + box + label(x, _TOP - 20.5, text, "mono bold ink", "middle")


def _row(
    event: _Event, top: float, at: Mapping[str, float], prose: float, lines: Sequence[str]
) -> Iterator[str]:
    """Number, arrows, states and sentence of one step."""
    y = top + 24
    tone = "bad" if event.bad else "accent"
    yield label(_LEFT - 28, y + 4, str(event.number), "mono muted", "end")
    for target in event.targets:
        begin, end = at[event.source], at[target]
        if begin != end:
            way = 1 if begin < end else -1
            yield element(
                "line", x1=begin, y1=y, x2=end - 7 * way, y2=y, class_=f"{tone}-line stroke"
            )
            yield arrow(end, y, way, 0, tone)
    if event.source:
        begin = at[event.source]
        yield element("circle", cx=begin, cy=y, r=4, class_=tone)
        yield _action(event, begin, y, [at[name] - begin for name in event.targets])
    for name, state in event.states.items():
        yield _pill(at[name], y + (20 if event.source else 0), _cut(state, 16))
    for number, line in enumerate(lines):
        yield label(prose, y + 4 + number * _LINE, line, f"{'bad bold' if event.bad else 'ink'}")


def _short(event: _Event) -> str:
    return _cut(event.label, 18)


def _action(event: _Event, begin: float, y: float, ways: Sequence[float]) -> str:
    """What happened: on the arrow next to its source, or beside the dot."""
    text, style = _short(event), "mono ink" if event.bad else "mono halo ink"
    if not any(ways):
        return label(begin + 10, y + 4, text, style)
    way = 1 if ways[0] > 0 else -1
    return label(begin + way * _GAP / 2, y - 7, text, style, "middle")


def _pill(x: float, y: float, state: str) -> str:
    """A state on a lifeline."""
    half = width(state, MONO) / 2 + 8
    box = element("rect", x=x - half, y=y - 9, width=2 * half, height=18, rx=9, class_="pill")
    return box + label(x, y + 4, state, "mono small ink", "middle")


def _ever(first: float, last: float, below: float, loop: int) -> Iterator[str]:
    """The bracket around the steps that repeat."""
    x = _LEFT - 68
    yield element("path", d=f"M{x + 12} {last}H{x}V{first}H{x + 8}", class_="stroke accent-line")
    yield arrow(x + 14, first, 1, 0, "accent")
    yield label(x, below, f"and back to step {loop}, for ever", "small accent")


# --- state graphs ---------------------------------------------------------------------------------


def described(state: Mapping[str, Value]) -> str:
    """A state in full, a line a variable."""
    return "\n".join(f"{name} = {spoken(value)}" for name, value in state.items())


def graph_dot(graph: StateGraph, label: Callable[[Mapping[str, Value]], str] = described) -> str:
    """A state graph for Graphviz: `dot -Tsvg`.

    Args:
        label: what a state is called, of any characters; a line break stays one.
    """
    lines = [
        "digraph states {",
        '  node [shape=box style="rounded,filled" fillcolor=white fontname=monospace];',
        "  edge [fontname=monospace];",
    ]
    for at, state in enumerate(graph.states):
        marks = " penwidth=2 color=blue" if at in graph.initial else ""
        marks += " fillcolor=mistyrose color=red" if at in graph.violating else ""
        lines.append(f"  {at} [label={_quoted(label(state))}{marks}];")
    for source, name, target in graph.steps:
        lines.append(f"  {source} -> {target} [label={_quoted(name)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    """A DOT string whose lines are set flush left."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    lines = escaped.split("\n")
    return f'"{lines[0]}"' if len(lines) == 1 else '"' + "".join(f"{x}\\l" for x in lines) + '"'


def refuse_large(states: int) -> None:
    """Refuse a graph that is too large to be drawn here.

    Raises:
        ConfigError: it has more than `STATES_MAX` states.
    """
    if states > STATES_MAX:
        raise ConfigError(
            "--svg", f"{states} states",
            f"at most {STATES_MAX}; write --dot FILE and lay it out with Graphviz, "
            "or make the constants smaller",
        )  # fmt: skip


def graph_svg(graph: StateGraph, title: str = "States") -> str:
    """A state graph in layers by depth, each state with what tells it from the others.

    Raises:
        ConfigError: it has more than `STATES_MAX` states.
    """
    refuse_large(len(graph.states))
    pairs: dict[tuple[int, int], list[str]] = {}
    for source, name, target in graph.steps:
        pairs.setdefault((source, target), []).append(_cut(name, LETTERS_MAX))
    layers = layered.depths(len(graph.states), list(pairs), sorted(graph.initial))
    telling = _telling(graph.states)
    nodes = [
        boxes.Node(
            (str(at), *_lines(state, telling)),
            layers[at],
            tone="alarm" if at in graph.violating else "node",
            initial=at in graph.initial,
            tooltip=described(state),
        )
        for at, state in enumerate(graph.states)
    ]
    links = [boxes.Link(source, target, tuple(names)) for (source, target), names in pairs.items()]
    return boxes.draw(nodes, links, title)


def _telling(states: Sequence[Mapping[str, Value]]) -> list[str]:
    """The variables that are not the same in all states."""
    first, *others = states
    return [name for name in first if any(other[name] != first[name] for other in others)]


def _lines(state: Mapping[str, Value], names: Sequence[str]) -> Iterator[str]:
    """As much of a state as its box has room for."""
    shown = [_line(name, state[name]) for name in names]
    short = [line for line in shown if len(line) <= LETTERS_MAX][:LINES_MAX]
    yield from short
    if len(short) < len(shown):
        yield f"and {len(shown) - len(short)} more"


def _line(name: str, value: Value) -> str:
    if isinstance(value, Function):
        keys = ordered(frozenset(value.items))
        return f"{name}: " + ", ".join(f"{named(k)} {named(value.items[k])}" for k in keys)
    return f"{name} = {spoken(value)}"
