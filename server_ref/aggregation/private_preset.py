"""The specification's ``DPGradientAggregator``: a thin preset, as in ``presets``, whose noise slot is filled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.updates import WorkerGradient
from server_ref.aggregation.accounting import (
    GaussianRelease,
    LedgerKeeper,
    PrivacyBudget,
    PrivacyEvent,
    PrivacyLedger,
    PrivacySpent,
)
from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.calibration import NoiseSchedule, ScheduleShape
from server_ref.aggregation.intake import Intake, RefusedUpdate
from server_ref.aggregation.noise import CentralNoise
from server_ref.aggregation.reduce import ExactMean
from server_ref.aggregation.settings import AggregationMethod, IntakeOptions, IntakeSettings
from server_ref.aggregation.tensors import AggregatedUpdate

_FACTOR_OF_CLIP_NORM = 2.0**20
"""Adaptive clipping stays within this factor of the first clip norm: noise alone must not carry it off."""


class DPGradientAggregator:
    """The mean of workers' updates with client-level differential privacy, in the central model.

    What is protected is everything that one worker holds, against whoever sees the aggregates; this server sees the
    updates. Updates are clipped, summed as integers, noised as integers, and only then divided. Every aggregate is paid
    for before its noise is drawn; beyond the budget there are none.

    All workers weigh the same, unless ``max_weight`` is declared: one of weight 10 can move the sum ten times as far,
    and so costs ten times the noise.

    Args:
        epsilon: Budget of all rounds together.
        delta: Its other half.
        max_grad_norm: Clip norm; with adaptive clipping, that of the first round.
        noise_multiplier: Standard deviation of the noise as a multiple of the sum's sensitivity under ``adjacency``.
            None: as much as spends the budget over ``rounds``. Given one, rounds go on until the budget is spent.
        adaptive_clipping: Whether the clip norm follows a private quantile of the updates' norms. It needs enough
            workers for the noise (see ``split_noise``); with fewer the clip norm stays.
        rounds: Aggregates that the budget is calibrated for.
        participations: In how many of them one worker takes part at most, which the caller enforces; None: in all.
        adjacency: Which cohorts are neighbours: ``zero-out``, ``replace-one``, or ``add-remove`` (needs
            ``expected_workers``, and that nobody learns who took part).
        sampling_rate: Under ``add-remove``: the probability with which each worker takes part in each round, by an
            independent and secret coin.
        expected_workers: Constant to divide the sum by; None for the number of workers in the round.
        schedule: How the noise changes over the rounds (``ScheduleShape``); fixed now, never by how training goes.
        final_ratio: For a schedule: the last round's noise over the first one's.
        target_quantile: Share of the updates that adaptive clipping leaves within the clip norm.
        ledger: What was spent before, from ``ledger.to_json()``; its budget replaces ``epsilon`` and the other terms.
        persist: Makes an event durable before its release; see ``LedgerKeeper``.
        random: Source of the noise's random bytes. The default is the operating system's.
        on_rejected: Called with each refusal.
        **options: See ``IntakeSettings``; ``max_weight`` is 1 by default.

    Raises:
        ConfigurationError: Settings that do not go together; the message says what to change.
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        delta: float = 1e-5,
        max_grad_norm: float = 1.0,
        noise_multiplier: float | None = None,
        adaptive_clipping: bool = True,
        *,
        rounds: int = 1000,
        participations: int | None = None,
        adjacency: Adjacency | str = Adjacency.ZERO_OUT,
        sampling_rate: float | None = None,
        expected_workers: int | None = None,
        schedule: ScheduleShape | str = ScheduleShape.CONSTANT,
        final_ratio: float = 0.5,
        target_quantile: float = 0.9,
        ledger: PrivacyLedger | None = None,
        persist: Callable[[PrivacyEvent], None] | None = None,
        random: Callable[[int], bytes] = os.urandom,
        on_rejected: Callable[[RefusedUpdate], None] | None = None,
        **options: Unpack[IntakeOptions],
    ) -> None:
        if ledger is None:
            ledger = PrivacyLedger(
                budget=PrivacyBudget(
                    epsilon=epsilon,
                    delta=delta,
                    adjacency=_adjacency(adjacency),
                    participations=participations,
                    sampling_probability=sampling_rate,
                )
            )
        budget = ledger.budget
        if noise_multiplier is None:
            plan = NoiseSchedule.plan(
                budget.epsilon,
                budget.delta,
                rounds=rounds,
                shape=schedule,
                final_ratio=final_ratio,
                participations=budget.participations,
                sampling_probability=budget.sampling_probability,
            )
        elif schedule != ScheduleShape.CONSTANT:
            raise ConfigurationError(f"a {schedule} schedule is calibrated to the budget; leave noise_multiplier out")
        else:
            plan = NoiseSchedule(noise_multipliers=(noise_multiplier,))
        self._multipliers = plan.noise_multipliers
        hidden = budget.adjacency is Adjacency.ADD_REMOVE
        if hidden and expected_workers is None:
            raise ConfigurationError(
                "under add-remove adjacency nobody may learn how many took part; give expected_workers to divide by"
            )
        self._keeper = LedgerKeeper(ledger, persist)
        self._random = random
        self._adaptive = adaptive_clipping
        self._expected = expected_workers
        self._clip = AdaptiveClipNorm(
            clip_norm=max_grad_norm,
            target_quantile=target_quantile,
            smallest=max_grad_norm / _FACTOR_OF_CLIP_NORM,
            largest=max_grad_norm * _FACTOR_OF_CLIP_NORM,
        )
        declared: dict[str, Any] = {
            "max_weight": 1,
            **options,
            "clip_norm": max_grad_norm,
            "aggregation_method": AggregationMethod.FEDAVG,
            "arrival_public": not hidden,
        }
        settings = IntakeSettings.parse(declared)
        if expected_workers is not None:
            settings = settings.model_copy(update={"denominator": expected_workers * settings.max_weight})
        self._settings = settings
        self._intake = Intake(self._mean(), settings, noise=self._noise(), on_rejected=on_rejected)

    @property
    def ledger(self) -> PrivacyLedger:
        """What has been spent; keep it (``to_json``), and go on from it after a restart."""
        return self._keeper.ledger

    @property
    def spent(self) -> PrivacySpent:
        """What all aggregates so far have cost, with the adjacency that it is stated for."""
        return self.ledger.spent()

    @property
    def noise_multiplier(self) -> float:
        """That of the next round. After the last round that was planned it stays: the ledger says when to stop."""
        return self._multipliers[min(len(self.ledger.events), len(self._multipliers) - 1)]

    @property
    def clip_norm(self) -> float:
        """That of the next round."""
        return self._clip.clip_norm

    @property
    def rejections(self) -> tuple[RefusedUpdate, ...]:
        """Who was refused in the last round, and why. Not private: it is for this server's eyes."""
        return self._intake.rejections

    def aggregate_with_privacy(
        self, worker_gradients: Iterable[WorkerGradient], server_model_state: Mapping[str, Any], round_num: int
    ) -> tuple[AggregatedUpdate, float]:
        """The private mean of the accepted updates, and the epsilon that all rounds so far have cost together.

        Args:
            worker_gradients: Any iterable, read once.
            server_model_state: The model: names, shapes and dtypes; its values play no part.
            round_num: Number of the round; each is released once.

        Returns:
            ``(aggregate, epsilon)``. ``aggregate.measurements`` has the cost of the release with its adjacency.

        Raises:
            PrivacyBudgetExhausted: The budget does not allow another release; no worker was read.
            RoundAlreadyCharged: The round has been released.
            EmptyAggregate: No update is left; nothing was charged.
            MixedKinds: Deltas and gradients in one round, and ``kind`` was not declared.
        """
        keeper = self._keeper
        budget = keeper.ledger.budget
        keeper.ledger.check(
            GaussianRelease(
                round_id=round_num,
                noise_multiplier=self.noise_multiplier,
                adjacency=budget.adjacency,
                sampling_probability=budget.sampling_probability,
            )
        )
        keeper.open_round(round_num)
        self._intake.settings = self._settings.model_copy(update={"clip_norm": self.clip_norm})
        self._intake.reduce, self._intake.noise = self._mean(), self._noise()
        gathered = self._intake.gather(worker_gradients, server_model_state)
        released = gathered.aggregate
        if released.indicator is not None:
            self._clip = self._clip.after(released.indicator, released.count)
        return gathered.named(released.values), float(released.measurements["epsilon"])

    def describe(self) -> str:
        """The pipeline's slots as a table."""
        return self._intake.describe()

    def _mean(self) -> ExactMean:
        return ExactMean(arithmetic="fixed", noise_multiplier=self.noise_multiplier)

    def _noise(self) -> CentralNoise:
        return CentralNoise(
            noise_multiplier=self.noise_multiplier,
            keeper=self._keeper,
            adjacency=self._keeper.ledger.budget.adjacency,
            indicators=self._adaptive,
            nominal_count=self._expected,
            random=self._random,
        )


def _adjacency(name: Adjacency | str) -> Adjacency:
    try:
        return Adjacency(name)
    except ValueError as e:
        raise ConfigurationError(f"no adjacency {name!r}; choose one of {', '.join(Adjacency)}") from e
