"""The devices of a cohort run: what each learns from, what it remembers, and what it sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression import Codec
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan, normaliser
from client_sdk.reports import compress_update
from client_sdk.training import Controls
from server_ref.aggregation.batch import EncodedUpdate
from server_ref.recipe import compression_of
from server_ref.task import Task
from simulator.adversaries.transport import compress_within
from simulator.adversaries.vectors import within
from simulator.cohort.attackers import CohortAttackers
from simulator.cohort.queue import Broadcast, Job, Trained
from simulator.cohort.trainer import LocalWork


@dataclass(frozen=True, eq=False)
class Memory:
    """What a device carries to its next report, once the server has taken this one.

    Attributes:
        residual: What error feedback left out, float32[size of the update]; None where nothing is to be remembered.
        control: SCAFFOLD's control variate, float32[d]; likewise.
        personal: Its personal layers, float32[p]; likewise.
    """

    residual: Float32Array | None = None
    control: Float32Array | None = None
    personal: Float32Array | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to carry."""
        return self.residual is None and self.control is None and self.personal is None


class Clients:
    """All devices of a run, as far as they differ from one another.

    Memory: error feedback, SCAFFOLD and personal layers (of which there are fewer) take 4 bytes a parameter for each
    device whose report was accepted.

    Args:
        task: What assignments say.
        parts: Rows of each device.
        attackers: The dishonest ones among them.
        plans: What each of them trains, where that is not the same for all.
    """

    def __init__(
        self,
        task: Task,
        parts: Sequence[npt.NDArray[np.int64]],
        attackers: CohortAttackers | None = None,
        plans: Sequence[TrainingPlan] | None = None,
    ) -> None:
        self._task = task
        self._plans = plans
        spec = compression_of(task.settings)
        self._codec = None if spec is None else Codec(spec, task.pipeline.entry.size)
        self._parts = parts
        self._attackers = attackers
        self._memories: dict[int, Memory] = {}

    def work(self, job: Job, broadcast: Broadcast) -> LocalWork:
        """A device's local training on a broadcast."""
        seed = self._task.shuffle_seed(job.number)
        plan = None if self._plans is None else self._plans[job.device]
        own = self._memory(job.device).personal
        return LocalWork(self._parts[job.device], seed, self._controls(job.device, broadcast), plan, own)

    def report(self, job: Job, broadcast: Broadcast, trained: Trained, version: int) -> tuple[EncodedUpdate, Memory]:
        """What a device sends, with what the server's record says of it; and what it remembers if that is accepted.

        Args:
            job: Its assignment.
            broadcast: The model that it was given.
            trained: What became of it.
            version: The newest model.

        Raises:
            UpdateOutOfRange: What the server would decode is beyond what it takes.
        """
        payload, seed, residual = self._encode(job, broadcast, trained.update)
        controls = self._controls(job.device, broadcast)
        control = None if controls is None else controls.device + trained.update[len(controls.device) :]
        update = EncodedUpdate(
            number=job.number,
            payload=payload,
            weight=job.record.weight,
            staleness=version - job.record.model_version,
            seed=seed,
            normaliser=normaliser(self._task.settings.plan, trained.steps),
        )
        # A row of many devices' would keep all of them in memory.
        personal = None if trained.personal is None else trained.personal.copy()
        return update, Memory(residual, control, personal)

    def accepted(self, device: int, memory: Memory) -> None:
        """The server holds the report that this memory was made with."""
        if not memory.empty:
            self._memories[device] = memory

    def personal_layers(self) -> dict[int, Float32Array]:
        """Device -> its personal layers, float32[p]; those of devices that have none yet are the model's."""
        return {d: m.personal for d, m in sorted(self._memories.items()) if m.personal is not None}

    def _memory(self, device: int) -> Memory:
        return self._memories.get(device, Memory())

    def _controls(self, device: int, broadcast: Broadcast) -> Controls | None:
        if broadcast.control is None:
            return None
        own = self._memory(device).control
        return Controls(broadcast.control, np.zeros_like(broadcast.control) if own is None else own)

    def _encode(
        self, job: Job, broadcast: Broadcast, update: Float32Array
    ) -> tuple[Float32Array | bytes, int, Float32Array | None]:
        """The payload, the seed of its compression, and what it leaves out for the next one."""
        task, codec, max_abs = self._task, self._codec, self._task.settings.max_abs
        attackers = self._attackers if self._attackers is not None and self._attackers.attacks(job.device) else None
        if codec is None:
            if attackers is not None:
                update = within(attackers.craft(job.device, broadcast, update), max_abs)
            return update, 0, None
        seed, rounding_seed = task.compression_seed(job.record), task.shuffle_seed(job.number)
        residual = self._memory(job.device).residual
        payload, residual = compress_update(
            codec, update, residual, seed=seed, rounding_seed=rounding_seed, max_abs=max_abs
        )
        if attackers is not None:
            # An attacker starts from what the device has sealed, as ``AdversarialTransport`` has it.
            crafted = attackers.craft(job.device, broadcast, codec.decode(payload, seed))
            payload = compress_within(codec, crafted, seed=seed, rounding_seed=rounding_seed, max_abs=max_abs)
        return payload, seed, residual
