"""Layers that stay on the device, and plans that have them: what is shared is exactly the rest."""

import numpy as np
import pytest
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import ParameterSpec
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind

TABLE = (
    ParameterSpec(name="body.weight", shape=(2, 3), offset=0),
    ParameterSpec(name="output.weight", shape=(2, 2), offset=6),
    ParameterSpec(name="output.bias", shape=(2,), offset=10),
    ParameterSpec(name="outputs.scale", shape=(1,), offset=12),
)
VECTOR = np.arange(13, dtype=np.float32)


def test_a_module_s_name_stands_for_its_parameters_and_no_other_module_s():
    layers = SharedLayers.of(TABLE, ["output"])
    assert layers.personal == ("output.weight", "output.bias")
    np.testing.assert_array_equal(layers.gather(VECTOR), [0, 1, 2, 3, 4, 5, 12])
    np.testing.assert_array_equal(layers.personal_of(VECTOR), [6, 7, 8, 9, 10, 11])
    assert layers.size == 7
    assert layers.num_parameters == 13


def test_shared_and_personal_coordinates_make_up_the_vector_again():
    layers = SharedLayers.of(TABLE, ["output.bias", "body"])
    other = VECTOR + 100
    put_together = layers.with_personal(layers.with_shared(other, layers.gather(VECTOR)), layers.personal_of(VECTOR))
    np.testing.assert_array_equal(put_together, VECTOR)
    np.testing.assert_array_equal(other, np.arange(13) + 100)


def test_the_shared_table_lays_out_the_vector_that_is_sent():
    layers = SharedLayers.of(TABLE, ["output"])
    sent = layers.gather(VECTOR)
    whole = {p.name: VECTOR[p.offset : p.offset + p.num_elements] for p in TABLE}
    assert [p.name for p in layers.shared] == ["body.weight", "outputs.scale"]
    for p in layers.shared:
        np.testing.assert_array_equal(sent[p.offset : p.offset + p.num_elements], whole[p.name])


def test_without_personal_layers_everything_is_shared_and_nothing_is_copied():
    layers = SharedLayers.of(TABLE, [])
    assert layers.gather(VECTOR) is VECTOR
    assert layers.size == layers.num_parameters == 13
    assert layers.shared == TABLE


@pytest.mark.parametrize("names", [["head"], ["outpu"], ["body.weights"], [""]])
def test_a_layer_that_is_none_is_refused_with_those_that_are(names):
    with pytest.raises(ConfigurationError, match=r"body\.weight"):
        SharedLayers.of(TABLE, names)


def test_a_model_of_personal_layers_alone_has_nothing_to_learn_together():
    with pytest.raises(ConfigurationError, match="nothing to share"):
        SharedLayers.of(TABLE, ["body", "output", "outputs"])


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_gradients_are_what_is_subtracted_and_deltas_what_is_added(algorithm):
    plan = TrainingPlan(algorithm=algorithm, meta=MetaPlan())
    assert plan.update_kind is (UpdateKind.DELTA if algorithm == "reptile" else UpdateKind.GRADIENT)
    assert TrainingPlan().update_kind is UpdateKind.DELTA


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "maml"},
        {"meta": {}},
        {"algorithm": "reptile", "meta": {}, "local_epochs": 2},
        {"algorithm": "reptile", "meta": {}, "max_steps": 2},
        {"algorithm": "fomaml", "meta": {}, "prox_mu": 0.1},
        {"algorithm": "maml", "meta": {}, "adaptive": True},
        {"algorithm": "maml", "meta": {}, "personal": ["output"]},
        {"algorithm": "scaffold", "personal": ["output"]},
        {"algorithm": "fednova", "personal": ["output"]},
        {"algorithm": "maml", "meta": {"inner_steps": 0}},
        {"algorithm": "maml", "meta": {"query_fraction": 1.0}},
        {"algorithm": "maml", "meta": {"meta_learning_rate": float("nan")}},
        {"personal": [""]},
    ],
)
def test_plans_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValidationError):
        TrainingPlan.model_validate(settings)


def test_a_plan_without_meta_learning_says_nothing_of_it_on_the_wire():
    assert not {"meta", "personal"} & set(TrainingPlan().model_dump(mode="json"))
    plan = TrainingPlan(algorithm="reptile", meta=MetaPlan(inner_steps=3), personal=("output",))
    assert TrainingPlan.model_validate_json(plan.model_dump_json()) == plan
