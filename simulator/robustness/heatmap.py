"""A heat-map as a standalone SVG: no script, no font, no address; every square says its figure in digits as well."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_SQUARE_W: Final = 76
_SQUARE_H: Final = 24
_LEFT: Final = 186
_PAD: Final = 18
_HEAD: Final = 58
_COLUMN_LETTERS: Final = 10
_LINE_H: Final = 14
_PANEL_GAP: Final = 22
_LEGEND: Final = 52
_LEGEND_W: Final = 240
# About the mean width of a letter; only a very wide font would run out of the picture.
_LETTER_W: Final = 6.6
Colour = tuple[int, int, int]

_INK: Final = "#1b1f24"
_MUTED: Final = "#5b6672"
_EMPTY: Final = (238, 241, 244)
# From bad to good: told apart without red and green, and in grey the ends are the darkest.
_STOPS: Final = (
    (0.0, (140, 45, 4)),
    (0.3, (217, 119, 48)),
    (0.55, (251, 217, 160)),
    (0.75, (200, 223, 236)),
    (1.0, (17, 96, 160)),
)


@dataclass(frozen=True)
class Square:
    """One square.

    Attributes:
        value: Decides its colour; None leaves it empty.
        text: What stands in it.
        words: The same in full, for a pointer that rests on it and for a screen reader.
    """

    value: float | None
    text: str
    words: str


@dataclass(frozen=True)
class Panel:
    """A block of rows under one title; a row is a name and one square for each column.

    Attributes:
        title: Above it.
        rows: Its rows.
        set_apart: How many of the last rows stand a little apart from the others.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[Square]]]
    set_apart: int = 0


@dataclass(frozen=True)
class Scale:
    """What colours mean.

    Attributes:
        low: Value of the worst colour.
        high: Value of the best one; may lie below ``low``.
        words: Beside the legend.
    """

    low: float
    high: float
    words: str

    def place(self, value: float) -> float:
        """Where a value lies from worst (0) to best (1)."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def heatmap(title: str, lead: str, columns: Sequence[str], panels: Sequence[Panel], scale: Scale) -> str:
    """Draw a heat-map.

    Args:
        title: Of the whole.
        lead: One line below it.
        columns: Names of the columns, at least one; long ones are broken after a hyphen or a plus.
        panels: One below the other.
        scale: Of the colours.

    Returns:
        The SVG element.
    """
    width = max(
        _LEFT + _SQUARE_W * len(columns) + _PAD,
        2 * _PAD + round(_LETTER_W * len(lead)),
        _LEFT + _LEGEND_W + 2 * _PAD + round(_LETTER_W * len(scale.words)),
    )
    parts: list[str] = []
    y = _HEAD
    for panel in panels:
        y = _panel(parts, panel, columns, scale, y)
    height = y + _LEGEND
    _legend(parts, scale, y + 14)
    font = 'font-family="system-ui, sans-serif" font-size="13"'
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {font} fill="{_INK}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
            f'<text x="{_PAD}" y="27" font-size="16" font-weight="600">{escape(title)}</text>',
            f'<text x="{_PAD}" y="46" fill="{_MUTED}">{escape(lead)}</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _panel(parts: list[str], panel: Panel, columns: Sequence[str], scale: Scale, top: int) -> int:
    """Draw a panel; returns where the next one begins."""
    heads = [_broken(name) for name in columns]
    y = top + 12 + _LINE_H * max(map(len, heads))
    parts.append(f'<text x="{_PAD}" y="{y - 8}" font-weight="600">{escape(panel.title)}</text>')
    for i, lines in enumerate(heads):
        x = _LEFT + _SQUARE_W * i + _SQUARE_W / 2
        for j, line in enumerate(lines):
            at = y - 8 - _LINE_H * (len(lines) - 1 - j)
            parts.append(f'<text x="{x:g}" y="{at}" font-size="12" text-anchor="middle">{escape(line)}</text>')
    for number, (name, squares) in enumerate(panel.rows):
        if panel.set_apart and number == len(panel.rows) - panel.set_apart:
            y += 6
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        for i, square in enumerate(squares):
            parts.append(_square(square, scale, _LEFT + _SQUARE_W * i, y))
        y += _SQUARE_H
    return y + _PANEL_GAP


def _square(square: Square, scale: Scale, x: int, y: int) -> str:
    colour = _colour(None if square.value is None else scale.place(square.value))
    ink = _MUTED if square.value is None else _ink_on(colour)
    return (
        f'<g><title>{escape(square.words)}</title><rect x="{x}" y="{y}" width="{_SQUARE_W - 2}" '
        f'height="{_SQUARE_H - 2}" rx="3" fill="{_hex(colour)}"/><text x="{x + _SQUARE_W / 2 - 1:g}" y="{y + 16}" '
        f'text-anchor="middle" fill="{ink}">{escape(square.text)}</text></g>'
    )


def _legend(parts: list[str], scale: Scale, y: int) -> None:
    steps, wide = 40, _LEGEND_W
    for i in range(steps):
        colour, x = _hex(_colour(i / (steps - 1))), _LEFT + i * wide / steps
        # A little wider than its step, or the page would shine through between two.
        parts.append(f'<rect x="{x:g}" y="{y}" width="{wide / steps + 0.5:g}" height="12" fill="{colour}"/>')
    parts.append(f'<text x="{_LEFT}" y="{y + 28}" fill="{_MUTED}">{100 * scale.low:.0f} %</text>')
    parts.append(
        f'<text x="{_LEFT + wide}" y="{y + 28}" text-anchor="end" fill="{_MUTED}">{100 * scale.high:.0f} %</text>'
    )
    parts.append(f'<text x="{_LEFT + wide + 14}" y="{y + 11}" fill="{_MUTED}">{escape(scale.words)}</text>')


def _broken(name: str) -> list[str]:
    """Lines that fit over a square, broken after hyphens and pluses."""
    lines = [""]
    for piece in re.findall(r"[^-+]*[-+]|[^-+]+", name):
        if lines[-1] and len(lines[-1]) + len(piece) > _COLUMN_LETTERS:
            lines.append("")
        lines[-1] += piece
    return lines


def _colour(place: float | None) -> Colour:
    """Between the stops, in a straight line."""
    if place is None:
        return _EMPTY
    for (low, first), (high, second) in itertools.pairwise(_STOPS):
        if place <= high:
            part = (place - low) / (high - low)
            red, green, blue = (round(a + part * (b - a)) for a, b in zip(first, second, strict=True))
            return red, green, blue
    return _STOPS[-1][1]


def _ink_on(colour: Colour) -> str:
    """Black or white, whichever stands out more: never less than 4.5 to 1 (WCAG 2, level AA)."""
    linear = [c / 255 / 12.92 if c <= 10 else math.pow((c / 255 + 0.055) / 1.055, 2.4) for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if luminance < 0.179 else "#000000"


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{c:02x}" for c in colour)
