"""Layers that stay on the device (FedPer), and the flat vector of those that are shared.

A task may name parameters that each device keeps for itself [Arivazhagan et al. 2019, "Federated Learning with
Personalization Layers"]. Updates, compression, clipping, noise and shares then have the shared coordinates alone: of
the others nothing is ever sent, not even zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import Float32Array, ParameterSpec


@dataclass(frozen=True)
class SharedLayers:
    """Which coordinates of the flat weight vector are shared, and which are personal.

    Attributes:
        parameters: The whole parameter table.
        personal: Names of the personal parameters, in its order.
    """

    parameters: tuple[ParameterSpec, ...]
    personal: tuple[str, ...] = ()

    @classmethod
    def of(cls, parameters: Sequence[ParameterSpec], personal: Sequence[str]) -> Self:
        """Resolve names.

        Args:
            parameters: Of the manifest.
            personal: Each the name of a parameter, or of a module whose parameters all stay (``output`` for
                ``output.weight`` and ``output.bias``).

        Raises:
            ConfigurationError: A name that is none, or nothing that would be shared.
        """
        table = tuple(parameters)
        chosen = set()
        for name in personal:
            found = {p.name for p in table if p.name == name or p.name.startswith(f"{name}.")}
            if not found:
                names = ", ".join(p.name for p in table)
                raise ConfigurationError(f"the model has no layer {name!r} to keep on the device; it has {names}")
            chosen |= found
        if len(chosen) == len(table):
            raise ConfigurationError("all layers are personal, so that there is nothing to share: name fewer")
        return cls(table, tuple(p.name for p in table if p.name in chosen))

    @property
    def shared(self) -> tuple[ParameterSpec, ...]:
        """The shared parameters, with their offsets in the vector that is sent."""
        table, offset = [], 0
        for p in self.parameters:
            if p.name not in self.personal:
                table.append(ParameterSpec(name=p.name, shape=p.shape, offset=offset))
                offset += p.num_elements
        return tuple(table)

    @property
    def num_parameters(self) -> int:
        """Length d of the whole vector."""
        return sum(p.num_elements for p in self.parameters)

    @property
    def size(self) -> int:
        """Number of shared coordinates; d where nothing is personal."""
        return sum(p.num_elements for p in self.parameters if p.name not in self.personal)

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Which coordinates are shared, bool ``[d]``: true where one is."""
        return np.concatenate([np.full(p.num_elements, p.name not in self.personal) for p in self.parameters])

    def gather(self, vector: Float32Array) -> Float32Array:
        """The shared coordinates of a vector of length d; the vector itself where nothing is personal."""
        return vector[self.mask] if self.personal else vector

    def personal_of(self, vector: Float32Array) -> Float32Array:
        """The personal coordinates of a vector of length d."""
        return vector[~self.mask]

    def with_personal(self, vector: Float32Array, own: Float32Array) -> Float32Array:
        """A copy of a vector of length d in which the personal coordinates are the given ones."""
        whole = vector.copy()
        whole[~self.mask] = own
        return whole

    def with_shared(self, vector: Float32Array, shared: Float32Array) -> Float32Array:
        """A copy of a vector of length d in which the shared coordinates are the given ones."""
        whole = vector.copy()
        whole[self.mask] = shared
        return whole
