"""A global model beside personal ones, each pair judged by one device's own examples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from client_sdk.protocol.program import Float32Array
from simulator.datasets import Split
from simulator.errors import MissingModel, NothingToJudge

Model = nn.Module | Float32Array
"""A module that gives logits ``[B, C]``, or its parameters in its own order as one flat float32 vector."""

Examples = Split | tuple[npt.NDArray[Any], npt.NDArray[Any]] | Iterable[tuple[Tensor, Tensor]]
"""A split, its two arrays, or batches of inputs ``[B, ...]`` and labels ``[B]``, such as a ``DataLoader`` gives."""

_BATCH = 1024


class PersonalizationEvaluator:
    """Judges what personalisation gives.

    Args:
        module: What flat weights are weights of; needed where models are given so. Never changed.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = module

    def evaluate_personalization_gain(
        self,
        global_model: Model,
        personalized_models: Mapping[str, Model],
        test_data_per_device: Mapping[str, Examples],
    ) -> dict[str, Any]:
        """Compare every device's own model with the one of all, by examples that none was trained on.

        An answer is right if the first largest logit is the label's. Both models of a device see the same batches,
        which are gone through once. Modules are judged in evaluation mode, and left in the mode they were in.

        Args:
            global_model: The model of all.
            personalized_models: Device -> its own model; more than are judged do no harm.
            test_data_per_device: Device -> examples that judge both.

        Returns:
            ``global_accuracy`` and ``personalized_accuracy``, means over devices (each counts once, however many
            examples it has), ``personalization_gain``, their difference, and ``per_device_accuracies``, device ->
            (global, personal). Shares from 0 to 1; the gain may be negative.

        Raises:
            NothingToJudge: No device at all, or one without examples.
            MissingModel: A device that is to be judged has no model of its own, or flat weights have no module.
        """
        if not test_data_per_device:
            raise NothingToJudge("no device has examples to judge by")
        missing = [device for device in test_data_per_device if device not in personalized_models]
        if missing:
            raise MissingModel(f"device {missing[0]!r} has examples to judge by, and no personal model")
        found = {
            device: self._accuracies((global_model, personalized_models[device]), examples, device)
            for device, examples in test_data_per_device.items()
        }
        of_all, own = (float(np.mean(column)) for column in zip(*found.values(), strict=True))
        return {
            "global_accuracy": of_all,
            "personalized_accuracy": own,
            "personalization_gain": own - of_all,
            "per_device_accuracies": found,
        }

    def _accuracies(self, models: tuple[Model, Model], examples: Examples, device: str) -> tuple[float, float]:
        right, total = [0, 0], 0
        for x, y in _batches(examples):
            total += len(y)
            for i, model in enumerate(models):
                right[i] += int((self._logits(model, x).argmax(dim=1) == y).sum())
        if not total:
            raise NothingToJudge(f"device {device!r} has no examples to judge by")
        return right[0] / total, right[1] / total

    @torch.no_grad()
    def _logits(self, model: Model, x: Tensor) -> Tensor:
        if isinstance(model, nn.Module):
            with _judging(model):
                return cast("Tensor", model(x))
        if self._module is None:
            raise MissingModel("flat weights say nothing by themselves: give the evaluator the module they are of")
        with _judging(self._module):
            return cast("Tensor", functional_call(self._module, _parameters(self._module, model), (x,)))


@contextlib.contextmanager
def _judging(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, and every part back in its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _parameters(module: nn.Module, weights: Float32Array) -> dict[str, Tensor]:
    """Named parameters as views of flat weights."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    size = sum(shape.numel() for shape in shapes.values())
    if weights.shape != (size,):
        raise MissingModel(f"the module has {size} parameters, the flat weights are {list(weights.shape)}")
    pieces = torch.split(torch.tensor(weights), [shape.numel() for shape in shapes.values()])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _batches(examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(examples, Split):
        examples = (examples.x, examples.y)
    if isinstance(examples, tuple) and len(examples) == 2 and all(isinstance(part, np.ndarray) for part in examples):
        x, y = (torch.tensor(np.asarray(part)) for part in examples)
        yield from zip(torch.split(x, _BATCH), torch.split(y, _BATCH), strict=True)
        return
    for x, y in examples:
        yield torch.as_tensor(x), torch.as_tensor(y)
