"""What personalisation gives in one run: every device adapts the run's models to its own examples, and is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array
from simulator.cohort.adaptation import AdaptationCurves, Adapted, adapt_devices, adaptation_curves, evaluate_devices
from simulator.cohort.model import BatchedModel
from simulator.days import evenly
from simulator.personalization.distribution import fairness, forgetting, worst_decile
from simulator.personalization.held_out import PER_DEVICE, DeviceTests, device_tests
from simulator.personalization.settings import Adaptation
from simulator.prepare import Fleet
from simulator.results import AdaptationCurve, ForgettingResult, PersonalizationResult

Float64Array = npt.NDArray[np.float64]

MOST_DEVICES: Final = 200
"""So many adapt and are judged: enough to tell shares within a few per cent, and over in seconds."""

SHARES: Final = (0.5, 1.0)
"""Of what a device had learned, that it lays over a new global model."""


@dataclass(frozen=True)
class Models:
    """What devices adapt from.

    Attributes:
        by_round: Round -> the model that it made, float32[d]; the last one, and whichever others are known.
        own: Device -> its personal layers' coordinates of the last model, float32[p]; of the others those of the model.
    """

    by_round: Mapping[int, Float32Array]
    own: Mapping[int, Float32Array]


def rounds_to_look_at(rounds: int) -> tuple[int, ...]:
    """A handful of rounds, ever further apart: the initial model, and some up to the last one.

    Example:
        >>> rounds_to_look_at(60), rounds_to_look_at(2)
        ((0, 8, 15, 30, 60), (0, 1, 2))
    """
    return tuple(sorted({0, *(max(1, -(-rounds // 2**k)) for k in range(4))}))


class PersonalizationStudy:
    """Adapts and judges the devices of one fleet.

    Args:
        model: What weights are weights of.
        fleet: Who adapts, with the examples they train on; attackers, who are no one's loss, are left out.
        adaptation: How.
        threads: Batches of devices that are adapted at the same time; None: one a core. Changes no bit.
    """

    def __init__(
        self, model: BatchedModel, fleet: Fleet, adaptation: Adaptation, *, threads: int | None = None
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._adaptation = adaptation
        self._threads = threads
        attack = fleet.attack
        honest = [d for d in range(len(fleet.parts)) if attack is None or not attack.attacks(d)]
        self._devices = [honest[i] for i in evenly(len(honest), MOST_DEVICES)]
        self._rows = [fleet.parts[d] for d in self._devices]

    def result(self, models: Models) -> PersonalizationResult:
        """Judge the last model on the test split, and how it came about on the validation split.

        Raises:
            NothingToJudge: There is no honest device, or one whose classes were held out nowhere.
        """
        last = max(models.by_round)
        weights = models.by_round[last]
        starts = self._starts(weights, models.own)
        test = self._tests("test")
        curves = self._curves(starts, test).accuracy
        # With layers of their own, what devices start from is no global model any more.
        own, of_all = curves[:, -1], curves[:, 0] if starts is weights else self._accuracy(weights, test)
        validation = self._tests("validation")
        pairs = zip(of_all.tolist(), own.tolist(), strict=True)
        before, after = float(of_all.mean()), float(own.mean())
        return PersonalizationResult(
            global_accuracy=before,
            personalized_accuracy=after,
            personalization_gain=after - before,
            per_device_accuracies={str(d): pair for d, pair in zip(self._devices, pairs, strict=True)},
            devices=len(self._devices),
            examples=PER_DEVICE,
            steps=self._adaptation.steps,
            learning_rate=self._adaptation.learning_rate,
            batch_size=self._adaptation.batch_size,
            personal_layers=self._adaptation.personal_layers,
            worst_decile=worst_decile(of_all, own),
            fairness=fairness(of_all, own),
            curves=self._by_round(models, starts, validation),
            forgetting=self._forgetting(models, validation),
        )

    def _by_round(self, models: Models, starts: Float32Array, validation: DeviceTests) -> tuple[AdaptationCurve, ...]:
        last = max(models.by_round)
        # What devices had in their own layers in earlier rounds is not known any more.
        looked_at = [last] if models.own else sorted({*rounds_to_look_at(last)} & {*models.by_round})
        found = []
        for number in looked_at:
            curves = self._curves(starts if number == last else models.by_round[number], validation)
            found.append(AdaptationCurve(round=number, accuracy=tuple(curves.accuracy.mean(axis=0).tolist())))
        return tuple(found)

    def _forgetting(self, models: Models, validation: DeviceTests) -> tuple[ForgettingResult, ...]:
        last = max(models.by_round)
        if last < 2 or last - 1 not in models.by_round or models.own:
            return ()
        old, new = models.by_round[last - 1], models.by_round[last]
        adapted = np.empty(len(self._devices))
        merged = {share: np.empty(len(self._devices)) for share in SHARES}
        for devices, step, weights in self._adapted(old):
            if step == self._adaptation.steps:
                adapted[devices] = self._accuracy(weights, validation, devices)
                for share, accuracies in merged.items():
                    laid_over = new + np.float32(share) * (weights - old)
                    accuracies[devices] = self._accuracy(laid_over, validation, devices)
        before, renewed = self._accuracy(old, validation), self._accuracy(new, validation)
        return tuple(forgetting(before, adapted, renewed, merged[share], share=share) for share in SHARES)

    def _tests(self, split: Literal["validation", "test"]) -> DeviceTests:
        return device_tests(self._fleet, self._devices, split=split)

    def _starts(self, weights: Float32Array, own: Mapping[int, Float32Array]) -> Float32Array:
        """float32[d] where all start alike, or [n, d] where devices have layers of their own."""
        if not own:
            return weights
        layers = SharedLayers.of(self._model.parameters, self._adaptation.personal_layers)
        return np.stack([layers.with_personal(weights, own[d]) if d in own else weights for d in self._devices])

    def _curves(self, starts: Float32Array, tests: DeviceTests) -> AdaptationCurves:
        return adaptation_curves(
            self._model,
            self._fleet.honest_data,
            self._rows,
            starts,
            tests.rows,
            steps=self._adaptation.steps,
            learning_rate=self._adaptation.learning_rate,
            batch_size=self._adaptation.batch_size,
            seed=self._fleet.population.seed,
            test_data=tests.data,
            threads=self._threads,
        )

    def _adapted(self, starts: Float32Array) -> Iterator[Adapted]:
        return adapt_devices(
            self._model,
            self._fleet.honest_data,
            self._rows,
            starts,
            steps=self._adaptation.steps,
            learning_rate=self._adaptation.learning_rate,
            batch_size=self._adaptation.batch_size,
            seed=self._fleet.population.seed,
        )

    def _accuracy(self, weights: Float32Array, tests: DeviceTests, devices: slice = slice(None)) -> Float64Array:
        found = evaluate_devices(self._model, weights, tests.data, tests.rows[devices])
        shares: Float64Array = found.correct / found.count
        return shares
