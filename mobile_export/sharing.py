"""The ``share`` method: an update, clipped, on the fixed-point grid, and split into shares modulo 2^61 - 1.

It is for a host that has no native kernels: what it computes is, bit for bit, what
``client_sdk.protocol.privacy.encode_clipped`` and ``client_sdk.protocol.shamir.share_seeded`` do. What is left to the
host are one number and the randomness: it draws the seeds, expands them (field elements are inputs), computes the norm
and with it the clip factor, and compares the integer norm that comes out with its bound.

The arithmetic is additions, comparisons and selections of int64. ExecuTorch's remainder is wrong for negative numbers,
and float literals in a float64 graph become float32, so that all that are here are powers of two, or inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.field import MERSENNE_61
from client_sdk.protocol.program import NORM_LIMB_BITS
from client_sdk.protocol.shamir import Scheme
from mobile_export.methods import MethodFunction

SHARE_METHOD: Final = "share"

_P: Final = MERSENNE_61.modulus

_MAX_ELEMENTS: Final = 2**22
"""Sums of products of limbs stay below 2^62."""


def check_share(scheme: Scheme, num_parameters: int) -> None:
    """Refuse what the method does not do.

    Raises:
        ConfigurationError: Another field than 2^61 - 1, packed shares, or a model that is too large.
    """
    if scheme.field is not MERSENNE_61 or scheme.packing != 1:
        raise ConfigurationError("the share method splits modulo 2^61 - 1, one coordinate in an element: packing=1")
    if num_parameters > _MAX_ELEMENTS:
        raise ConfigurationError(f"the share method takes up to {_MAX_ELEMENTS} parameters, not {num_parameters}")


def share_inputs(scheme: Scheme) -> tuple[str, ...]:
    """Names: the update, what it is clipped and scaled by, and the first t - 1 shares."""
    return ("update", "clip_factor", "scale", *(f"share_{x}" for x in range(1, scheme.threshold)))


def share_outputs(scheme: Scheme) -> tuple[str, ...]:
    """Names: the codes' norm, and the other shares."""
    return ("norm_limbs", *(f"share_{x}" for x in range(scheme.threshold, scheme.num_shares + 1)))


def example_inputs(scheme: Scheme, num_parameters: int) -> tuple[Tensor, ...]:
    """Zeros of the inputs' shapes and dtypes."""
    one = torch.zeros(1, dtype=torch.float64)
    drawn = [torch.zeros(num_parameters, dtype=torch.int64) for _ in range(scheme.threshold - 1)]
    return (torch.zeros(num_parameters), one, one.clone(), *drawn)


def share_function(scheme: Scheme) -> MethodFunction:
    """The method as a function of tensors: ``share_inputs`` in, ``share_outputs`` out."""

    def share(update: Tensor, clip_factor: Tensor, scale: Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:
        clipped = (update.to(torch.float64) * clip_factor).to(torch.float32)
        codes = torch.round(clipped.to(torch.float64) * scale)
        integers = codes.to(torch.int64)
        secret = torch.where(integers < 0, integers + _P, integers)
        return (_norm_limbs(codes), *_extrapolated([secret, *drawn], scheme.num_shares - len(drawn)))

    return share


def _norm_limbs(codes: Tensor) -> Tensor:
    """Sums of products of the codes' limbs ``[6]``, from float64 codes: see ``protocol.program.norm_squared``."""
    limbs = []
    for shift in (2 * NORM_LIMB_BITS, NORM_LIMB_BITS):
        # Exact: a code has the 24 bits of a float32, and the factors are powers of two.
        upper = torch.floor(codes * 2.0**-shift)
        codes = codes - upper * 2.0**shift
        limbs.append(upper.to(torch.int64))
    high, middle, low = (*limbs, codes.to(torch.int64))
    pairs = ((low, low), (low, middle), (low, high), (middle, middle), (middle, high), (high, high))
    return torch.stack([(a * b).sum() for a, b in pairs])


def _extrapolated(values: Sequence[Tensor], count: int) -> list[Tensor]:
    """The next values of the polynomials that have these at consecutive integers, by finite differences."""
    rows = list(values)
    for order in range(1, len(rows)):
        for i in range(len(rows) - order):
            difference = rows[i + 1] - rows[i]
            rows[i] = torch.where(difference < 0, difference + _P, difference)
    out = []
    for _ in range(count):
        for i in range(1, len(rows)):
            total = rows[i] + rows[i - 1]
            rows[i] = torch.where(total >= _P, total - _P, total)
        out.append(rows[-1])
    return out
