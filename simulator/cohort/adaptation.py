"""Many devices' adaptation to their own examples, and how well what comes of it does: a curve over the steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array
from simulator.cohort.batches import Int64Array, Steps, adaptation_batches
from simulator.cohort.model import BatchedModel
from simulator.cohort.stepping import MEMORY_BYTES, Gatherer, clients_at_once, one_thread_an_operation
from simulator.datasets import Split

Float64Array = npt.NDArray[np.float64]

# Devices and examples of each that are judged in one call.
_DEVICES_JUDGED: Final = 32
_EXAMPLES_JUDGED: Final = 64
# Into as many batches devices are dealt at least, so that there is work for several threads. A constant, so that their
# number changes no device's company.
_BATCHES: Final = 4


class Adapted(NamedTuple):
    """Some devices' models after some steps.

    Attributes:
        devices: Which of the devices that were given.
        step: Steps taken so far, 0 to K.
        weights: float32[c, d], a new array each time.
    """

    devices: slice
    step: int
    weights: Float32Array


@dataclass(frozen=True)
class Judged:
    """How c devices' models do on their examples.

    Attributes:
        correct: int64[c], right answers.
        loss_sum: float64[c], summed loss in nats.
        count: int64[c], examples.
    """

    correct: Int64Array
    loss_sum: Float64Array
    count: Int64Array


@dataclass(frozen=True)
class AdaptationCurves:
    """How n devices' models do after 0 to K steps of adaptation.

    Attributes:
        correct: int64[n, K + 1], right answers.
        loss_sum: float64[n, K + 1], summed loss in nats.
        count: int64[n], examples that judge.
    """

    correct: Int64Array
    loss_sum: Float64Array
    count: Int64Array

    @property
    def accuracy(self) -> Float64Array:
        """float64[n, K + 1]; NaN for a device that no example judges."""
        count = np.where(self.count > 0, self.count, np.nan)
        shares: Float64Array = self.correct / count[:, None]
        return shares


def adapt_devices(
    model: BatchedModel,
    data: Split,
    rows: Sequence[Int64Array],
    weights: Float32Array,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    frozen: Sequence[str] = (),
    shuffle: bool = True,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[Adapted]:
    """Fine-tune a model to every device's examples, and show it before the first step and after each.

    The batches are those of ``MetaBatches`` for reptile over the given rows, all of which adapt; a step is that of the
    program's ``train`` method. A device without examples keeps its weights.

    Memory: the weights of one batch of devices, and about ``memory_bytes`` besides.

    Args:
        model: Computes the gradients.
        data: All examples.
        rows: Rows of each device that adapt it.
        weights: float32[d], where all devices start, or [n, d], where each does.
        steps: K, at least 0.
        learning_rate: Of each step.
        batch_size: The most examples of a step.
        seed: Of the shuffles, in [0, 2**64): each device's own examples in an order that it decides.
        frozen: Names of parameters, or of modules, that stay as they are.
        shuffle: Whether epochs are shuffled.
        memory_bytes: Bound on what a batch of devices takes at once.

    Yields:
        For one stretch of devices after the other steps 0 to K.

    Raises:
        ProgramInputError: Weights of the wrong shape or dtype.
        ConfigurationError: Numbers that make no adaptation, or a frozen layer that is none.
    """
    plan = _Adaptation.of(
        model,
        data,
        rows,
        weights,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        frozen=frozen,
        shuffle=shuffle,
    )
    for devices in plan.batches(memory_bytes):
        stages = plan.adapt(devices)
        while True:
            with one_thread_an_operation():  # and not what the caller does with it
                stage = next(stages, None)
            if stage is None:
                break
            yield stage


def adaptation_curves(
    model: BatchedModel,
    data: Split,
    rows: Sequence[Int64Array],
    weights: Float32Array,
    tests: Sequence[Int64Array],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    frozen: Sequence[str] = (),
    shuffle: bool = True,
    memory_bytes: int = MEMORY_BYTES,
    test_data: Split | None = None,
    threads: int | None = None,
) -> AdaptationCurves:
    """Adapt as ``adapt_devices`` and judge every device's model after every step.

    Guarantees: the result is the same with any number of threads, to the bit, on one machine.

    Args:
        model: As there.
        data: As there.
        rows: As there.
        weights: As there.
        tests: Rows of each device that judge it.
        steps: As there.
        learning_rate: As there.
        batch_size: As there.
        seed: As there.
        frozen: As there.
        shuffle: As there.
        memory_bytes: For each thread.
        test_data: What ``tests`` are rows of; None: of ``data``.
        threads: Batches of devices that are adapted at the same time; None: one a core.

    Raises:
        ProgramInputError: As there, or not as many ``tests`` as ``rows``.
        ConfigurationError: As there.
    """
    if len(tests) != len(rows):
        raise ProgramInputError(f"{len(rows)} devices adapt and {len(tests)} are judged")
    plan = _Adaptation.of(
        model,
        data,
        rows,
        weights,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        frozen=frozen,
        shuffle=shuffle,
    )
    judging = data if test_data is None else test_data
    correct = np.zeros((len(rows), steps + 1), np.int64)
    losses = np.zeros((len(rows), steps + 1), np.float64)

    def curve(devices: slice) -> None:
        for _, step, adapted in plan.adapt(devices):
            found = evaluate_devices(model, adapted, judging, tests[devices])
            correct[devices, step], losses[devices, step] = found.correct, found.loss_sum

    batches = plan.batches(memory_bytes)
    with one_thread_an_operation(), ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        list(pool.map(curve, batches))
    return AdaptationCurves(correct, losses, np.array([len(t) for t in tests], np.int64))


def evaluate_devices(model: BatchedModel, weights: Float32Array, data: Split, tests: Sequence[Int64Array]) -> Judged:
    """Judge each device's model by its own examples.

    Args:
        model: Computes the losses.
        weights: float32[d], one model for all, or [c, d], each device's own.
        data: All examples.
        tests: Rows of each device that judge it; none gives zeros.
    """
    count = np.array([len(rows) for rows in tests], np.int64)
    found = Judged(np.zeros(len(tests), np.int64), np.zeros(len(tests), np.float64), count)
    gatherer = Gatherer(data, _DEVICES_JUDGED * _EXAMPLES_JUDGED)
    # Devices with about as many examples together; of those that have no more, nothing is computed.
    order = np.argsort(-count, kind="stable")
    for at in range(0, len(tests), _DEVICES_JUDGED):
        group = order[at : at + _DEVICES_JUDGED]
        own = torch.tensor(weights if weights.ndim == 1 else weights[group])
        for first in range(0, int(count[group[0]]), _EXAMPLES_JUDGED):
            active = int(np.count_nonzero(count[group] > first))
            devices = group[:active]
            some = Steps.stacked([[tests[i][first : first + _EXAMPLES_JUDGED]] for i in devices], 1, _EXAMPLES_JUDGED)
            batch = gatherer.gather(some.picked[:, 0], some.counts[:, 0])
            right, losses = model.judge(own if own.dim() == 1 else own[:active], batch)
            found.correct[devices] += right.numpy()
            found.loss_sum[devices] += losses.numpy()
    return found


@dataclass(frozen=True)
class _Adaptation:
    """What a call asks for, checked."""

    model: BatchedModel
    data: Split
    rows: Sequence[Int64Array]
    weights: Float32Array
    meta: MetaPlan | None
    learning_rate: float
    batch_size: int
    seed: int
    frozen: tuple[str, ...]
    shuffle: bool

    @classmethod
    def of(
        cls,
        model: BatchedModel,
        data: Split,
        rows: Sequence[Int64Array],
        weights: Float32Array,
        *,
        steps: int,
        learning_rate: float,
        batch_size: int,
        seed: int,
        frozen: Sequence[str],
        shuffle: bool,
    ) -> _Adaptation:
        d = model.num_parameters
        if weights.dtype != np.float32 or weights.shape not in {(d,), (len(rows), d)}:
            raise ProgramInputError(
                f"weights must be float32[{d}] or [{len(rows)}, {d}], got {weights.dtype}{list(weights.shape)}"
            )
        if steps < 0 or batch_size < 1 or not learning_rate > 0:
            raise ConfigurationError(
                f"adaptation takes at least 0 steps of at least 1 example at a rate above 0, not {steps} of "
                f"{batch_size} at {learning_rate}"
            )
        names = SharedLayers.of(model.parameters, frozen).personal
        meta = MetaPlan(inner_steps=steps) if steps else None
        return cls(model, data, rows, weights, meta, learning_rate, batch_size, seed, names, shuffle)

    def batches(self, memory_bytes: int) -> list[slice]:
        """The devices that adapt together."""
        n = len(self.rows)
        size = clients_at_once(self.model, self.data, self.batch_size, memory_bytes)
        size = max(1, min(size, -(-n // _BATCHES)))
        return [slice(at, min(at + size, n)) for at in range(0, n, size)]

    def adapt(self, devices: slice) -> Iterator[Adapted]:
        """Some devices' models, from step to step."""
        rows = self.rows[devices]
        own = self.weights.ndim > 1
        now: Tensor = torch.tensor(self.weights[devices] if own else self.weights)
        yield Adapted(devices, 0, np.broadcast_to(now.numpy(), (len(rows), now.shape[-1])).copy())
        if self.meta is None:
            return
        batches = [adaptation_batches(r, self.meta, self.batch_size, self.seed, shuffle=self.shuffle) for r in rows]
        table = Steps.stacked(batches, self.meta.inner_steps, self.batch_size)
        gatherer = Gatherer(self.data, len(rows) * self.batch_size)
        rates = table.rates(self.learning_rate)
        for step in range(self.meta.inner_steps):
            after = torch.empty(len(rows), now.shape[-1])
            if table.counts.any():
                batch = gatherer.gather(table.picked[:, step], table.counts[:, step])
                self.model.descend(now, after, batch, rates[:, step, None], frozen=self.frozen)
            else:
                after[:] = now
            now = after
            yield Adapted(devices, step + 1, now.numpy())
