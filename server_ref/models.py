"""The global model and its encoding as a blob."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import InvalidUpdate, ShapeMismatch
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import CONTROL_TENSOR
from client_sdk.protocol.program import Manifest


@dataclass(frozen=True)
class GlobalModel:
    """One version: its number, its bytes (a frame of named parameters), their hash, and a flat view of them."""

    version: int
    sha256: str
    frame: bytes
    weights: npt.NDArray[np.float32]


def encode_model(version: int, weights: npt.NDArray[np.float32], manifest: Manifest) -> GlobalModel:
    """Frame float32[d] weights as named parameters in parameter-table order."""
    tensors = {p.name: weights[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in manifest.parameters}
    return decode_model(version, encode_frame(tensors), manifest)


def decode_model(version: int, frame: bytes, manifest: Manifest) -> GlobalModel:
    """Read a model blob.

    Raises:
        ShapeMismatch: The parameters are not those of the manifest, in its order.
        InvalidUpdate: NaN or infinite weights.
    """
    decoded = decode_frame(frame)
    found = [(name, t.shape, t.dtype) for name, t in decoded.tensors.items()]
    if found != [(p.name, p.shape, np.dtype(np.float32)) for p in manifest.parameters]:
        raise ShapeMismatch("the model's parameters are not those of the program's manifest")
    weights = np.frombuffer(decoded.payload, np.float32)
    if not np.isfinite(weights).all():
        raise InvalidUpdate("the model holds NaN or infinite weights")
    return GlobalModel(version, hashlib.sha256(frame).hexdigest(), frame, weights)


def encode_control(control: npt.NDArray[np.float64]) -> bytes:
    """SCAFFOLD's control variate as devices get it: a frame with one float32[d] tensor."""
    return encode_frame({CONTROL_TENSOR: control.astype(np.float32)})
