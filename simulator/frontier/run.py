"""One cell of the frontier: a whole run with the server's own noise, ledger, buckets and optimizer.

The sums come from ``LinearCohort``; from there on it is what a server does. Noise has no seed, so accuracies differ
from run to run, by a few tenths of a percent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self

import numpy as np

from client_sdk.protocol.clipping import clip_global
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.accounting import LedgerKeeper, PrivacyBudget, PrivacyLedger
from server_ref.aggregation.batch import Adjacency, Aggregate
from server_ref.aggregation.bucketed import BUCKET_WEIGHTS, BucketNoise
from server_ref.aggregation.buckets import BucketedRule, assign_buckets
from server_ref.aggregation.calibration import calibrate
from server_ref.aggregation.noise import CentralNoise
from server_ref.aggregation.robust import apply_rule
from server_ref.aggregation.server_optim import Sgd
from server_ref.aggregation.server_state import MASTER
from simulator.adversaries.base import Attack, AttackContext, CommonAttack
from simulator.adversaries.on_updates import SignFlip
from simulator.datasets import Dataset, load_dataset
from simulator.frontier.cohort import (
    Float32Array,
    Float64Array,
    ImplicitUpdates,
    Int64Array,
    LinearCohort,
    accuracy,
    features_of,
)
from simulator.frontier.config import DELTA, Cell, FrontierSettings

LOCAL_RATE: Final = 1.0
"""Learning rate of the one local step; with the server's it is one number, and the clip norm is in its units."""


@dataclass(frozen=True)
class Outcome:
    """What a cell came to.

    Attributes:
        validation: Accuracy on the validation split.
        test: Likewise on the test split, or None where it was not read (tuning).
        epsilon: What the ledger says was spent; None without noise.
    """

    validation: float
    test: float | None
    epsilon: float | None


@dataclass(frozen=True)
class World:
    """Data and devices, once for all cells.

    Attributes:
        settings: Of the study.
        dataset: Loaded.
        cohort: Its training split, dealt out.
    """

    settings: FrontierSettings
    dataset: Dataset
    cohort: LinearCohort

    @classmethod
    def load(cls, settings: FrontierSettings) -> Self:
        """Load the data set and deal it out.

        Raises:
            ConfigurationError: No such data set.
            DatasetUnavailable: It has to be fetched first.
        """
        dataset = load_dataset(settings.dataset)
        return cls(settings, dataset, LinearCohort.deal(dataset, settings.devices, settings.seed))

    def attackers(self, fraction: float) -> Int64Array:
        """Which devices attack: the same for all cells of a fraction, and more of them at a higher one."""
        order = np.random.default_rng([self.settings.seed, 1]).permutation(self.cohort.devices)
        return np.sort(order[: self.settings.attackers(fraction)]).astype(np.int64)


@dataclass(frozen=True)
class _Sent:
    """What the devices sent in a round: their own updates times a factor, or one vector in common."""

    updates: ImplicitUpdates
    factors: Float64Array
    common: Float32Array | None

    def norms(self, centre: Float64Array | None) -> Float64Array:
        """L2 norm of each one's difference from the centre."""
        norms = self.updates.norms()
        if centre is None:
            return norms
        inner = self.factors * self.updates.inner(centre)
        squares = norms**2 - 2 * inner + float(centre @ centre)
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)))

    def scales(self, clip_norm: float, centre: Float64Array | None) -> Float64Array:
        """What clipping leaves of each one's own difference; 0 for a device that sends the common vector instead."""
        scales = np.minimum(1.0, clip_norm / np.maximum(self.norms(centre), 1e-12))
        return np.where(self.factors == 0, 0.0, scales)

    def clipped_sum(
        self, scales: Float64Array, clip_norm: float, centre: Float64Array | None, members: Int64Array | None
    ) -> Float64Array:
        """Sum of the clipped differences from the centre (zero where there is none)."""
        total = self.updates.sum(scales * self.factors, members)
        at = slice(None) if members is None else members
        if centre is not None:
            total -= scales[at].sum() * centre
        if self.common is not None:
            start = self.common if centre is None else self.common - centre.astype(np.float32)
            total += np.count_nonzero(self.factors[at] == 0) * clip_global(start, clip_norm).vector.astype(np.float64)
        return total


def run_cell(world: World, cell: Cell, *, test: bool = True, random: Callable[[int], bytes] = os.urandom) -> Outcome:
    """Train and score.

    Args:
        world: Data and devices.
        cell: What is run.
        test: Whether to read the test split.
        random: Source of the noise and of the buckets' draw.

    Raises:
        ConfigurationError: An attack that is neither a sign flip nor one vector in common.
    """
    settings, cohort, attack = world.settings, world.cohort, cell.parsed
    attackers = world.attackers(cell.fraction) if attack is not None else np.empty(0, np.int64)
    keeper = None
    if cell.epsilon is not None:
        budget = PrivacyBudget(epsilon=cell.epsilon, delta=DELTA, participations=settings.rounds)
        keeper = LedgerKeeper(PrivacyLedger(budget=budget))
    server = _Server(world, cell, keeper, random)
    optimizer = Sgd(learning_rate=cell.mode.learning_rate, momentum=settings.momentum)
    state = optimizer.initial(np.zeros(cohort.size, np.float32))
    for version in range(settings.rounds):
        weights = state.tensors[MASTER]
        sent = _Sent(cohort.train(weights, LOCAL_RATE), np.ones(cohort.devices), None)
        if attack is not None and len(attackers):
            sent = _attacked(world, sent, attack, attackers, version)
        state = optimizer.step(state, server.release(sent, version), UpdateKind.DELTA)
    weights, data = state.tensors[MASTER], world.dataset
    return Outcome(
        validation=accuracy(weights, features_of(data.validation), data.validation.y),
        test=accuracy(weights, features_of(data.test), data.test.y) if test else None,
        epsilon=None if keeper is None else keeper.ledger.spent().epsilon,
    )


def _attacked(world: World, honest: _Sent, attack: Attack, attackers: Int64Array, version: int) -> _Sent:
    factors = honest.factors.copy()
    if isinstance(attack, SignFlip):
        factors[attackers] = -attack.factor
        return _Sent(honest.updates, factors, None)
    if not isinstance(attack, CommonAttack):
        raise ConfigurationError(f"the frontier knows sign-flip and attacks of one common vector, not {attack}")
    context = AttackContext(
        seed=world.settings.seed,
        version=version,
        device=int(attackers[0]),
        reports=world.cohort.devices,
        attackers=len(attackers),
        weights=np.zeros(world.cohort.size, np.float32),
        colluders=lambda: honest.updates.dense(attackers[: world.settings.knowledge]),
    )
    factors[attackers] = 0.0
    return _Sent(honest.updates, factors, attack.vector(context))


class _Server:
    """Sums, noise, and the rule, as one vector a round."""

    def __init__(self, world: World, cell: Cell, keeper: LedgerKeeper | None, random: Callable[[int], bytes]) -> None:
        self._mode = mode = cell.mode
        self._devices = world.cohort.devices
        self._keeper = keeper
        self._random = random
        self._rule = BucketedRule(mode.buckets, mode.num_byzantine, mode.rule) if mode.kind == "buckets" else None
        self._centre: Float64Array | None = np.zeros(world.cohort.size) if mode.kind == "centred" else None
        self._noise: CentralNoise | BucketNoise | None = None
        if keeper is not None and cell.epsilon is not None:
            z = calibrate(cell.epsilon, DELTA, participations=world.settings.rounds)
            central = CentralNoise(z, keeper, random=random)
            self._noise = central if self._rule is None else BucketNoise(central, self._rule)

    def release(self, sent: _Sent, version: int) -> Float64Array:
        """The round's outcome, float64[size]."""
        sums, weights = self._sums(sent)
        if self._noise is None or self._keeper is None:
            means = [s / w for s, w in zip(sums, weights, strict=True)]
            if self._rule is None:
                values = means[0]
            else:
                values = np.asarray(apply_rule(self._rule.rule, means, self._rule.num_byzantine).values)
        else:
            self._keeper.open_round(version)
            values = self._noise.release(self._aggregate(sums, weights)).values
        if self._centre is not None:
            values = values + self._centre
            self._centre = values
        return values

    def _sums(self, sent: _Sent) -> tuple[list[Float64Array], list[int]]:
        clip = self._mode.clip_norm
        scales = sent.scales(clip, self._centre)
        if self._rule is None:
            return [sent.clipped_sum(scales, clip, self._centre, None)], [self._devices]
        dealt = assign_buckets(range(self._devices), self._rule.num_buckets, self._random(16))
        members = [np.array(bucket, np.int64) for bucket in dealt]
        return [sent.clipped_sum(scales, clip, None, m) for m in members], [len(m) for m in members]

    def _aggregate(self, sums: list[Float64Array], weights: list[int]) -> Aggregate:
        """As a reduce stage hands it to the noise stage: a mean, or the sums of all buckets one behind the other."""
        clip = self._mode.clip_norm
        if self._rule is None:
            values, reach, measured = sums[0] / weights[0], clip / weights[0], {}
        else:
            values, reach, measured = np.concatenate(sums), clip, {BUCKET_WEIGHTS: weights}
        return Aggregate(
            values=values,
            kind=UpdateKind.DELTA,
            count=self._devices,
            total_weight=self._devices,
            sensitivity=MappingProxyType({Adjacency.ZERO_OUT: reach}),
            measurements=measured,
        )
