"""Keeping accumulated state in the middle of its floating-point range, by powers of two: exact, nothing is lost.

A sum of gradients or of their squares that is kept over thousands of rounds drifts towards an end of its format. In
float32 squares of 1e18 overflow after some hundred rounds, whereupon an adaptive optimizer divides by infinity and
stands still without any error; squares of 1e-23 vanish at once. Every so often the whole state is therefore multiplied
by a power of two, which only changes exponents, and the power is kept beside it.

A quantity that grows with the p-th power of the gradient (1: momentum, 2: second moment) is multiplied by
``2**(-p * shift)``; a gradient that is folded into it later by ``2**-shift``. Ratios such as momentum / sqrt(second
moment) do not change by a single bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, NonFiniteUpdate

F = TypeVar("F", bound=np.floating[Any])


def rescale(
    tensors: Mapping[str, npt.NDArray[F]], powers: Mapping[str, int], *, incoming: float = 0.0
) -> tuple[dict[str, npt.NDArray[F]], int]:
    """Bring the largest magnitude of accumulated tensors near 1, exactly.

    Args:
        tensors: float32 or float64, any shapes.
        powers: For each tensor, the power of the gradient it grows with, from 1.
        incoming: Largest magnitude (on the tensors' present scale) of the gradient that is folded in next.

    Returns:
        New tensors and a shift s, with ``new * 2**(power * s) == old`` for every element, exactly. Gradients (those
        already folded in, and the incoming one) are at most 1 on the new scale, unless a small element would lose bits
        on the way there: then the shift is as close to that as exactness permits. Zeros only: shift 0.

    Raises:
        ConfigurationError: A tensor without a power, or a power below 1.
        NonFiniteUpdate: NaN or infinities: it is too late for them.

    Example:
        >>> rescale({"second_moment": np.array([2e38, 1e20], np.float32)}, {"second_moment": 2})
        ({'second_moment': array([5.877...e-01, 2.938...e-19], dtype=float32)}, 64)
    """
    if any(powers.get(name, 0) < 1 for name in tensors):
        raise ConfigurationError(f"every accumulated tensor needs a power from 1, got {dict(powers)}")
    wanted = [_ceil_exponent(incoming)] if incoming else []
    most = math.inf
    for name, tensor in tensors.items():
        magnitudes = np.abs(tensor[tensor != 0])
        if not magnitudes.size:
            continue
        if not np.isfinite(magnitudes).all():
            raise NonFiniteUpdate(f"the accumulated {name} holds NaN or infinite values")
        wanted.append(-(-_ceil_exponent(float(magnitudes.max())) // powers[name]))
        most = min(most, _exact_shift(magnitudes, powers[name]))
    if not wanted:
        return dict(tensors), 0
    shift = max(wanted)
    if shift > most:
        shift = max(int(most), 0)
    return {name: np.ldexp(tensor, -powers[name] * shift) for name, tensor in tensors.items()}, shift


def _ceil_exponent(magnitude: float) -> int:
    """Smallest e with ``magnitude <= 2**e``."""
    fraction, exponent = math.frexp(magnitude)
    return exponent - 1 if fraction == 0.5 else exponent


def _exact_shift(magnitudes: npt.NDArray[F], power: int) -> int:
    """Largest shift after which the smallest magnitude still has all its bits; below 0 if it is subnormal already."""
    smallest = math.frexp(float(magnitudes.min()))[1] - 1
    return (smallest - int(np.finfo(magnitudes.dtype).minexp)) // power
