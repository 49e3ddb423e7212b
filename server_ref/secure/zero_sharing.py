"""Shares of zero of double degree, without a message each: what hides everything but the product that is opened.

The distance of two shared updates is a polynomial of degree 2(t - 1) in the aggregators' points. Opening it opens all
of its coefficients, and only the constant one is the distance; the others are made uniform by adding a random
polynomial of that degree whose constant is zero, fresh for every pair. Three ways to come by one:

- *Devices* deal them: a dishonest device would deal a non-zero constant and choose its own distances, and with
  n = 2t - 1 nothing would show it. Unsound against just those whom the distances are to find.
- *Aggregators* deal them to one another, as they do noise: sound, but a vector per pair and dealer on the wire.
- *Keys* (here): every n - t + 1 aggregators have a key in common, and expand it. t - 1 aggregators lack exactly the key
  of all the others, and what they lack is worth t - 1 random coefficients for each pair, which is all that they do not
  know already. A handful of keys per cohort is dealt, whatever its size; one aggregator of each set deals its key, and
  whoever else is in the set learns nothing by it that it would not know anyway.

Source: R. Cramer, I. Damgard, Y. Ishai, "Share Conversion, Pseudorandom Secret-Sharing and Applications to Secure
Computation", TCC 2005, section 4.3 (pseudorandom zero-sharing).
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections.abc import Mapping
from typing import Final

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.mersenne import FieldVector
from client_sdk.protocol.sharing_scheme import Scheme

Subset = tuple[int, ...]
"""Indices of aggregators, ascending, from 1."""

KEY_BYTES: Final = 32
MAX_SUBSETS: Final = 1000
"""Keys that n and t may make necessary; 10 for 3 of 5, 35 for 4 of 7, 126 for 5 of 9."""


def key_holders(scheme: Scheme) -> tuple[Subset, ...]:
    """The sets of n - t + 1 aggregators that have a key in common, in lexicographic order.

    Raises:
        ConfigurationError: More than ``MAX_SUBSETS``.
    """
    n, size = scheme.num_shares, scheme.num_shares - scheme.threshold + 1
    if math.comb(n, size) > MAX_SUBSETS:
        raise ConfigurationError(
            f"distances among {n} aggregators with a threshold of {scheme.threshold} need {math.comb(n, size)} keys, "
            f"and at most {MAX_SUBSETS} are dealt; use fewer aggregators"
        )
    return tuple(itertools.combinations(scheme.indices, size))


def held_by(index: int, subsets: tuple[Subset, ...]) -> tuple[Subset, ...]:
    """Those of the sets that an aggregator is in, in their order."""
    return tuple(s for s in subsets if index in s)


def dealt_by(dealer: int, receiver: int, subsets: tuple[Subset, ...]) -> tuple[Subset, ...]:
    """Sets whose key this dealer, the lowest index in them, gives to this receiver."""
    return tuple(s for s in subsets if s[0] == dealer and receiver in s)


def derive_key(secret: bytes, context: bytes, subset: Subset) -> bytes:
    """The dealer's key for one set and one cohort: the same whenever it is asked for, another for anything else.

    Args:
        secret: 32 bytes or more that only the dealer has.
        context: What is compared: a hash of the request.
        subset: Whose key it is.
    """
    return hmac.digest(secret, b"pocketfed zero key v1" + context + bytes(subset), "sha256")


def fingerprint(key: bytes) -> str:
    """What holders publish of a key, so that a dealer who gave out different ones is found."""
    return hashlib.sha256(b"pocketfed zero key fingerprint v1" + key).hexdigest()


def zero_shares(keys: Mapping[Subset, bytes], index: int, scheme: Scheme, count: int) -> FieldVector:
    """One aggregator's shares of ``count`` random polynomials of degree 2(t - 1) with the constant 0.

    Args:
        keys: Of each set that the aggregator is in.
        index: The aggregator's, from 1.
        scheme: How updates are shared, without packing.
        count: How many polynomials.

    Returns:
        ``count`` elements.

    Raises:
        ConfigurationError: Not exactly the keys of the aggregator's sets.
    """
    expected = held_by(index, key_holders(scheme))
    if set(keys) != set(expected) or any(len(k) != KEY_BYTES for k in keys.values()):
        raise ConfigurationError(f"aggregator {index} needs the keys of its {len(expected)} sets, and no others")
    field = scheme.field
    total = field.zeros(count)
    coefficients = field.empty(count)
    for subset in expected:
        vanishing = _vanishing(subset, index, scheme)
        expand = field.expander(keys[subset])
        for power in range(1, scheme.threshold):
            expand(coefficients)
            total = field.add(total, field.scale(coefficients, vanishing * pow(index, power, field.modulus)))
    return total


def _vanishing(subset: Subset, at: int, scheme: Scheme) -> int:
    """The polynomial of degree t - 1 that is 1 at 0 and 0 at all points outside the set, at one of its points."""
    value, modulus = 1, scheme.field.modulus
    for outside in set(scheme.indices) - set(subset):
        value = value * (outside - at) * pow(outside, -1, modulus) % modulus
    return value
