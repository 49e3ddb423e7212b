"""Norms and clipping, the same on both ends: what is returned never exceeds the bound, in exact arithmetic.

Privacy accounting and robust rules multiply by the clip norm, so "about C" is not enough: ``||y|| <= C`` has to hold
for the numbers that are sent, after rounding to their dtype. It holds by construction, without a check afterwards:

1. The norm is computed in float64, blocks of squares added exactly, so that it is off by less than ``_MARGIN``
   (relative), whatever the order inside a block.
2. The factor is ``C / norm``, lowered by twice that margin.
3. Rounding to nearest can enlarge each normal product by half a unit in its last place, so the factor is lowered by
   that as well. A subnormal product can double: float16, and bounds near the smallest float32, where such products
   could matter, are rounded *towards zero* instead (1.5 times the work).

Whether a vector is inside the bound at all is decided by that float64 norm where the margin leaves no doubt, and by
integer arithmetic where it does; so a vector of norm exactly C stays as it is.

float16 and float32 never overflow or underflow when squared in float64. float64 is scaled by a power of two (exact)
where its magnitudes ask for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, NonFiniteUpdate, ShapeMismatch

SMALLEST_CLIP_NORM = 2.0**-500
LARGEST_CLIP_NORM = 2.0**500
"""Bounds of a clip norm: with them no intermediate value leaves float64's range, whatever the vector."""

_BLOCK = 2**14
"""Elements squared at once; small enough for the second cache level and for a single thread of the linear algebra."""

_MARGIN = 2.0**-38
"""Bound on the relative error of a norm. A sum of ``_BLOCK`` squares in any order is off by 2**14 * 2**-53 (relative,
all addends being positive), the square root halves that; the rest is slack."""

_SAFE_EXPONENT = 400
"""Vectors whose peak lies within 2**-400 .. 2**400 are squared as they are: what underflows is below 2**-270 of it."""

_LIMB = 18
"""Bits of a limb of an integer; a block's sum of products of limbs stays below 2**53."""

_BITS_OF: dict[np.dtype[Any], type[np.signedinteger[Any]]] = {
    np.dtype(np.float16): np.int16,
    np.dtype(np.float32): np.int32,
    np.dtype(np.float64): np.int64,
}

F = TypeVar("F", bound=np.floating[Any])


@dataclass(frozen=True)
class ClipPlan:
    """What clipping a vector takes, for a kernel that clips in one pass with what it does next.

    Attributes:
        norm: L2 norm before clipping, divided by ``2**exponent``.
        exponent: 0 unless squares could leave float64's range, as they cannot for float16 and float32.
        clipped: Whether the norm exceeds the bound.
        factor: What ``vector / 2**exponent`` is multiplied by, in float64, and rounded to the vector's dtype; 1.0 where
            nothing is clipped.
        towards_zero: Whether that rounding is towards zero; to nearest otherwise.
    """

    norm: float
    exponent: int
    clipped: bool = False
    factor: float = 1.0
    towards_zero: bool = False


@dataclass(frozen=True)
class ClipResult(Generic[F]):
    """A vector inside its bound, and what it took.

    Attributes:
        vector: Same shape and dtype as the input; the input itself where nothing was clipped.
        norm: L2 norm before clipping, rounded to float64 (infinite if it lies beyond that).
        factor: What the vector was multiplied by, before rounding; 1.0 where nothing was clipped.
        clipped: Whether the norm exceeded the bound.
    """

    vector: npt.NDArray[F]
    norm: float
    factor: float
    clipped: bool


@dataclass(frozen=True)
class LayerClipResult(Generic[F]):
    """A vector whose layers are each inside their bound.

    Attributes:
        vector: Same dtype and length as the input; the input itself where nothing was clipped.
        layers: One result for each layer.
    """

    vector: npt.NDArray[F]
    layers: tuple[ClipResult[F], ...]

    @property
    def clipped(self) -> bool:
        """Whether any layer was clipped."""
        return any(layer.clipped for layer in self.layers)


def l2_norm(vector: npt.NDArray[F]) -> float:
    """Euclidean norm in float64.

    Args:
        vector: float16, float32 or float64, any shape; an empty one has norm 0.

    Returns:
        The norm, with a relative error below 4e-12 (in practice a few 1e-16), for magnitudes from the smallest
        subnormal to the largest finite number. Infinite where the norm of a float64 vector exceeds float64's range.

    Raises:
        ShapeMismatch: Another dtype.
        NonFiniteUpdate: NaN or infinities.

    Example:
        >>> l2_norm(np.array([3e30, 4e30], np.float32))
        4.9999999...e+30
    """
    return _float(*_scaled_norm(vector))


def integer_norm_squared(codes: npt.NDArray[np.int64]) -> int:
    """``sum(code**2)``, exactly.

    Args:
        codes: int64, any shape; magnitudes below 2**62.

    Returns:
        A Python integer: with magnitudes near 2**60 and a million coordinates it has 140 bits.

    Raises:
        ShapeMismatch: Another dtype.

    Example:
        >>> integer_norm_squared(np.array([2**60, 1])) == 2**120 + 1
        True
    """
    if codes.dtype != np.int64:
        raise ShapeMismatch(f"an integer norm is taken of int64 codes, not of {codes.dtype}")
    flat = codes.reshape(-1)
    return sum(_square_of_integers(flat[start : start + _BLOCK]) for start in range(0, flat.size, _BLOCK))


def clip_global(vector: npt.NDArray[F], clip_norm: float) -> ClipResult[F]:
    """Scale a vector down so that its L2 norm is at most ``clip_norm``.

    Args:
        vector: float16, float32 or float64, any shape.
        clip_norm: C, from 2**-500 to 2**500.

    Returns:
        A vector whose norm, in exact arithmetic, is at most C. Every element is the input's times ``C / norm``, less at
        most two units in the last place (and less 2**-1000 C, which only float64 can tell from 0). A vector whose norm
        is at most C, in exact arithmetic, comes back as the same object.

    Raises:
        ConfigurationError: ``clip_norm`` is not a number within its bounds.
        ShapeMismatch: Another dtype.
        NonFiniteUpdate: NaN or infinities: scaling cannot mend them.

    Example:
        >>> clip_global(np.array([3.0, 4.0], np.float32), 5.0).clipped
        False
        >>> clip_global(np.array([0.0, 1e30], np.float32), 1.0).factor
        9.99999...e-31
    """
    plan = plan_clip(vector, clip_norm)
    norm = _float(plan.norm, plan.exponent)
    if not plan.clipped:
        return ClipResult(vector, norm, 1.0, clipped=False)
    clipped = _scaled(vector, plan.factor, plan.exponent, towards_zero=plan.towards_zero)
    return ClipResult(clipped, norm, math.ldexp(plan.factor, -plan.exponent), clipped=True)


def plan_clip(vector: npt.NDArray[F], clip_norm: float) -> ClipPlan:
    """What ``clip_global`` does to a vector, without doing it; it raises the same errors."""
    bound = _checked(clip_norm)
    norm, exponent = _scaled_norm(vector)
    scaled_bound = _float(bound, -exponent)
    if norm * (1 + _MARGIN) <= scaled_bound or (norm * (1 - _MARGIN) <= scaled_bound and not _exceeds(vector, bound)):
        return ClipPlan(norm, exponent)
    factor = bound / norm * (1 - 2 * _MARGIN)
    dtype = np.finfo(vector.dtype)
    towards_zero = math.sqrt(vector.size) * float(dtype.smallest_subnormal) > bound * _MARGIN / 4
    if not towards_zero:
        factor *= 1 - float(dtype.eps) / 2
    return ClipPlan(norm, exponent, clipped=True, factor=factor, towards_zero=towards_zero)


def clip_layers(vector: npt.NDArray[F], slices: Sequence[slice], clip_norms: Sequence[float]) -> LayerClipResult[F]:
    """Clip each layer of a flat vector to a bound of its own, as ``clip_global`` does.

    Args:
        vector: float16, float32 or float64, shape [d].
        slices: One for each layer, in order, without gaps or overlaps: a coordinate that no layer covers would go
            unclipped.
        clip_norms: One for each layer.

    Returns:
        The clipped vector. Its norm is at most ``joint_clip_norm(clip_norms)``.

    Raises:
        ConfigurationError: Slices that are not a partition of the vector, or a bad clip norm.
        ShapeMismatch: Not a flat vector, or another dtype.
        NonFiniteUpdate: NaN or infinities.
    """
    if vector.ndim != 1:
        raise ShapeMismatch(f"layers are slices of a flat vector, not of {list(vector.shape)}")
    if len(slices) != len(clip_norms):
        raise ConfigurationError(f"{len(slices)} layers with {len(clip_norms)} clip norms")
    ends = [0, *(s.stop for s in slices)]
    if any(s.start != end or s.step not in {None, 1} for s, end in zip(slices, ends, strict=False)) or (
        ends != sorted(ends) or ends[-1] != vector.size
    ):
        raise ConfigurationError(f"the layers' slices do not cover a vector of {vector.size} elements once, in order")
    layers = tuple(clip_global(vector[s], norm) for s, norm in zip(slices, clip_norms, strict=True))
    if not any(layer.clipped for layer in layers):
        return LayerClipResult(vector, layers)
    return LayerClipResult(np.concatenate([layer.vector for layer in layers]), layers)


def joint_clip_norm(clip_norms: Sequence[float]) -> float:
    """Bound on the norm of a vector whose layers are clipped to these: ``sqrt(sum C_l**2)``, rounded up.

    Raises:
        ConfigurationError: A bad clip norm, or none.
    """
    if not clip_norms:
        raise ConfigurationError("a vector without layers has no clip norm")
    return math.nextafter(math.hypot(*map(_checked, clip_norms)), math.inf)


def _checked(clip_norm: float) -> float:
    if not SMALLEST_CLIP_NORM <= clip_norm <= LARGEST_CLIP_NORM:
        raise ConfigurationError(
            f"a clip norm is positive and finite (from {SMALLEST_CLIP_NORM:.0e} to {LARGEST_CLIP_NORM:.0e}), "
            f"got {clip_norm}"
        )
    return float(clip_norm)


def _float(norm: float, exponent: int) -> float:
    try:
        return math.ldexp(norm, exponent)
    except OverflowError:
        return math.inf


def _parts(vector: npt.NDArray[F]) -> Iterator[npt.NDArray[F]]:
    flat = vector.reshape(-1)
    return (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))


def _scaled_norm(vector: npt.NDArray[F]) -> tuple[float, int]:
    """``(r, e)``: the norm is ``r * 2**e`` up to ``_MARGIN``; e is 0 unless squares could leave float64's range.

    Raises:
        ShapeMismatch: Another dtype.
        NonFiniteUpdate: NaN or infinities.
    """
    if vector.dtype not in _BITS_OF:
        raise ShapeMismatch(f"norms are taken of float16, float32 and float64 vectors, not of {vector.dtype}")
    exponent = 0
    if vector.dtype == np.float64 and vector.size:
        peak = max(float(vector.max()), -float(vector.min()))  # NaN passes through both
        if math.isfinite(peak) and peak:
            exponent = math.frexp(peak)[1]
            if abs(exponent) <= _SAFE_EXPONENT:
                exponent = 0
    buffer = np.empty(min(_BLOCK, vector.size))
    squares = []
    with np.errstate(over="ignore", invalid="ignore"):
        for part in _parts(vector):
            values = buffer[: part.size]
            if exponent:
                np.ldexp(part, -exponent, out=values)
            else:
                values[:] = part
            squares.append(float(values @ values))
    if not all(map(math.isfinite, squares)):
        raise NonFiniteUpdate(f"{int(np.count_nonzero(~np.isfinite(vector)))} values are NaN or infinite")
    return math.sqrt(math.fsum(squares)), exponent


def _scaled(vector: npt.NDArray[F], factor: float, exponent: int, *, towards_zero: bool) -> npt.NDArray[F]:
    """``vector * 2**-exponent * factor``, rounded into the vector's dtype."""
    clipped = np.empty(vector.shape, vector.dtype)
    buffer = np.empty(min(_BLOCK, vector.size))
    bits = _BITS_OF[vector.dtype]
    for part, out in zip(_parts(vector), _parts(clipped), strict=True):
        product = buffer[: part.size]
        if exponent:
            np.ldexp(part, -exponent, out=product)
            product *= factor
        else:
            np.multiply(part, factor, out=product, dtype=np.float64)
        out[...] = product
        if towards_zero:
            # One place down in magnitude, for normal and subnormal numbers alike: patterns are ordered like magnitudes.
            out.view(bits)[...] -= np.abs(out) > np.abs(product, out=product)
    return clipped


def _exceeds(vector: npt.NDArray[F], bound: float) -> bool:
    """Whether the norm exceeds the bound, in integer arithmetic."""
    total, exponent = _sum_of_squares(vector)
    return total > Fraction(bound) ** 2 / Fraction(2) ** exponent


def _sum_of_squares(vector: npt.NDArray[F]) -> tuple[int, int]:
    """``(n, e)``: the sum of the squares is exactly ``n * 2**e``."""
    total, lowest = 0, 0
    for part in _parts(vector):
        fractions, exponents = np.frexp(part.astype(np.float64))
        significands = np.abs(fractions * 2.0**53).astype(np.int64)
        for exponent in np.unique(exponents).tolist():
            shift = 2 * (exponent - 53)
            if shift < lowest:
                total, lowest = total << (lowest - shift), shift
            total += _square_of_integers(significands[exponents == exponent]) << (shift - lowest)
    return total, lowest


def _square_of_integers(values: npt.NDArray[np.int64]) -> int:
    """Sum of the squares of at most ``_BLOCK`` integers of magnitudes below 2**62.

    In float64, which multiplies faster than int64 does: products of limbs are below 2**37 and sums of ``_BLOCK`` of
    them below 2**51, so that no addition rounds, in whatever order the linear algebra makes them.
    """
    limbs = []
    rest = values
    while max(int(rest.max(initial=0)), -int(rest.min(initial=0))) >> _LIMB:
        limbs.append((rest & (2**_LIMB - 1)).astype(np.float64))
        rest = rest >> _LIMB
    limbs.append(rest.astype(np.float64))
    total = 0
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(limbs), 2):
        total += int(a @ b) << _LIMB * (i + j) + (i != j)
    return total
