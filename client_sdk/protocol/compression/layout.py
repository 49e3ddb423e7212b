"""Named arrays as one flat vector, in a fixed order, and back: compression works on the whole update at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ShapeMismatch
from client_sdk.protocol.program import Float32Array


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an update's arrays, in the order in which they lie in the flat vector.

    Attributes:
        shapes: Name and shape of each; scalars have the shape (), and empty arrays take no place.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Self:
        """The layout of these arrays, in the mapping's order."""
        return cls(tuple((name, tuple(array.shape)) for name, array in arrays.items()))

    @property
    def size(self) -> int:
        """Coordinates of the flat vector."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def flatten(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Float32Array:
        """The arrays one after the other, each in C order: float32[size], a new array.

        Args:
            arrays: Exactly the layout's names, in any order, of floating-point dtypes (rounded to float32) and any
                strides.

        Raises:
            ShapeMismatch: Another set of names, another shape, or a dtype that is not floating point.
        """
        names = {name for name, _ in self.shapes}
        if arrays.keys() != names:
            raise ShapeMismatch(f"names that do not match the layout's: {sorted(arrays.keys() ^ names)}")
        out = np.empty(self.size, np.float32)
        start = 0
        for name, shape in self.shapes:
            array = arrays[name]
            if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
                raise ShapeMismatch(f"{name!r} must be floating point of shape {shape}, not {array.dtype}{array.shape}")
            end = start + math.prod(shape)
            # Values beyond float32 become infinite here; whoever encodes the vector refuses them.
            with np.errstate(over="ignore"):
                out[start:end] = array.reshape(-1)
            start = end
        return out

    def unflatten(self, vector: Float32Array) -> dict[str, Float32Array]:
        """The inverse: name -> array, as views of the vector.

        Raises:
            ShapeMismatch: Another length.
        """
        if vector.shape != (self.size,):
            raise ShapeMismatch(f"the layout has {self.size} coordinates, the vector's shape is {vector.shape}")
        arrays: dict[str, Float32Array] = {}
        start = 0
        for name, shape in self.shapes:
            end = start + math.prod(shape)
            arrays[name] = vector[start:end].reshape(shape)
            start = end
        return arrays
