"""Draw docs/img/accuracy.svg, the README's picture, from finished runs.

    for how in iid dirichlet:0.5 shards:2; do
        .venv/bin/pocketfed simulate --rounds 100 --partition $how --out runs/picture/$how
    done
    .venv/bin/python docs/img/accuracy.py runs/picture/{iid,dirichlet:0.5,shards:2} > docs/img/accuracy.svg

The runs repeat to the bit on one machine, and so does the picture.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from simulator import SimulationResults
from simulator.report import command_of

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 44, 46
# Of the report's light theme, told apart by their dashes as well.
STROKES = (("#0b6bb5", ""), ("#c2510a", "7 4"), ("#0a8a68", "2 4"))


def picture(runs: list[SimulationResults]) -> str:
    """An SVG with one line per run: validation accuracy by round; test accuracy in the legend."""
    rounds = max(len(run.rounds) for run in runs)
    font = 'font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {font}>',
        f"<title>{escape(title(runs))}</title>",
        "<desc>",
        *(escape(f"{command_of(run.config)}  # model {run.model_sha256}") for run in runs),
        "</desc>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="26" font-size="15" font-weight="600">{escape(title(runs))}</text>',
    ]
    for percent in range(0, 101, 20):
        y = height_of(percent / 100)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dde2e8"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6672">{percent} %</text>')
    for number in range(0, rounds + 1, 10):
        x = place_of(number, rounds)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 24}" text-anchor="middle" fill="#5b6672">{number}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">round</text>')
    for index, (run, (colour, dashes)) in enumerate(zip(runs, STROKES, strict=False)):
        points = " ".join(
            f"{place_of(r.round, rounds):.1f},{height_of(r.accuracy):.1f}" for r in run.rounds if r.accuracy is not None
        )
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{points}" {style}/>')
        y = HEIGHT - BOTTOM - 22 * (len(runs) - index) + 4
        label = f"{run.config.partition}: {run.final_accuracy:.1%} on the test split"
        parts.append(f'<path d="M420 {y}h36" {style}/><text x="466" y="{y + 4}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def title(runs: list[SimulationResults]) -> str:
    """What the runs have in common."""
    config = runs[0].config
    return f"Validation accuracy by round: {config.dataset}, {config.model}, {config.devices} devices"


def place_of(number: int, rounds: int) -> float:
    """Horizontal place of a round."""
    return LEFT + (WIDTH - LEFT - RIGHT) * number / rounds


def height_of(accuracy: float) -> float:
    """Vertical place of an accuracy in 0 .. 1."""
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * accuracy


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    if not 1 <= len(folders) <= len(STROKES):
        sys.exit(f"name 1 to {len(STROKES)} folders of finished runs")
    sys.stdout.write(picture([SimulationResults.read(folder / "results.json") for folder in folders]))
