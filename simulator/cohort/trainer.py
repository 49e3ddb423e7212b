"""Many clients' local training in one batched computation: what a device's training does for one, for a whole cohort.

The same examples in the same batches, the same step formula in float32, the same masks; what differs is the order in
which a matrix product adds up, and so the last bits of an update (docs/simulator.md states the tolerance).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch

from client_sdk.protocol.errors import (
    ConfigurationError,
    NotEnoughExamples,
    ProgramError,
    ProgramInputError,
    TrainingDiverged,
)
from client_sdk.protocol.meta_learning import MetaBatches
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan, update_size
from simulator.cohort.batches import num_steps
from simulator.cohort.descent import Descent
from simulator.cohort.meta_training import META_GRADIENTS, MetaGradients, Splits, differentiated_steps
from simulator.cohort.model import BatchedModel
from simulator.cohort.stepping import MEMORY_BYTES, clients_at_once, one_thread_an_operation
from simulator.cohort.work import CohortResult, Figures, LocalWork
from simulator.datasets import Split

__all__ = ["CohortResult", "CohortTrainer", "LocalWork"]

# Batches that are asked for at once. A constant, so that the number of threads changes no client's company.
_BATCHES_AT_ONCE: Final = 4


class CohortTrainer:
    """Trains many clients at once from one weight vector.

    Guarantees: the result depends on weights, data, plan, the clients and their order, and ``memory_bytes`` alone, to
    the bit, on one machine, with any number of threads. For each client it agrees with a device's training up to
    float32 rounding. Memory: the updates, and ``memory_bytes`` a thread besides.

    Args:
        model: Computes the gradients.
        data: All examples; clients name theirs by row.
        memory_bytes: Bound on what a batch of clients takes at once, apart from the updates themselves.
        threads: Batches that are trained at the same time.

    Raises:
        ProgramInputError: Data that no client could train on: NaN, infinities, wrong dtypes.
    """

    def __init__(
        self, model: BatchedModel, data: Split, *, memory_bytes: int = MEMORY_BYTES, threads: int | None = None
    ) -> None:
        if data.x.dtype != np.float32 or data.y.dtype != np.int64 or data.y.shape != data.x.shape[:1] or not len(data):
            raise ProgramInputError(
                f"the data must be float32[n, ...] and int64[n], n >= 1; got {data.x.dtype}{list(data.x.shape)} and "
                f"{data.y.dtype}{list(data.y.shape)}"
            )
        if not (math.isfinite(data.x.min()) and math.isfinite(data.x.max())):
            raise ProgramInputError("the training data holds NaN or infinite values")
        self._model = model
        self._data = data
        self._memory_bytes = memory_bytes
        self._threads = threads or os.cpu_count() or 1
        self._in_a_batch: dict[tuple[int, int], int] = {}
        self._splits = Splits(data)

    def clients_at_once(self, plan: TrainingPlan) -> int:
        """How many clients to ask for at once, so that the updates take no more memory than the training."""
        return _BATCHES_AT_ONCE * self._clients_in_a_batch(plan)

    def _clients_in_a_batch(self, plan: TrainingPlan) -> int:
        key = plan.batch_size, differentiated_steps(plan)
        if key not in self._in_a_batch:
            self._in_a_batch[key] = clients_at_once(
                self._model, self._data, plan.batch_size, self._memory_bytes, differentiated_steps=key[1]
            )
        return self._in_a_batch[key]

    def train(self, weights: Float32Array, clients: Sequence[LocalWork], plan: TrainingPlan) -> CohortResult:
        """Carry the plan out for every client.

        Clients with more steps than others go on alone: nothing is computed for those that are done.

        Args:
            weights: float32[d], the global weights.
            clients: At least one.
            plan: Hyperparameters; of clients with a plan of their own only what that one shares with it.

        Raises:
            ProgramInputError: Weights of the wrong shape or dtype, or not finite; a client without examples.
            ConfigurationError: A learning rate that float32 cannot hold, control variates that are missing or not
                asked for, or personal layers that the model does not have.
        """
        layers = SharedLayers.of(self._model.parameters, plan.personal)
        self._check(weights, clients, plan, layers)
        plans = [client.plan or plan for client in clients]
        drawn, failures = self._drawn(clients, plan)

        def length(i: int) -> int:
            return len(drawn[i].query) if i in drawn else num_steps(len(clients[i].rows), plans[i])

        # Clients still at work are then always the first ones, so that a step sees a slice and no copy.
        able = [i for i in range(len(clients)) if i not in failures]
        order = sorted(able, key=lambda i: (-plans[i].batch_size, -length(i)))
        updates = torch.zeros(len(clients), update_size(plan, layers.size))
        kept = torch.zeros(len(clients), layers.num_parameters - layers.size) if plan.personal else None
        descent = Descent(self._model, self._data, plan, weights, layers)

        def train_batch(batch: slice) -> Figures:
            company = order[batch]
            if drawn:
                gradients = MetaGradients(self._model, self._data, [drawn[i] for i in company], plan)
                return gradients.train(weights, updates[batch])
            return descent.train([clients[i] for i in company], updates[batch], None if kept is None else kept[batch])

        batches: list[slice] = []
        for begin, end in _runs([plans[i].batch_size for i in order]):
            size = self._clients_in_a_batch(plans[order[begin]])
            batches += [slice(at, min(at + size, end)) for at in range(begin, end, size)]
        with one_thread_an_operation(), ThreadPoolExecutor(min(self._threads, max(1, len(batches)))) as pool:
            parts = list(pool.map(train_batch, batches))
        personal = None if kept is None else kept.numpy()
        return _result(order, failures, updates.numpy(), personal, parts, learning_rate=plan.learning_rate)

    def _drawn(
        self, clients: Sequence[LocalWork], plan: TrainingPlan
    ) -> tuple[dict[int, MetaBatches], dict[int, ProgramError]]:
        """The batches of clients that send meta-gradients, and why some of them cannot."""
        drawn: dict[int, MetaBatches] = {}
        failures: dict[int, ProgramError] = {}
        if plan.algorithm in META_GRADIENTS:
            for i, client in enumerate(clients):
                try:
                    drawn[i] = self._splits.batches(client.rows, plan, client.shuffle_seed)
                except NotEnoughExamples as e:
                    failures[i] = e
        return drawn, failures

    def _check(
        self, weights: Float32Array, clients: Sequence[LocalWork], plan: TrainingPlan, layers: SharedLayers
    ) -> None:
        d = self._model.num_parameters
        if weights.dtype != np.float32 or weights.shape != (d,) or not np.isfinite(weights).all():
            raise ProgramInputError(f"weights must be finite float32[{d}], got {weights.dtype}{list(weights.shape)}")
        if not clients or not all(len(client.rows) for client in clients):
            raise ProgramInputError("there is no training data")
        rates = {"learning_rate": plan.learning_rate}
        if plan.meta is not None:
            rates["meta_learning_rate"] = plan.meta.meta_learning_rate
        for name, rate in rates.items():
            with np.errstate(over="ignore", under="ignore"):
                rounded = np.float32(rate)
            if not (np.isfinite(rounded) and rounded > 0):
                raise ConfigurationError(f"{name} {rate} is zero or infinite as a float32")
        shared = ("algorithm", "learning_rate", "prox_mu", "shuffle", "meta", "personal")
        if any(c.plan is not None and any(getattr(c.plan, k) != getattr(plan, k) for k in shared) for c in clients):
            raise ConfigurationError("the plans of one call differ in batch size and in epochs and steps, nowhere else")
        personal = layers.num_parameters - layers.size
        if any(client.own is not None and client.own.shape != (personal,) for client in clients):
            raise ConfigurationError(f"clients keep {personal} coordinates of their personal layers, no more or fewer")
        scaffold = plan.algorithm == "scaffold"
        if any((client.controls is not None) != scaffold for client in clients):
            raise ConfigurationError(f"control variates go with scaffold and with nothing else, not {plan.algorithm}")


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of equal values, as half-open ranges."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return list(itertools.pairwise([*starts, len(values)]))


def _result(
    order: Sequence[int],
    failures: dict[int, ProgramError],
    updates: Float32Array,
    kept: Float32Array | None,
    parts: Sequence[Figures],
    *,
    learning_rate: float,
) -> CohortResult:
    """From the order in which clients trained to the one in which they were given; ``failures`` is added to."""
    clients = len(updates)
    steps, first, last = np.zeros(clients, np.int64), np.full(clients, np.nan), np.full(clients, np.nan)
    if list(order) != list(range(clients)):
        # Where nobody trained, zeros are left.
        back = np.array([*order, *sorted(failures)], np.int64).argsort()
        updates, kept = updates[back], None if kept is None else kept[back]
    at = 0
    for part in parts:
        company = order[at : at + len(part.steps)]
        at += len(company)
        steps[company], first[company], last[company] = part.steps, part.first, part.last
        for i in np.array(company)[part.diverged].tolist():
            updates[i] = 0
            failures[i] = TrainingDiverged(
                f"training diverged in {steps[i]} steps with learning rate {learning_rate}: the loss or the "
                "weights are not finite"
            )
    return CohortResult(updates, steps, first, last, failures, kept)
