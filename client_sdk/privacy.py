"""Local differential privacy: the device clips its update and adds noise to it, and needs to trust nobody for it.

The mechanism, all of it on integers:

1. Codes of norm at most ``B = floor(C 2**f)``, enforced exactly (``client_sdk.protocol.privacy``).
2. Plus independent discrete Gaussian noise of standard deviation ``2 z B`` on every code, from the system's randomness.
3. Back to float32. Whatever is done from here on, compression and its error feedback too, only processes what has been
   noised.

*Any* two updates that the device might have sent are neighbours, whatever its data: they lie at most 2 B apart. So this
is differential privacy against everyone who sees the report, the server included, for all of the device's data at once;
and it takes noise of norm ``2 z C sqrt(d)`` on a vector of norm C. Where a server may be trusted with a sum, noise on
the sum is far cheaper.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from client_sdk.blobs import Buffer
from client_sdk.errors import LocalBudgetSpent, LocalPrivacyUnavailable
from client_sdk.privacy_ledger import LocalCharges, LocalPrivacyLedger
from client_sdk.protocol.accountant import gaussian_rdp, noise_for_epsilon, rdp_to_epsilon
from client_sdk.protocol.discrete_gaussian import LARGEST_VARIANCE, sample
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.field import RandomBytes
from client_sdk.protocol.fixed_point import BUDGET_BITS, MAX_FRACTION_BITS
from client_sdk.protocol.messages import Assignment
from client_sdk.protocol.privacy import NOISE_TAIL, EncodedBounds, encode_clipped, noise_variance
from client_sdk.protocol.program import Float32Array

_BLOCK = 2**15
"""Coordinates noised at once, so that the noise of a large model never lies in memory as a whole."""

_MEANINGFUL_EPSILON: Final = 10.0
"""Beyond it, whoever sees a report may grow surer of a guess by a factor of 22,000; the label says so."""


class LocalPrivacyPolicy(BaseModel):
    """How much noise a device adds to each report, and how much of its privacy it spends in all. Nothing is seeded.

    Raises:
        ConfigurationError: Not one of ``epsilon`` and ``noise_multiplier``; no budget, or one that no report fits into;
            a grid too fine or too coarse for the clip norm and the noise.
        pydantic.ValidationError: A field that is not a number of its kind.

    Example:
        >>> policy = LocalPrivacyPolicy(clip_norm=1.0, epsilon=4.0, delta=1e-6, epsilon_total=20.0)
        >>> round(policy.multiplier, 2), round(policy.noise_stddev, 2)
        (1.27, 2.54)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_norm: float = Field(gt=0, allow_inf_nan=False, description="C, largest L2 norm of an update before the noise")
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False, description="of one report")
    noise_multiplier: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="z, instead of epsilon: the noise's deviation is 2 z C"
    )
    delta: float = Field(1e-6, gt=0, le=1e-3, description="of one report's epsilon, and of that of all together")
    epsilon_total: float | None = Field(None, gt=0, allow_inf_nan=False, description="largest epsilon of all reports")
    max_reports: int | None = Field(None, ge=1, description="largest number of reports, all tasks together")
    fraction_bits: int = Field(24, ge=0, le=MAX_FRACTION_BITS, description="f; noise is added on a grid of step 2^-f")
    hide_sample_count: bool = Field(default=True, description="the server is told of one example, so the weight is 1")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ConfigurationError("local privacy is given by epsilon or by noise_multiplier: one of them")
        if self.epsilon_total is None and self.max_reports is None:
            raise ConfigurationError("local privacy needs a budget: epsilon_total, max_reports, or both")
        tail = NOISE_TAIL * 2 * Fraction(self.multiplier)
        if (1 + tail) * self.bounds.norm_bound >= 2**BUDGET_BITS or self.noise_variance > LARGEST_VARIANCE:
            raise ConfigurationError(
                f"noise of deviation {self.noise_stddev:.3g} does not fit a grid of step 2^-{self.fraction_bits}: "
                "lower fraction_bits"
            )
        if self.epsilon_total is not None and self.report_epsilon > self.epsilon_total:
            raise ConfigurationError(
                f"one report costs epsilon = {self.report_epsilon:.3g}, more than the budget of {self.epsilon_total:g}"
            )
        return self

    @property
    def bounds(self) -> EncodedBounds:
        """The grid, and the norm of what is noised."""
        return EncodedBounds(clip_norm=self.clip_norm, fraction_bits=self.fraction_bits)

    @property
    def multiplier(self) -> float:
        """z, standard deviation of the noise over the distance of two updates."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        return noise_for_epsilon(self.epsilon or 0.0, self.delta)

    @property
    def noise_variance(self) -> Fraction:
        """``(2 z B)**2``, exactly: of every code's noise."""
        return noise_variance(self.bounds, noise_multiplier=self.multiplier, max_weight=2)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of every coordinate's noise, in the update's units."""
        return 2 * self.multiplier * self.bounds.norm_bound * self.bounds.step

    @property
    def report_epsilon(self) -> float:
        """Epsilon of one report, at ``delta``."""
        return rdp_to_epsilon(gaussian_rdp(self.multiplier), self.delta)


def local_policy(
    *, epsilon: float | None, clip_norm: float | None, budget: float | None, delta: float | None
) -> LocalPrivacyPolicy | None:
    """The policy of a command line; None where it names none of these.

    Raises:
        ConfigurationError: Some but not all of epsilon, clip norm and budget, or values that are not sound.
    """
    given = {"epsilon": epsilon, "clip_norm": clip_norm, "epsilon_total": budget, "delta": delta}
    stated = {name: value for name, value in given.items() if value is not None}
    if not stated:
        return None
    if not {"epsilon", "clip_norm", "epsilon_total"} <= stated.keys():
        raise ConfigurationError("local privacy needs its epsilon, its clip norm and its budget: give all three")
    try:
        return LocalPrivacyPolicy.model_validate(stated)
    except ValidationError as e:
        wrong = "; ".join(f"{error['loc'][0]}: {error['msg']}" for error in e.errors())
        raise ConfigurationError(f"local privacy: {wrong}") from e


def noised(update: Float32Array, policy: LocalPrivacyPolicy, *, random: RandomBytes = os.urandom) -> Float32Array:
    """One noised version of an update: (epsilon, delta)-differentially private for any two updates.

    Args:
        update: float32 ``[n]``, finite, of any norm.
        policy: Clip norm, noise and grid.
        random: Source of random bytes; privacy rests on it. Asked for 32 bytes at a time.

    Returns:
        float32 ``[n]``, a new array: clipped, noised on the grid, rounded to nearest.

    Raises:
        NonFiniteUpdate: NaN or infinities.
        ShapeMismatch: Not float32.
    """
    codes = encode_clipped(update, policy.bounds)
    variance, step = policy.noise_variance, policy.bounds.step
    released = np.empty(codes.shape, np.float32)
    for start in range(0, len(codes), _BLOCK):
        part = codes[start : start + _BLOCK]
        part += sample(len(part), variance, random)
        np.multiply(part, step, out=released[start : start + _BLOCK], dtype=np.float64, casting="same_kind")
    return released


@dataclass(frozen=True)
class LocalPrivacy:
    """A policy and the ledger that it spends: what a device with local privacy is given.

    Attributes:
        policy: How much noise, and the budget.
        ledger: What was spent so far, under this policy and others.
    """

    policy: LocalPrivacyPolicy
    ledger: LocalPrivacyLedger

    def check(self, assignment: Assignment) -> None:
        """Refuse what cannot be reported under this policy. Asked before training, which is dear.

        Raises:
            LocalPrivacyUnavailable: The assignment is SCAFFOLD's: two vectors, of which one would bypass the clipping.
            LocalBudgetSpent: The budget does not allow another report.
            StateDirUnusable: What was spent cannot be read.
        """
        if assignment.plan.algorithm == "scaffold":
            raise LocalPrivacyUnavailable(
                "scaffold sends a control variate beside the update; they are not clipped jointly, so this device's "
                "local privacy does not cover it"
            )
        self._check_budget(self.ledger.charges())

    def release(self, update: Float32Array, *, random: RandomBytes = os.urandom) -> Float32Array:
        """Charge the ledger, then draw the noise: see ``noised``. Each call is a charge of its own.

        Raises:
            LocalBudgetSpent: The budget does not allow another report; nothing was charged or drawn.
            StateDirUnusable: The charge could not be made durable; nothing was drawn.
            NonFiniteUpdate, ShapeMismatch: See ``noised``.
        """
        self._check_budget(self.ledger.charges())
        self.ledger.charge(self.policy.multiplier)
        return noised(update, self.policy, random=random)

    def name(self, frame: Buffer) -> None:
        """Note the report that came of the latest ``release``, before it is stored."""
        self.ledger.name(hashlib.sha256(frame).hexdigest())

    def covers(self, frame: Buffer) -> bool:
        """Whether a stored report is the one that came of the latest charge: only that one may be sent."""
        return self.ledger.covers(hashlib.sha256(frame).hexdigest())

    def told_samples(self, num_samples: int) -> int:
        """How many examples the server is told of."""
        return 1 if self.policy.hide_sample_count else num_samples

    def label(self) -> str:
        """What this device's local privacy is worth, for whoever owns the device. Honest: it says what is not hidden.

        Raises:
            StateDirUnusable: What was spent cannot be read.
        """
        policy, charges = self.policy, self.ledger.charges()
        spent = charges.account.epsilon(policy.delta) if charges.reports else 0.0
        budget = [] if policy.epsilon_total is None else [f"epsilon {policy.epsilon_total:.3g}"]
        if policy.max_reports is not None:
            budget.append(f"{policy.max_reports} reports")
        disclosed = ["participation and its timing", "the number of steps", "training that failed"]
        if not policy.hide_sample_count:
            disclosed.insert(1, "the number of examples")
        weak = "" if policy.report_epsilon <= _MEANINGFUL_EPSILON else " (so large that it promises next to nothing)"
        return (
            f"local differential privacy: epsilon = {policy.report_epsilon:.3g}{weak} per report, {spent:.3g} after "
            f"{charges.reports} report{'' if charges.reports == 1 else 's'}, budget {' and '.join(budget)}, delta "
            f"{policy.delta:g}; replace-one over all of this device's data; protects against everyone, the server "
            f"included; does not hide {', '.join(disclosed)}"
        )

    def _check_budget(self, charges: LocalCharges) -> None:
        policy = self.policy
        if policy.max_reports is not None and charges.reports >= policy.max_reports:
            raise LocalBudgetSpent(f"this device has made {charges.reports} noised reports of {policy.max_reports}")
        if policy.epsilon_total is None:
            return
        epsilon = charges.account.plus(gaussian_rdp(policy.multiplier)).epsilon(policy.delta)
        if epsilon > policy.epsilon_total:
            raise LocalBudgetSpent(
                f"after {charges.reports} noised reports, another one would cost epsilon = {epsilon:.4g} in all, more "
                f"than the {policy.epsilon_total:g} that this device spends at delta {policy.delta:g}"
            )
