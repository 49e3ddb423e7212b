"""A small accountant of discrete Gaussian noise, by Renyi divergence: for whoever has only the protocol at hand.

Everybody whose data or signature stands behind a sum keeps an account of its own, so that nobody has to trust the
coordinator's. This one needs nothing but arithmetic. It knows no sampling: each release counts in full.

What a sensitivity is taken over (its adjacency) is the caller's affair, and has to be stated with every epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from client_sdk.protocol.errors import ConfigurationError

ORDERS: Final[tuple[float, ...]] = (
    *(1 + x / 10 for x in range(1, 100)),
    *(float(x) for x in range(11, 64)),
    *(float(round(64 * 2 ** (x / 4))) for x in range(33)),
)
"""Orders that divergences are computed at, from 1.1 to 16384: the best one grows as the noise does."""

SMALLEST_STDDEV: Final = 3.0
"""Of one contributor's noise, in integer units. From here on a sum of discrete Gaussians is one but for 1e-37."""

_MOST_NOISE: Final = 2.0**40


def gaussian_rdp(noise_multiplier: float, orders: Sequence[float] = ORDERS) -> list[float]:
    """Renyi divergence of one release with Gaussian noise, continuous or discrete: ``order / (2 z**2)``.

    For integer vectors and noise from N_Z(0, sigma^2) on every coordinate the bound is the continuous one's
    [Canonne, Kamath and Steinke 2020, proposition 5].

    Args:
        noise_multiplier: z, standard deviation of the noise divided by the L2 sensitivity.
        orders: Orders greater than 1.

    Raises:
        ConfigurationError: z is not positive, or not a number.
    """
    if not noise_multiplier > 0:
        raise ConfigurationError(f"a noise multiplier is positive, got {noise_multiplier}")
    return [order / (2 * noise_multiplier**2) for order in orders]


def excess_of_sum(stddev: float, contributors: int) -> float:
    """How far a sum of discrete Gaussians is from one: tau of Kairouz et al. 2021, theorem 1.

    Args:
        stddev: s, standard deviation of one contributor's noise, in integer units.
        contributors: n, how many independent ones are summed.

    Returns:
        ``10 * sum(exp(-2 pi**2 s**2 k / (k + 1)))`` over k from 1 to n - 1.

    Raises:
        ConfigurationError: No contributor, or noise too small for integers: s < 3.
    """
    if contributors < 1:
        raise ConfigurationError(f"noise of {contributors} contributors")
    if not stddev >= SMALLEST_STDDEV:
        raise ConfigurationError(
            f"one contributor's noise has a standard deviation of {stddev:.3g} steps of the grid; below "
            f"{SMALLEST_STDDEV:g} a sum of such noise is not accounted for: use more fraction bits or more noise"
        )
    return 10 * math.fsum(math.exp(-2 * (math.pi * stddev) ** 2 * k / (k + 1)) for k in range(1, contributors))


def distributed_rdp(
    *,
    sensitivity: float,
    stddev: float,
    contributors: int,
    size: int,
    orders: Sequence[float] = ORDERS,
) -> list[float]:
    """Renyi divergence of one release whose noise is a sum of discrete Gaussians [Kairouz et al. 2021, proposition 14].

    With D2 the L2 sensitivity, D1 the L1 sensitivity, s ``stddev``, n ``contributors``, d ``size``, and tau as in
    ``excess_of_sum``, the least of

        a D2^2 / (2 n s^2) + tau d
        a/2 (D2^2 / (n s^2) + 2 tau D1 / (sqrt(n) s) + tau^2 d)
        a/2 (D2 / (sqrt(n) s) + sqrt(d) tau)^2.

    Of contributors of whom some may be dishonest, only the honest ones count.

    Args:
        sensitivity: D2, in integer units. D1 is at most ``D2 * min(D2, sqrt(d))`` for integer vectors.
        stddev: s, of one contributor's noise, in integer units; at least 3.
        contributors: n.
        size: d, coordinates of the sum.
        orders: Orders greater than 1.

    Raises:
        ConfigurationError: s < 3, or a number that is not positive.
    """
    if not (sensitivity > 0 and size >= 1):
        raise ConfigurationError(f"a sensitivity of {sensitivity} over {size} coordinates")
    tau = excess_of_sum(stddev, contributors)
    ratio = sensitivity / (math.sqrt(contributors) * stddev)
    ratio_l1 = ratio * min(sensitivity, math.sqrt(size))
    return [
        min(
            order / 2 * ratio**2 + tau * size,
            order / 2 * (ratio**2 + 2 * tau * ratio_l1 + tau**2 * size),
            order / 2 * (ratio + math.sqrt(size) * tau) ** 2,
        )
        for order in orders
    ]


def rdp_to_epsilon(rdp: Sequence[float], delta: float, orders: Sequence[float] = ORDERS) -> float:
    """The least epsilon that follows from Renyi divergences [Canonne, Kamath and Steinke 2020, proposition 12].

    Args:
        rdp: Divergence at each order.
        delta: In (0, 1).
        orders: As many, greater than 1.

    Returns:
        Epsilon from 0; infinite if no order has a finite divergence.

    Raises:
        ConfigurationError: delta out of its range, or lists of different lengths.

    Example:
        >>> round(rdp_to_epsilon(gaussian_rdp(3.7306), 1e-5), 3)
        1.093
    """
    if not 0 < delta < 1:
        raise ConfigurationError(f"delta lies between 0 and 1, got {delta}")
    if len(rdp) != len(orders):
        raise ConfigurationError(f"{len(rdp)} divergences for {len(orders)} orders")
    # Below it the two outcomes' total variation is at most delta: sqrt(1 - exp(-divergence)).
    if min(rdp) <= -math.log1p(-(delta**2)):
        return 0.0
    found = (
        divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order, divergence in zip(orders, rdp, strict=True)
    )
    return max(0.0, min(found))


@lru_cache(maxsize=32)
def noise_for_epsilon(epsilon: float, delta: float) -> float:
    """The least noise multiplier, but for one part in a million, with which one release costs at most epsilon.

    Args:
        epsilon: Positive.
        delta: In (0, 1).

    Raises:
        ConfigurationError: A number out of its range, or an epsilon so small that no order of ``ORDERS`` shows it.

    Example:
        >>> z = noise_for_epsilon(1.0, 1e-5)
        >>> round(z, 3), rdp_to_epsilon(gaussian_rdp(z), 1e-5) <= 1.0
        (4.045, True)
    """
    if not 0 < epsilon < math.inf:
        raise ConfigurationError(f"epsilon is positive and finite, got {epsilon}")
    low, high = 0.0, 1.0
    while rdp_to_epsilon(gaussian_rdp(high), delta) > epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ConfigurationError(f"epsilon = {epsilon:g} at delta = {delta:g} is beyond this accountant")
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if rdp_to_epsilon(gaussian_rdp(middle), delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class RdpAccount:
    """Divergences of all releases so far. A value: ``plus`` makes the next one.

    Example:
        >>> account = RdpAccount()
        >>> for _ in range(10):
        ...     account = account.plus(gaussian_rdp(20.0))
        >>> round(account.epsilon(1e-5), 2)
        0.62
    """

    rdp: tuple[float, ...] = field(default=(0.0,) * len(ORDERS))

    def plus(self, rdp: Iterable[float]) -> RdpAccount:
        """The account after one more release, whose divergences at ``ORDERS`` these are.

        Raises:
            ConfigurationError: A divergence is negative or no number, or there are not as many as orders.
        """
        added = tuple(rdp)
        if len(added) != len(ORDERS) or not all(r >= 0 for r in added):
            raise ConfigurationError(f"a release has {len(ORDERS)} divergences from 0, one for each order")
        return RdpAccount(tuple(a + b for a, b in zip(self.rdp, added, strict=True)))

    def epsilon(self, delta: float) -> float:
        """Epsilon of all releases together; see ``rdp_to_epsilon``."""
        return rdp_to_epsilon(self.rdp, delta)
