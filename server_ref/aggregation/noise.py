"""The ``noise`` slot where this server makes the sum itself: discrete Gaussian noise, paid for before it is drawn.

Noise goes on the integer sum, before it is divided by anything, and is as exact as the sum: an integer variance that is
a multiple of the squared sensitivity, samples from the discrete Gaussian itself. An aggregate in floating point (a
robust rule's, or a sum in float64 bins) is rounded to a grid first, and what rounding can add is added to the
sensitivity.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from client_sdk.protocol.discrete_gaussian import sample
from client_sdk.protocol.errors import BudgetExceeded
from client_sdk.protocol.privacy import NOISE_TAIL
from server_ref.aggregation.accounting import GaussianRelease, LedgerKeeper, PrivacySpent
from server_ref.aggregation.adaptive_clipping import NoiseSplit, split_noise
from server_ref.aggregation.batch import (
    Adjacency,
    Aggregate,
    Facts,
    Int64Array,
    IntegerSum,
    PrivateAggregate,
)
from server_ref.aggregation.calibration import NoiseSchedule
from server_ref.aggregation.errors import NoiseUnexpected, UnknownSensitivity
from server_ref.aggregation.release import require_sensitivity
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Noise

_SENSITIVITY_BITS: Final = 30
"""A floating-point aggregate's sensitivity has so many bits on the grid: what rounding adds to it is beyond notice."""

_EXACT_BITS: Final = 52
"""Codes of a floating-point aggregate stay below this: float64 rounds its values by less than half a step then."""

_CODE_LIMIT: Final = 2**62

_PUBLIC: Final = frozenset({"staleness", "rule", "num_byzantine", "degraded"})
"""Measurements that depend on public facts alone: who reported when, and what was declared."""


@dataclass(frozen=True, eq=False)
class CentralNoise:
    """Discrete Gaussian noise on the aggregate, for a budget that is asked first.

    The server sees single updates in the clear: the noise protects against whoever sees the model, not against it.

    Attributes:
        noise_multiplier: z, standard deviation as a multiple of the sensitivity under ``adjacency``; or a schedule of
            them, by round.
        keeper: The ledger. Its round must be open (``LedgerKeeper.open_round``) when an aggregate is released.
        adjacency: What the noise is calibrated for; the ledger's.
        indicators: Whether the indicators of adaptive clipping are released too, out of the same z.
        nominal_count: Under add/remove adjacency: the public number that stands for how many took part.
        random: Source of random bytes. The default is the operating system's; there is no seed.
    """

    noise_multiplier: float | NoiseSchedule
    keeper: LedgerKeeper = field(repr=False)
    adjacency: Adjacency = Adjacency.ZERO_OUT
    indicators: bool = False
    nominal_count: int | None = None
    random: Callable[[int], bytes] = field(default=os.urandom, repr=False)

    def __post_init__(self) -> None:
        z = self.noise_multiplier
        if not isinstance(z, NoiseSchedule) and not 0 < z < math.inf:
            raise NoiseUnexpected(f"a noise multiplier is positive and finite, got {z}; drop the stage for no noise")

    @property
    def slot(self) -> Slot:
        """``noise``."""
        return Slot.NOISE

    @property
    def title(self) -> str:
        """How much, and for what adjacency."""
        z = self.noise_multiplier
        if isinstance(z, NoiseSchedule):
            amount = f"noise multipliers from {z.noise_multipliers[0]:.4g} to {z.noise_multipliers[-1]:.4g}"
        else:
            amount = f"noise multiplier {z:.4g}"
        return f"discrete Gaussian, {amount} ({self.adjacency} adjacency)"

    def derive(self, facts: Facts) -> Facts:
        """Needs a sensitivity under the adjacency, and a ledger of the same.

        Raises:
            NoiseUnexpected: The ledger holds another adjacency, or add/remove adjacency has no nominal count.
            PipelineError: As ``require_sensitivity``.
        """
        require_sensitivity(facts, self.adjacency)
        budget = self.keeper.ledger.budget
        if budget.adjacency is not self.adjacency:
            raise NoiseUnexpected(
                f"the noise is for {self.adjacency} adjacency and the ledger holds {budget.adjacency}; make them agree"
            )
        if self.adjacency is Adjacency.ADD_REMOVE and self.nominal_count is None:
            raise NoiseUnexpected("add/remove adjacency hides how many took part; give nominal_count to stand for it")
        return replace(facts, noised=True)

    def release(self, aggregate: Aggregate) -> PrivateAggregate:
        """Pay, then draw noise. What fails after the payment is not paid back.

        Returns:
            The private aggregate. Measurements of single updates are left out, and what the release cost is among
            them. Under add/remove adjacency the count is the nominal one.

        Raises:
            UnknownSensitivity: The aggregate carries none for this adjacency.
            PrivacyBudgetExhausted: The budget does not allow another release; no noise was drawn.
            PrivacyError: Another subclass: no round is open, or it was released before.
            BudgetExceeded: Sum and noise do not fit 62 bits.
        """
        if self.adjacency not in aggregate.sensitivity:
            raise UnknownSensitivity(f"the aggregate carries no sensitivity for {self.adjacency} adjacency")
        clean, reach = self._on_a_grid(aggregate)
        z = self.noise_multiplier
        round_id = self.keeper.round_id
        z = z.at(round_id) if isinstance(z, NoiseSchedule) else z
        hidden = self.adjacency is Adjacency.ADD_REMOVE
        count = (self.nominal_count or 0) if hidden else aggregate.count
        split = split_noise(z, count) if self.indicators and aggregate.indicator is not None else None
        variance = (Fraction(z if split is None else split.update_multiplier) * reach) ** 2
        if NOISE_TAIL**2 * variance > _CODE_LIMIT**2 // 16:
            raise BudgetExceeded("the noise does not fit 60 bits: choose fewer fraction bits for the grid")
        spent = self.keeper.charge(
            GaussianRelease(
                round_id=round_id,
                noise_multiplier=z,
                adjacency=self.adjacency,
                sampling_probability=self.keeper.ledger.budget.sampling_probability,
            )
        )
        noised = replace(clean, codes=_plus(clean.codes, sample(clean.codes.size, variance, self.random)), reach=None)
        measurements = {k: v for k, v in aggregate.measurements.items() if k in _PUBLIC and not hidden}
        return PrivateAggregate(
            values=noised.decoded(),
            kind=aggregate.kind,
            count=count,
            total_weight=count if hidden else aggregate.total_weight,
            measurements=measurements | _price(spent, z),
            integers=noised,
            indicator=None if split is None else self._indicator(aggregate.indicator or 0, split),
            noise_stddev=math.sqrt(variance) / math.ldexp(noised.denominator, noised.fraction_bits),
            adjacency=self.adjacency,
        )

    def _on_a_grid(self, aggregate: Aggregate) -> tuple[IntegerSum, int]:
        """The sum in integers, and its integer sensitivity under this adjacency."""
        twice = 2 if self.adjacency is Adjacency.REPLACE_ONE else 1
        if aggregate.integers is not None and aggregate.integers.reach is not None:
            return aggregate.integers, aggregate.integers.reach * twice
        sensitivity = aggregate.sensitivity[self.adjacency]
        fraction_bits = _SENSITIVITY_BITS - math.frexp(sensitivity)[1]
        with np.errstate(over="ignore"):
            codes = np.rint(np.ldexp(aggregate.values, fraction_bits))
        if not np.abs(codes).max(initial=0) < 2.0**_EXACT_BITS:
            raise BudgetExceeded(
                f"the aggregate is more than 2**{_EXACT_BITS - _SENSITIVITY_BITS} times as large as its sensitivity of "
                f"{sensitivity:.3g}; use the int64 grid (summation 'fixed')"
            )
        # float64 may have rounded a value by half a step, and the grid rounds by another half: in each of the two
        # outcomes, on every coordinate.
        rounding = 2 * (math.isqrt(codes.size) + 1)
        reach = math.ceil(Fraction(sensitivity) * Fraction(2) ** fraction_bits) + rounding
        return IntegerSum(codes.astype(np.int64), fraction_bits, denominator=1), reach

    def _indicator(self, indicator: int, split: NoiseSplit) -> int:
        # In halves: +1 or -1 for each update, so that leaving one out moves it by 1, and replacing one by 2.
        twice = 2 if self.adjacency is Adjacency.REPLACE_ONE else 1
        variance = (Fraction(split.indicator_multiplier) * twice) ** 2
        return indicator + int(sample(1, variance, self.random)[0])


def _plus(codes: Int64Array, noise: Int64Array) -> Int64Array:
    largest = max(int(codes.max(initial=0)), -int(codes.min(initial=0)))
    drawn = max(int(noise.max(initial=0)), -int(noise.min(initial=0)))
    if largest + drawn >= _CODE_LIMIT:
        raise BudgetExceeded("the sum and its noise do not fit 62 bits: choose fewer fraction bits for the grid")
    return codes + noise


def _price(spent: PrivacySpent, noise_multiplier: float) -> dict[str, Any]:
    return {
        "epsilon": spent.epsilon,
        "epsilon_rdp": spent.epsilon_rdp,
        "delta": spent.delta,
        "adjacency": str(spent.adjacency),
        "noise_multiplier": noise_multiplier,
    }


if TYPE_CHECKING:
    _noises: type[Noise] = CentralNoise
