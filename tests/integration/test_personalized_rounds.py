"""Personalised clients and the personalised aggregator, joined: what one sends the other takes, and learns from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.datasets import load_digits

from client_sdk import DeviceProfile, PersonalizationConfig, PersonalizedMobileClient
from client_sdk.local_training import flat, named
from client_sdk.personalizer import judge
from client_sdk.protocol.errors import EmptyAggregate
from client_sdk.protocol.meta_learning import META_ALGORITHMS
from client_sdk.runtime import load_program
from server_ref import PersonalizedFederatedAggregator, apply_update
from server_ref.aggregation.integrated_config import (
    CompressionConfig,
    FederatedConfig,
    PrivacyConfig,
    SecurityConfig,
)
from tests.bundles import META_INNER_STEPS, meta_bundle

DEVICES, ROUNDS, RATE, META_RATE = 8, 8, 0.3, 0.3
PLAIN = FederatedConfig(
    compression=CompressionConfig(method="none"),
    privacy=PrivacyConfig(enabled=False, max_grad_norm=100.0),
    security=SecurityConfig(rule="mean", num_byzantine=0, buckets=None),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory):
    return load_program(meta_bundle(tmp_path_factory.mktemp("meta") / "bundle").path, "native")


def examples(device: int):
    """Forty digits of three classes."""
    x, y = load_digits(return_X_y=True)
    rows = np.flatnonzero(np.isin(y, [(device + i) % 10 for i in range(3)]))[device::DEVICES][:40]
    return (x[rows] / 16).astype(np.float32).reshape(-1, 8, 8), y[rows].astype(np.int64)


def fleet(program, **choices):
    config = {"inner_steps": META_INNER_STEPS, "inner_lr": RATE, "meta_lr": META_RATE} | choices
    settings = PersonalizationConfig.model_validate(config)
    return [
        PersonalizedMobileClient(program, DeviceProfile(f"device-{i}"), personalization_config=settings)
        for i in range(DEVICES)
    ]


def start(program):
    manifest = program.manifest
    rng = np.random.default_rng(0)
    return named((0.3 * rng.standard_normal(manifest.num_parameters)).astype(np.float32), manifest)


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_rounds_of_clients_and_aggregator_lead_to_a_model_that_adapts_better(program, algorithm: str):
    aggregator = PersonalizedFederatedAggregator(algorithm, META_INNER_STEPS, RATE, PLAIN, meta_learning_rate=META_RATE)
    model, clients = start(program), fleet(program)
    rate = 1.0 if algorithm == "reptile" else META_RATE

    def loss_after_adaptation() -> float:
        """Of the examples that never adapted, averaged over the devices."""
        found = []
        for i, client in enumerate(clients):
            record = client.personalize(examples(i), global_weights=model, model_version=0).record
            found.append(record.of_personal.loss)
        return float(np.mean(found))

    before = loss_after_adaptation()
    for version in range(ROUNDS):
        updates = [
            client.train_with_personalization(examples(i), model, algorithm, model_version=version)
            for i, client in enumerate(clients)
        ]
        found = aggregator.aggregate_with_personalization(updates, model)
        assert aggregator.rejections == ()
        assert found.kind is aggregator.kind
        expected = np.mean([flat(update.gradients, program.manifest) for update in updates], axis=0)
        np.testing.assert_allclose(flat(found, program.manifest), expected, rtol=1e-5, atol=1e-7)
        model = apply_update(model, found, learning_rate=rate)
    assert loss_after_adaptation() < 0.8 * before


def test_a_client_of_other_choices_than_the_server_s_is_left_out_and_named(program):
    aggregator = PersonalizedFederatedAggregator("maml", META_INNER_STEPS, RATE, PLAIN)
    model = start(program)
    agreed, other_rate, other_steps = (
        fleet(program)[0],
        fleet(program, inner_lr=0.1)[0],
        fleet(program, inner_steps=2)[0],
    )
    honest = agreed.train_with_personalization(examples(0), model, "maml")
    others = [
        dataclasses.replace(client.train_with_personalization(examples(0), model, algorithm), worker_id=f"other-{i}")
        for i, (client, algorithm) in enumerate(
            [(other_rate, "maml"), (other_steps, "maml"), (agreed, "fomaml"), (agreed, "reptile")]
        )
    ]
    found = aggregator.aggregate_with_personalization([*others, honest], model)
    assert [refused.worker_id for refused in aggregator.rejections] == [f"other-{i}" for i in range(4)]
    np.testing.assert_array_equal(flat(found, program.manifest), flat(honest.gradients, program.manifest))
    with pytest.raises(EmptyAggregate):
        aggregator.aggregate_with_personalization(others, model)


def test_the_personal_model_of_a_training_client_is_what_judge_says_of_its_weights(program):
    client, model = fleet(program)[1], start(program)
    assert client.train_with_personalization(examples(1), model, "fomaml") is not None
    own = client.personal_model
    x, y = examples(1)
    assert client.evaluate(x, y) == judge(program, own.weights, x, y)
    np.testing.assert_array_equal(client.infer_with_personalized_model(x).argmax(1) == y, _right(program, own, x, y))


def _right(program, own, x, y):
    found = []
    for at in range(0, len(x), 8):
        batch = np.zeros((8, 8, 8), np.float32)
        batch[: len(x[at : at + 8])] = x[at : at + 8]
        found.append(program.run("infer_b8", own.weights, batch)[0][: len(x[at : at + 8])])
    return np.concatenate(found).argmax(1) == y
