"""Ten workers, three of which collude: what the mean makes of them, and what robust rules do.

python docs/examples/byzantine_workers.py
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import numpy as np

from client_sdk.protocol.errors import TooManyByzantine
from server_ref import ByzantineRobustAggregator, GradientAggregator, WorkerGradient

random = np.random.default_rng(0)
model = {"w": np.zeros(1000, np.float32)}
truth = random.standard_normal(1000)


def worker(name: str, direction: np.ndarray) -> WorkerGradient:
    """A gradient with some noise of the worker's own."""
    noisy = direction + 0.3 * random.standard_normal(1000)
    return WorkerGradient(name, {"w": noisy.astype(np.float32)}, num_samples=100, timestamp=0.0)


workers = [worker(f"honest-{i}", truth) for i in range(7)] + [worker(f"colluder-{i}", -5 * truth) for i in range(3)]


def cosine(update: np.ndarray) -> float:
    """1: the right way; -1: the opposite."""
    return float(update @ truth / np.linalg.norm(update) / np.linalg.norm(truth))


mean = GradientAggregator().aggregate(workers, model)
print(f"mean               {cosine(mean['w']):+.2f}")  # noqa: T201
for rule in ("krum", "multi-krum", "median", "trimmed-mean"):
    found = ByzantineRobustAggregator(rule, num_byzantine=3).aggregate_byzantine_robust(workers, model)
    excluded = [workers[i].worker_id for i in found.measurements.get("excluded", [])]
    caught = sum(name.startswith("colluder") for name in excluded)
    print(f"{rule:<18} {cosine(found['w']):+.2f}" + (f"  colluders left out: {caught}" if excluded else ""))  # noqa: T201

# A rule that cannot stand so many says so, and what would have to change.
try:
    ByzantineRobustAggregator("krum", num_byzantine=4).aggregate_byzantine_robust(workers, model)
except TooManyByzantine as refusal:
    print(refusal)  # noqa: T201
