"""Integers as elements of a Mersenne field, and back: c stands for c mod p, and comes back as the least magnitude."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.mersenne.blocks import FieldVector

_SIGN: Final = np.int64(63)
_P61: Final = np.int64(2**61 - 1)
_HALF_P61: Final = np.int64(2**60 - 1)
_TOP_127: Final = np.uint64(2**63 - 1)
_SIGN_127: Final = np.uint64(62)


def largest_magnitude(codes: npt.NDArray[np.int64]) -> int:
    """Of a vector's integers; 0 for none."""
    return max(int(codes.max(initial=0)), -int(codes.min(initial=0)))


def encode_61(codes: npt.NDArray[np.int64], out: FieldVector) -> None:
    """``out = codes mod 2^61 - 1``, for magnitudes below 2^60."""
    sign = codes >> _SIGN
    sign &= _P61
    np.add(codes, sign, out=out.view(np.int64))


def decode_61(vector: FieldVector, out: npt.NDArray[np.int64]) -> None:
    """``out`` = the integers of magnitude below 2^60 that the elements stand for."""
    codes = vector.view(np.int64)
    negative = _HALF_P61 - codes
    negative >>= _SIGN
    negative &= _P61
    np.subtract(codes, negative, out=out)


def encode_127(codes: npt.NDArray[np.int64], out: FieldVector) -> None:
    """``out = codes mod 2^127 - 1``, for any codes."""
    # p - |c| has the low limb c - 1, and above it ones.
    sign = codes >> _SIGN
    out[:, 0] = (codes + sign).view(np.uint64)
    out[:, 1] = sign.view(np.uint64) & _TOP_127


def decode_127(vector: FieldVector, out: npt.NDArray[np.int64]) -> bool:
    """``out`` = the integers that the elements stand for; false if one of them does not fit 64 bits."""
    low, high = vector[:, 0], vector[:, 1]
    negative = high >> _SIGN_127
    np.add(low, negative, out=out.view(np.uint64))
    fits = high == negative * _TOP_127
    fits &= (out < 0) == negative.astype(np.bool_)
    return bool(fits.all())
