"""The attackers among devices that run the real SDK: whose transports are wrapped, and how colluders rehearse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.programs import ProgramProvider, model_weights
from client_sdk.protocol.errors import NotEnoughExamples, TrainingDiverged
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.trainings import begin_training
from client_sdk.transport import Buffer, Transport
from simulator.adversaries.examples import Float32Array
from simulator.adversaries.plan import AttackPlan, Coalition, plain_plan, stacked
from simulator.adversaries.transport import AdversarialTransport
from simulator.datasets import Split
from simulator.errors import AttackError


class SdkAttackers:
    """All attackers of a fleet of SDK devices.

    They share what the fleet shares anyway: programs and downloaded models. Nothing more is downloaded for an attack,
    so that the bytes on the wire are those of honest devices.
    """

    def __init__(
        self,
        plan: AttackPlan,
        *,
        programs: ProgramProvider,
        blob: Callable[[str], Buffer | None],
        data: Split,
        parts: Sequence[npt.NDArray[np.int64]],
        plans: Sequence[TrainingPlan] | None = None,
    ) -> None:
        """Bring the attackers together.

        Args:
            plan: The attack.
            programs: Gives the calling thread the program of an assignment.
            blob: Hash -> a blob that some device has downloaded.
            data: All training examples.
            parts: Rows of each device.
            plans: What each device trains, where that is not the same for all.
        """
        self.plan = plan
        self._plans = plans
        self._coalition = Coalition(plan)
        self._programs = programs
        self._downloaded = blob
        self._data = data
        self._parts = parts

    def transport(self, device: int, inner: Transport) -> AdversarialTransport:
        """The way to the server of one attacker."""
        return AdversarialTransport(inner, _Device(self, device))

    def program(self, assignment: Assignment) -> Program:
        """The assignment's program, for the calling thread, which has just trained with it."""
        return self._programs.open(assignment, self._blob)

    def craft(self, device: int, assignment: Assignment, own: Float32Array) -> Float32Array:
        """What a device sends instead of its honest update.

        SCAFFOLD's second half, the change of the device's control variate, stays what the device computed: the attacks
        of the literature are on the model's update.
        """
        program = self.program(assignment)
        weights = model_weights(decode_frame(self._blob(assignment.model_sha256)), program.manifest)
        layers = _layers(program, assignment)
        delta, control = np.split(own, [layers.size])
        crafted = self._coalition.craft(
            device,
            assignment.model_version,
            delta,
            layers.gather(weights),
            lambda devices: self._rehearse(devices, assignment, program, weights),
        )
        return np.concatenate([crafted, control]) if len(control) else crafted

    def _rehearse(
        self, devices: Sequence[int], assignment: Assignment, program: Program, weights: Float32Array
    ) -> Float32Array:
        """What these devices would honestly send from this model; without SCAFFOLD's correction, which is theirs."""
        layers = _layers(program, assignment)
        rows = []
        for device in devices:
            x, y = self._data.x[self._parts[device]], self._data.y[self._parts[device]]
            seed = self.plan.rehearsal_seed(assignment.model_version, device)
            plan = plain_plan(assignment.plan if self._plans is None else self._plans[device])
            # The personal layers that others have are theirs: all are rehearsed with those of the model.
            whole = plan.model_copy(update={"personal": ()})
            try:
                run = begin_training(program, weights, (x, y), whole, seed)
                while not run.finished:
                    run.advance()
                rows.append(layers.gather(run.result().update(whole)))
            except (TrainingDiverged, NotEnoughExamples):
                continue
        return stacked(rows, layers.size)

    def _blob(self, sha256: str) -> Buffer:
        data = self._downloaded(sha256)
        if data is None:
            raise AttackError(f"blob {sha256} has left the pool that the devices share; the model is too large for it")
        return data


def _layers(program: Program, assignment: Assignment) -> SharedLayers:
    """What of a model is sent, and attacked."""
    return SharedLayers.of(program.manifest.parameters, assignment.plan.personal)


@dataclass(frozen=True)
class _Device:
    """One of them, as its transport sees it."""

    attackers: SdkAttackers
    device: int

    def num_parameters(self, assignment: Assignment) -> int:
        return _layers(self.attackers.program(assignment), assignment).size

    def craft(self, assignment: Assignment, own: Float32Array) -> Float32Array:
        return self.attackers.craft(self.device, assignment, own)
