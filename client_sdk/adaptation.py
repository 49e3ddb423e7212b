"""A few steps of a global model towards a device's own examples: within its memory, under its conditions. No files."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from client_sdk.data import Examples, Int64Array
from client_sdk.descent import Descent, descent_method
from client_sdk.errors import Interrupted, TrainingPaused
from client_sdk.footprint import MIB, estimate_memory, mib
from client_sdk.local_training import LocalTraining
from client_sdk.memory_budget import MemoryBudget
from client_sdk.personalization import PersonalizationConfig
from client_sdk.power import PowerMonitor
from client_sdk.protocol.errors import MemoryBudgetExceeded
from client_sdk.protocol.meta_learning import ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.throttle import Governor
from client_sdk.training_loop import APP_REASON

_DESCENDING = (Role.ADAPT, Role.TRAIN, Role.GRAD)
"""Roles whose methods take steps of some layers; ``reptile`` takes those of all alone."""


@dataclass(frozen=True)
class Adaptation:
    """How a device adapts weights.

    Attributes:
        local: The program, and what the device can spend: power, memory, clocks.
        config: The app's choices.
        conditions: The app's own reason not to work now, or None; asked before and between calls of the program.
        should_stop: Asked before each call.
    """

    local: LocalTraining
    config: PersonalizationConfig
    conditions: Callable[[], str | None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False

    def batch_size(self, num_examples: int, held_bytes: int = 0) -> int:
        """Examples of a step: as configured, else the size of the program's that fits them best and fits the memory.

        Args:
            num_examples: Those that adapt.
            held_bytes: What the examples take, which are in memory already.

        Raises:
            MemoryBudgetExceeded: None fits; says what the least that was tried takes, item by item.
            UnknownMethod: The program cannot train in batches of the configured size, or at all.
        """
        manifest, wanted = self.local.program.manifest, self.config.batch_size
        frozen = bool(self._frozen())
        roles = _DESCENDING if frozen else (*_DESCENDING, Role.REPTILE)
        sizes = {size for role in roles for size in manifest.batch_sizes(role)}
        best = best_size(sizes or {1}, num_examples) if wanted is None else wanted
        for size in [best, *sorted((s for s in sizes if s < best and wanted is None), reverse=True)]:
            method = descent_method(manifest, size, self.config.inner_steps, frozen=frozen)
            estimate = estimate_memory(
                manifest,
                method,
                TrainingPlan(batch_size=size, learning_rate=self.config.inner_lr),
                num_samples=max(1, num_examples),
                baseline_bytes=self.local.baseline_bytes + held_bytes,
            )
            if estimate.total_bytes <= self._budget_bytes(held_bytes):
                return size
        raise MemoryBudgetExceeded(
            f"adapting {manifest.model_name} does not fit into {mib(self._budget_bytes(held_bytes))} MiB; the least "
            f"takes {estimate}"
        )

    def _budget_bytes(self, held_bytes: int) -> int:
        """As for training: what the app allows, else what is there anyway and a fraction of the device's memory."""
        local = self.local
        if local.memory_limit_bytes is not None:
            return local.memory_limit_bytes
        return local.baseline_bytes + held_bytes + int(local.memory_fraction * local.profile.available_memory_mb * MIB)

    def adapted(self, start: Float32Array, examples: Examples, rows: Int64Array, steps: int) -> Float32Array:
        """Take some steps.

        Args:
            start: float32 ``[d]``.
            examples: All of the device's.
            rows: Of those that adapt.
            steps: K.

        Returns:
            float32 ``[d]``; ``start`` itself where no step is taken.

        Raises:
            TrainingPaused: The device's conditions do not allow it now.
            Interrupted: ``should_stop`` said so.
            MemoryBudgetExceeded: It does not fit into the device's memory.
            TrainingDiverged, ProgramError, ConfigurationError: See ``Descent.run``.
        """
        if not steps:
            return start
        check_conditions(self.local.power, self.conditions)
        config, program = self.config, self.local.program
        size = self.batch_size(len(rows), sum(array.nbytes for array in examples))
        nobody = np.empty(0, np.int64)
        batches = MetaBatches.of(
            "reptile",  # which adapts with all that it is given
            MetaPlan(inner_steps=steps),
            ExampleSplit(rows, nobody),
            batch_size=size,
            seed=config.seed,
            shuffle=config.shuffle,
        )
        own, _ = Descent(program, size).run(
            start,
            *examples,
            batches.support,
            config.inner_lr,
            frozen=self._frozen(),
            on_call=_Watch(self.local, self.conditions, self.should_stop).look,
        )
        return own

    def _frozen(self) -> tuple[str, ...]:
        names = self.config.personal_layers
        if names is None:
            return ()
        return tuple(p.name for p in SharedLayers.of(self.local.program.manifest.parameters, names).shared)


class _Watch:
    """Looks before each call of the program, and after the last, whether to go on; rests as training does."""

    def __init__(
        self, local: LocalTraining, conditions: Callable[[], str | None], should_stop: Callable[[], bool]
    ) -> None:
        self._conditions = conditions
        self._should_stop = should_stop
        self._monotonic = local.monotonic
        self._budget = None if local.memory_limit_bytes is None else MemoryBudget(local.memory_limit_bytes)
        self._governor = None
        if local.power is not None:
            self._governor = Governor(local.power, monotonic=local.monotonic, sleep=local.sleep)
        self._began: float | None = None

    def look(self) -> None:
        """Raise where adapting may not go on."""
        now = self._monotonic()
        if self._governor is not None and self._began is not None:
            self._governor.after_call(now - self._began)
        if self._budget is not None:
            self._budget.check()
        if self._should_stop():
            raise Interrupted("adapting the model was interrupted")
        own = self._conditions()
        if own is not None:
            raise TrainingPaused(own, reason=APP_REASON)
        if self._governor is not None:
            verdict = self._governor.before_call(at_step_boundary=True)
            if not verdict.allowed:
                raise TrainingPaused(verdict.detail, reason=str(verdict.reason))
        self._began = self._monotonic()


def check_conditions(power: PowerMonitor | None, conditions: Callable[[], str | None]) -> None:
    """Ask whether adapting may begin: it needs what a training needs.

    Raises:
        TrainingPaused: No; it says why.
    """
    own = conditions()
    if own is not None:
        raise TrainingPaused(own, reason=APP_REASON)
    if power is not None:
        verdict = power.start_verdict()
        if not verdict.allowed:
            raise TrainingPaused(verdict.detail, reason=str(verdict.reason))


def best_size(sizes: Collection[int], num_examples: int) -> int:
    """The smallest batch that holds all examples, else the largest.

    >>> best_size({4, 8, 32}, 6), best_size({4, 8}, 100)
    (8, 8)
    """
    return min((size for size in sizes if size >= num_examples), default=max(sizes))
