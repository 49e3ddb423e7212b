"""What a task's secrecy settings come to: what aggregators pin, and what devices are told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Self

from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError
from client_sdk.protocol.field import Field
from client_sdk.protocol.messages import SecurePlan
from client_sdk.protocol.privacy import EncodedBounds, choose_private_grid, noise_variance
from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.secure import SecureLayout, shared_size
from client_sdk.protocol.shamir import Scheme
from server_ref.config import TaskConfig
from server_ref.privacy_plan import PrivacyPlan
from server_ref.protection import SecureConfig
from server_ref.secure.messages import TaskBinding
from server_ref.secure.parameters import CheckingMode, PinnedParameters, PinnedPrivacy
from server_ref.secure.projections import ProjectionSettings

_PER_BUCKET: Final = 3
"""Reports for each bucket at least: a sum of fewer than two is not opened."""

_COARSEST: Final = 16
"""Fraction bits without which rounding would show in a model."""


def grid_of(config: TaskConfig, size: int, max_scale: int, privacy: PrivacyPlan | None) -> EncodedBounds:
    """The grid of a task's sums, shared or not: both give the same bits.

    Args:
        config: Its settings, with the clip norm of the present round.
        size: Coordinates of an update.
        max_scale: Of the schedule.
        privacy: Its noise, for whose tails the sum leaves room.

    Raises:
        BudgetExceeded: No grid is fine enough for the numbers.
        ConfigurationError: No clip norm.
    """
    clip_norm = config.aggregation.clip_norm
    if clip_norm is None:
        raise ConfigurationError("a sum on the grid needs a bound on each update: set task.aggregation.clip_norm")
    adaptive = None if privacy is None else privacy.clip_norm
    noise = 0.0
    if privacy is not None:
        # Where devices add it and all of them are honest, there is more of it than was relied on.
        surplus = 1.0 if config.privacy.honest_devices is None else config.buffer_size / config.privacy.honest_devices
        noise = privacy.most_noise_per_clip_norm * math.sqrt(surplus)
    finest = choose_private_grid(
        # One grid for all rounds, whatever the clip norm of the present one.
        clip_norm=clip_norm if adaptive is None else adaptive.largest,
        # A set that is shared is never larger than the buffer.
        max_count=config.capacity if config.secure is None else config.buffer_size,
        max_weight=config.max_weight * max_scale,
        noise_multiplier=noise,
        threshold=1 if config.secure is None else config.secure.threshold,
    )
    finest = EncodedBounds(clip_norm=clip_norm, fraction_bits=finest.fraction_bits)
    if config.secure is None or config.secure.checks != "projections":
        return finest
    return _checkable(finest, config.secure, shared_size(config.compression, size))


def _checkable(finest: EncodedBounds, settings: SecureConfig, size: int) -> EncodedBounds:
    """The finest grid on which an update that is too long cannot wrap around the field and pass as a short one."""
    refused: BudgetExceeded | None = None
    for fraction_bits in range(finest.fraction_bits, _COARSEST - 1, -1):
        bounds = EncodedBounds(clip_norm=finest.clip_norm, fraction_bits=fraction_bits)
        try:
            ProjectionSettings(
                num_aggregators=settings.num_aggregators,
                threshold=settings.threshold,
                field=Field.by_name(settings.field),
                bounds=bounds,
                size=size,
                packing=settings.packing,
            )
        except BudgetExceeded as e:
            refused = e
        else:
            return bounds
    raise refused or BudgetExceeded("no grid is fine enough for projections")


def selects_by_distance(config: TaskConfig) -> bool:
    """Whether a rule chooses among shared updates by the distances between them."""
    return config.secure is not None and config.privacy.buckets is None and config.aggregation.rule != "mean"


@dataclass(frozen=True)
class SharingPlan:
    """How the updates of a task are shared.

    Attributes:
        settings: Of the task.
        pinned: What every aggregator insists on, if it is configured for this task.
        size: Coordinates of an update that are shared.
    """

    settings: SecureConfig
    pinned: PinnedParameters
    size: int

    @classmethod
    def of(cls, config: TaskConfig, size: int, max_scale: int, privacy: PrivacyPlan | None) -> Self | None:
        """A task's plan; None where updates are not shared.

        Args:
            config: Its settings.
            size: Coordinates of an update.
            max_scale: Of the schedule.
            privacy: The noise that the aggregators add.

        Raises:
            ConfigurationError: Settings that do not go together.
            BudgetExceeded: No grid is fine enough.
        """
        settings = config.secure
        if settings is None:
            return None
        if shared_size(config.compression, size) != size and config.staleness.max_staleness > 0:
            raise ConfigurationError(
                "shares of one sum are at the same coordinates, which change with the round: compression of shared "
                "updates needs synchronous rounds (max_staleness = 0)"
            )
        if settings.minimum_cohort > config.buffer_size:
            raise ConfigurationError(
                f"a buffer of {config.buffer_size} reports never reaches the {settings.minimum_cohort} that a sum is "
                "opened of at least: raise task.buffer_size, or lower task.secure.minimum_cohort (2 or more)"
            )
        buckets = config.privacy.buckets
        if buckets is not None and config.buffer_size < _PER_BUCKET * buckets:
            raise ConfigurationError(
                f"{buckets} buckets of shared updates need buffers of {_PER_BUCKET * buckets} reports, so that one "
                f"with a malformed share can be left out: raise task.buffer_size from {config.buffer_size}, or lower "
                "task.privacy.buckets"
            )
        if buckets is not None and (settings.checks != "trust-devices" or config.staleness.max_staleness > 0):
            raise ConfigurationError(
                "buckets of shared updates need synchronous rounds (max_staleness = 0) and no other check: each is a "
                "sum of its own"
            )
        bounds = grid_of(config, size, max_scale, privacy)
        pinned = PinnedParameters(
            num_aggregators=settings.num_aggregators,
            threshold=settings.threshold,
            field=settings.field,
            packing=settings.packing,
            min_cohort=max(settings.minimum_cohort, config.privacy.honest_devices or 0),
            min_bucket=None if buckets is None else 2,
            max_parts=buckets or 1,
            clip_norm=bounds.clip_norm,
            fraction_bits=bounds.fraction_bits,
            max_weight=config.max_weight * max_scale,
            checking=CheckingMode(settings.checks) if buckets is None else CheckingMode.BUCKETS,
            distances=selects_by_distance(config),
            indicator=config.privacy.adaptive_clipping,
            privacy=_pinned_privacy(config, privacy, bounds),
        )
        return cls(settings, pinned, shared_size(config.compression, size))

    def announce(self, sealing_keys: Sequence[str]) -> SecurePlan:
        """What devices are told: what the aggregators pin, or no share would open.

        With a clip norm that moves: of the first model version (``Task.announced``).

        Args:
            sealing_keys: Of the aggregators, hex, in order.

        Raises:
            ConfigurationError: Keys that do not fit the suite.
        """
        pinned, privacy = self.pinned, self.pinned.privacy
        return SecurePlan(
            field=pinned.field,
            threshold=pinned.threshold,
            packing=pinned.packing,
            fraction_bits=pinned.fraction_bits,
            clip_norm=pinned.clip_norm,
            indicator_norm=pinned.clip_norm if pinned.indicator else None,
            noise="none" if privacy is None else privacy.noise,
            noise_variance=None if privacy is None else privacy.device_noise_variance,
            max_participations=None if privacy is None else privacy.max_participations,
            suite=self.suite,
            aggregator_keys=tuple(sealing_keys),
        )

    @property
    def suite(self) -> SealingSuite:
        """How shares are sealed."""
        return SealingSuite(self.settings.suite)

    def binding(self, task_id: str, parameter_table_sha256: str) -> TaskBinding:
        """The task that aggregators serve."""
        return TaskBinding(task_id=task_id, parameter_table_sha256=parameter_table_sha256, size=self.size)

    @property
    def layout(self) -> SecureLayout:
        """What a device's shares hold."""
        scheme = Scheme(
            self.pinned.threshold, self.pinned.num_aggregators, Field.by_name(self.pinned.field), self.pinned.packing
        )
        return SecureLayout(scheme, self.size, self.pinned.indicator, self.suite)


def _pinned_privacy(config: TaskConfig, privacy: PrivacyPlan | None, bounds: EncodedBounds) -> PinnedPrivacy | None:
    if privacy is None:
        return None
    budget, honest = privacy.budget, config.privacy.honest_devices
    variance = None
    if honest is not None:
        each = noise_variance(bounds, noise_multiplier=privacy.noise_per_clip_norm, contributors=honest)
        # Upwards to a whole number: what devices are told has to be short.
        variance = str(Fraction(math.ceil(each)))
    return PinnedPrivacy(
        noise_multiplier=privacy.noise_per_clip_norm,
        max_rounds=config.rounds,
        max_participations=budget.participations,
        epsilon=budget.epsilon,
        delta=budget.delta,
        adjacency=budget.adjacency,
        indicator_noise_multiplier=privacy.indicator_noise,
        noise="aggregators" if honest is None else "devices",
        device_noise_variance=variance,
        honest_devices=honest,
    )
