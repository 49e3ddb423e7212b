"""What float32 state does to a long run: weights that stop moving, and sums of squares that overflow without a word.

    python docs/examples/long_run_stagnation.py                  # the table
    python docs/examples/long_run_stagnation.py long_run.svg     # and the picture

Ten workers hold the digits of scikit-learn between them. A linear model on whitened pixels has to reproduce the outputs
of the best one; each round is one gradient of each worker, one exact mean, one step. Only the server's state differs:

1. A weight of 1 that 1000 updates of 3e-8 are added to.
2. Fine-tuning: the best model, rounded to bfloat16, is trained back. In float32 an update below half a unit in the last
   place of its weight is lost, in every round again; float64 master weights go on.
3. Adagrad on a loss in tiny units, that is, with gradients around 1e19. In float32 the sums of their squares overflow,
   one after the other; what is divided by infinity stands still, and nothing is NaN. A power of two mends that.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.exact import AccumulatorPlan, ExactAccumulator
from server_ref.aggregation.rescaling import rescale
from server_ref.aggregation.server_optim import Adagrad, ServerOptimizer, Sgd
from simulator.panels import Panel

ROUNDS = 1000
WORKERS = 10
COMPONENTS = 40
"""Principal components of the pixels that the model sees, scaled to variance 1: every direction is equally steep."""

LEARNING_RATE = 0.01
ADAGRAD_RATE, EPSILON = 0.003, 1e-8
UNIT = 3e19
"""The third experiment's loss is this many times the second one's: gradients of some tenths become some 1e19."""

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Step = Callable[[Float64Array], Float32Array]
"""From a round's mean gradient to the weights of the next."""


@dataclass(frozen=True)
class Task:
    """The digits, divided among the workers, and the outputs to reproduce."""

    inputs: Float64Array
    targets: Float64Array
    shards: list[npt.NDArray[np.int64]]
    best: Float64Array

    @classmethod
    def digits(cls) -> Task:
        """1797 images of 64 pixels, whitened; the targets are those of the least-squares classifier."""
        pixels, labels = load_digits(return_X_y=True)
        left, _, _ = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
        whitened = left[:, :COMPONENTS] * np.sqrt(len(pixels))
        inputs = np.column_stack([whitened, np.ones(len(pixels))])
        best = np.linalg.lstsq(inputs, np.eye(10)[labels])[0]
        shards = np.array_split(np.random.default_rng(0).permutation(len(pixels)), WORKERS)
        return cls(inputs, inputs @ best, shards, best)

    @cached_property
    def _on_devices(self) -> list[tuple[Float32Array, Float32Array]]:
        return [(self.inputs[s].astype(np.float32), self.targets[s].astype(np.float32)) for s in self.shards]

    def gradients(self, weights: Float32Array) -> Iterator[Float32Array]:
        """One of each worker, computed in float32."""
        matrix = weights.reshape(self.best.shape)
        for inputs, targets in self._on_devices:
            yield (inputs.T @ (inputs @ matrix - targets) / np.float32(len(inputs))).ravel()

    def loss(self, weights: Float32Array) -> float:
        """Mean squared difference from the targets, in float64."""
        return float(np.mean((self.inputs @ weights.reshape(self.best.shape).astype(np.float64) - self.targets) ** 2))


def train(task: Task, start: Float32Array, step: Step, unit: float = 1.0) -> list[float]:
    """Losses after each round."""
    plan = AccumulatorPlan.for_bounds(
        max_abs=1024 * unit, max_weight=1, max_count=WORKERS, resolution=max(1e-10 * unit, 1e-12)
    )
    weights, losses = start, []
    for _ in range(ROUNDS):
        total = ExactAccumulator(start.size, plan)
        for gradient in task.gradients(weights):
            total.add(gradient * np.float32(unit), 1)
        weights = step(total.result())
        losses.append(task.loss(weights))
    return losses


# --- the server's state, wrong and right ----------------------------------------------------------------------


def float32_weights(start: Float32Array, rate: float) -> Step:
    """The weights are float32 and are all there is; each step is computed in float64 and rounded."""
    weights = start

    def step(gradient: Float64Array) -> Float32Array:
        nonlocal weights
        weights = (weights - rate * gradient).astype(np.float32)
        return weights

    return step


def float32_adagrad(start: Float32Array, rate: float, *, rescale_every: int | None) -> Step:
    """Adagrad whose sum of squares is float32, kept near 1 by powers of two if asked for."""
    weights, second, exponent, rounds = start.astype(np.float64), np.zeros_like(start), 0, 0

    def step(gradient: Float64Array) -> Float32Array:
        nonlocal weights, second, exponent, rounds
        if rescale_every and rounds % rescale_every == 0:
            incoming = float(np.ldexp(np.abs(gradient).max(), -exponent))
            scaled, shift = rescale({"second": second}, {"second": 2}, incoming=incoming)
            second, exponent = scaled["second"], exponent + shift
        rounds += 1
        scaled_gradient = np.ldexp(gradient, -exponent).astype(np.float32)
        with np.errstate(over="ignore"):
            second = second + scaled_gradient**2
        weights = weights - rate * scaled_gradient / (np.sqrt(second) + np.ldexp(EPSILON, -exponent))
        return weights.astype(np.float32)

    return step


def of_the_server(optimizer: ServerOptimizer, start: Float32Array) -> Step:
    """The optimizers of this project."""
    state = optimizer.initial(start)

    def step(gradient: Float64Array) -> Float32Array:
        nonlocal state
        state = optimizer.step(state, gradient, UpdateKind.GRADIENT)
        return state.weights

    return step


# --- the three experiments ------------------------------------------------------------------------------------


def one_weight(update: float = 3e-8) -> dict[str, list[float]]:
    """How far a weight of 1 has come after each round."""
    start = np.ones(1, np.float32)
    steps = {"float32 weights": float32_weights(start, 1.0), "float64 master weights": of_the_server(Sgd(), start)}
    return {name: [float(step(np.array([-update]))[0]) - 1.0 for _ in range(ROUNDS)] for name, step in steps.items()}


def fine_tuning(task: Task) -> dict[str, list[float]]:
    """Losses while the rounded model is trained back."""
    start = rounded_to_bfloat16(task.best.ravel().astype(np.float32))
    steps = {
        "float32 weights": float32_weights(start, LEARNING_RATE),
        "float64 master weights": of_the_server(Sgd(learning_rate=LEARNING_RATE), start),
    }
    return {name: train(task, start, step) for name, step in steps.items()}


def large_gradients(task: Task) -> dict[str, list[float]]:
    """Losses (in the unit of the second experiment) of Adagrad from scratch."""
    start = np.zeros(task.best.size, np.float32)
    steps = {
        "float32 sums of squares": float32_adagrad(start, ADAGRAD_RATE, rescale_every=None),
        "float32, rescaled": float32_adagrad(start, ADAGRAD_RATE, rescale_every=100),
        "the server's Adagrad": of_the_server(Adagrad(learning_rate=ADAGRAD_RATE, epsilon=EPSILON), start),
    }
    return {name: train(task, start, step, UNIT) for name, step in steps.items()}


def rounded_to_bfloat16(weights: Float32Array) -> Float32Array:
    """Eight bits of significand left."""
    bits = weights.view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def main() -> None:
    """Print the table; draw the picture if a file is named."""
    task = Task.digits()
    moved, tuned, large = one_weight(), fine_tuning(task), large_gradients(task)
    for title, runs in (
        ("a weight of 1, moved by 3e-8 a round: distance", moved),
        ("fine-tuning: loss", tuned),
        ("gradients of 1e19: loss", large),
    ):
        print(title)  # noqa: T201
        for name, values in runs.items():
            print(f"  {name:<36}" + "".join(f"  {values[at - 1]:9.3g} ({at})" for at in (1, 300, 500, ROUNDS)))  # noqa: T201
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(picture(moved, tuned, large))


# --- the picture ----------------------------------------------------------------------------------------------


def picture(moved: dict[str, list[float]], tuned: dict[str, list[float]], large: dict[str, list[float]]) -> str:
    """An SVG with one panel for each experiment."""
    rounds = range(5, ROUNDS + 1, 5)
    x_ticks = range(0, ROUNDS + 1, 250)
    weight = Panel(70, 60, 240, 260, (0, ROUNDS), (0, 4e-5), logarithmic=False)
    parts = weight.frame("A weight of 1 + 3e-8 a round", "round", x_ticks, [1e-5 * k for k in range(5)])
    tuning = Panel(380, 60, 240, 260, (0, ROUNDS), (1e-16, 1e-6))
    parts += tuning.frame("Fine-tuning: loss", "round", x_ticks, [10.0**e for e in range(-16, -5, 2)])
    huge = Panel(690, 60, 240, 260, (0, ROUNDS), (1e-5, 1e-1))
    parts += huge.frame("Adagrad, gradients of 1e19: loss", "round", x_ticks, [10.0**e for e in range(-5, 0)])
    for panel, runs, at in ((weight, moved, 76), (tuning, tuned, 284), (huge, large, 270)):
        for index, values in enumerate(runs.values()):
            parts.append(panel.line(rounds, [values[r - 1] for r in rounds], index))
        parts += panel.legend(list(runs), panel.left + 14, at)
    root = 'viewBox="0 0 960 380" role="img" font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {root}>',
        "<title>What float32 state does to a long run, and what mends it</title>",
        '<rect width="960" height="380" rx="10" fill="#ffffff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


if __name__ == "__main__":
    main()
