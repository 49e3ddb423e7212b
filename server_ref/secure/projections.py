"""The mode ``projections``: opened functionals of each update that show that it is as short as it claims.

The squared norm modulo p alone shows nothing: a vector with entries near the square root of p can have any. So two
things of each update q are opened, B being its norm bound and d its length:

- ``R q`` for 128 random rows R of entries -1, 0, 1 (0 half of the time), from a seed that nobody could know when the
  shares were sealed. Accepted iff every entry is at most 9.5 B in magnitude.
- ``||q||^2``. Accepted iff it is at most B^2.

**An honest update passes.** An entry of R q exceeds 9.5 B with probability below 2 exp(-9.5^2), as
``E exp(s r x) = cosh(s x / 2)^2 <= exp(s^2 x^2 / 4)`` for an entry r: fewer than one update in 2^120 is refused.

**A longer one does not.**

1. If an entry x of q, centred, is beyond 19 B: of the three values v, v + x, v - x that a row takes with the others'
   contribution v fixed, v and v +- x are not all within 9.5 B modulo p. If v is, then v + x and v - x are not; so a
   row is within it with probability at most 1/2, and all 128 are with 2^-128.
2. Otherwise no row wraps around if ``19 B d <= (p - 1) / 2``, and rows are what they are over the integers. If
   ``||q|| > 32 B``, an accepted row has ``(r q)^2 <= (9.5 B)^2 < 0.177 E (r q)^2``, for which the probability is at
   most 0.775, since ``E (r q)^4 <= 3 (E (r q)^2)^2`` [Paley and Zygmund]: for all 128 it is below 2^-47.
3. Otherwise ``||q||^2 <= (32 B)^2 < p`` does not wrap around, and is compared exactly.

The two inequalities on B are the mode's bit budget (``ProjectionSettings``). What is opened is the mode's price: 128
linear functionals and the norm of each update. They carry no noise, and no differential privacy is claimed against
whoever sees them.

Source: C. Gentry, S. Halevi, V. Lyubashevsky, "Practical Non-interactive Publicly Verifiable Secret Sharing with
Thousands of Parties", EUROCRYPT 2022, section 3 (modular random projections).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError
from client_sdk.protocol.field import Field, FieldVector
from client_sdk.protocol.privacy import EncodedBounds

ROWS: Final = 128
"""Random rows for each challenge."""

_ROW_BYTES: Final = ROWS // 8
_COLUMNS: Final = 2048
"""Coordinates at a time. Sums of so many limbs of 31 bits, and their partial sums, are exact in float64."""
_LIMB_BITS: Final = 31


@dataclass(frozen=True)
class ProjectionSettings:
    """What the mode depends on.

    Attributes:
        num_aggregators: n.
        threshold: t.
        field: Of the shares.
        bounds: The grid, and the norm that updates are clipped to.
        size: d, coordinates of an update.
        packing: Coordinates in an element of a share.

    Raises:
        ConfigurationError: The norm cannot be opened by so many aggregators, or on packed shares.
        BudgetExceeded: An update could wrap around the field and pass.
    """

    num_aggregators: int
    threshold: int
    field: Field
    bounds: EncodedBounds
    size: int
    packing: int = 1

    def __post_init__(self) -> None:
        if self.packing != 1:
            raise ConfigurationError("the checking mode projections opens norms of shares without packing; set it to 1")
        if self.num_aggregators < self.needed:
            raise ConfigurationError(
                f"norms of shares with a threshold of {self.threshold} need {self.needed} aggregators, all of them "
                f"answering, and there are {self.num_aggregators}; add some or lower the threshold"
            )
        limit, bound = (self.field.modulus - 1) // 2, self.bounds.norm_bound
        if 19 * bound * self.size > limit or (32 * bound) ** 2 > limit:
            raise BudgetExceeded(
                f"an update of {self.size} coordinates with clip_norm {self.bounds.clip_norm:g} and "
                f"{self.bounds.fraction_bits} fraction bits could wrap around {self.field.name} and pass as a short "
                "one: lower fraction_bits or clip_norm, or use the field m127"
            )

    @property
    def needed(self) -> int:
        """Aggregators that open a norm: 2t - 1."""
        return 2 * self.threshold - 1

    def accepts(self, projections: Sequence[int], norm_squared: int) -> bool:
        """Whether an update is as short as it claims.

        Args:
            projections: ``ROWS`` of them, centred.
            norm_squared: From 0 to p - 1.
        """
        bound = self.bounds.norm_bound
        return all(2 * abs(value) <= 19 * bound for value in projections) and norm_squared <= bound**2


def project(shares: Sequence[FieldVector], seed: bytes, field: Field) -> list[FieldVector]:
    """``R x`` of each vector, for the rows of one seed.

    Args:
        shares: Vectors of one length, without the mask. The rows are expanded once for all of them.
        seed: 32 bytes. For each coordinate in order, 32 bytes of AES-256-CTR: a bit for each row that says whether its
            entry is not 0, then one for each that says whether it is negative (bits from the highest of each byte).
        field: Of the shares.

    Returns:
        ``ROWS`` elements for each.
    """
    size = len(shares[0])
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    limbs = -(-field.bits // _LIMB_BITS)
    totals = np.zeros((ROWS, len(shares) * limbs), np.int64)
    for start in range(0, size, _COLUMNS):
        columns = min(_COLUMNS, size - start)
        bits = np.frombuffer(stream.update(bytes(columns * 2 * _ROW_BYTES)), np.uint8).reshape(columns, -1)
        parts = [_limbs(share[start : start + columns], limbs) for share in shares]
        # Integers throughout: products of entries and limbs, and their sums, stay below 2^53.
        totals += (_rows(bits).T @ np.concatenate(parts, axis=1)).astype(np.int64)
    return [
        field.from_ints(
            sum(int(limb) << (_LIMB_BITS * i) for i, limb in enumerate(row))
            for row in totals[:, at : at + limbs].tolist()
        )
        for at in range(0, len(shares) * limbs, limbs)
    ]


def _rows(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Entries of the rows at some coordinates: float64 ``[columns, ROWS]``."""
    present, negative = np.unpackbits(bits, axis=1).reshape(len(bits), 2, ROWS).transpose(1, 0, 2)
    return present * (1.0 - 2.0 * negative)


def _limbs(part: FieldVector, limbs: int) -> npt.NDArray[np.float64]:
    """Elements in limbs of 31 bits, the lowest first: float64 ``[columns, limbs]``."""
    words = part.reshape(len(part), -1)
    mask = np.uint64((1 << _LIMB_BITS) - 1)
    out = np.empty((len(part), limbs))
    for i in range(limbs):
        word, shift = divmod(_LIMB_BITS * i, 64)
        limb = words[:, word] >> np.uint64(shift)
        if shift + _LIMB_BITS > 64 and word + 1 < words.shape[1]:
            limb = limb | (words[:, word + 1] << np.uint64(64 - shift))
        out[:, i] = limb & mask
    return out
