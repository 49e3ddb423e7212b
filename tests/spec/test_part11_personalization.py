"""The specification's tests of part 11: personalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from client_sdk.protocol.program import Float32Array, ParameterSpec, Role
from mobile_export.models import build_model
from server_ref.aggregation.server_optim import Adam
from simulator.cohort.adaptation import AdaptationCurves, adaptation_curves
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.languages import write_corpus
from simulator.personal_study.training import Method, Trained, World
from simulator.personalization.held_out import device_tests
from simulator.personalization.operations import operations_of
from simulator.results import PersonalizationResult
from simulator.run import RunOptions, run_simulation
from tests.personal_digits import DigitsWorld
from tests.texts import small_corpus

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
            former = client.personal_model
            new = client.on_global_model(digits.models[version], version)
            assert new is former or new.record.retention is not None, "another one, and measured, or none"
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
                # A linear model stands longer steps than those by default.
                **({"learning_rate": 0.2, "meta": {"meta_learning_rate": 2.0}} if algorithm == "maml" else {}),
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


def _curves(
    trained: Trained,
    weights: Float32Array,
    devices: range,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    per_device: int,
    shifted: int = 0,
) -> AdaptationCurves:
    """Devices adapt, and are judged by examples of the test split: their own, or those of the device so much later."""
    fleet = trained.fleet
    tests = device_tests(fleet, devices, split="test", per_device=per_device)
    return adaptation_curves(
        trained.model,
        fleet.honest_data,
        [fleet.parts[d] for d in devices],
        weights,
        [*tests.rows[shifted:], *tests.rows[:shifted]],
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=1,
        test_data=tests.data,
    )


def test_meta_learning_convergence():
    """Test: Train global model with MAML for 500 rounds.

    Expected: New devices can adapt in fewer steps as training progresses. Devices that never took part start from the
    models of four rounds; what falls is the number of steps after which nine in ten of their answers are right. It has
    a floor, which MAML reaches long before the last round: then it only stays there.
    """
    world = World("meta", "digits", "mlp", "shards:2", devices=20, newcomers=10, cohort=2, batch_size=8)
    maml = Method("maml", "maml", 0.03, Adam(learning_rate=0.003))
    trained = Trained.of(world, maml, rounds=500, seed=1, keep=(0, 20, 500))
    needed, after_all = [], []
    for number in (0, 20, 500):
        curves = _curves(
            trained, trained.by_round[number], range(20, 30), steps=10, learning_rate=0.03, batch_size=8, per_device=50
        )
        accuracy = curves.accuracy.mean(axis=0)
        needed.append(int(np.argmax(accuracy >= 0.85)) if (accuracy >= 0.85).any() else 11)
        after_all.append(accuracy[5])
    assert needed[0] == 11, "an untrained model needs more steps than were taken"
    assert needed[0] >= needed[1] > needed[2]
    assert needed[2] <= 4
    assert after_all[0] < after_all[1] < after_all[2], "as does what the five steps lead to that MAML trains for"


def test_heterogeneous_personalization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Test: Devices with very different data distributions (e.g., English vs. Chinese text).

    Expected: Personalized models specialize correctly, global model maintains both. Each device speaks one of three
    languages: its own model tells the next byte of that better than the global one, and of another language worse,
    while the global model has learned all of them.
    """
    monkeypatch.setenv("POCKETFED_CACHE", str(tmp_path))
    write_corpus(tmp_path / "data" / "manpages", small_corpus(page_bytes=6000, pages=6).texts)
    world = World("three", "manpages", "byte-mlp", "by-group", devices=12, newcomers=3, cohort=6, batch_size=32)
    averaged = Method("averaged", "fedavg", 0.3, Adam(learning_rate=0.01))
    trained = Trained.of(world, averaged, rounds=30, seed=1)
    assert trained.fleet.dataset.group_names == ("en", "de", "zh")
    own, other = (
        _curves(
            trained,
            trained.weights,
            range(12),
            steps=5,
            learning_rate=0.3,
            batch_size=256,
            per_device=100,
            shifted=shifted,
        )
        for shifted in (0, 1)
    )
    nats, nats_elsewhere = (curves.loss_sum / curves.count[:, None] for curves in (own, other))
    test = trained.fleet.dataset.test
    for language in range(3):
        mine = slice(language, None, 3)  # the devices that speak it
        before, after = own.accuracy[mine, 0].mean(), own.accuracy[mine, 5].mean()
        assert after > before, "personal models specialise"
        assert nats[mine, 5].mean() < nats[mine, 0].mean() - 0.03
        shares = np.bincount(test.y[test.groups == language]) / (test.groups == language).sum()
        frequencies = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        assert nats[mine, 0].mean() < frequencies - 0.1, "who knew the language and its bytes' shares would do worse"
    assert nats_elsewhere[:, 5].mean() > nats_elsewhere[:, 0].mean(), "at the cost of the others"
