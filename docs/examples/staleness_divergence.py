"""Asynchronous training that really diverges, where theory says it does, and what stops it.

    python docs/examples/staleness_divergence.py                          # the table
    python docs/examples/staleness_divergence.py staleness_divergence.svg   # and the picture

The loss is a quadratic (near its minimum every smooth loss looks like one) with a few flat directions, which carry
nearly all of the loss at the start, and a stiff one, where the optimum is all but reached. Every update passes through
AsyncGradientAggregator; each round is one full buffer. All numbers follow from the seed.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.updates import WorkerGradient
from server_ref import AsyncGradientAggregator, DivergenceDetected
from server_ref.aggregation.staleness import stability_limit
from simulator.panels import COLOURS, Panel, style

LEARNING_RATE = 0.1
CURVATURES = np.array([3.05, 1.2, 0.8, 0.5])
"""The stiff direction first: LEARNING_RATE * 3.05 = 0.305 is stable up to a staleness of 4."""
START = np.array([1e-3, 8.0, 8.0, 8.0])
BUFFER = 10
EXPLODED = 1e6

Ages = Callable[[np.random.Generator], Sequence[int]]


def slow_workers(rng: np.random.Generator) -> Sequence[int]:
    """A buffer of workers that are 5 to 10 rounds late."""
    return [int(age) for age in rng.integers(5, 11, BUFFER)]


def half_fresh(rng: np.random.Generator) -> Sequence[int]:
    """A buffer of which half is up to date."""
    return [0] * (BUFFER // 2) + list(slow_workers(rng))[BUFFER // 2 :]


@dataclass(frozen=True)
class Run:
    """Losses of one run, round by round, and why it ended before its time, if it did."""

    losses: npt.NDArray[np.float64]
    halted: bool

    @property
    def best(self) -> float:
        """Smallest loss on the way."""
        return float(self.losses.min())

    @property
    def final(self) -> float:
        """Last loss."""
        return float(self.losses[-1])


def train(
    ages: Ages,
    *,
    rounds: int = 500,
    buffer: int = BUFFER,
    learning_rate: float = LEARNING_RATE,
    curvatures: npt.NDArray[np.float64] = CURVATURES,
    start: npt.NDArray[np.float64] = START,
    watched: bool = False,
    **settings: Any,  # noqa: ANN401 - of the aggregator
) -> Run:
    """Asynchronous training: in every round a full buffer of gradients, one of each of these ages, then one step.

    Stops when the loss exceeds EXPLODED squared, or when the divergence detector halts it.
    """
    rng = np.random.default_rng(7)
    settings = {"staleness_weighting": "constant", **settings}
    aggregator = AsyncGradientAggregator(buffer, 10, **settings)
    models = [start]
    losses = [loss_of(start, curvatures)]
    for version in range(rounds):
        aggregate = None
        for worker, age in enumerate(ages(rng)):
            seen = max(0, version - age)
            gradient = {"w": (curvatures * models[seen]).astype(np.float32)}
            aggregate = aggregator.submit_gradient_async(WorkerGradient(f"worker-{worker}", gradient, 1, 0.0), seen)
        assert aggregate is not None, "the last update fills the buffer"  # noqa: S101 - an example
        models.append(models[-1] - learning_rate * aggregate["w"])
        losses.append(loss_of(models[-1], curvatures))
        if watched:
            try:
                aggregator.observe_loss(losses[-1])
            except DivergenceDetected:
                return Run(np.array(losses), halted=True)
        if losses[-1] > EXPLODED**2:
            break
    return Run(np.array(losses), halted=False)


def loss_of(model: npt.NDArray[np.float64], curvatures: npt.NDArray[np.float64]) -> float:
    """Half the curvature times the squared distance from the optimum, which is 0."""
    return 0.5 * float(curvatures @ model**2)


def sweep(fractions: Sequence[float], *, staleness: int = 10, rounds: int = 600) -> dict[float, Run]:
    """One stiff direction, one staleness for all, and learning rates around the bound."""
    return {
        fraction: train(
            lambda _rng: [staleness] * 2,
            rounds=rounds,
            buffer=2,
            learning_rate=fraction * stability_limit(staleness),
            curvatures=np.ones(1),
            start=np.ones(1),
        )
        for fraction in fractions
    }


def growth(losses: npt.NDArray[np.float64]) -> float:
    """Factor by which the amplitude grows in a round, from the loss's peaks in the last two thirds of the run."""
    tail = losses[len(losses) // 3 :]
    peaks = [i for i in range(1, len(tail) - 1) if tail[i - 1] < tail[i] >= tail[i + 1]]
    slope = np.polyfit(peaks, np.log(tail[peaks]), 1)[0]
    return math.exp(slope / 2)  # the loss is the amplitude's square


def predicted_growth(step: float, staleness: int) -> float:
    """Largest root of ``z - 1 + step * z^-staleness``: what theory says of ``growth``."""
    coefficients = np.zeros(staleness + 2)
    coefficients[0], coefficients[1] = 1, -1
    coefficients[-1] += step
    return float(np.max(np.abs(np.roots(coefficients))))


CASES: dict[str, dict[str, Any]] = {
    "constant weights, learning rate 0.1": {},
    "the same, watched": {"watched": True},
    "learning rate below the bound (0.045)": {"learning_rate": 0.045},
    "learning rate / (1 + mean staleness)": {"scale_learning_rate": True},
    "polynomial weights, exponent 1": {"staleness_weighting": "polynomial", "staleness_exponent": 1.0},
    "momentum correction (damping 0.305)": {"delay_damping": 0.305},
}
"""Who fails, and the fixes, all on the same buffers of slow workers."""


def main() -> None:
    """Print the table; draw the picture if a file is named."""
    fractions = (0.9, 0.98, 1.02, 1.1, 1.2)
    swept = sweep(fractions)
    print(f"staleness 10: stable below eta * lambda = {stability_limit(10):.4f}")  # noqa: T201
    for fraction, run in swept.items():
        step = fraction * stability_limit(10)
        print(  # noqa: T201
            f"  {fraction:.2f} x the bound ({step:.4f}): amplitude x {growth(run.losses):.4f} a round, "
            f"theory {predicted_growth(step, 10):.4f}"
        )
    print(f"staleness 5 to 10, eta * lambda = {LEARNING_RATE * CURVATURES.max():.3f}:")  # noqa: T201
    runs = {name: train(slow_workers, **settings) for name, settings in CASES.items()}
    for name, run in runs.items():
        end = f"halted after round {len(run.losses) - 1}" if run.halted else f"{len(run.losses) - 1} rounds"
        print(f"  {name:<40} best loss {run.best:9.3g}, last {run.final:9.3g}, {end}")  # noqa: T201
    mixed = train(half_fresh)
    print(f"  {'constant weights, but half are fresh':<40} best loss {mixed.best:9.3g}, last {mixed.final:9.3g}")  # noqa: T201
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(picture(swept, runs))


# --- the picture ---------------------------------------------------------------------------------------------


def picture(swept: dict[float, Run], runs: dict[str, Run]) -> str:
    """An SVG: losses around the bound, growth beside theory, the failure and its fixes."""
    bound = stability_limit(10)
    around = Panel(60, 60, 380, 240, (0, 600), (1e-6, 1e8))
    parts = around.frame("Staleness 10: loss by round", "round", range(0, 601, 100), [10.0**e for e in range(-6, 9, 2)])
    for index, run in enumerate(swept.values()):
        parts.append(around.line(range(len(run.losses)), run.losses.tolist(), index))
    parts += around.legend([f"{f:.2f} x the bound" for f in swept], 76, 76)

    steps = np.linspace(0.11, 0.19, 33)
    measured = sweep([float(s) / bound for s in steps[::4]])
    growing = Panel(540, 60, 380, 240, (0.11, 0.19), (0.96, 1.02), logarithmic=False)
    parts += growing.frame(
        "Growth of the amplitude in a round", "learning rate x curvature", (0.11, 0.13, 0.15, 0.17, 0.19),
        (0.96, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02),
    )  # fmt: skip
    x = growing.x(bound)
    parts.append(f'<path d="M{x:.1f} 60V300" stroke="#b3123f" stroke-width="1.5"/>')
    parts.append(f'<text x="{x - 6:.1f}" y="76" text-anchor="end" fill="#b3123f">2 sin(π / 42) = {bound:.4f}</text>')
    parts.append(growing.line(steps.tolist(), [predicted_growth(float(s), 10) for s in steps], 0))
    for fraction, run in measured.items():
        place = f'cx="{growing.x(fraction * bound):.1f}" cy="{growing.y(growth(run.losses)):.1f}"'
        parts.append(f'<circle {place} r="4" fill="#c2510a"/>')
    parts.append(f'<path d="M560 106h30" {style(0)}/><text x="598" y="110">theory</text>')
    parts.append('<circle cx="575" cy="124" r="4" fill="#c2510a"/><text x="598" y="128">measured</text>')

    fixed = Panel(60, 400, 860, 260, (0, 500), (1e-6, 1e10))
    title = "Staleness 5 to 10, learning rate x curvature = 0.305: what diverges, and what stops it"
    parts += fixed.frame(title, "round", range(0, 501, 50), [10.0**e for e in range(-6, 11, 2)])
    for index, run in enumerate(runs.values()):
        parts.append(fixed.line(range(len(run.losses)), run.losses.tolist(), index))
    halted = runs["the same, watched"].losses
    place = f'cx="{fixed.x(len(halted) - 1):.1f}" cy="{fixed.y(halted[-1]):.1f}"'
    parts.append(f'<circle {place} r="5" fill="{COLOURS[1]}"/>')
    parts += fixed.legend(list(runs), 76, 418)
    root = 'viewBox="0 0 960 710" role="img" font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {root}>',
        "<title>Delayed gradient descent diverges where theory says it does</title>",
        '<rect width="960" height="710" rx="10" fill="#ffffff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


if __name__ == "__main__":
    main()
