"""What personalisation gives in one run: every device adapts the run's models to its own examples, and is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array
from simulator.cohort.adaptation import AdaptationCurves, Adapted, adapt_devices, adaptation_curves, evaluate_devices
from simulator.cohort.model import BatchedModel
from simulator.personalization.distribution import fairness, forgetting, worst_decile
from simulator.personalization.held_out import PER_DEVICE, DeviceTests, SplitName, device_tests, judged_devices
from simulator.personalization.models import Models, rounds_to_look_at
from simulator.personalization.settings import Adaptation
from simulator.prepare import Fleet
from simulator.results import AdaptationCurve, ForgettingResult, PersonalizationResult

Float64Array = npt.NDArray[np.float64]

SHARES: Final = (0.5, 1.0)
"""Of what a device had learned, that it lays over a new global model."""


class PersonalizationStudy:
    """Adapts and judges the devices of one fleet.

    Args:
        model: What weights are weights of.
        fleet: Who adapts, with the examples they train on.
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
        self._devices = judged_devices(fleet)
        self._rows = [fleet.parts[d] for d in self._devices]

    def result(self, models: Models, *, of_rounds: int) -> PersonalizationResult:
        """Judge the last model on the test split, and how it came about on the validation split.

        Args:
            models: That the run made.
            of_rounds: That it was to make.

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
            curves=self._by_round(models, of_rounds, starts, validation),
            forgetting=self._forgetting(models, validation),
        )

    def _by_round(
        self, models: Models, of_rounds: int, starts: Float32Array, validation: DeviceTests
    ) -> tuple[AdaptationCurve, ...]:
        last = max(models.by_round)
        # What devices had in their own layers in earlier rounds is not known any more.
        looked_at = (last,) if models.own else rounds_to_look_at(of_rounds, last)
        found = []
        for number in looked_at:
            curves = self._curves(starts if number == last else models.by_round[number], validation)
            found.append(AdaptationCurve(round=number, accuracy=tuple(curves.accuracy.mean(axis=0).tolist())))
        return tuple(found)

    def _forgetting(self, models: Models, validation: DeviceTests) -> tuple[ForgettingResult, ...]:
        last = max(models.by_round)
        if last < 2 or models.own:
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

    def _tests(self, split: SplitName) -> DeviceTests:
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
