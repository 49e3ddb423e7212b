"""Whether shares lie on one polynomial, and which ones do not.

More shares than are needed to open a vector check each other: with ``needed + 1`` a wrong share shows, and with two
more than needed for each wrong one it is located, as in any Reed-Solomon code. What cannot be known is ``ambiguous``.

Nothing here tells a wrong secret from a right one: whoever makes all shares can share what he likes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.field import SEED_BYTES, Field, FieldVector, RandomBytes
from client_sdk.protocol.shamir import (
    NUMPY_KERNELS,
    Scheme,
    SharingKernels,
    lagrange_weights,
    require_shares,
)


@dataclass(frozen=True)
class LocatedShares:
    """What is known about shares of one vector.

    Attributes:
        good: Indices of the shares that lie on one polynomial, in order; empty if ambiguous.
        bad: Those that do not; empty if ambiguous.
        ambiguous: The shares contradict each other, and no polynomial has all but ``correctable`` of them.
        correctable: If no more shares than these are wrong, then ``bad`` has all of them and none else. If more are,
            they can agree on another polynomial and make right ones look wrong; by accident they do not.
    """

    good: tuple[int, ...]
    bad: tuple[int, ...]
    ambiguous: bool
    correctable: int


def check_parity(
    shares: Mapping[int, FieldVector],
    scheme: Scheme,
    *,
    degree: int | None = None,
    kernels: SharingKernels = NUMPY_KERNELS,
) -> bool:
    """Whether all shares lie on polynomials of a degree: exactly, at every element.

    Args:
        shares: At least ``degree + 2`` vectors by index, from 1.
        scheme: How they were made.
        degree: Of the polynomials; that of fresh shares unless given.
        kernels: What computes.

    Returns:
        False if any share is wrong, as long as ``degree + 1`` are right: with fewer, the wrong ones may agree.

    Raises:
        NotEnoughShares: Too few to contradict each other.
        MalformedShare: An index that the scheme does not have, or an element that is not canonical.
        ShapeMismatch: Not vectors of the field, or of different lengths.
        ConfigurationError: A degree without a check: n - 1 or more.
    """
    degree = _checkable(degree, scheme)
    require_shares(shares, scheme, degree + 2)
    return _consistent(shares, degree, scheme.field, kernels)


def locate(
    shares: Mapping[int, FieldVector],
    scheme: Scheme,
    *,
    degree: int | None = None,
    random: RandomBytes = os.urandom,
    kernels: SharingKernels = NUMPY_KERNELS,
) -> LocatedShares:
    """Which shares are wrong, up to ``floor((len(shares) - degree - 1) / 2)`` of them.

    The elements of each share are combined with random coefficients, the same for all, and the combinations decoded as
    a Reed-Solomon code: a wrong share keeps a right combination with probability 1/p. The shares that are found good
    are then compared at every element.

    Args:
        shares: At least ``degree + 2`` vectors by index, from 1. One that is known to be lost or malformed is left out.
        scheme: How they were made.
        degree: Of the polynomials; that of fresh shares unless given.
        random: Source of the coefficients, which the makers of the shares must not know.
        kernels: What computes.

    Raises:
        NotEnoughShares: Too few to contradict each other.
        MalformedShare: An index that the scheme does not have, or an element that is not canonical.
        ShapeMismatch: Not vectors of the field, or of different lengths.
        ConfigurationError: A degree without a check: n - 1 or more.
    """
    degree = _checkable(degree, scheme)
    length = require_shares(shares, scheme, degree + 2)
    field = scheme.field
    points = tuple(sorted(shares))
    correctable = (len(points) - degree - 1) // 2
    coefficients = field.empty(length)
    kernels.expand_into(random(SEED_BYTES), coefficients, field)
    values = [field.inner(coefficients, shares[point]) for point in points]
    polynomial = _decode(points, values, degree, field.modulus)
    if polynomial is not None:
        on_it = [_at(polynomial, point, field.modulus) == value for point, value in zip(points, values, strict=True)]
        good = tuple(point for point, fits in zip(points, on_it, strict=True) if fits)
        bad = tuple(point for point, fits in zip(points, on_it, strict=True) if not fits)
        if len(bad) <= correctable and _consistent({point: shares[point] for point in good}, degree, field, kernels):
            return LocatedShares(good, bad, ambiguous=False, correctable=correctable)
    return LocatedShares((), (), ambiguous=True, correctable=correctable)


def _checkable(degree: int | None, scheme: Scheme) -> int:
    degree = scheme.degree if degree is None else degree
    if not 0 <= degree < scheme.num_shares - 1:
        raise ConfigurationError(
            f"{scheme.num_shares} shares of degree {degree} cannot contradict each other: {degree + 2} would be needed"
        )
    return degree


def _consistent(shares: Mapping[int, FieldVector], degree: int, field: Field, kernels: SharingKernels) -> bool:
    points = sorted(shares)
    base = [shares[point] for point in points[: degree + 1]]
    return all(
        np.array_equal(kernels.interpolate(base, lagrange_weights(points[: degree + 1], point), field), shares[point])
        for point in points[degree + 1 :]
    )


# --- Reed-Solomon decoding [Gao 2003]; polynomials are lists of coefficients modulo p, the constant first -------------


def _decode(points: Sequence[int], values: Sequence[int], degree: int, p: int) -> list[int] | None:
    """The polynomial of a degree that has all but at most half of the redundant values, if there is one.

    The extended Euclidean algorithm runs on the polynomial through all values and the one that vanishes at all points,
    until the remainder's degree tells that the cofactor locates the errors.
    """
    vanishing, through = [1], [0]
    for point, value in zip(points, values, strict=True):
        # Newton: a multiple of what vanishes at the points so far corrects the value at the next.
        missing = (value - _at(through, point, p)) * pow(_at(vanishing, point, p), -1, p)
        through = _add(through, [c * missing for c in vanishing], p)
        vanishing = _add([0, *vanishing], [-point * c for c in vanishing], p)
    previous, remainder = vanishing, through
    previous_factor, factor = [0], [1]
    while 2 * (len(remainder) - 1) >= len(points) + degree + 1:
        quotient, rest = _divide(previous, remainder, p)
        previous, remainder = remainder, rest
        previous_factor, factor = factor, _add(previous_factor, _multiply([-c for c in quotient], factor, p), p)
    quotient, rest = _divide(remainder, factor, p)
    return quotient if rest == [0] and len(quotient) <= degree + 1 else None


def _at(polynomial: Sequence[int], point: int, p: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % p
    return value


def _trimmed(polynomial: list[int]) -> list[int]:
    while len(polynomial) > 1 and not polynomial[-1]:
        polynomial.pop()
    return polynomial


def _add(left: Sequence[int], right: Sequence[int], p: int) -> list[int]:
    out = [0] * max(len(left), len(right))
    for polynomial in (left, right):
        for i, coefficient in enumerate(polynomial):
            out[i] += coefficient
    return _trimmed([coefficient % p for coefficient in out])


def _multiply(left: Sequence[int], right: Sequence[int], p: int) -> list[int]:
    out = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            out[i + j] += a * b
    return _trimmed([coefficient % p for coefficient in out])


def _divide(dividend: Sequence[int], divisor: Sequence[int], p: int) -> tuple[list[int], list[int]]:
    rest, inverse = list(dividend), pow(divisor[-1], -1, p)
    quotient = [0] * max(1, len(dividend) - len(divisor) + 1)
    for shift in range(len(dividend) - len(divisor), -1, -1):
        factor = rest[shift + len(divisor) - 1] * inverse % p
        quotient[shift] = factor
        for i, coefficient in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - factor * coefficient) % p
    return _trimmed(quotient), _trimmed(rest)
