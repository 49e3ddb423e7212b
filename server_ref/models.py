"""The global model: applying an aggregate, and its encoding as a blob."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import InvalidUpdate, ShapeMismatch
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.program import Manifest
from client_sdk.protocol.updates import UpdateKind


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


def apply_update(
    weights: npt.NDArray[np.float32],
    aggregate: npt.NDArray[np.float64],
    kind: UpdateKind,
    server_learning_rate: float = 1.0,
) -> npt.NDArray[np.float32]:
    """New weights: a delta is added, a gradient subtracted, both scaled by the server's learning rate.

    Args:
        weights: float32[d].
        aggregate: float64[d], the weighted mean of the updates.
        kind: Says the sign.
        server_learning_rate: Scale.

    Returns:
        float32[d], computed in float64 and rounded once.

    Raises:
        InvalidUpdate: The result is not finite.
    """
    step = server_learning_rate if kind is UpdateKind.DELTA else -server_learning_rate
    with np.errstate(over="ignore", invalid="ignore"):
        updated = (weights.astype(np.float64) + step * aggregate).astype(np.float32)
    if not np.isfinite(updated).all():
        raise InvalidUpdate("the update would make the model's weights infinite or NaN")
    return updated
