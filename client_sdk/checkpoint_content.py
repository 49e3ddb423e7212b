"""What is kept of a training, whose it is, and how it becomes bytes. No I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from client_sdk.errors import CheckpointCorrupted
from client_sdk.memory import DeviceMemory
from client_sdk.protocol.errors import ProtocolError
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from client_sdk.protocol.messages import Id128
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training_state import Int64Array, TrainingState

Buffer = bytes | bytearray | memoryview

_SHA256 = "^[0-9a-f]{64}$"
_ROWS_PER_CHUNK = 1024
# Name -> dtype and length, where it is one and the same for all.
_LAYOUT: Final[dict[str, tuple[np.dtype[Any], int | None]]] = {
    "progress": (np.dtype(np.int64), 5),
    "losses": (np.dtype(np.float64), 4),
    "weights": (np.dtype(np.float32), None),
    "accumulator": (np.dtype(np.float32), None),
    "memory": (np.dtype(np.uint8), None),
}
_OPTIONAL = {"accumulator", "memory"}
_REQUIRED = set(_LAYOUT) - _OPTIONAL


class CheckpointBinding(BaseModel):
    """What a training is a function of: a checkpoint serves a training where all of it is the same.

    The plan and the shuffle seed are the whole state of the randomness: the order of each epoch is drawn by a
    counter-based generator, Philox, whose key is the seed and the epoch.

    Attributes:
        assignment_id: Of the assignment that is being fulfilled.
        task_id: Its task.
        model_version: Its version of the model.
        model_sha256: Of the global weights' frame.
        program_sha256: Of the program.
        parameter_table_sha256: Of the order of the parameters.
        plan: As it is really trained.
        shuffle_seed: In ``[0, 2**64)``.
        slice_size: As given to ``LocalTrainer.begin``.
        data_sha256: ``data_fingerprint`` of the device's examples.
        control_sha256: Of the server's control variate, with scaffold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    assignment_id: Id128
    task_id: Id128
    model_version: int = Field(ge=0)
    model_sha256: str = Field(pattern=_SHA256)
    program_sha256: str = Field(pattern=_SHA256)
    parameter_table_sha256: str = Field(pattern=_SHA256)
    plan: TrainingPlan
    shuffle_seed: int = Field(ge=0, lt=2**64)
    slice_size: int | None = Field(None, ge=1)
    data_sha256: str = Field(pattern=_SHA256)
    control_sha256: str | None = Field(None, pattern=_SHA256)

    def differences(self, other: CheckpointBinding) -> tuple[str, ...]:
        """Names of the fields in which two bindings differ."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) != getattr(other, name))


@dataclass(frozen=True)
class Checkpoint:
    """A training that was left, and can go on bit for bit.

    Attributes:
        binding: Which training it is.
        state: How far it is.
        memory: The residual (error feedback) and the control variate (SCAFFOLD) that it began with; None for none.
    """

    binding: CheckpointBinding
    state: TrainingState
    memory: DeviceMemory | None = None

    def to_bytes(self) -> bytes:
        """A frame; floats are kept to the bit."""
        s = self.state
        tensors: dict[str, npt.NDArray[Any]] = {
            "progress": np.array([s.slices_done, s.epoch, s.position, s.steps, s.seen], np.int64),
            "losses": np.array([s.accumulated_loss, s.loss_sum, s.first_epoch_loss, s.last_epoch_loss], np.float64),
            "weights": s.weights,
        }
        if s.accumulator is not None:
            tensors["accumulator"] = s.accumulator
        if self.memory is not None:
            tensors["memory"] = np.frombuffer(self.memory.to_bytes(), np.uint8)
        return encode_frame(tensors, {"binding": self.binding.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: Buffer, max_bytes: int) -> Checkpoint:
        """Read ``to_bytes``; the vectors are read-only views into ``data``.

        Raises:
            CheckpointCorrupted: It is no checkpoint's content.
        """
        try:
            return cls._parsed(data, max_bytes)
        except (ProtocolError, ValueError, KeyError) as e:
            raise CheckpointCorrupted("its content is not a checkpoint's") from e

    @classmethod
    def _parsed(cls, data: Buffer, max_bytes: int) -> Checkpoint:
        frame = decode_frame(data, FrameLimits(max_bytes=max_bytes))
        tensors = frame.tensors
        if set(frame.metadata) != {"binding"} or not _REQUIRED <= set(tensors) <= _REQUIRED | _OPTIONAL:
            raise ValueError("its names are not a checkpoint's")
        for name, tensor in tensors.items():
            dtype, length = _LAYOUT[name]
            if tensor.dtype != dtype or tensor.ndim != 1 or length not in (None, len(tensor)):
                raise ValueError(f"its {name} is not a checkpoint's")
        slices_done, epoch, position, steps, seen = tensors["progress"].tolist()
        accumulated_loss, loss_sum, first_epoch_loss, last_epoch_loss = tensors["losses"].tolist()
        accumulator, memory = tensors.get("accumulator"), tensors.get("memory")
        state = TrainingState(
            tensors["weights"].view(np.float32),
            accumulator=None if accumulator is None else accumulator.view(np.float32),
            accumulated_loss=accumulated_loss,
            slices_done=slices_done,
            epoch=epoch,
            position=position,
            steps=steps,
            loss_sum=loss_sum,
            seen=seen,
            first_epoch_loss=first_epoch_loss,
            last_epoch_loss=last_epoch_loss,
        )
        binding = CheckpointBinding.model_validate_json(frame.metadata["binding"])
        return cls(binding, state, None if memory is None else DeviceMemory.from_bytes(memory.tobytes()))


def data_fingerprint(x: Float32Array, y: Int64Array) -> str:
    """SHA-256 (hex) of examples: shapes, dtypes and values in order, whatever their layout in memory."""
    digest = hashlib.sha256()
    for array in (x, y):
        digest.update(f"{array.dtype.str}{list(array.shape)};".encode())
        for at in range(0, len(array), _ROWS_PER_CHUNK):
            digest.update(np.ascontiguousarray(array[at : at + _ROWS_PER_CHUNK]).data)
    return digest.hexdigest()
