"""Part 8 of the specification: excessive staleness really breaks convergence, where theory says so, and the fixes hold.

Corrected: the specification's demonstration submits one gradient a round and so never aggregates, and its first ten
workers are its ten fresh ones. Here every round is a full buffer through the aggregator, of workers 5 to 10 rounds
late (or a staleness of 10 for all, where the bound is exact).
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client_sdk.protocol.updates import WorkerGradient
from server_ref import AsyncGradientAggregator
from server_ref.aggregation.staleness import largest_stable_staleness, stability_limit

SCRIPT = Path(__file__).resolve().parents[2] / "docs/examples/staleness_divergence.py"


def load_example():
    """The script as a module: what the documentation shows is what is tested."""
    spec = importlib.util.spec_from_file_location("staleness_divergence", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


example = load_example()


def test_staleness_divergence():
    """High staleness, learning rate 0.1, constant weights: the loss falls, oscillates ever wider, and explodes."""
    losses = example.train(example.slow_workers, rounds=500).losses
    start = losses[0]
    assert losses[80:120].max() < 1e-3 * start, "it converges at first"
    peaks = [losses[a : a + 50].max() for a in range(100, 451, 50)]
    assert all(later > 3 * earlier for earlier, later in itertools.pairwise(peaks)), "ever wider"
    turns = np.diff(np.sign(np.diff(losses[150:300])))
    assert np.count_nonzero(turns) >= 10, "it oscillates"
    assert losses.max() > 1e6


@pytest.mark.parametrize("staleness", [3, 10])
@pytest.mark.parametrize(("fraction", "diverges"), [(0.9, False), (0.97, False), (1.03, True), (1.1, True)])
def test_it_diverges_beyond_the_bound_and_not_before_at_the_rate_that_theory_gives(staleness, fraction, diverges):
    step = fraction * stability_limit(staleness)
    losses = example.sweep([fraction], staleness=staleness, rounds=400)[fraction].losses
    assert bool(losses[300:].max() > losses[100:200].max()) is diverges
    assert example.growth(losses) == pytest.approx(example.predicted_growth(step, staleness), abs=5e-4)


@pytest.mark.parametrize(
    ("settings", "final"),
    [
        ({"learning_rate": 0.045}, 1e-6),  # 0.045 * 3.05 = 0.137 < 0.1495
        ({"scale_learning_rate": True}, 0.1),
        ({"staleness_weighting": "polynomial", "staleness_exponent": 1.0}, 0.1),
        ({"staleness_weighting": "polynomial", "staleness_exponent": 2.0}, 50.0),
        ({"delay_damping": 0.305}, 1e-4),
    ],
    ids=["learning rate", "learning rate by staleness", "polynomial 1", "polynomial 2", "momentum correction"],
)
def test_each_fix_converges(settings, final):
    losses = example.train(example.slow_workers, rounds=500, **settings).losses
    assert losses[-1] < final < losses[0]
    assert losses[250:].max() <= losses[:250].max(), "and does not come back"
    assert losses[-1] == losses[400:].min()


def test_divergence_detection_halts_training():
    run = example.train(example.slow_workers, rounds=500, watched=True)
    assert run.halted
    assert run.final < 1.0 * run.losses[0], "before the loss is back where it started"
    converging = example.train(example.slow_workers, rounds=500, watched=True, scale_learning_rate=True)
    assert not converging.halted


def test_weights_that_are_normalised_by_their_own_sum_fix_nothing():
    """Why the denominator is a constant: where all are equally late, normalised polynomial weights cancel."""
    rng = np.random.default_rng(7)
    models = [example.START]
    for version in range(500):
        ages = example.slow_workers(rng)
        weights = np.array([1 / (1 + age) for age in ages])
        gradients = [example.CURVATURES * models[max(0, version - age)] for age in ages]
        models.append(models[-1] - example.LEARNING_RATE * (weights @ gradients) / weights.sum())
    assert max(example.loss_of(model, example.CURVATURES) for model in models) > 1e6


def test_half_of_fresh_workers_tame_the_rest():
    """The specification's own mixture, half fresh and half 5 to 10 late, is stable: the fresh half holds the model."""
    run = example.train(example.half_fresh, rounds=300)
    assert run.final < 1e-6 * run.losses[0]


def test_a_declared_step_size_refuses_the_ages_that_would_diverge():
    step = example.LEARNING_RATE * float(example.CURVATURES.max())
    assert largest_stable_staleness(step) == 4
    aggregator = AsyncGradientAggregator(1, max_staleness=10, step_times_curvature=step)
    for version in range(10):
        aggregator.submit_gradient_async(WorkerGradient("w", {"w": np.zeros(1, np.float32)}, 1, 0.0), version)
    for age in (5, 10):
        late = WorkerGradient("late", {"w": np.ones(1, np.float32)}, 1, 0.0)
        assert aggregator.submit_gradient_async(late, 10 - age) is None
    assert aggregator.rejection_counts == {"stale-report": 2}


def test_the_script_prints_the_table_and_draws_the_picture(tmp_path):
    picture = tmp_path / "picture.svg"
    done = subprocess.run([sys.executable, SCRIPT, picture], capture_output=True, text=True, check=True)
    assert f"stable below eta * lambda = {stability_limit(10):.4f}" in done.stdout
    assert "halted after round" in done.stdout
    drawn, committed = (
        re.findall(r'points="([^"]*)"', path.read_text())
        for path in (picture, SCRIPT.parents[1] / "img/staleness_divergence.svg")
    )
    assert len(drawn) == len(committed) == 5 + 1 + len(example.CASES)
    for new, old in zip(drawn, committed, strict=True):
        np.testing.assert_allclose(points(new), points(old), atol=1.0, err_msg="the committed picture is another one")


def points(text: str) -> list[list[float]]:
    return [[float(number) for number in pair.split(",")] for pair in text.split()]
