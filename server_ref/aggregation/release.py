"""The ``noise`` slot: what has to hold before noise means anything, and the two stages that add none here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from server_ref.aggregation.batch import Adjacency, Aggregate, Facts, PrivateAggregate, Visibility
from server_ref.aggregation.errors import (
    CohortDependentAcceptance,
    NoiseUnexpected,
    NoiseUseless,
    UndeclaredRescaling,
    UnknownSensitivity,
)
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Noise


_ROUNDING: Final = 1e-6
"""Relative difference at which two standard deviations still count as the same number, computed in two places.

One of them is from a clip norm that was rounded down to the grid, the other from the clip norm.
"""


def require_sensitivity(facts: Facts, adjacency: Adjacency) -> float:
    """The L2 sensitivity that noise must be calibrated to: for every stage that adds some.

    Raises:
        UndeclaredRescaling: Single updates are rescaled after clipping.
        CohortDependentAcceptance: Whether an update counts depends on the others'.
        UnknownSensitivity: None is proved; the message says what is missing.
        NoiseUseless: One client can change the whole aggregate; the message says what to use instead.
    """
    if facts.noise_refusal is not None:
        raise NoiseUseless(facts.noise_refusal)
    if facts.rescaled:
        raise UndeclaredRescaling(
            "updates are rescaled by something that is not a declared public weight, so one client can move the "
            "aggregate by more than its clipped update; drop the rescaling (FedNova's normalisation) or the noise"
        )
    if facts.cohort_dependent:
        raise CohortDependentAcceptance(
            "whether an update counts depends on the others', so one client can change what all others contribute; "
            "accept by each update alone, or drop the noise"
        )
    if facts.norm_bound is None:
        raise UnknownSensitivity("nothing bounds an update's norm; add a clip stage (clip_norm)")
    value = facts.sensitivity.get(adjacency)
    if value is None:
        proved = ", ".join(facts.sensitivity) or "none"
        raise UnknownSensitivity(
            f"no sensitivity of the aggregate is proved for {adjacency} adjacency (proved: {proved}); use another "
            "adjacency, the mean, or a rule for which one is proved"
        )
    return value


@dataclass(frozen=True)
class NoNoise:
    """The aggregate is used as it is: no privacy is claimed."""

    @property
    def slot(self) -> Slot:
        """``noise``."""
        return Slot.NOISE

    @property
    def title(self) -> str:
        """Says so."""
        return "none (no privacy is claimed)"

    def derive(self, facts: Facts) -> Facts:
        """Changes nothing."""
        return facts

    def release(self, aggregate: Aggregate) -> Aggregate:
        """The aggregate itself."""
        return aggregate


@dataclass(frozen=True)
class ExternalNoise:
    """Whoever made the sum has added the noise: the aggregators of secret-shared updates.

    Attributes:
        adjacency: What they calibrated it for.
        noise_multiplier: What their noise has to be at least, as a multiple of the sensitivity; None: whatever they
            say, which is then for them alone to account for.
    """

    adjacency: Adjacency = Adjacency.ZERO_OUT
    noise_multiplier: float | None = None

    @property
    def slot(self) -> Slot:
        """``noise``."""
        return Slot.NOISE

    @property
    def title(self) -> str:
        """Who added it."""
        return f"added by the aggregators ({self.adjacency} adjacency)"

    def derive(self, facts: Facts) -> Facts:
        """Fits only where this server sees no single update, and the aggregators' calibration had a sensitivity.

        Raises:
            NoiseUnexpected: Single updates were visible here.
            PipelineError: As ``require_sensitivity``.
        """
        if facts.visibility is not Visibility.SUM:
            raise NoiseUnexpected("external noise protects nothing where single updates are visible; use another stage")
        require_sensitivity(facts, self.adjacency)
        return replace(facts, noised=True)

    def release(self, aggregate: Aggregate) -> Aggregate:
        """The aggregate itself.

        Raises:
            NoiseUnexpected: It carries no noise of the declared kind, or less than declared.
        """
        if not isinstance(aggregate, PrivateAggregate) or aggregate.adjacency is not self.adjacency:
            raise NoiseUnexpected("the aggregators' sum carries no noise of the declared kind; nothing is released")
        if self.noise_multiplier is not None:
            least = self.noise_multiplier * aggregate.sensitivity.get(self.adjacency, math.inf)
            if not aggregate.noise_stddev >= least * (1 - _ROUNDING):
                raise NoiseUnexpected(
                    f"the aggregators' noise has a standard deviation of {aggregate.noise_stddev:.3g}, below the "
                    f"declared {least:.3g}; nothing is released"
                )
        return aggregate


if TYPE_CHECKING:
    _noises: tuple[type[Noise], ...] = (NoNoise, ExternalNoise)
