"""What local privacy costs on the digits: accuracy against epsilon, as a table and a plot (``--svg``).

    .venv/bin/python tests/benchmarks/study_local_privacy.py --svg docs/img/local_privacy.svg

Softmax regression, every device sends one clipped and noised update a round, all of them enter a plain mean. The
settings are fixed; none was chosen by looking at the test split.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from client_sdk.privacy import LocalPrivacyPolicy, noised
from client_sdk.protocol.accountant import noise_for_epsilon
from client_sdk.protocol.clipping import clip_global

CLASSES, FEATURES = 10, 65
ROUNDS, CLIP, DELTA, RATE, LOCAL_STEPS = 5, 1.0, 1e-6, 0.5, 5
EPSILONS = (math.inf, 300.0, 100.0, 30.0, 10.0, 3.0)
FLEETS = (100, 800)
SEEDS = (0, 1)


def trained(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What full-batch gradient descent on a device's examples changes: float32[650]."""
    w = weights.copy()
    for _ in range(LOCAL_STEPS):
        z = x @ w.T
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        w -= RATE * (p - np.eye(CLASSES)[y]).T @ x / len(y)
    return (w - weights).astype(np.float32).reshape(-1)


def accuracy(epsilon: float, devices: int, seed: int) -> float:
    """On 360 held-out digits, after all rounds; epsilon is that of a device's reports together."""
    data, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = np.hstack([data / 16.0, np.ones((len(labels), 1))])[order]
    y = labels[order]
    shards = np.array_split(np.arange(360, len(y)), devices)
    policy = None
    if math.isfinite(epsilon):
        # Gaussian releases compose like one of a root as much noise.
        z = noise_for_epsilon(epsilon, DELTA) * math.sqrt(ROUNDS)
        policy = LocalPrivacyPolicy(clip_norm=CLIP, noise_multiplier=z, delta=DELTA, max_reports=ROUNDS)
    weights = np.zeros((CLASSES, FEATURES))
    for _ in range(ROUNDS):
        total = np.zeros(CLASSES * FEATURES)
        for shard in shards:
            update = trained(weights, x[shard], y[shard])
            total += clip_global(update, CLIP).vector if policy is None else noised(update, policy)
        weights += (total / devices).reshape(weights.shape)
    return float(np.mean((x[:360] @ weights.T).argmax(axis=1) == y[:360]))


def plot(rows: list[tuple[float, list[float]]]) -> str:
    """An SVG of both fleets' accuracy; epsilon falls to the right, on equal steps."""
    left, top, width, height = 60, 20, 520, 240
    at = [left + width * i / (len(rows) - 1) for i in range(len(rows))]
    box = f"0 0 {left + width + 40} {top + height + 60}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif" font-size="12">'
    parts = [head, '<rect width="100%" height="100%" fill="white"/>']
    for tenth in range(0, 11, 2):
        level = top + height * (1 - tenth / 10)
        parts.append(f'<path d="M{left} {level:.0f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{level + 4:.0f}" text-anchor="end">{tenth * 10} %</text>')
    for x, (epsilon, _) in zip(at, rows, strict=True):
        name = "no noise" if math.isinf(epsilon) else f"{epsilon:g}"
        parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{name}</text>')
    parts.append(f'<text x="{left + width / 2:.0f}" y="{top + height + 42}" text-anchor="middle">epsilon of a device'
                 "'s five reports</text>")  # fmt: skip
    for index, (fleet, colour) in enumerate(zip(FLEETS, ("#c44", "#247"), strict=True)):
        points = " ".join(f"{x:.1f},{top + height * (1 - row[1][index]):.1f}" for x, row in zip(at, rows, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + width - 4}" y="{top + 16 + 16 * index}" fill="{colour}" text-anchor="end">'
                     f"{fleet} devices</text>")  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Measure, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="where the plot goes")
    args = parser.parse_args()
    rows = [(e, [statistics.mean(accuracy(e, n, seed) for seed in SEEDS) for n in FLEETS]) for e in EPSILONS]
    print("| epsilon of five reports | " + " | ".join(f"{n} devices" for n in FLEETS) + " |")  # noqa: T201 - the result
    print("|---|" + "---|" * len(FLEETS))  # noqa: T201 - the result
    for epsilon, found in rows:
        print(f"| {'no noise' if math.isinf(epsilon) else f'{epsilon:g}'} | {' | '.join(f'{a:.1%}' for a in found)} |")  # noqa: T201 - the result
    if args.svg is not None:
        args.svg.write_text(plot(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
