"""One batch of clients that descend: FedAvg, FedProx, SCAFFOLD, FedNova and Reptile, all layers shared or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan, normaliser
from simulator.cohort.batches import BatchTable, Int64Array
from simulator.cohort.model import BatchedModel
from simulator.cohort.stepping import Gatherer
from simulator.cohort.work import Figures, LocalWork, finite_rows
from simulator.datasets import Split


@dataclass(frozen=True)
class Descent:
    """What all clients of a call have in common.

    Attributes:
        model: Computes the gradients.
        data: All examples.
        plan: What clients without a plan of their own train.
        weights: float32[d], the global weights.
        layers: Which of them are shared.
    """

    model: BatchedModel
    data: Split
    plan: TrainingPlan
    weights: Float32Array
    layers: SharedLayers

    def train(self, clients: Sequence[LocalWork], updates: Tensor, personal: Tensor | None) -> Figures:
        """Train clients in descending order of their steps.

        Args:
            clients: Of one batch size.
            updates: float32[c, update_size], receives what they send.
            personal: float32[c, p], receives what they keep, where there is something to keep.
        """
        d = len(self.weights)
        table = BatchTable.of(clients, self.plan)
        start = torch.tensor(self.weights) if personal is None else self._own_starts(clients)
        local = updates[:, :d] if personal is None else torch.empty(len(clients), d)
        losses = self._descend(table, clients, start, local)
        finite = torch.isfinite(losses).all(dim=1)
        steps = np.count_nonzero(table.counts, axis=1)
        if personal is not None:
            mask = torch.tensor(self.layers.mask)
            personal[:] = local[:, ~mask]
            finite &= finite_rows(personal)
            torch.sub(local[:, mask], start[:, mask], out=updates)
        else:
            local -= start
        _finish(updates, self.plan, clients, steps, d)
        diverged = ~(finite & finite_rows(updates)).numpy()
        first, last = (_mean_losses(losses, table, among) for among in (table.in_first_epoch, table.in_last_epoch))
        return Figures(steps, first, last, diverged)

    def _own_starts(self, clients: Sequence[LocalWork]) -> Tensor:
        """float32[c, d]: the shared layers of the model, and each client's own of the others."""
        starts = np.tile(self.weights, (len(clients), 1))
        personal = ~self.layers.mask
        for row, client in zip(starts, clients, strict=True):
            if client.own is not None:
                row[personal] = client.own
        return torch.from_numpy(starts)

    def _descend(self, table: BatchTable, clients: Sequence[LocalWork], start: Tensor, local: Tensor) -> Tensor:
        """Fill ``local`` with where the steps lead; float32[c, s], the summed losses before each of them."""
        pull = _Pull.of(self.plan, start, clients)
        losses = torch.zeros(table.counts.shape)
        gatherer = Gatherer(self.data, len(clients) * table.picked.shape[2])
        rates = table.rates(self.plan.learning_rate)
        for step in range(table.counts.shape[1]):
            counts = table.counts[:, step]
            active = int(np.count_nonzero(counts))
            now = local[:active]
            before = now if step else start
            pulled = None if pull is None else pull.before_step(active, now if step else None)
            batch = gatherer.gather(table.picked[:active, step], counts[:active])
            losses[:active, step] = self.model.descend(before, now, batch, rates[:active, step, None])
            if pulled is not None:
                now -= pulled
        return losses


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

    def before_step(self, active: int, weights: Tensor | None) -> Tensor | None:
        """float32[active, d], computed from the weights before the step (None: the first one); None for nothing."""
        if self.correction is not None:
            return self.correction[:active]
        if weights is None:  # nobody has drifted yet
            return None
        start = self.start if self.start.dim() == 1 else self.start[:active]
        return (weights - start).mul_(self.prox_rate)


def _finish(updates: Tensor, plan: TrainingPlan, clients: Sequence[LocalWork], steps: Int64Array, d: int) -> None:
    """From deltas to what the algorithm sends, as ``TrainingResult.update`` has it."""
    if plan.algorithm == "fednova":
        divisors = torch.tensor([[normaliser(plan, int(k))] for k in steps], dtype=torch.float64)
        updates.copy_(updates / divisors)
    elif plan.algorithm == "scaffold":
        scale = torch.tensor(-steps * float(np.float32(plan.learning_rate)), dtype=torch.float64)
        updates[:, d:] = (updates[:, :d] / scale[:, None]).float()
        updates[:, d:] -= torch.tensor(np.stack([c.controls.server for c in clients if c.controls is not None]))


def _mean_losses(losses: Tensor, table: BatchTable, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """float64[c]: summed losses of some steps over their examples."""
    chosen = np.where(among, losses.numpy().astype(np.float64), 0.0)
    seen = np.where(among, table.counts, 0)
    means: npt.NDArray[np.float64] = chosen.sum(axis=1) / seen.sum(axis=1)
    return means
