"""Who needs how many shares: the parameters of Shamir's scheme, and the weights that open it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.field import MERSENNE_61, Field
from client_sdk.protocol.packed import packed_length

MAX_SHARES: Final = 255


@dataclass(frozen=True)
class Scheme:
    """Shamir's sharing among n holders, any t - 1 of whom learn nothing.

    Share x, for x = 1 .. n, is the value at x of polynomials of degree ``needed - 1`` whose values at 0 (and at -1 with
    packing 2) are the secret; see ``packed``.

    Attributes:
        threshold: t; t - 1 shares are independent of the secret. From 2.
        num_shares: n, at least ``needed``.
        field: Where secrets and shares live.
        packing: k, coordinates of the secret in one element of a share.

    Raises:
        ConfigurationError: Parameters that cannot work.

    Example:
        >>> Scheme(threshold=3, num_shares=5, packing=2).needed
        4
    """

    threshold: int = 3
    num_shares: int = 5
    field: Field = MERSENNE_61
    packing: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.packing not in (1, 2):
            raise ConfigurationError(f"a share holds 1 or 2 coordinates in an element, not {self.packing}")
        if self.threshold < 2:
            raise ConfigurationError(f"with threshold {self.threshold}, one share says it all: choose 2 or more")
        if not self.needed <= self.num_shares <= MAX_SHARES:
            raise ConfigurationError(
                f"threshold {self.threshold} with packing {self.packing} needs {self.needed} to {MAX_SHARES} shares, "
                f"not {self.num_shares}"
            )

    @property
    def needed(self) -> int:
        """Shares that reconstruct: t + k - 1."""
        return self.threshold + self.packing - 1

    @property
    def degree(self) -> int:
        """Of a fresh sharing's polynomials."""
        return self.needed - 1

    @property
    def indices(self) -> range:
        """The shares: 1 .. n."""
        return range(1, self.num_shares + 1)

    @property
    def secret_points(self) -> range:
        """Where the secrets are: 0, and -1 with packing 2."""
        return range(0, -self.packing, -1)

    def share_length(self, size: int) -> int:
        """Elements of a share of ``size`` coordinates."""
        return packed_length(size, self.packing)


@dataclass(frozen=True)
class Weights:
    """Of values in their linear combination ``sum(numerators[i] * value[i]) / denominator``; integers, and public."""

    numerators: tuple[int, ...]
    denominator: int = 1

    def residues(self, field: Field) -> tuple[int, ...]:
        """The weights as integers from 0 to p - 1."""
        inverse = pow(self.denominator, -1, field.modulus)
        return tuple(numerator * inverse % field.modulus for numerator in self.numerators)


def lagrange_weights(points: Sequence[int], at: int) -> Weights:
    """Weights of the values at distinct ``points`` in the value ``at`` another of the polynomial of least degree.

    Example:
        >>> lagrange_weights((1, 2, 3), 0)
        Weights(numerators=(3, -3, 1), denominator=1)
    """
    weights = [
        math.prod((Fraction(at - other, point - other) for other in points if other != point), start=Fraction(1))
        for point in points
    ]
    denominator = math.lcm(*(weight.denominator for weight in weights))
    return Weights(tuple(int(weight * denominator) for weight in weights), denominator)
