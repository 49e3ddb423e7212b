"""The newest model of a server's task, for a device that serves or adapts it, whether or not it was given work."""

from __future__ import annotations

from dataclasses import dataclass

from client_sdk import events
from client_sdk.executor import MAX_MANIFEST_BYTES, ActionExecutor
from client_sdk.memory import PERSONAL
from client_sdk.programs import Buffer, NamesProgram, check_program, model_weights
from client_sdk.protocol.errors import UnknownDevice
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import EnrolRequest, ModelReply
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, Manifest, Program


@dataclass(frozen=True)
class GlobalModel:
    """A global model as this device begins with it.

    Attributes:
        version: The server's.
        weights: float32 ``[d]``; where the task has personal layers, with the device's own in their place.
        reply: What the server says of it: its program, and the task's plan.
    """

    version: int
    weights: Float32Array
    reply: ModelReply


class ModelSource:
    """Where a device with a transport gets models and programs from, outside of its assignments."""

    def __init__(self, executor: ActionExecutor) -> None:
        self._around = executor.around
        self._executor = executor

    def newest(self) -> GlobalModel:
        """Ask for the newest model, and download what of it and its program is not here.

        Raises:
            BundleMismatch: Model, program and manifest do not belong together.
            ProtocolError, DeviceError: The server refuses, or cannot be reached.
            ProgramError: The program cannot be run here.
        """
        reply = self._ask()
        manifest = self.program(reply).manifest
        check_program(manifest, reply)
        weights = model_weights(decode_frame(self._read(reply.model_sha256)), manifest)
        return GlobalModel(reply.model_version, self._with_own_layers(weights, manifest, reply), reply)

    def program(self, names: NamesProgram) -> Program:
        """The program of these hashes, until the next one is opened.

        Raises:
            See ``newest``.
        """

        def read(sha256: str) -> Buffer:
            return self._read(sha256, MAX_MANIFEST_BYTES if sha256 == names.manifest_sha256 else None)

        return self._around.programs.open(names, read)

    def _ask(self) -> ModelReply:
        around = self._around
        try:
            return around.transport.latest_model()
        except UnknownDevice:  # one that never asked for work, or that the server has forgotten
            key = around.store.identity.public_key.hex()
            around.transport.enrol(EnrolRequest(public_key=key, tier=around.profile.device_type))
            return around.transport.latest_model()

    def _read(self, sha256: str, max_bytes: int | None = None) -> Buffer:
        data, size = self._executor.fetch(sha256, max_bytes or self._around.max_blob_bytes)
        self._around.on_event(events.Downloaded(sha256, size))
        return data

    def _with_own_layers(self, weights: Float32Array, manifest: Manifest, reply: ModelReply) -> Float32Array:
        layers = SharedLayers.of(manifest.parameters, reply.plan.personal)
        memory = self._around.store.memory(reply.task_id) if layers.personal else None
        own = None if memory is None else memory.vector(PERSONAL, layers.num_parameters - layers.size)
        return weights if own is None else layers.with_personal(weights, own)
