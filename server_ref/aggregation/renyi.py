"""Renyi divergence of sampled Gaussian noise, and the specification's accountant over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.accountant import ORDERS, rdp_to_epsilon
from client_sdk.protocol.errors import ConfigurationError

Float64Array = npt.NDArray[np.float64]

LARGEST_SAMPLED_ORDER: Final = 1024
"""A sampled release's divergence has as many terms as its order; beyond this one it is not computed, and infinite."""


def sampled_gaussian_rdp(
    noise_multiplier: float, sampling_probability: float, orders: Sequence[float] = ORDERS
) -> Float64Array:
    """Renyi divergences of one release of a Poisson-sampled sum with Gaussian noise, under add/remove adjacency.

    At an integer order a it is exact [Mironov, Talwar and Zhang 2019, equation 30, whose other direction is less]:

        log(sum(C(a, i) (1 - q)**(a - i) q**i exp((i**2 - i) / (2 z**2)) for i in 0..a)) / (a - 1).

    Between two integers it is an integral of the same, by the trapezoidal rule (relative error below 1e-10, which is
    added), and never more than what convexity gives. Without sampling (q = 1) it is ``a / (2 z**2)``.

    Args:
        noise_multiplier: z, standard deviation of the noise divided by the L2 sensitivity.
        sampling_probability: q, with which each client takes part, independently of all others.
        orders: Orders greater than 1.

    Returns:
        float64[len(orders)]; infinite beyond ``LARGEST_SAMPLED_ORDER`` where 0 < q < 1.

    Raises:
        ConfigurationError: z is not positive, q is no probability, or an order is not greater than 1.
    """
    if not noise_multiplier > 0 or not 0 <= sampling_probability <= 1 or not all(o > 1 for o in orders):
        raise ConfigurationError(
            f"no divergences for noise_multiplier={noise_multiplier}, sampling_probability={sampling_probability} at "
            f"orders from {min(orders, default=0):g}; they are positive, in [0, 1], and greater than 1"
        )
    at = np.asarray(orders, np.float64)
    if sampling_probability in {0, 1}:
        return at / (2 * noise_multiplier**2) * sampling_probability
    whole, binomials, index, starts = _terms(tuple(orders))
    logs = binomials + index * math.log(sampling_probability)
    logs += (np.repeat(whole, (whole + 1).astype(np.intp)) - index) * math.log1p(-sampling_probability)
    logs += (index**2 - index) / (2 * noise_multiplier**2)
    peaks = np.maximum.reduceat(logs, starts)
    sums = np.add.reduceat(np.exp(logs - np.repeat(peaks, (whole + 1).astype(np.intp))), starts)
    # At order 1 it is 0: all terms are probabilities. It is convex: between integers at most the interpolation.
    found = np.interp(at, np.concatenate([[1.0], whole]), np.concatenate([[0.0], np.maximum(peaks + np.log(sums), 0)]))
    for i in np.flatnonzero((at != np.round(at)) & (at <= LARGEST_SAMPLED_ORDER)).tolist():
        found[i] = min(found[i], _log_moment(noise_multiplier, sampling_probability, float(at[i])))
    return np.where(at <= LARGEST_SAMPLED_ORDER, found / (at - 1), math.inf)


def _log_moment(z: float, q: float, order: float) -> float:
    """Logarithm of the expectation, over x from N(0, z**2), of ``(1 - q + q exp((2 x - 1) / (2 z**2)))**order``.

    The integrand is analytic within ``pi z**2`` of the real line and falls like a Gaussian beyond [0, order], so that
    the trapezoidal rule with steps of z / 8, and at most z**2 / 2, misses by less than exp(-39).
    """
    step = min(z / 8, z * z / 2)
    x = np.arange(-13 * z, order + 13 * z + step, step)
    logs = order * np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z * z)) - (x / z) ** 2 / 2
    peak = float(logs.max())
    moment = peak + math.log(float(np.exp(logs - peak).sum()) * step / (z * math.sqrt(2 * math.pi)))
    return max(0.0, moment + 1e-10 * abs(moment) + 1e-15)


@lru_cache(maxsize=8)
def _terms(orders: tuple[float, ...]) -> tuple[Float64Array, Float64Array, Float64Array, npt.NDArray[np.intp]]:
    """For the integers around these orders, one after the other: log C(a, i) and i for i = 0..a, and where a starts."""
    around = {f(o) for o in orders if o <= LARGEST_SAMPLED_ORDER for f in (math.floor, math.ceil)}
    whole = sorted({a for a in around if a > 1} or {2})
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, whole[-1] + 1)))])
    index = np.concatenate([np.arange(a + 1) for a in whole])
    of = np.repeat(whole, [a + 1 for a in whole])
    binomials = log_factorials[of] - log_factorials[index] - log_factorials[of - index]
    starts = np.concatenate([[0], np.cumsum([a + 1 for a in whole])[:-1]]).astype(np.intp)
    return np.array(whole, np.float64), binomials, index.astype(np.float64), starts


class RenyiPrivacyAccountant:
    """Adds up the privacy loss of Gaussian releases, sampled or not, under add/remove adjacency.

    Without sampling (``sampling_rate=1``) the same account holds under the zero-out and replace-one adjacencies, for
    noise that is a multiple of *their* sensitivity.

    Args:
        orders: Orders greater than 1; by default a wide grid from 1.1 to 16384.

    Example:
        >>> accountant = RenyiPrivacyAccountant()
        >>> accountant.accumulate(noise_multiplier=1.0, sampling_rate=0.01, steps=1000)
        >>> round(accountant.get_epsilon(1e-5), 5)
        2.10137
    """

    def __init__(self, orders: Sequence[float] | None = None) -> None:
        self.orders: tuple[float, ...] = ORDERS if orders is None else tuple(map(float, orders))
        if not self.orders or not all(order > 1 for order in self.orders):
            raise ConfigurationError("an accountant needs orders, all of them greater than 1")
        self._rdp = np.zeros(len(self.orders))

    @property
    def rdp(self) -> tuple[float, ...]:
        """Divergences of all releases so far, at each order."""
        return tuple(self._rdp.tolist())

    def accumulate(self, noise_multiplier: float, sampling_rate: float, steps: int = 1) -> None:
        """Add releases.

        Args:
            noise_multiplier: Standard deviation of the noise divided by the L2 sensitivity.
            sampling_rate: Probability with which each client takes part, independently; 1 if all do.
            steps: How many releases, from 0.

        Raises:
            ConfigurationError: A value out of its range; nothing was added.
        """
        if steps < 0:
            raise ConfigurationError(f"{steps} releases cannot be taken back")
        self._rdp = self._rdp + steps * sampled_gaussian_rdp(noise_multiplier, sampling_rate, self.orders)

    def get_epsilon(self, delta: float) -> float:
        """The least epsilon at this delta that follows; see ``rdp_to_epsilon``.

        Raises:
            ConfigurationError: delta is not in (0, 1).
        """
        return rdp_to_epsilon(self.rdp, delta, self.orders)
