"""Global beside personal models, against numbers that a hand computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from simulator import PersonalizationEvaluator
from simulator.datasets import Split
from simulator.errors import MissingModel, NothingToJudge
from simulator.personalization.distribution import fairness, forgetting, lowest_tenth, worst_decile

ALWAYS_0, ALWAYS_1 = [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]
"""A linear layer's weight [2, 1] and bias [2], flat."""


def linear(values):
    module = nn.Linear(1, 2)
    nn.utils.vector_to_parameters(torch.tensor(values), module.parameters())
    return module


def flat(values):
    return np.array(values, np.float32)


LABELS = {"anna": [0, 0, 0, 1], "ben": [1, 1, 1, 1, 1, 0, 0, 0]}
MODELS = {"anna": ALWAYS_0, "ben": ALWAYS_1, "nobody": ALWAYS_1}
# The model of all says 1: right in 1/4 of anna's and 5/8 of ben's; her own says 0: right in 3/4.
EXPECTED = {
    "global_accuracy": (1 / 4 + 5 / 8) / 2,
    "personalized_accuracy": (3 / 4 + 5 / 8) / 2,
    "personalization_gain": 1 / 4,
    "per_device_accuracies": {"anna": (1 / 4, 3 / 4), "ben": (5 / 8, 5 / 8)},
}


def arrays(labels):
    return np.zeros((len(labels), 1), np.float32), np.array(labels, np.int64)


def loader(labels):
    x, y = map(torch.tensor, arrays(labels))
    return DataLoader(TensorDataset(x, y), batch_size=3)


@pytest.mark.parametrize(
    "examples", [loader, arrays, lambda labels: Split(*arrays(labels)), lambda ls: iter(loader(ls))]
)
@pytest.mark.parametrize(("module", "model"), [(None, linear), (linear([9.0] * 4), flat)])
def test_the_figures_are_those_of_a_hand(examples, module, model):
    found = PersonalizationEvaluator(module).evaluate_personalization_gain(
        model(ALWAYS_1),
        {device: model(values) for device, values in MODELS.items()},
        {device: examples(labels) for device, labels in LABELS.items()},
    )
    assert found == EXPECTED


def test_modules_are_judged_in_evaluation_mode_and_left_as_they_were():
    frozen = nn.Dropout(0.5).eval()
    model = nn.Sequential(linear(ALWAYS_1), nn.Dropout(1.0), frozen)
    found = PersonalizationEvaluator().evaluate_personalization_gain(
        model, {"ben": model}, {"ben": loader(LABELS["ben"])}
    )
    # With every logit dropped all would be class 0.
    assert found["global_accuracy"] == 5 / 8
    assert [part.training for part in model] == [True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_equal_logits_are_an_answer_for_the_first_class():
    found = PersonalizationEvaluator(nn.Linear(1, 2)).evaluate_personalization_gain(
        flat([0] * 4), {"anna": flat([0] * 4)}, {"anna": arrays(LABELS["anna"])}
    )
    assert found["per_device_accuracies"]["anna"] == (3 / 4, 3 / 4)


@pytest.mark.parametrize(
    ("models", "tests", "error", "words"),
    [
        (MODELS, {}, NothingToJudge, "no device"),
        (MODELS, {"anna": []}, NothingToJudge, "'anna' has no examples"),
        ({"ben": ALWAYS_1}, LABELS, MissingModel, "'anna'.*no personal model"),
        ({"anna": ALWAYS_1[1:]}, {"anna": [0]}, MissingModel, r"has 4 parameters.*\[3\]"),
    ],
)
def test_what_cannot_be_judged_is_refused_and_named(models, tests, error, words):
    with pytest.raises(error, match=words):
        PersonalizationEvaluator(nn.Linear(1, 2)).evaluate_personalization_gain(
            flat(ALWAYS_1),
            {device: flat(values) for device, values in models.items()},
            {device: arrays(labels) for device, labels in tests.items()},
        )


def test_flat_weights_need_a_module():
    with pytest.raises(MissingModel, match="give the evaluator the module"):
        PersonalizationEvaluator().evaluate_personalization_gain(
            flat(ALWAYS_1), {"anna": flat(ALWAYS_1)}, {"anna": arrays([0])}
        )


# --- the spread over devices ---------------------------------------------------------------------------------


def test_the_lowest_tenth_is_rounded_up_to_whole_devices():
    assert lowest_tenth(np.array([0.4])) == 0.4
    assert lowest_tenth(np.arange(10) / 10) == 0.0
    assert lowest_tenth(np.arange(11) / 10) == pytest.approx(0.05)


def test_each_model_has_its_own_worst_tenth():
    of_all = np.array([0.1, 0.3] + [0.9] * 18)
    own = np.array([0.8, 0.7] + [0.9] * 16 + [0.4, 0.6])
    found = worst_decile(of_all, own)
    assert found.devices == 2
    assert (found.global_accuracy, found.personalized_accuracy) == pytest.approx((0.2, 0.5))
    assert found.personalization_gain == pytest.approx(0.3)


def test_fairness_tells_spread_and_who_loses():
    of_all, own = np.array([0.2, 0.6, 0.4, 0.8]), np.array([0.6, 0.6, 0.6, 0.6])
    found = fairness(of_all, own)
    assert found.global_stddev == pytest.approx(np.sqrt(0.05))
    assert found.personalized_stddev == 0
    assert found.global_jain == pytest.approx(2.0**2 / (4 * 1.2))
    assert found.personalized_jain == pytest.approx(1)
    assert found.worst_decile_gain == pytest.approx(-0.2)
    assert found.losing == 1 / 4


def test_forgetting_is_what_is_left_of_the_gain_beside_each_ones_own_global_model():
    before, adapted = np.array([0.5, 0.5]), np.array([0.9, 0.7])
    renewed, kept = np.array([0.6, 0.6]), np.array([0.9, 0.75])
    found = forgetting(before, adapted, renewed, kept, share=0.5)
    assert (found.gain_before, found.gain_after) == pytest.approx((0.3, 0.225))
    assert found.kept == pytest.approx(0.75)
    assert forgetting(before, before, renewed, kept, share=0.5).kept is None
