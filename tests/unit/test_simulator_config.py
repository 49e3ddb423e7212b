"""What a simulation is: defaults that work, numbers that fit together, and refusals that name the flag."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError
from simulator.config import SimulationConfig, default_cohort
from simulator.datasets import DATASETS
from simulator.errors import PartitionError
from simulator.personalization.settings import META_RECIPES, Adaptation
from simulator.recipes import RECIPES


def test_nothing_given_is_a_run_that_works():
    config = SimulationConfig.parse({})
    config.check()
    assert config.dataset == "digits"
    assert config.cohort_size == 20


def test_local_training_follows_the_data_set_unless_given():
    fashion = SimulationConfig.parse({"dataset": "fashion-mnist", "learning_rate": None})
    assert fashion.learning_rate == RECIPES["fashion-mnist"]["learning_rate"]
    assert SimulationConfig.parse({"dataset": "fashion-mnist", "learning_rate": 0.7}).learning_rate == 0.7


def test_there_is_a_recipe_for_every_data_set_and_the_defaults_are_that_of_the_default_one():
    assert set(RECIPES) == set(DATASETS)
    assert SimulationConfig.parse({"dataset": "digits"}) == SimulationConfig.parse({}) == SimulationConfig()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"devices": 0}, "--devices.*greater than or equal to 1.*got 0"),
        ({"devices": -3}, "--devices"),
        ({"rounds": 0}, "--rounds"),
        ({"cohort": 0}, "--cohort"),
        ({"devices": 5, "cohort": 6}, "cohort of 6.*there are 5.*--cohort.*--devices"),
        ({"devices": 10, "cohort": 8, "overselect": 1.5}, "--cohort 8 x --overselect 1.5 invites 12.*there are 10"),
        ({"overselect": 0.5}, "--overselect"),
        ({"refill_at": 99}, "--refill-at 99.*at most 20"),
        ({"dropout": 1.0}, "--dropout"),
        ({"dropout": float("nan")}, "--dropout"),
        ({"learning_rate": 0}, "--lr"),
        ({"learning_rate": float("inf")}, "--lr"),
        ({"optimizer": {"learning_rate": -1}}, "--server-lr"),
        ({"prox_mu": -0.1}, "--prox-mu"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**31}, "--seed"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
        ({"staleness": {"max_staleness": -1}}, "--max-staleness"),
        ({"optimizer": {"name": "adam", "momentum": 0.5}}, "^adam has no momentum$"),
        ({"algorithm": "scaffold", "prox_mu": 0.1}, "^prox_mu has no meaning with scaffold; set it to 0"),
        ({"algorithm": "fednova", "prox_mu": 10.0, "learning_rate": 0.1}, "learning_rate . prox_mu < 1"),
        ({"algorithm": "fedprox"}, "--algorithm.*'fedavg'"),
        ({"algorithm": "maml", "prox_mu": 0.1}, "^--personalize maml takes --inner-steps steps.*leave --prox-mu out"),
        ({"algorithm": "maml", "meta": {"inner_steps": 0}}, "--inner-steps"),
        ({"meta": {"inner_steps": 3}}, "^--inner-steps: fedavg does not adapt"),
        ({"algorithm": "maml", "personal": ["output"]}, "^personal layers go with fedavg and reptile, not with maml"),
        ({"adapt_steps": -1}, "--adapt-steps"),
        ({"adapt_learning_rate": 0.1}, "--adapt-lr.*--adapt-steps 5"),
        ({"adapt_steps": 5, "server": "http://127.0.0.1:1"}, "--adapt-steps out with --server"),
        ({"algorithm": "reptile", "server": "http://127.0.0.1:1"}, "--personalize.* out with --server"),
        ({"aggregation": {"rule": "krumm"}}, "--rule.*'multi-krum'"),
        ({"aggregation": {"clip_norm": 0}}, "--clip-norm"),
        ({"aggregation": {"bucket_size": 0}}, "aggregation.bucket_size: "),
        ({"selection": {"floor": 2}}, "--selection-floor"),
        ({"delay_damping": 2}, "--delay-damping"),
        ({"staleness": {"max_staleness": 1, "exponent": -1}}, "--staleness"),
        ({"byzantine": 1.0}, "--byzantine"),
        ({"attack": "alie"}, "--attack alie needs attackers"),
        ({"attack": "alie", "byzantine": 0.2, "server": "http://127.0.0.1:1"}, "--attack is for the simulation's own"),
        ({"model": "transformer"}, "--model.*'softmax', 'mlp', 'cnn', 'byte-mlp' or 'byte-gru'.*got 'transformer'"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_flag(values, words):
    with pytest.raises(ConfigurationError, match=words):
        SimulationConfig.parse(values)


def test_an_unknown_partition_is_refused_with_the_known_ones():
    with pytest.raises(PartitionError, match="iid, dirichlet:ALPHA"):
        SimulationConfig.parse({"partition": "random"})


@given(st.integers(1, 10_000))
def test_the_default_cohort_always_fits(devices):
    assert 1 <= default_cohort(devices) <= devices


@given(st.integers(1, 100), st.floats(1, 10))
def test_over_selection_invites_at_least_the_cohort(cohort, overselect):
    config = SimulationConfig(devices=1000, cohort=cohort, overselect=overselect)
    assert cohort <= config.concurrency <= cohort * overselect + 1


def test_whole_multiples_invite_exactly_as_many():
    assert SimulationConfig(cohort=10, overselect=1.1).concurrency == 11


def test_differences_of_nested_settings_are_named_as_flags_where_there_is_one():
    ours = SimulationConfig(aggregation={"rule": "krum", "bucket_size": 3}, optimizer={"learning_rate": 2.0})
    assert ours.differences(SimulationConfig()) == [
        "--rule krum (the run has mean)",
        "aggregation.bucket_size 3 (the run has 2)",
        "--server-lr 2.0 (the run has None)",
    ]


def test_differences_are_named_as_flags():
    ours, theirs = SimulationConfig(seed=1, learning_rate=0.1), SimulationConfig(seed=2, learning_rate=0.1)
    assert ours.differences(theirs) == ["--seed 1 (the run has 2)"]


# --- personalisation -----------------------------------------------------------------------------------------


def test_meta_learning_counts_its_steps_whatever_the_data_set_says_of_epochs():
    plan = SimulationConfig.parse({"algorithm": "maml"}).plan
    assert plan.local_epochs == 1
    assert plan.meta.inner_steps == 5
    assert SimulationConfig.parse({"algorithm": "reptile", "meta": {"inner_steps": 3}}).plan.meta.inner_steps == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"adapt_steps": 3}, Adaptation(3, 0.5, 8)),
        ({"adapt_steps": 3, "adapt_learning_rate": 0.1, "batch_size": 4}, Adaptation(3, 0.1, 4)),
        ({"personal": ["output"]}, Adaptation(5, 0.5, 8, ("output",))),
        ({"algorithm": "maml", "meta": {"inner_steps": 2}, "learning_rate": 0.3}, Adaptation(2, 0.3, 8)),
        ({"algorithm": "maml", "adapt_steps": 0}, None),
        ({"algorithm": "reptile", "adapt_steps": 9, "learning_rate": 0.3}, Adaptation(9, 0.3, 8)),
    ],
)
def test_devices_adapt_as_they_were_trained_to_unless_told(given, expected):
    assert SimulationConfig.parse(given).adaptation == expected


@pytest.mark.parametrize("dataset", META_RECIPES)
def test_rates_of_meta_learning_follow_the_data_set_unless_given(dataset):
    for algorithm, recipe in META_RECIPES[dataset].items():
        config = SimulationConfig.parse({"dataset": dataset, "algorithm": algorithm})
        assert config.learning_rate == recipe["learning_rate"]
        assert SimulationConfig.parse({"algorithm": algorithm, "learning_rate": 0.123}).learning_rate == 0.123
        kept = SimulationConfig.parse({"algorithm": algorithm, "meta": {"inner_steps": 2}}).plan.meta
        assert kept.inner_steps == 2
        assert kept.meta_learning_rate == recipe.get("meta", {}).get("meta_learning_rate", 0.05)
