"""Meta-gradients of many clients at once: what ``client_sdk.protocol.meta_learning`` says that each of them sends.

MAML's gradient goes back through the steps of adaptation one by one: with u_k the weights after k of them and H_k the
Hessian of step k's mean loss, ``v_K = grad L(u_K)`` and ``v_k = v_(k+1) - alpha H_k(u_k) v_(k+1)``; v_0 is the
meta-gradient, to second order and exactly. No matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.meta_learning import ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan
from simulator.cohort.batches import Int64Array, Steps
from simulator.cohort.model import BatchedModel, Slope
from simulator.cohort.stepping import Gatherer
from simulator.cohort.work import Figures, finite_rows
from simulator.datasets import Split

META_GRADIENTS: Final = frozenset({"maml", "fomaml", "per-fedavg"})
"""Algorithms whose clients need examples to judge by. Reptile descends as ordinary training does."""


def differentiated_steps(plan: TrainingPlan) -> int:
    """Steps whose slopes are kept to go back through: all of MAML's, and one at a time of Per-FedAvg's."""
    if plan.algorithm == "maml":
        return _meta(plan).inner_steps
    return 1 if plan.algorithm == "per-fedavg" else 0


class Splits:
    """Which examples of each client adapt and which judge, worked out once for a run: it hashes all of them.

    Args:
        data: All examples.
    """

    def __init__(self, data: Split) -> None:
        self._data = data
        self._known: dict[tuple[bytes, float], ExampleSplit] = {}

    def batches(self, rows: Int64Array, plan: TrainingPlan, seed: int) -> MetaBatches:
        """A client's batches for one session, as rows of the data.

        Args:
            rows: Its examples.
            plan: Of one of the ``META_GRADIENTS``.
            seed: Its shuffle seed.

        Raises:
            NotEnoughExamples: None of them could judge.
        """
        meta = _meta(plan)
        key = rows.tobytes(), meta.query_fraction
        split = self._known.get(key)
        if split is None:
            found = ExampleSplit.of(self._data.x[rows], self._data.y[rows], meta.query_fraction)
            split = self._known[key] = ExampleSplit(rows[found.support], rows[found.query])
        match plan.algorithm:
            case "maml" | "fomaml" | "per-fedavg" as which:
                return MetaBatches.of(which, meta, split, batch_size=plan.batch_size, seed=seed, shuffle=plan.shuffle)
            case _:
                raise ConfigurationError(f"{plan.algorithm} has no meta-gradient")


class MetaGradients:
    """One batch of clients' meta-gradients.

    Args:
        model: Computes the gradients.
        data: All examples.
        clients: Their batches.
        plan: What they train.
    """

    def __init__(self, model: BatchedModel, data: Split, clients: Sequence[MetaBatches], plan: TrainingPlan) -> None:
        self._model = model
        self._data = data
        self._plan = plan
        meta = _meta(plan)
        size = plan.batch_size
        most = max(len(client.query) for client in clients)
        self._support = Steps.stacked([client.support for client in clients], meta.inner_steps, size)
        self._query = Steps.stacked([client.query for client in clients], most, size)
        self._hessian = Steps.stacked([client.hessian for client in clients], meta.inner_steps, size)
        self._beta = np.float32(meta.meta_learning_rate)
        self._losses = np.zeros(len(clients), np.float64)
        self._finite = np.ones(len(clients), np.bool_)

    def train(self, weights: Float32Array, updates: Tensor) -> Figures:
        """Work out what each client sends.

        Args:
            weights: float32[d], the global weights.
            updates: float32[c, d], receives the updates.
        """
        start = torch.tensor(weights)
        if self._plan.algorithm == "per-fedavg":
            self._local_meta_steps(start, updates)
        else:
            self._meta_gradient(start, updates, second_order=self._plan.algorithm == "maml")
        losses = self._losses / self._query.counts.sum(axis=1)
        steps = np.full(len(updates), self._support.counts.shape[1])
        return Figures(steps, losses, losses, ~(self._finite & finite_rows(updates).numpy()))

    def _meta_gradient(self, start: Tensor, gradient: Tensor, *, second_order: bool) -> None:
        rates = self._support.rates(self._plan.learning_rate)
        if second_order:
            now, slopes = self._steps_to_go_back(start, rates, gradient)
        else:
            now, slopes = self._steps(start, rates, gradient), []
        gradient.zero_()
        gatherer = self._gatherer()
        shares = torch.tensor(1 / self._query.counts.sum(axis=1, keepdims=True).astype(np.float32))
        for j in range(self._query.counts.shape[1]):
            # Clients with more batches than others come first.
            active = int(np.count_nonzero(self._query.counts[:, j]))
            batch = gatherer.gather(self._query.picked[:active, j], self._query.counts[:active, j])
            slope = self._model.slope(now[:active], batch)
            slope.add_to(gradient[:active], shares[:active])
            self._note(slope.losses)
        while slopes:
            slopes.pop().step_back(rates[:, len(slopes), None], gradient)

    def _steps(self, start: Tensor, rates: Tensor, like: Tensor) -> Tensor:
        """float32[c, d]: each client's adapted weights."""
        now, gatherer = torch.empty_like(like), self._gatherer()
        for k in range(rates.shape[1]):
            batch = gatherer.gather(self._support.picked[:, k], self._support.counts[:, k])
            losses = self._model.descend(now if k else start, now, batch, rates[:, k, None])
            self._finite &= torch.isfinite(losses).numpy()
        return now

    def _steps_to_go_back(self, start: Tensor, rates: Tensor, like: Tensor) -> tuple[Tensor, list[Slope]]:
        """Each client's adapted weights, and what led there."""
        now, slopes = start, []
        for k in range(rates.shape[1]):
            # What is gone back through needs its examples and weights as they are.
            batch = self._gatherer().gather(self._support.picked[:, k], self._support.counts[:, k])
            slopes.append(self._model.slope(now, batch, differentiable=True))
            after = torch.empty_like(like)
            slopes[-1].descend(now, rates[:, k, None], after)
            self._finite &= torch.isfinite(slopes[-1].losses).numpy()
            now = after
        return now, slopes

    def _local_meta_steps(self, start: Tensor, update: Tensor) -> None:
        alpha = self._plan.learning_rate
        support, shares, hessian = self._support.rates(alpha), self._query.rates(1), self._hessian.rates(alpha)
        gatherers = [self._gatherer() for _ in range(3)]
        adapted, direction, now = torch.empty_like(update), torch.empty_like(update), start
        beta = torch.tensor(self._beta)
        for k in range(support.shape[1]):
            mine, judging, curving = (
                gatherer.gather(steps.picked[:, k], steps.counts[:, k])
                for gatherer, steps in zip(gatherers, (self._support, self._query, self._hessian), strict=True)
            )
            slope = self._model.slope(now, mine)
            slope.descend(now, support[:, k, None], adapted)
            self._finite &= torch.isfinite(slope.losses).numpy()
            slope = self._model.slope(adapted, judging)
            slope.add_to(direction.zero_(), shares[:, k, None])
            self._note(slope.losses)
            self._model.slope(now, curving, differentiable=True).step_back(hessian[:, k, None], direction)
            now = torch.addcmul(now, direction, beta, value=-1)
        torch.sub(start, now, out=update)
        update /= beta

    def _note(self, losses: Tensor) -> None:
        self._losses[: len(losses)] += losses.numpy()
        self._finite[: len(losses)] &= torch.isfinite(losses).numpy()

    def _gatherer(self) -> Gatherer:
        return Gatherer(self._data, self._support.picked.shape[0] * self._support.picked.shape[2])


def _meta(plan: TrainingPlan) -> MetaPlan:
    if plan.meta is None:
        raise ConfigurationError(f"{plan.algorithm} has no meta settings")
    return plan.meta
