"""What all batched training shares: the examples of a step, and how many clients step together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from simulator.cohort.batches import Int64Array
from simulator.cohort.model import Batch, BatchedModel
from simulator.datasets import Split

# Beyond it, weights and gradients of a batch of clients leave the processor's caches, and every step reads memory.
MEMORY_BYTES: Final = 32 * 2**20


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


def clients_at_once(
    model: BatchedModel, data: Split, batch_size: int, memory_bytes: int, *, differentiated_steps: int = 0
) -> int:
    """How many clients may step together within this memory; at least one.

    Args:
        model: Computes the gradients.
        data: Examples, to measure with.
        batch_size: Of a step.
        memory_bytes: The bound.
        differentiated_steps: See ``BatchedModel.bytes_per_client``.
    """
    rows = np.arange(batch_size) % len(data)
    x, y = torch.tensor(data.x[rows]), torch.tensor(data.y[rows])
    return max(1, memory_bytes // model.bytes_per_client(x, y, differentiated_steps=differentiated_steps))


@contextlib.contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """Batches run in parallel instead: operations this small mostly wait for their threads, and round accordingly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
