"""The specification's tests of part 11: personalisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
