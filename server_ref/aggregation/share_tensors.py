"""Shares as named tensors: what the specification's signatures carry, and the field's vectors behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ShapeMismatch
from client_sdk.protocol.field import Field, FieldVector
from server_ref.aggregation.tensors import as_numpy, in_kind_of

Tensors = dict[str, Any]
"""Parameter name -> array or tensor."""


def vector_of(share: Mapping[str, Any], field: Field) -> FieldVector:
    """A share's tensors as one vector.

    Raises:
        ShapeMismatch: A tensor that is not uint64 (int64 with the same bits in torch), or has not the field's limbs.
        MalformedShare: An element that is not canonical.
    """
    parts = [np.empty(0, np.uint64)]
    for name, tensor in share.items():
        array = as_numpy(tensor)
        if array.dtype not in {np.dtype(np.uint64), np.dtype(np.int64)}:
            raise ShapeMismatch(f"{name!r} is no share: {array.dtype}{list(array.shape)}")
        if field.limbs > 1 and array.shape[-1:] != (field.limbs,):
            raise ShapeMismatch(f"{name!r} has no last dimension of {field.limbs} limbs: {list(array.shape)}")
        parts.append(np.ascontiguousarray(array).view(np.uint64).reshape(-1))
    words = np.concatenate(parts)
    vector = words.reshape(-1, field.limbs) if field.limbs > 1 else words
    field.require(vector)
    return vector


def named(rows: npt.NDArray[Any], shapes: Mapping[str, tuple[int, ...]], like: Mapping[str, Any]) -> Tensors:
    """Coordinates as tensors by name, in the kinds of ``like``; torch gets int64 for uint64, with the same bits.

    Args:
        rows: One row or number for each coordinate, in order of the names.
        shapes: Of the parameters.
        like: Tensors, or a layout's entries, of these names.
    """
    out, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        part = rows[start:stop].reshape((*shape, *rows.shape[1:]))
        start = stop
        # torch has no arithmetic, and hardly a function, for unsigned words.
        signed = part.view(np.int64) if part.dtype == np.uint64 else part
        converted = in_kind_of(like[name], signed)
        out[name] = part if converted is signed else converted
    return out


def parameter_shapes(share: Mapping[str, Any], field: Field) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a share's tensors stand for."""
    shapes = {name: tuple(int(n) for n in tensor.shape) for name, tensor in share.items()}
    return shapes if field.limbs == 1 else {name: shape[:-1] for name, shape in shapes.items()}
