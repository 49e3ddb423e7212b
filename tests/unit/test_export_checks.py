"""A model that cannot become a functional program is refused by the name of what is wrong with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import nn

from client_sdk.protocol.errors import ConfigurationError, PocketfedError, ProgramError
from client_sdk.protocol.program import Role
from mobile_export import UnsupportedModel, export_program
from mobile_export.checks import flat_weights, parameter_table


class Scaled(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function=lambda z: z):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    return model


def with_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].register_buffer("steps", torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("model", "layer", "advice"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "1", "GroupNorm"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), "1", "GroupNorm"),
        (nn.Sequential(nn.Linear(4, 3), nn.InstanceNorm1d(3, track_running_stats=True)), "1", "GroupNorm"),
        (with_buffer(), "0", "steps"),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), "1", "model.eval()"),
        (nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)), "0", "nn.Linear"),
        (nn.ReLU(), "", "no parameters"),
        (nn.ParameterList([torch.empty(0)]), "", "no parameters"),
        (nn.Linear(4, 3).double(), "weight", "float32"),
        (nn.Linear(4, 3).half(), "weight", "float32"),
        (tied(), "1.weight", "0.weight"),
        (frozen(), "0.bias", "frozen"),
        (nn.LazyLinear(3), "weight", "run the model once"),
    ],
)
def test_layers_and_parameters_are_checked_first(model, layer, advice):
    with pytest.raises(UnsupportedModel) as refusal:
        parameter_table(model)
    assert refusal.value.layer == layer
    assert advice in str(refusal.value)
    assert isinstance(refusal.value, ProgramError)


def test_the_table_lays_parameters_out_in_their_own_order():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.GroupNorm(1, 3)).eval()
    table = parameter_table(model)
    assert [(p.name, p.shape, p.offset) for p in table] == [
        ("0.weight", (3, 4), 0),
        ("0.bias", (3,), 12),
        ("2.weight", (3,), 15),
        ("2.bias", (3,), 18),
    ]
    assert torch.equal(flat_weights(model)[12:15], model[0].bias)


def test_dropout_that_draws_nothing_is_no_obstacle():
    parameter_table(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)))
    parameter_table(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).eval())


def export(model: nn.Module, folder, **options) -> None:
    options.setdefault("feature_shape", (4,))
    options.setdefault("batch_sizes", {Role.TRAIN: (2,), Role.EVALUATE: (2,)})
    export_program(model, out_dir=folder / "out", cache_dir=folder / "cache", **options)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Scaled(lambda z: F.dropout(z, 0.5)), "random numbers"),
        (Scaled(lambda z: z + torch.rand_like(z)), "aten.rand_like"),
        (Scaled(lambda z: z if z.sum() > 0 else -z), "torch.where"),
        (Scaled(lambda z: z * float(z.detach().numpy().max())), "cannot be traced"),
        (Scaled(lambda z: z.sum()), "logits"),
        (Scaled(lambda z: z.double()), "float64"),
        (Scaled(lambda z: (z, z)), "tuple"),
        (Scaled(lambda z: z @ torch.zeros(7, 7)), "[1, 4]"),
    ],
)
def test_a_forward_pass_that_cannot_be_exported_is_refused_before_anything_is_written(model, said, tmp_path):
    with pytest.raises(UnsupportedModel) as refusal:
        export(model, tmp_path)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda logits, _y: -logits])
def test_a_loss_must_give_one_value_per_example(loss, tmp_path):
    with pytest.raises(UnsupportedModel, match="one value per example") as refusal:
        export(Scaled(), tmp_path, loss=loss)
    assert refusal.value.layer == "loss"


X = torch.zeros(2, 4)
Y = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_sizes": {}}, "at least one batch size"),
        ({"batch_sizes": {Role.TRAIN: (0,)}}, "at least 1"),
        ({"feature_shape": None}, "example_batch"),
        ({"feature_shape": (0,)}, "positive"),
        ({"num_classes": 4}, "3 logits"),
        ({"constants": {"train_b2": 1}}, "no method's name"),
        ({"constants": {"a b": 1}}, "letters"),
        ({"constants": {"flag": True}}, "bool"),
        ({"example_batch": (X.double(), Y)}, "float32"),
        ({"example_batch": (X, Y.float())}, "int64"),
        ({"example_batch": (X, Y[:1])}, "[B]"),
        ({"example_batch": (torch.zeros(2, 5), Y)}, "contradicts"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said, tmp_path):
    with pytest.raises(ConfigurationError) as refusal:
        export(Scaled(), tmp_path, **options)
    assert said in str(refusal.value)
    assert isinstance(refusal.value, PocketfedError)
    assert not (tmp_path / "out").exists()
