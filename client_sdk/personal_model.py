"""A device's own model, and how it becomes bytes. No I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from client_sdk.checkpoint_file import Buffer
from client_sdk.errors import CheckpointCorrupted, CheckpointVersionError
from client_sdk.personalization import PersonalRecord
from client_sdk.protocol.errors import ProtocolError
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from client_sdk.protocol.program import Float32Array, Manifest

PERSONAL_FORMAT: Final = "1"

_TENSORS = ("global", "personal")
_METADATA = {"format", "record"}


@dataclass(frozen=True)
class PersonalModel:
    """A device's own weights, the global ones that they come from, and how they were judged.

    Attributes:
        weights: float32 ``[d]``, what the device serves; the global weights where ``record.adapted`` is false.
        global_weights: float32 ``[d]``, of ``record.model_version``.
        record: Where they come from.
    """

    weights: Float32Array = field(repr=False)
    global_weights: Float32Array = field(repr=False)
    record: PersonalRecord

    def is_of(self, manifest: Manifest) -> bool:
        """Whether its weights are this very program's."""
        return (
            self.record.program_sha256 == manifest.program_sha256
            and self.record.parameter_table_sha256 == manifest.parameter_table_sha256
            and len(self.weights) == manifest.num_parameters
        )

    def to_bytes(self) -> bytes:
        """A frame; floats are kept to the bit."""
        tensors = {"global": self.global_weights, "personal": self.weights}
        return encode_frame(tensors, {"format": PERSONAL_FORMAT, "record": self.record.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: Buffer, max_bytes: int) -> PersonalModel:
        """Read ``to_bytes``; the vectors are read-only views into ``data``.

        Raises:
            CheckpointVersionError: Another format of personal models.
            CheckpointCorrupted: It is none.
        """
        try:
            return cls._parsed(data, max_bytes)
        except (ProtocolError, ValueError, KeyError) as e:
            raise CheckpointCorrupted("its content is not a personal model") from e

    @classmethod
    def _parsed(cls, data: Buffer, max_bytes: int) -> PersonalModel:
        frame = decode_frame(data, FrameLimits(max_bytes=max_bytes))
        if set(frame.metadata) != _METADATA or tuple(frame.tensors) != _TENSORS:
            raise ValueError("its names are not a personal model's")
        found = frame.metadata["format"]
        if found != PERSONAL_FORMAT:
            raise CheckpointVersionError(f"the personal model has format {found}; this release reads {PERSONAL_FORMAT}")
        of_all, own = frame.tensors["global"], frame.tensors["personal"]
        if {of_all.dtype, own.dtype} != {np.dtype(np.float32)} or of_all.ndim != 1 or of_all.shape != own.shape:
            raise ValueError("its vectors are not a personal model's")
        model = cls(
            own.view(np.float32), of_all.view(np.float32), PersonalRecord.model_validate_json(frame.metadata["record"])
        )
        if model.record.global_sha256 != weights_hash(model.global_weights):
            raise ValueError("its global weights are not those that its record names")
        return model


def weights_hash(weights: Float32Array) -> str:
    """SHA-256 (hex) of flat weights, float32 in little-endian order."""
    return hashlib.sha256(np.ascontiguousarray(weights, "<f4").data).hexdigest()
