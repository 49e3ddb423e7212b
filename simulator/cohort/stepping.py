"""What all batched training shares: the examples of a step, and how many clients step together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from simulator.cohort.batches import Int64Array
from simulator.cohort.model import Batch, BatchedModel
from simulator.datasets import Split

# Beyond it, weights and gradients of a batch of clients leave the processor's caches, and every step reads memory.
MEMORY_BYTES: Final = 32 * 2**20


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


class Gatherer:
    """One step's examples of all active clients, in buffers that are filled over and over.

    Args:
        data: All examples.
        size: The most of them that one step sees.
    """

    def __init__(self, data: Split, size: int) -> None:
        self._data = data
        self._x = torch.empty(size, *data.x.shape[1:])
        self._y = torch.empty(size, dtype=torch.int64)

    def gather(self, picked: Int64Array, counts: Int64Array) -> Batch:
        """The batch, as wide as the longest of this step; the last examples of shorter ones do not count.

        Args:
            picked: int64[c, B], rows of the data.
            counts: int64[c], how many of each line count; at least one counts one.
        """
        clients, width = len(counts), int(counts.max())
        rows = picked[:, :width].reshape(-1)
        x, y = self._x[: len(rows)], self._y[: len(rows)]
        # mode="clip" writes straight into the buffer; the rows are in range by construction.
        np.take(self._data.x, rows, axis=0, out=x.numpy(), mode="clip")
        np.take(self._data.y, rows, axis=0, out=y.numpy(), mode="clip")
        keep = None if int(counts.min()) == width else torch.tensor(np.arange(width) < counts[:, None])
        return Batch(x.view(clients, width, *x.shape[1:]), y.view(clients, width), keep)


def example_batch(data: Split, size: int) -> Batch:
    """One client's batch of this size, to measure with."""
    rows = np.arange(size) % len(data)
    return Batch(torch.tensor(data.x[rows]), torch.tensor(data.y[rows]), None)


def clients_at_once(model: BatchedModel, data: Split, batch_size: int, memory_bytes: int) -> int:
    """How many clients may step together within this memory; at least one."""
    batch = example_batch(data, batch_size)
    return max(1, memory_bytes // model.bytes_per_client(batch.x, batch.y))


@contextlib.contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """Batches run in parallel instead: operations this small mostly wait for their threads, and round accordingly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
