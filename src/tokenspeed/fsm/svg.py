"""Just enough SVG for our diagrams: escaped elements, one palette, light and dark.

Rule: a drawing stands alone: no script, no font file, nothing fetched. Colours are classes, so that
`prefers-color-scheme` decides, and readers that know no media query get the light ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

__all__ = ["MONO", "SANS", "arrow", "document", "element", "label", "printable", "text", "width"]

SANS, MONO = "sans", "mono"
_FACTOR = {SANS: 0.56, MONO: 0.605}  # of the font's size, the mean advance of a letter

_LIGHT = {
    "paper": "#ffffff", "ink": "#1f2430", "muted": "#667085", "line": "#cfd5de", "node": "#f4f6fa",
    "pill": "#e8effc", "accent": "#2f62c9", "bad": "#c0302a", "alarm": "#fdeeec",
}  # fmt: skip
_DARK = {
    "paper": "#14171c", "ink": "#e5e8ed", "muted": "#98a2b3", "line": "#3a414c", "node": "#1d2229",
    "pill": "#1f2c47", "accent": "#86aeff", "bad": "#ff8d84", "alarm": "#3b2020",
}  # fmt: skip


def _rules(palette: dict[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{colour}}}" for name, colour in palette.items())
    lines = "".join(f".{name}-line{{stroke:{colour}}}" for name, colour in palette.items())
    return fills + lines + f".halo{{stroke:{palette['paper']}}}"


_STYLE = (
    'text{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-size:13px}'
    '.mono{font-family:ui-monospace,"SF Mono","DejaVu Sans Mono",monospace;font-size:12px}'
    ".bold{font-weight:600}.title{font-size:16px;font-weight:600}.small{font-size:11px}"
    ".halo{stroke-width:4px;stroke-linejoin:round;paint-order:stroke}"
    ".stroke{fill:none;stroke-width:1.4px}.dash{stroke-dasharray:3 4}"
    f"{_rules(_LIGHT)}@media (prefers-color-scheme:dark){{{_rules(_DARK)}}}"
)


def document(wide: float, high: float, title: str, body: Iterable[str]) -> str:
    """A whole drawing of a size in pixels, under a title that screen readers speak."""
    head = element("title", text(printable(title))) + element("style", escape(_STYLE))
    paper = element("rect", width=wide, height=high, rx=8, class_="paper")
    inside = "\n".join([head, paper, *body])
    return (
        element(
            "svg", f"\n{inside}\n", xmlns="http://www.w3.org/2000/svg", role="img",
            width=wide, height=high, viewBox=f"0 0 {_number(wide)} {_number(high)}",
        ) + "\n"
    )  # fmt: skip


def element(name: str, content: str = "", **attributes: object) -> str:
    """`<name a="1">content</name>`; the content is markup, attributes are escaped.

    `class_` is `class`, and `_` in other names is `-`.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}={quoteattr(_number(value))}"
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{content}</{name}>" if content else f"<{name}{given}/>"


def label(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    """Text at a place, its middle or one end."""
    return element("text", text(words), x=x, y=y, class_=style, text_anchor=anchor)


def arrow(x: float, y: float, dx: float, dy: float, style: str) -> str:
    """The head of an arrow that ends at a place, towards (dx, dy), a unit vector along an axis."""
    back, side = 8, 4
    left = (x - back * dx - side * dy, y - back * dy + side * dx)
    right = (x - back * dx + side * dy, y - back * dy - side * dx)
    points = " ".join(f"{_number(a)},{_number(b)}" for a, b in ((x, y), left, right))
    return element("polygon", points=points, class_=style)


def width(words: str, font: str = SANS, size: float = 13) -> float:
    """How wide a text will be, roughly, in pixels."""
    return _FACTOR[font] * (12 if font == MONO else size) * len(words)


def text(words: str) -> str:
    """Words as markup; a line break stays one."""
    return escape("\n".join(map(printable, words.split("\n"))))


def printable(words: str) -> str:
    """A text on one line, in characters that XML may contain."""
    return "".join(char if char.isprintable() else "\N{MIDDLE DOT}" for char in words)


def _number(value: object) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
