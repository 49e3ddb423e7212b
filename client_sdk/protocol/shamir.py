"""Secret sharing after Shamir: vectors split so that t - 1 shares say nothing and ``Scheme.needed`` open them.

The first t - 1 shares of a secret are uniform whatever it is, so a seed of 32 bytes stands for each; only the others
are as long as the secret (``share_seeded``). Since the points are consecutive integers, they follow by additions.

Shares add up: a combination of secrets with public integer weights is what the same combination of shares opens. So do
products, but for the degree: the product of two sharings is on polynomials of twice the degree (``zero_sharing``,
``reconstruct_degree``).

What was split may have been tampered with: see ``share_checks`` before you reconstruct.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from client_sdk.protocol.errors import ConfigurationError, MalformedShare, NotEnoughShares
from client_sdk.protocol.field import SEED_BYTES, Field, FieldVector, RandomBytes
from client_sdk.protocol.packed import pack, packed_length, unpack
from client_sdk.protocol.sharing_kernels import NUMPY_KERNELS, NumpyKernels, SharingKernels, extrapolate
from client_sdk.protocol.sharing_scheme import Scheme, Weights, lagrange_weights

__all__ = [
    "NUMPY_KERNELS",
    "Field",
    "NumpyKernels",
    "Scheme",
    "SeededShares",
    "SharingKernels",
    "Weights",
    "by_index",
    "draw_seeds",
    "lagrange_weights",
    "reconstruct",
    "reconstruct_degree",
    "require_shares",
    "share",
    "share_seeded",
    "zero_sharing",
]


@dataclass(frozen=True)
class SeededShares:
    """All shares of one secret, the first t - 1 of them as seeds. A secret: whoever has all of it has what was split.

    Attributes:
        seeds: Of shares 1 .. t - 1; 32 bytes each.
        vectors: Shares t .. n.
    """

    seeds: tuple[bytes, ...] = field(repr=False)
    vectors: tuple[FieldVector, ...] = field(repr=False)

    def expand(self, scheme: Scheme, size: int, kernels: SharingKernels = NUMPY_KERNELS) -> list[FieldVector]:
        """All n shares of a secret of ``size`` coordinates, as vectors.

        Raises:
            MalformedShare: Another number of seeds or vectors than the scheme has, or an element that is not canonical.
            ShapeMismatch: Vectors of another length, or a seed that has not 32 bytes.
        """
        length = scheme.share_length(size)
        if len(self.seeds) != scheme.threshold - 1 or len(self.seeds) + len(self.vectors) != scheme.num_shares:
            raise MalformedShare(
                f"{len(self.seeds)} seeds and {len(self.vectors)} vectors are not {scheme.num_shares} shares "
                f"with threshold {scheme.threshold}"
            )
        for vector in self.vectors:
            scheme.field.require(vector, length)
        expanded = [scheme.field.empty(length) for _ in self.seeds]
        for seed, out in zip(self.seeds, expanded, strict=True):
            kernels.expand_into(seed, out, scheme.field)
        return [*expanded, *self.vectors]


def share(secret: FieldVector, scheme: Scheme, random: RandomBytes = os.urandom) -> list[FieldVector]:
    """Split a secret.

    Args:
        secret: A vector of the scheme's field, any length.
        scheme: How.
        random: Source of random bytes; anything but a CSPRNG gives the secret away.

    Returns:
        Shares 1 .. n, ``scheme.share_length(len(secret))`` elements each.

    Raises:
        ShapeMismatch: Not a vector of this field.
        MalformedShare: An element that is not canonical.
    """
    scheme.field.require(secret)
    return _split(secret, scheme, scheme.threshold - 1, random)


def _split(secret: FieldVector, scheme: Scheme, free: int, random: RandomBytes) -> list[FieldVector]:
    """Shares on polynomials whose values at 1 .. ``free`` are drawn."""
    rows = pack(secret, scheme.packing, scheme.field)[::-1]
    drawn = [scheme.field.random(len(rows[0]), random) for _ in range(free)]
    return [*drawn, *extrapolate([*rows, *drawn], scheme.num_shares - free, scheme.field)]


def share_seeded(
    secret: FieldVector,
    scheme: Scheme,
    random: RandomBytes = os.urandom,
    kernels: SharingKernels = NUMPY_KERNELS,
) -> SeededShares:
    """Split a secret into t - 1 seeds and n - t + 1 vectors.

    Args:
        secret: A vector of the scheme's field, any length.
        scheme: How.
        random: Source of the seeds; anything but a CSPRNG gives the secret away. A seed is used once.
        kernels: What computes.

    Raises:
        ShapeMismatch: Not a vector of this field.
        MalformedShare: An element that is not canonical.
        ConfigurationError: The source gave no seeds of 32 bytes, or the same one twice.
    """
    scheme.field.require(secret)
    seeds = draw_seeds(scheme, random)
    return SeededShares(seeds, tuple(kernels.split_seeded(secret, seeds, scheme)))


def draw_seeds(scheme: Scheme, random: RandomBytes) -> tuple[bytes, ...]:
    """The seeds of the first t - 1 shares of one secret.

    Raises:
        ConfigurationError: The source gave no seeds of 32 bytes, or the same one twice.
    """
    seeds = tuple(bytes(random(SEED_BYTES)) for _ in range(scheme.threshold - 1))
    if any(len(seed) != SEED_BYTES for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigurationError("the source of randomness does not give seeds: they are short, or one comes twice")
    return seeds


def by_index(shares: Iterable[tuple[int, FieldVector]], scheme: Scheme) -> dict[int, FieldVector]:
    """Shares by their index, as they came from their holders.

    Raises:
        MalformedShare: An index that the scheme does not have, or that comes twice.
    """
    out: dict[int, FieldVector] = {}
    for index, vector in shares:
        if index in out or index not in scheme.indices:
            raise MalformedShare(f"share {index} came twice" if index in out else f"there is no share {index}")
        out[index] = vector
    return out


def require_shares(shares: Mapping[int, FieldVector], scheme: Scheme, count: int, length: int | None = None) -> int:
    """Refuse what are not at least ``count`` shares of one vector; the length of a share.

    Raises:
        NotEnoughShares: Fewer.
        MalformedShare: An index that the scheme does not have, or an element that is not canonical.
        ShapeMismatch: Not vectors of the field, or of another length than ``length`` or than each other.
    """
    by_index(shares.items(), scheme)
    if len(shares) < count:
        raise NotEnoughShares(f"{count} shares are needed, {len(shares)} are here: {sorted(shares)}")
    for vector in shares.values():
        scheme.field.require(vector, length)
        length = len(vector)
    return length or 0


def reconstruct(
    shares: Mapping[int, FieldVector], scheme: Scheme, size: int, kernels: SharingKernels = NUMPY_KERNELS
) -> FieldVector:
    """The secret (or the combination of secrets) of ``size`` coordinates that shares open.

    The ``needed`` shares of lowest index are used. Whether more agree with them, ``share_checks`` says.

    Args:
        shares: Vectors by index, from 1.
        scheme: How they were made.
        size: Coordinates of the secret.
        kernels: What computes.

    Raises:
        NotEnoughShares: Fewer than needed.
        MalformedShare: An index that the scheme does not have, or an element that is not canonical.
        ShapeMismatch: Shares of another length.
    """
    return reconstruct_degree(shares, scheme.degree, scheme, size, kernels)


def reconstruct_degree(
    shares: Mapping[int, FieldVector],
    degree: int,
    scheme: Scheme,
    size: int,
    kernels: SharingKernels = NUMPY_KERNELS,
) -> FieldVector:
    """As ``reconstruct``, for shares on polynomials of another degree: products have ``2 * scheme.degree``.

    What is opened says more than its value, unless a fresh ``zero_sharing`` of this degree was added.

    Raises:
        ConfigurationError: A degree that the scheme's shares cannot open.
        NotEnoughShares: Fewer than ``degree + 1``.
        MalformedShare: As in ``reconstruct``.
        ShapeMismatch: As in ``reconstruct``.
    """
    _require_degree(degree, scheme)
    require_shares(shares, scheme, degree + 1, packed_length(size, scheme.packing))
    points = sorted(shares)[: degree + 1]
    vectors = [shares[point] for point in points]
    rows = [kernels.interpolate(vectors, lagrange_weights(points, at), scheme.field) for at in scheme.secret_points]
    return unpack(rows, size, scheme.field)


def zero_sharing(degree: int, scheme: Scheme, size: int, random: RandomBytes = os.urandom) -> list[FieldVector]:
    """Shares of ``size`` zeros on uniform polynomials of a degree: added, they hide all of an opened one but its value.

    Args:
        degree: From ``scheme.packing``, so that something is random, to n - 1.
        scheme: Points and field.
        size: Coordinates.
        random: Source of random bytes: a CSPRNG.

    Returns:
        Shares 1 .. n. Whoever has ``degree + 1 - packing`` of them has them all.

    Raises:
        ConfigurationError: A degree that hides nothing, or that the scheme's shares cannot open.
    """
    _require_degree(degree, scheme)
    return _split(scheme.field.zeros(size), scheme, degree + 1 - scheme.packing, random)


def _require_degree(degree: int, scheme: Scheme) -> None:
    if not scheme.packing <= degree < scheme.num_shares:
        raise ConfigurationError(
            f"{scheme.num_shares} shares open polynomials of degree {scheme.packing} to {scheme.num_shares - 1}, "
            f"not {degree}"
        )
