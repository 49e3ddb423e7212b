"""The attackers of a cohort run: the same coalition as among SDK devices, rehearsing in batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan
from simulator.adversaries import AttackPlan, Coalition
from simulator.adversaries.plan import plain_plan, stacked
from simulator.cohort.queue import Broadcast
from simulator.cohort.trainer import CohortTrainer, LocalWork


class CohortAttackers:
    """All attackers of a fleet.

    Args:
        attack: Who they are, and what they do.
        rehearsal: Trains on the examples as they were before the attack.
        parts: Rows of each device.
        plan: The local training.
        plans: Each device's own, where they differ.
        layers: Which are shared, and attacked; None: all.
    """

    def __init__(
        self,
        attack: AttackPlan,
        rehearsal: CohortTrainer,
        parts: Sequence[npt.NDArray[np.int64]],
        plan: TrainingPlan,
        plans: Sequence[TrainingPlan] | None = None,
        *,
        layers: SharedLayers | None = None,
    ) -> None:
        self._attack = attack
        self._coalition = Coalition(attack)
        self._rehearsal = rehearsal
        self._parts = parts
        self._plan = plain_plan(plan)
        self._layers = layers
        self._plans = None if plans is None else [plain_plan(p) for p in plans]

    def attacks(self, device: int) -> bool:
        """Whether a device is one of them."""
        return self._attack.attacks(device)

    def craft(self, device: int, broadcast: Broadcast, honest: Float32Array) -> Float32Array:
        """What an attacker sends instead of its honest update.

        SCAFFOLD's second half, the change of the device's control variate, stays what the device computed: the attacks
        of the literature are on the model's update.
        """
        weights = self._shared(broadcast)
        delta, control = np.split(honest, [len(weights)])
        crafted = self._coalition.craft(
            device, broadcast.version, delta, weights, lambda devices: self._rehearse(devices, broadcast)
        )
        return np.concatenate([crafted, control]) if len(control) else crafted

    def _shared(self, broadcast: Broadcast) -> Float32Array:
        return broadcast.weights if self._layers is None else self._layers.gather(broadcast.weights)

    def _rehearse(self, devices: Sequence[int], broadcast: Broadcast) -> Float32Array:
        """What these devices would honestly send from this model, all with its personal layers."""
        work = [
            LocalWork(
                self._parts[d],
                self._attack.rehearsal_seed(broadcast.version, d),
                plan=None if self._plans is None else self._plans[d],
            )
            for d in devices
        ]
        result = self._rehearsal.train(broadcast.weights, work, self._plan)
        rows = [row for i, row in enumerate(result.updates) if i not in result.failures]
        return stacked(rows, len(self._shared(broadcast)))
