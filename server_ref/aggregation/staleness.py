"""Staleness: how old an update may be, what its age costs it, and when delayed gradient descent is stable at all.

An update is *stale* by the number of model versions between the model it was computed on and the one it changes.
On a quadratic with curvature lambda, gradient descent with step size eta and a delay of tau versions is

    w_{t+1} = w_t - eta lambda w_{t - tau}

and converges if and only if ``eta lambda < 2 sin(pi / (2 (2 tau + 1)))``: 2 without delay, 0.149 at tau = 10. For any
fixed mixture of delays up to tau, with weights that sum to at most 1, the same bound suffices (docs/async.md proves
it). It is the yardstick of everything here: of the learning rate, and of the staleness that can be tolerated.

Source: S. A. Levin, R. M. May, "A note on difference-delay equations", Theoretical Population Biology 9 (1976), for the
bound; C. Xie, S. Koyejo, I. Gupta, "Asynchronous Federated Optimization" (2019), for polynomial weights; J. Nguyen et
al., "Federated Learning with Buffered Asynchronous Aggregation" (2022), for the buffer and its constant denominator.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.batch import Facts
from server_ref.aggregation.errors import UnboundedWeight
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Schedule

SCALE: Final = 256
"""Integer scale of an update that is not stale: staleness weights are whole multiples of 1 / SCALE."""

_SLACK: Final = 1e-9
# Larger than the error of any mathematical library's power function, so that 1 / 2 is 128 parts of 256 on all of them.

MAX_STALENESS: Final = 1_000_000


def stability_limit(staleness: int) -> float:
    """Largest ``eta * lambda`` (exclusive) at which gradient descent with this delay converges on a quadratic.

    Delays that change from round to round without a pattern average out; ones that are chosen against the run can
    diverge a little below (docs/async.md has a measured case). Leave a tenth of margin.

    Example:
        >>> [round(stability_limit(tau), 4) for tau in (0, 1, 10)]
        [2.0, 1.0, 0.1495]

    Raises:
        ConfigurationError: A negative staleness.
    """
    if staleness < 0:
        raise ConfigurationError(f"a staleness of {staleness}")
    return 2 * math.sin(math.pi / (2 * (2 * staleness + 1)))


def largest_stable_staleness(step_times_curvature: float, *, at_most: int = MAX_STALENESS) -> int:
    """Largest delay at which gradient descent converges: the inverse of ``stability_limit``.

    Args:
        step_times_curvature: ``eta * lambda``: step size times the largest curvature (the smoothness of the loss).
        at_most: Upper end of the answer.

    Raises:
        ConfigurationError: No positive number, or not stable even without delay.

    Example:
        >>> largest_stable_staleness(0.149), largest_stable_staleness(0.15)
        (10, 9)
    """
    if not 0 < step_times_curvature < stability_limit(0):
        raise ConfigurationError(
            f"a step size times curvature of {step_times_curvature:g} is not stable even without staleness (it must be "
            "positive and below 2); lower the learning rate"
        )
    unstable = bisect.bisect_left(
        range(at_most + 1), x=True, key=lambda staleness: stability_limit(staleness) <= step_times_curvature
    )
    return unstable - 1


class StalenessWeighting(StrEnum):
    """What an update's age does to its weight."""

    POLYNOMIAL = "polynomial"
    """``1 / (1 + staleness) ** exponent``."""

    CONSTANT = "constant"
    """Nothing."""

    ADAPTIVE = "adaptive"
    """Polynomial, with an exponent that rises from ``exponent`` to ``final_exponent`` as the declared rounds pass."""


class StalenessPolicy(BaseModel):
    """How old updates may be and what that costs them. A frozen value; ``round_id`` is always an argument.

    Guarantees: ``tolerance`` never rises with the round; ``scale`` never rises with staleness nor with the round, and
    is at least 1: an update that is admitted is never silently multiplied by zero. (Where the formula gives less than
    1 / 256, the weight is 1 / 256. How old an update may be is the tolerance's business, not rounding's.)

    Raises:
        ConfigurationError: Settings that contradict each other; the message says which.
        pydantic.ValidationError: A number out of its range.

    Example:
        >>> policy = StalenessPolicy(exponent=1.0, max_staleness=10)
        >>> [policy.scale(staleness, round_id=0) for staleness in (0, 1, 2, 10)]
        [256, 128, 85, 23]
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weighting: StalenessWeighting = StalenessWeighting.POLYNOMIAL
    exponent: float = Field(default=0.5, ge=0, le=16, description="of the polynomial; where an adaptive one starts")
    final_exponent: float = Field(default=2.0, ge=0, le=16, description="where an adaptive exponent ends")
    max_staleness: int = Field(default=0, ge=0, le=MAX_STALENESS, description="oldest update accepted in round 0")
    min_staleness: int = Field(default=0, ge=0, description="what the tolerance falls to, if it tightens")
    tighten_rounds: int | None = Field(default=None, ge=1, description="rounds over which the tolerance falls")
    total_rounds: int | None = Field(default=None, ge=1, description="declared length of the run, for adaptive weights")
    step_times_curvature: float | None = Field(
        default=None, gt=0, description="declared eta * lambda; ages that are not stable with it are refused"
    )
    scale_learning_rate: bool = Field(
        default=False, description="divide the server's learning rate by 1 + the buffer's mean staleness"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weighting is StalenessWeighting.ADAPTIVE and self.final_exponent < self.exponent:
            raise ConfigurationError(
                f"final_exponent={self.final_exponent:g} lies below exponent={self.exponent:g}; adaptive weights get "
                "stricter, not looser"
            )
        if self.min_staleness > self.max_staleness:
            raise ConfigurationError(
                f"min_staleness={self.min_staleness} exceeds max_staleness={self.max_staleness}; a tolerance only falls"
            )
        if self.step_times_curvature is not None:
            largest_stable_staleness(self.step_times_curvature, at_most=0)
        return self

    def lasting(self, rounds: int) -> Self:
        """The same policy for a run of so many rounds, if it does not declare a number itself."""
        return self if self.total_rounds is not None else self.model_copy(update={"total_rounds": rounds})

    def exponent_at(self, round_id: int) -> float:
        """The polynomial's exponent in this round; 0 for constant weights.

        Raises:
            ConfigurationError: Adaptive weights without a declared number of rounds.
        """
        match self.weighting:
            case StalenessWeighting.CONSTANT:
                return 0.0
            case StalenessWeighting.POLYNOMIAL:
                return self.exponent
            case StalenessWeighting.ADAPTIVE:
                if self.total_rounds is None:
                    raise ConfigurationError("adaptive weighting follows the run's progress; declare total_rounds")
                progress = min(max(round_id, 0), self.total_rounds) / self.total_rounds
                return self.exponent + (self.final_exponent - self.exponent) * progress

    def scale(self, staleness: int, round_id: int) -> int:
        """Weight of an update of this age as an integer from 1 to ``SCALE``: ``max(1, floor(SCALE * s))``.

        Raises:
            ConfigurationError: A negative staleness.
        """
        if staleness < 0:
            raise ConfigurationError(f"a staleness of {staleness}: the update is of a model that does not exist yet")
        weight = math.pow(1 + staleness, -self.exponent_at(round_id))
        return max(1, math.floor(SCALE * weight + _SLACK))

    def tolerance(self, round_id: int) -> int:
        """Oldest staleness that is accepted in this round.

        ``max_staleness``, falling in equal steps to ``min_staleness`` over ``tighten_rounds``, and never more than
        what is stable with the declared ``step_times_curvature``.
        """
        tolerance = self.max_staleness
        if self.tighten_rounds is not None:
            passed = min(max(round_id, 0), self.tighten_rounds)
            tolerance -= (self.max_staleness - self.min_staleness) * passed // self.tighten_rounds
        if self.step_times_curvature is not None:
            tolerance = largest_stable_staleness(self.step_times_curvature, at_most=tolerance)
        return tolerance

    def learning_rate_scale(self, staleness: Sequence[int]) -> float:
        """Factor on the learning rate for a buffer of these ages: ``1 / (1 + mean)``, or 1 if that is not asked for.

        If all updates are equally old, ``eta * lambda <= pi / 2`` is then stable at every age.
        """
        if not self.scale_learning_rate or not staleness:
            return 1.0
        return len(staleness) / (len(staleness) + sum(staleness))


@dataclass(frozen=True)
class SynchronousSchedule:
    """The ``schedule`` slot of synchronous rounds: only updates of the current model count."""

    @property
    def slot(self) -> Slot:
        """``schedule``."""
        return Slot.SCHEDULE

    @property
    def title(self) -> str:
        """Says so."""
        return "synchronous: updates of the current model only"

    def derive(self, facts: Facts) -> Facts:
        """Changes nothing."""
        return facts

    def admits(self, staleness: int, round_id: int) -> bool:  # noqa: ARG002 - the slot's signature
        """Whether it is not stale."""
        return staleness == 0

    def scale(self, staleness: int, round_id: int) -> int:  # noqa: ARG002 - the slot's signature
        """1: weights stay as they are."""
        return 1

    def learning_rate_scale(self, staleness: Sequence[int], round_id: int) -> float:  # noqa: ARG002 - likewise
        """1."""
        return 1.0


@dataclass(frozen=True)
class BufferedSchedule:
    """The ``schedule`` slot of asynchronous rounds: every so many updates make a model, whatever theirs was.

    Attributes:
        policy: What ages are accepted, and what they cost.
        buffer_size: Updates that close a buffer. Where all weigh 1, the sum is divided by this constant.

    Raises:
        ConfigurationError: No buffer, or adaptive weights over an unknown number of rounds.
    """

    policy: StalenessPolicy
    buffer_size: int

    def __post_init__(self) -> None:
        if self.buffer_size < 1:
            raise ConfigurationError(f"a buffer of {self.buffer_size} updates")
        self.policy.exponent_at(0)  # refuses what it does not know now, not at the first stale update

    @property
    def slot(self) -> Slot:
        """``schedule``."""
        return Slot.SCHEDULE

    @property
    def title(self) -> str:
        """The buffer, the tolerance and the weights."""
        policy = self.policy
        oldest = f"staleness <= {policy.tolerance(0)}"
        if policy.tighten_rounds is not None:
            oldest += f", falling to {policy.tolerance(policy.tighten_rounds)} over {policy.tighten_rounds} rounds"
        match policy.weighting:
            case StalenessWeighting.CONSTANT:
                weights = "constant weights"
            case StalenessWeighting.POLYNOMIAL:
                weights = f"weights (1 + staleness)^-{policy.exponent:g}"
            case StalenessWeighting.ADAPTIVE:
                weights = (
                    f"weights (1 + staleness)^-{policy.exponent:g}..{policy.final_exponent:g} "
                    f"over {policy.total_rounds} rounds"
                )
        rate = ", learning rate / (1 + mean staleness)" if policy.scale_learning_rate else ""
        return f"asynchronous: buffers of {self.buffer_size}, {oldest}, {weights}{rate}"

    def derive(self, facts: Facts) -> Facts:
        """Declares the largest scale, and the constant denominator where all weights are 1.

        Raises:
            UnboundedWeight: Weights by staleness on top of sample weights without a declared maximum.
        """
        if facts.max_weight is None and self._weighs:
            raise UnboundedWeight(
                "staleness weights multiply sample weights, which have no maximum; declare max_weight"
            )
        if facts.max_weight == 1 and facts.constant_denominator is None:
            facts = replace(facts, constant_denominator=self.buffer_size)
        return replace(facts, max_scale=SCALE if self._weighs else 1)

    def admits(self, staleness: int, round_id: int) -> bool:
        """Whether the policy tolerates this age in this round; a model from the future never."""
        return 0 <= staleness <= self.policy.tolerance(round_id)

    def scale(self, staleness: int, round_id: int) -> int:
        """The policy's integer weight, out of the ``max_scale`` that ``derive`` declares."""
        return self.policy.scale(staleness, round_id) if self._weighs else 1

    def learning_rate_scale(self, staleness: Sequence[int], round_id: int) -> float:  # noqa: ARG002 - likewise
        """The policy's factor for a buffer of these ages."""
        return self.policy.learning_rate_scale(staleness)

    @property
    def _weighs(self) -> bool:
        return self.policy.weighting is not StalenessWeighting.CONSTANT


if TYPE_CHECKING:
    _schedules: tuple[type[Schedule], ...] = (SynchronousSchedule, BufferedSchedule)
