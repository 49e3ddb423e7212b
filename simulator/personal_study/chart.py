"""Lines over a common axis as a standalone SVG: no script, no font, no address; told apart by dashes as by colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH, _HEIGHT = 760, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 210, 44, 46
_STROKES: Final = (
    ("#0b6bb5", ""), ("#c2510a", "7 4"), ("#0a8a68", "2 4"), ("#7a4fb5", "9 3 2 3"), ("#8c2d04", "4 2"),
    ("#1b1f24", "1 3"), ("#5b6672", "12 4"), ("#b5480b", "3 6"),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: In the legend.
        points: (x, share from 0 to 1), ascending in x.
    """

    name: str
    points: Sequence[tuple[float, float]]


def chart(title: str, x_label: str, lines: Sequence[Line], *, digits: str = ".0f") -> str:
    """Draw lines of shares, in percent, over an axis that they share.

    Args:
        title: Above them.
        x_label: What the axis counts.
        lines: At least one, each with a point or more.
        digits: Format of the percentages that end each line in the legend.
    """
    xs = sorted({x for line in lines for x, _ in line.points})
    lowest, highest = xs[0], max(xs[-1], xs[0] + 1)
    values = [value for line in lines for _, value in line.points]
    bottom, top = max(0, int(min(values) * 10)) / 10, min(1.0, (int(max(values) * 10) + 1) / 10)

    def across(x: float) -> float:
        return _LEFT + (x - lowest) / (highest - lowest) * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        return _TOP + (top - value) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    font = 'font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" {font}>',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="10" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="26" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    for tenth in range(round(bottom * 10), round(top * 10) + 1):
        y = down(tenth / 10)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e3e7eb"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6672">{tenth * 10} %</text>')
    parts += [
        f'<text x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle" fill="#5b6672">{x:g}</text>'
        for x in xs[:: -(-len(xs) // 11)]
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    for i, line in enumerate(lines):
        colour, dash = _STROKES[i % len(_STROKES)]
        points = " ".join(f"{across(x):.1f},{down(value):.1f}" for x, value in line.points)
        stroke = f'fill="none" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{points}" {stroke}/>')
        y = _TOP + 12 + 22 * i
        parts.append(f'<path d="M{_WIDTH - _RIGHT + 12} {y - 4}h26" {stroke}/>')
        ending = f"{line.name} {100 * line.points[-1][1]:{digits}}"
        parts.append(f'<text x="{_WIDTH - _RIGHT + 44}" y="{y}" font-size="12">{escape(ending)}</text>')
    return "\n".join([*parts, "</svg>", ""])
