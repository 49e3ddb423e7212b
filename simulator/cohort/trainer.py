"""Many clients' local training in one batched computation: what ``LocalTrainer`` does for one, for a whole cohort.

The same examples in the same batches, the same step formula in float32, the same masks; what differs is the order in
which a matrix product adds up, and so the last bits of an update (docs/simulator.md states the tolerance).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, TrainingDiverged
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan, normaliser, update_size
from client_sdk.training import Controls
from simulator.cohort.batches import BatchTable, Int64Array, num_steps
from simulator.cohort.model import BatchedModel
from simulator.cohort.stepping import MEMORY_BYTES, Gatherer, clients_at_once, one_thread_an_operation
from simulator.datasets import Split

# Batches that are asked for at once. A constant, so that the number of threads changes no client's company.
_BATCHES_AT_ONCE: Final = 4


@dataclass(frozen=True)
class LocalWork:
    """One client's local training.

    Attributes:
        rows: int64[n], its examples: rows of the trainer's data, n >= 1.
        shuffle_seed: As in ``LocalTrainer.train``.
        controls: With scaffold, and only there; the server's control is the same for all clients of one call.
        plan: What it trains of the call's plan: batch size and numbers of epochs and steps of its own. None for all.
    """

    rows: Int64Array
    shuffle_seed: int
    controls: Controls | None = None
    plan: TrainingPlan | None = None


@dataclass(frozen=True)
class CohortResult:
    """What local training produced for c clients.

    Attributes:
        updates: float32[c, update_size(plan, d)], what each client sends before compression; zeros where it failed.
        steps: int64[c], optimizer steps taken.
        first_epoch_losses: float64[c], as in ``TrainingResult``.
        last_epoch_losses: float64[c], likewise.
        failures: Position of a client -> why it has no update.
    """

    updates: Float32Array
    steps: Int64Array
    first_epoch_losses: npt.NDArray[np.float64]
    last_epoch_losses: npt.NDArray[np.float64]
    failures: Mapping[int, TrainingDiverged]


class _Figures(NamedTuple):
    """Steps, mean loss of the first and of the last epoch, and whether training diverged, for each client."""

    steps: Int64Array
    first: npt.NDArray[np.float64]
    last: npt.NDArray[np.float64]
    diverged: npt.NDArray[np.bool_]


class CohortTrainer:
    """Trains many clients at once from one weight vector.

    Guarantees: the result depends on weights, data, plan, the clients and their order, and ``memory_bytes`` alone, to
    the bit, on one machine, with any number of threads. For each client it agrees with ``LocalTrainer`` up to float32
    rounding. Memory: the updates, and ``memory_bytes`` a thread besides.

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
        self._in_a_batch: dict[int, int] = {}

    def clients_at_once(self, plan: TrainingPlan) -> int:
        """How many clients to ask for at once, so that the updates take no more memory than the training."""
        return _BATCHES_AT_ONCE * self._clients_in_a_batch(plan)

    def _clients_in_a_batch(self, plan: TrainingPlan) -> int:
        size = plan.batch_size
        if size not in self._in_a_batch:
            self._in_a_batch[size] = clients_at_once(self._model, self._data, size, self._memory_bytes)
        return self._in_a_batch[size]

    def train(self, weights: Float32Array, clients: Sequence[LocalWork], plan: TrainingPlan) -> CohortResult:
        """Run the plan's epochs for every client.

        Clients with more steps than others go on alone: nothing is computed for those that are done.

        Args:
            weights: float32[d], the global weights.
            clients: At least one.
            plan: Hyperparameters; of clients with a plan of their own only what that one shares with it.

        Raises:
            ProgramInputError: Weights of the wrong shape or dtype, or not finite; a client without examples.
            ConfigurationError: A learning rate that float32 cannot hold, or control variates that are missing or not
                asked for.
        """
        self._check(weights, clients, plan)
        plans = [client.plan or plan for client in clients]
        # Clients still at work are then always the first ones, so that a step sees a slice and no copy.
        order = sorted(
            range(len(clients)), key=lambda i: (-plans[i].batch_size, -num_steps(len(clients[i].rows), plans[i]))
        )
        sorted_clients = [clients[i] for i in order]
        updates = torch.empty(len(clients), update_size(plan, self._model.num_parameters))
        batches: list[slice] = []
        for begin, end in _runs([plans[i].batch_size for i in order]):
            size = self._clients_in_a_batch(plans[order[begin]])
            batches += [slice(at, min(at + size, end)) for at in range(begin, end, size)]

        def train_batch(batch: slice) -> _Figures:
            return self._train_batch(weights, sorted_clients[batch], plan, updates[batch])

        with one_thread_an_operation(), ThreadPoolExecutor(min(self._threads, len(batches))) as pool:
            parts = list(pool.map(train_batch, batches))
        steps, first, last, diverged = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        result = updates.numpy()
        if order != sorted(order):
            back = np.argsort(order)
            result, steps, first, last, diverged = (a[back] for a in (result, steps, first, last, diverged))
        failures = {}
        for i in np.flatnonzero(diverged).tolist():
            result[i] = 0
            failures[i] = TrainingDiverged(
                f"training diverged in {steps[i]} steps with learning rate {plan.learning_rate}: the loss or the "
                "weights are not finite"
            )
        return CohortResult(result, steps, first, last, failures)

    def _train_batch(
        self, weights: Float32Array, clients: Sequence[LocalWork], plan: TrainingPlan, updates: Tensor
    ) -> _Figures:
        """Train clients in descending order of their steps; fills ``updates``."""
        table = BatchTable.of(clients, plan)
        start = torch.tensor(weights)
        d = len(weights)
        local = updates[:, :d]
        pull = _Pull.of(plan, start, clients)
        losses = torch.zeros(table.counts.shape)
        gatherer = Gatherer(self._data, len(clients) * table.picked.shape[2])
        rates = torch.tensor(np.float32(plan.learning_rate) / np.maximum(table.counts, 1).astype(np.float32))
        for step in range(table.counts.shape[1]):
            counts = table.counts[:, step]
            active = int(np.count_nonzero(counts))
            now = local[:active]
            before = start if step == 0 else now
            pulled = pull.before_step(before, active) if pull is not None else None
            batch = gatherer.gather(table.picked[:active, step], counts[:active])
            losses[:active, step] = self._model.descend(before, now, batch, rates[:active, step, None])
            if pulled is not None:
                now -= pulled
        local -= start
        steps = np.count_nonzero(table.counts, axis=1)
        _finish(updates, plan, clients, steps, d)
        diverged = ~(torch.isfinite(losses).all(dim=1) & _finite_rows(updates)).numpy()
        first, last = (_mean_losses(losses, table, among) for among in (table.in_first_epoch, table.in_last_epoch))
        return _Figures(steps, first, last, diverged)

    def _check(self, weights: Float32Array, clients: Sequence[LocalWork], plan: TrainingPlan) -> None:
        d = self._model.num_parameters
        if weights.dtype != np.float32 or weights.shape != (d,) or not np.isfinite(weights).all():
            raise ProgramInputError(f"weights must be finite float32[{d}], got {weights.dtype}{list(weights.shape)}")
        if not clients or not all(len(client.rows) for client in clients):
            raise ProgramInputError("there is no training data")
        with np.errstate(over="ignore", under="ignore"):
            rate = np.float32(plan.learning_rate)
        if not (np.isfinite(rate) and rate > 0):
            raise ConfigurationError(f"learning_rate {plan.learning_rate} is zero or infinite as a float32")
        shared = ("algorithm", "learning_rate", "prox_mu", "shuffle")
        if any(c.plan is not None and any(getattr(c.plan, k) != getattr(plan, k) for k in shared) for c in clients):
            raise ConfigurationError("the plans of one call differ in batch size and in epochs and steps, nowhere else")
        scaffold = plan.algorithm == "scaffold"
        if any((client.controls is not None) != scaffold for client in clients):
            raise ConfigurationError(f"control variates go with scaffold and with nothing else, not {plan.algorithm}")


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of equal values, as half-open ranges."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


@dataclass(frozen=True)
class _Pull:
    """What is taken off the weights besides the gradient: FedProx's drift, or SCAFFOLD's correction."""

    start: Tensor
    prox_rate: float
    correction: Tensor | None

    @classmethod
    def of(cls, plan: TrainingPlan, start: Tensor, clients: Sequence[LocalWork]) -> _Pull | None:
        if plan.algorithm == "scaffold":
            rate = np.float32(plan.learning_rate)
            rows = [(c.controls.server - c.controls.device) * rate for c in clients if c.controls is not None]
            return cls(start, 0.0, torch.tensor(np.stack(rows)))
        prox_rate = float(np.float32(plan.learning_rate * plan.prox_mu))
        return cls(start, prox_rate, None) if prox_rate > 0 else None

    def before_step(self, weights: Tensor, active: int) -> Tensor | None:
        """float32[active, d], computed from the weights before the step; None for nothing."""
        if self.correction is not None:
            return self.correction[:active]
        # The drift is zero before the first step, whose weights are one vector for all.
        return None if weights.dim() == 1 else (weights - self.start).mul_(self.prox_rate)


def _finish(updates: Tensor, plan: TrainingPlan, clients: Sequence[LocalWork], steps: Int64Array, d: int) -> None:
    """From deltas to what the algorithm sends, as ``TrainingResult.update`` has it."""
    if plan.algorithm == "fednova":
        divisors = torch.tensor([[normaliser(plan, int(k))] for k in steps], dtype=torch.float64)
        updates.copy_(updates / divisors)
    elif plan.algorithm == "scaffold":
        scale = torch.tensor(-steps * float(np.float32(plan.learning_rate)), dtype=torch.float64)
        updates[:, d:] = (updates[:, :d] / scale[:, None]).float()
        updates[:, d:] -= torch.tensor(np.stack([c.controls.server for c in clients if c.controls is not None]))


def _finite_rows(values: Tensor) -> Tensor:
    """bool[c]: whether a row is finite throughout."""
    finite = torch.isfinite(values.sum(dim=1))
    for i in torch.nonzero(~finite).flatten().tolist():  # a sum may overflow where no addend did
        finite[i] = torch.isfinite(values[i]).all()
    return finite


def _mean_losses(losses: Tensor, table: BatchTable, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """float64[c]: summed losses of some steps over their examples."""
    chosen = np.where(among, losses.numpy().astype(np.float64), 0.0)
    seen = np.where(among, table.counts, 0)
    means: npt.NDArray[np.float64] = chosen.sum(axis=1) / seen.sum(axis=1)
    return means
