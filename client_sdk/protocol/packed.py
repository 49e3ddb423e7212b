"""Packing: two coordinates of a secret in one share, so that shares are half as long.

With packing k, element j of every share belongs to one polynomial that has coordinate ``k j + i`` of the secret at the
point -i, for i = 0 .. k - 1. A vector that does not fill the last element is followed by zeros. t - 1 shares still say
nothing, but ``t + k - 1`` are needed to reconstruct.
"""

from __future__ import annotations

from client_sdk.protocol.errors import ShapeMismatch
from client_sdk.protocol.field import Field, FieldVector


def packed_length(size: int, packing: int) -> int:
    """Elements of a share of ``size`` coordinates."""
    return -(-size // packing)


def pack(secret: FieldVector, packing: int, field: Field) -> list[FieldVector]:
    """The secrets at the points 0, -1, ..: views of the vector, or of a copy with zeros at its end."""
    missing = -len(secret) % packing
    if missing:
        padded = field.zeros(len(secret) + missing)
        padded[: len(secret)] = secret
        secret = padded
    return [secret[i::packing] for i in range(packing)]


def unpack(rows: list[FieldVector], size: int, field: Field) -> FieldVector:
    """The vector whose secrets at 0, -1, .. are given. The last ones may be padding, which is left out.

    Raises:
        ShapeMismatch: The rows do not hold ``size`` coordinates.
    """
    packing = len(rows)
    if any(len(row) != packed_length(size, packing) for row in rows):
        raise ShapeMismatch(f"{packing} rows of {len(rows[0])} elements do not hold {size} coordinates")
    if packing == 1:
        return rows[0]
    out = field.empty(len(rows[0]) * packing)
    for i, row in enumerate(rows):
        out[i::packing] = row
    return out[:size]
