"""Payloads of an integrated task: what a worker sends, and what a detector sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from client_sdk.protocol.compression import Codec
from client_sdk.protocol.errors import ConfigurationError, MalformedEncoding
from client_sdk.protocol.updates import WorkerGradient
from server_ref.aggregation.batch import Float32Array, Float64Array
from server_ref.aggregation.integrated_config import CompressionConfig
from server_ref.aggregation.support_voting import Support
from server_ref.aggregation.tensors import TensorLayout


@dataclass(frozen=True, eq=False)
class Wire:
    """Both directions for one model.

    Attributes:
        config: How updates are compressed.
        layout: The model's.
        support: What the workers have elected; None where they do not vote, or have not yet.

    Raises:
        ConfigurationError: A vote is wanted, and there is no support yet.
    """

    config: CompressionConfig
    layout: TensorLayout
    support: Support | None = None

    def __post_init__(self) -> None:
        if self.config.method == "voted" and self.support is None:
            raise ConfigurationError("no support has been elected yet; collect ballots, then elect_support")

    @property
    def size(self) -> int:
        """Coordinates of a decoded update: what the pipeline sees."""
        return self.layout.size if self.support is None else self.support.indices.size

    @cached_property
    def codec(self) -> Codec:
        """Of a payload."""
        return Codec(self.config.spec, self.size)

    def seed(self, model_version: int) -> int:
        """Of an update that was computed on this model: public, and the server's own to know."""
        return (self.config.seed << 32) + model_version

    def encode(self, update: Mapping[str, Any], model_version: int) -> bytes:
        """The payload of tensors.

        Raises:
            ShapeMismatch: Not an update of this model.
            NonFiniteUpdate: NaN or infinities.
        """
        vector = flat(update, self.layout)
        if self.support is not None:
            vector = self.support.project(vector)
        return self.codec.encode(vector, self.seed(model_version))

    def payload_of(self, worker: WorkerGradient, model_version: int) -> bytes:
        """What a worker sent, in ``metadata["payload"]``; dense tensors are encoded first.

        Raises:
            MalformedEncoding: Something else in place of bytes.
            ProtocolError: As ``encode``.
        """
        payload = (worker.metadata or {}).get("payload")
        if payload is None:
            return self.encode(worker.gradients, model_version)
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise MalformedEncoding("a payload is bytes")
        return bytes(payload)

    def sparse(self, payload: bytes, model_version: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values by name, and the ``indices`` and ``shapes`` that a detector reads; raises as ``Codec.decode`` does."""
        sent = self.codec.decode_sparse(payload, self.seed(model_version))
        values, indices = {}, {}
        for name, entry in self.layout.entries.items():
            first, last = np.searchsorted(sent.indices, (entry.start, entry.stop))
            values[name] = sent.values[first:last]
            indices[name] = sent.indices[first:last] - entry.start
        return values, {"indices": indices, "shapes": {n: e.shape for n, e in self.layout.entries.items()}}

    def scattered(self, values: Float64Array) -> Float64Array:
        """An aggregate in the model's coordinates, float64[layout.size]."""
        return values if self.support is None else np.asarray(self.support.scatter(values), np.float64)


def flat(update: Mapping[str, Any], layout: TensorLayout) -> Float32Array:
    """Tensors as one vector, float32[size].

    Raises:
        ShapeMismatch: Not an update of this model.
    """
    vector = np.empty(layout.size, np.float32)
    layout.flatten(update, vector)
    return vector
