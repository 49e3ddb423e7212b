"""Line charts as SVG text, for the pictures of the documentation: small, and the same from run to run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b6bb5", "#c2510a", "#0a8a68", "#8a3ab9", "#b3123f", "#5b6672")
DASHES = ("", "7 4", "2 4", "10 3 2 3", "5 2", "1 3")


@dataclass(frozen=True)
class Panel:
    """A rectangle with a linear horizontal and a linear or logarithmic vertical axis."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool = True

    def x(self, value: float) -> float:
        """Horizontal place."""
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Vertical place; what lies outside goes to the edge."""
        low, high = map(math.log10, self.y_range) if self.logarithmic else self.y_range
        height = (math.log10(max(value, 1e-300)) if self.logarithmic else value) - low
        return self.top + self.height * (1 - min(max(height / (high - low), 0), 1))

    def frame(self, title: str, x_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
        """Grid, ticks and words."""
        right, bottom = self.left + self.width, self.top + self.height
        parts = [f'<text x="{self.left}" y="{self.top - 12}" font-weight="600">{escape(title)}</text>']
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<path d="M{self.left} {y:.1f}H{right}" stroke="#dde2e8"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6672">{tick:g}</text>')
        for tick in x_ticks:
            x = self.x(tick)
            parts.append(f'<path d="M{x:.1f} {bottom}v4" stroke="#5b6672"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#5b6672">{tick:g}</text>')
        middle = (self.left + right) / 2
        parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(x_label)}</text>')
        return parts

    def line(self, xs: Sequence[float], ys: Sequence[float], index: int) -> str:
        """A curve in the style of this index, up to where it falls below the panel for good."""
        visible = max((i for i, y in enumerate(ys) if y >= self.y_range[0]), default=0) + 1
        xs, ys = xs[:visible], ys[:visible]
        points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline points="{points}" {style(index)}/>'

    def legend(self, names: Sequence[str], x: float, y: float) -> list[str]:
        """Names beside their styles, one below the other, on white."""
        width, height = 50 + 7 * max(map(len, names)), 18 * len(names) + 6
        parts = [f'<rect x="{x - 6}" y="{y - 12}" width="{width}" height="{height}" fill="#ffffff"/>']
        for index, name in enumerate(names):
            at = y + 18 * index
            parts.append(
                f'<path d="M{x} {at}h30" {style(index)}/><text x="{x + 38}" y="{at + 4}">{escape(name)}</text>'
            )
        return parts


def style(index: int) -> str:
    """Stroke of a curve: told apart by its dashes as well as by its colour."""
    return f'fill="none" stroke="{COLOURS[index]}" stroke-width="1.8" stroke-dasharray="{DASHES[index]}"'
