"""The specification's tests of part 11: personalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from client_sdk.protocol.program import ParameterSpec, Role
from mobile_export.models import build_model
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.personalization.operations import operations_of
from simulator.results import PersonalizationResult
from simulator.run import RunOptions, run_simulation
from tests.personal_digits import DigitsWorld

NEWCOMERS = 15
"""Devices that are looked at together: ten examples of one say little."""


@pytest.fixture(scope="module")
def digits(cnn_bundle: Path) -> DigitsWorld:
    """A global model on its way: after 29 rounds it tells about 60 % of a device's digits right."""
    return DigitsWorld(cnn_bundle, rounds=37)


def test_few_shot_adaptation(digits: DigitsWorld):
    """Test: New device with only 10 training samples fine-tunes global model.

    Expected: After 5 gradient steps, accuracy improves from 60% to 75%. Of the ten eight adapt and two judge; the
    accuracy is that on 80 others of the device's classes, the median over devices.
    """
    found = []
    for seed in range(NEWCOMERS):
        newcomer = digits.newcomer(seed)
        client = digits.client(newcomer)
        model = client.personalize(global_weights=digits.models[29], model_version=29)
        assert (model.record.support_examples, model.record.query_examples, model.record.steps) == (8, 2, 5)
        before = digits.accuracy(digits.models[29], newcomer)
        found.append((before, client.evaluate(*newcomer.later).accuracy))
    before, after = np.median(found, axis=0)
    assert 0.5 < before < 0.7
    assert after >= 0.75
    assert after - before >= 0.15
    # Two examples judge right often enough: hardly anybody is served worse than by the global model.
    assert np.mean([own < of_all for of_all, own in found]) <= 0.2


@pytest.mark.parametrize(("merge", "least"), [("readapt", 0.8), ("interpolate", 0.8), ("replace", -1)])
def test_personalization_forgetting(digits: DigitsWorld, merge: str, least: float):
    """Test: Device fine-tunes, then receives new global model. How much does it forget?

    Expected: Personalized model retains >80% of local adaptations. Of what the devices' models had before the old
    global one, how much is there after a new one came, on examples that none of them has seen; three times, two rounds
    apart. That holds where the new global model is adapted anew, the default, and where what was learned is laid over
    it without any step. Without a personal model most of it is gone.
    """
    found = []
    for seed in range(NEWCOMERS):
        newcomer = digits.newcomer(seed)
        client = digits.client(newcomer, merge=merge, personal_share=1.0)
        old = client.personalize(global_weights=digits.models[31], model_version=31)
        of_old = digits.accuracy(digits.models[31], newcomer)
        gained = digits.accuracy(old.weights, newcomer) - of_old
        left = []
        for version in (33, 35, 37):
            new = client.on_global_model(digits.models[version], version)
            assert new.record.retention is not None
            left.append(digits.accuracy(new.weights, newcomer) - of_old)
        found.append((gained, *left))
    gained, *left = np.mean(found, axis=0)
    assert gained > 0.15
    kept = [each / gained for each in left]
    assert min(kept) > least
    if merge == "replace":
        assert max(kept) < 0.5, "what the test can tell: nothing of one's own is left"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PersonalizationResult]:
    """What personalisation gives 100 devices with two classes each, who hold their pictures askew; 20 rounds."""

    @functools.cache
    def run(algorithm: str) -> PersonalizationResult:
        config = SimulationConfig.parse(
            {
                "algorithm": algorithm, "engine": "cohort", "dataset": "digits", "model": "softmax", "devices": 100,
                "rounds": 20, "partition": "shards:2", "skew": "rotation:45", "adapt_steps": 5,
            }
        )  # fmt: skip
        with RunFolder.begin(tmp_path_factory.mktemp(algorithm) / "run", config) as folder:
            found = run_simulation(folder, RunOptions()).personalization
        assert found is not None
        return found

    return run


def test_maml_personalization(trained: Callable[[str], PersonalizationResult]):
    """Test: Train 100 devices with diverse local data using MAML.

    Expected: Personalized models outperform global model by >5% accuracy. What MAML trains is made to be adapted, and
    by itself a poor model; so the bar is also the global model that plain averaging makes of the same devices and
    rounds.
    """
    maml, averaged = trained("maml"), trained("fedavg")
    assert maml.devices == 100
    assert maml.personalization_gain > 0.05
    assert maml.personalized_accuracy > averaged.global_accuracy + 0.05
    assert maml.personalized_accuracy > 0.9
    # Not only on average.
    assert maml.fairness.losing < 0.1
    assert maml.worst_decile.personalized_accuracy > averaged.worst_decile.global_accuracy + 0.05


def test_reptile_personalization(trained: Callable[[str], PersonalizationResult]):
    """Test: Compare MAML vs. Reptile personalization.

    Expected: Similar accuracy gains, Reptile 2x faster (no double backward). Similar are the models in the end, to
    within five points; what each gained by adapting says little, for Reptile's model is a better one to begin with. How
    fast it is, is told here by operations, which no other process disturbs: those of one device's session.
    """
    maml, reptile = trained("maml"), trained("reptile")
    assert reptile.personalization_gain > 0.05
    assert abs(reptile.personalized_accuracy - maml.personalized_accuracy) < 0.05
    for name in ("softmax", "mlp"):
        model = build_model(name, (1, 8, 8), 10, 0)
        cost = {
            role: operations_of(role, model, _table(model), (1, 8, 8), inner_steps=5, batch_size=8)
            for role in (Role.MAML, Role.FOMAML, Role.REPTILE)
        }
        assert cost[Role.MAML] >= 2 * cost[Role.REPTILE]
        # The query examples' gradient is all that first-order MAML has more of.
        assert cost[Role.REPTILE] < cost[Role.FOMAML] < cost[Role.MAML]


def _table(model: nn.Module) -> tuple[ParameterSpec, ...]:
    """Where each parameter is in a flat vector."""
    sizes = [p.numel() for p in model.parameters()]
    offsets = np.cumsum([0, *sizes])[:-1].tolist()
    return tuple(
        ParameterSpec(name=name, shape=tuple(p.shape), offset=offset)
        for (name, p), offset in zip(model.named_parameters(), offsets, strict=True)
    )
