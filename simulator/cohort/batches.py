"""Which examples each client of a cohort sees at each of its steps: the batches of ``LocalTrainer``, as one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client_sdk.protocol.meta_learning import ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import epoch_order

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Shuffled(Protocol):
    """The part of a client's work that decides its batches."""

    @property
    def rows(self) -> Int64Array:
        """Its examples: rows of the data set, at least one."""
        ...

    @property
    def shuffle_seed(self) -> int:
        """Seed of its shuffles."""
        ...

    @property
    def plan(self) -> TrainingPlan | None:
        """Its own plan; None for the one that all have."""
        ...


def num_steps(num_samples: int, plan: TrainingPlan) -> int:
    """Optimizer steps of a client with this many examples; of one that adapts, its steps of adaptation."""
    if plan.meta is not None:
        return plan.meta.inner_steps
    steps = plan.local_epochs * math.ceil(num_samples / plan.batch_size)
    return steps if plan.max_steps is None else min(steps, plan.max_steps)


@dataclass(frozen=True)
class Steps:
    """Batches of c clients over s steps.

    Attributes:
        picked: int64[c, s, B], rows of the data set; a short batch is filled up with its own last row, and where a
            client has no more batches, with any row.
        counts: int64[c, s], examples in each batch; 0 where there is none.
    """

    picked: Int64Array
    counts: Int64Array

    @classmethod
    def stacked(cls, clients: Sequence[Sequence[Int64Array]], steps: int, batch_size: int) -> Self:
        """Put clients' batches side by side.

        Args:
            clients: Of each at most ``steps`` batches of rows of the data set, of 1 to ``batch_size`` rows.
            steps: s.
            batch_size: B.
        """
        picked = np.zeros((len(clients), steps, batch_size), np.int64)
        counts = np.zeros((len(clients), steps), np.int64)
        for i, batches in enumerate(clients):
            for k, rows in enumerate(batches):
                picked[i, k, : len(rows)] = rows
                picked[i, k, len(rows) :] = rows[-1]
                counts[i, k] = len(rows)
        return cls(picked, counts)

    def rates(self, learning_rate: float) -> Tensor:
        """float32[c, s]: what the sum of a batch's gradients is multiplied by, as the program's ``train`` has it."""
        return torch.tensor(np.float32(learning_rate) / np.maximum(self.counts, 1).astype(np.float32))


@dataclass(frozen=True)
class BatchTable(Steps):
    """Batches of c clients that descend, s the largest number of steps of any of them; 0 counts come last.

    Attributes:
        in_first_epoch: bool[c, s], which steps belong to the client's first epoch.
        in_last_epoch: bool[c, s], which belong to its last one, or to as much of it as ``max_steps`` lets happen.
            Adaptation has no epochs: all of its steps are of the first and the last one.
    """

    in_first_epoch: BoolArray
    in_last_epoch: BoolArray

    @classmethod
    def of(cls, clients: Sequence[Shuffled], plan: TrainingPlan) -> BatchTable:
        """Shuffle every client's examples, epoch by epoch; with reptile as ``MetaBatches`` does.

        Args:
            clients: All of one batch size.
            plan: Of those that have none of their own.
        """
        if plan.meta is not None:
            return cls._adapting(clients, plan, plan.meta)
        plans = [client.plan or plan for client in clients]
        size = plans[0].batch_size
        taken = np.array([num_steps(len(c.rows), p) for c, p in zip(clients, plans, strict=True)], np.int64)
        an_epoch = np.array([math.ceil(len(client.rows) / size) for client in clients], np.int64)
        steps = int(taken.max())
        picked = np.empty((len(clients), steps * size), np.int64)
        counts = np.zeros((len(clients), steps), np.int64)
        for i, (client, mine) in enumerate(zip(clients, plans, strict=True)):
            _fill(picked[i], counts[i, : taken[i]], client, mine, int(an_epoch[i]))
        step = np.arange(steps)
        last = (taken - 1) // an_epoch * an_epoch
        return cls(
            picked=picked.reshape(len(clients), steps, size),
            counts=counts,
            in_first_epoch=step < np.minimum(an_epoch, taken)[:, None],
            in_last_epoch=(step >= last[:, None]) & (step < taken[:, None]),
        )

    @classmethod
    def _adapting(cls, clients: Sequence[Shuffled], plan: TrainingPlan, meta: MetaPlan) -> BatchTable:
        size = plan.batch_size
        batches = [adaptation_batches(c.rows, meta, size, c.shuffle_seed, shuffle=plan.shuffle) for c in clients]
        steps = Steps.stacked(batches, meta.inner_steps, size)
        all_of_them = np.ones(steps.counts.shape, np.bool_)
        return cls(steps.picked, steps.counts, all_of_them, all_of_them)


def adaptation_batches(
    rows: Int64Array, meta: MetaPlan, batch_size: int, seed: int, *, shuffle: bool
) -> list[Int64Array]:
    """The batches of K steps over all of a client's examples, those of ``MetaBatches`` for reptile.

    Args:
        rows: Its examples; none gives no batches.
        meta: K.
        batch_size: The most of a step.
        seed: Of its shuffles.
        shuffle: Whether there are any.
    """
    if not len(rows):
        return []
    # Reptile judges nothing, so that it does not matter what it could be judged by.
    everything = ExampleSplit(np.arange(len(rows)), np.zeros(0, np.int64))
    drawn = MetaBatches.of("reptile", meta, everything, batch_size=batch_size, seed=seed, shuffle=shuffle)
    return [rows[batch] for batch in drawn.support]


def _fill(picked: Int64Array, counts: Int64Array, client: Shuffled, plan: TrainingPlan, an_epoch: int) -> None:
    """One client's line of the table; ``counts`` has as many steps as it takes."""
    n, size = len(client.rows), plan.batch_size
    for epoch, first in enumerate(range(0, len(counts), an_epoch)):
        # Where one batch holds them all, their order changes nothing but the rounding of a sum, and costs a shuffle.
        rows = client.rows if n <= size else client.rows[epoch_order(n, plan, client.shuffle_seed, epoch)]
        here = picked[first * size : (first + an_epoch) * size]
        here[:n] = rows[: len(here)]
        here[n:] = rows[-1]
        counts[first : first + an_epoch] = size
        if first + an_epoch <= len(counts):
            counts[first + an_epoch - 1] = n - (an_epoch - 1) * size
