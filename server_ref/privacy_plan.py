"""What a task's privacy settings come to: the noise of every round, and the budget that its ledger holds it to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from client_sdk.protocol.accountant import SMALLEST_STDDEV
from client_sdk.protocol.clipping import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM
from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.accounting import PrivacyBudget
from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm, NoiseSplit, fewest_updates, split_noise
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.calibration import NoiseSchedule, calibrate, composed_multiplier, gaussian_epsilon
from server_ref.config import TaskConfig

_HIGHEST, _LOWEST = 16.0, 2.0**-10
"""An adaptive clip norm stays within these multiples of the first one: the grid leaves room for the largest."""

_SLACK = 1 + 1e-9
"""On an epsilon that follows from the noise: sums of floats round, and the last round must still fit."""


@dataclass(frozen=True)
class PrivacyPlan:
    """Fixed before the first round, and public.

    Attributes:
        noise_multiplier: Standard deviation of each round's noise, as a multiple of the aggregate's L2 sensitivity
            under the budget's adjacency: the least of them, where a schedule changes it.
        budget: Of the whole task.
        schedule: A multiplier for each round; None where all have the same.
        clip_norm: Of the first round, where it is adaptive, and how it moves.
        split: Then, how a round's noise is divided between the update and its bit.
    """

    noise_multiplier: float
    budget: PrivacyBudget
    schedule: NoiseSchedule | None = None
    clip_norm: AdaptiveClipNorm | None = None
    split: NoiseSplit | None = None

    @classmethod
    def of(cls, config: TaskConfig) -> Self | None:
        """A task's plan; None where nobody adds noise.

        No amplification by sampling is claimed: devices come by themselves, and who was chosen is public. What counts
        is in how many rounds one device can be counted.

        Raises:
            ConfigurationError: A budget that no noise keeps, or too few reports for adaptive clipping.
        """
        settings = config.privacy
        if not settings.enabled:
            return None
        participations = min(settings.max_participations or config.rounds, config.rounds)
        schedule = None
        if settings.noise_schedule != "constant":
            epsilon = settings.epsilon or 0.0
            schedule = NoiseSchedule.plan(
                epsilon,
                settings.delta,
                rounds=config.rounds,
                shape=settings.noise_schedule,
                final_ratio=settings.final_noise,
                participations=participations,
            )
            noise_multiplier = min(schedule.noise_multipliers)
        elif settings.noise_multiplier is None:
            # The settings are checked: without a multiplier there is an epsilon.
            epsilon = settings.epsilon or 0.0
            noise_multiplier = calibrate(epsilon, settings.delta, participations=participations)
        else:
            noise_multiplier = settings.noise_multiplier
            together = composed_multiplier([noise_multiplier] * participations)
            epsilon = gaussian_epsilon(settings.delta, together) * _SLACK
        budget = PrivacyBudget(
            epsilon=epsilon,
            delta=settings.delta,
            adjacency=Adjacency(settings.adjacency),
            participations=participations,
        )
        return cls(noise_multiplier, budget, schedule, first_clip_norm(config), _split(config, noise_multiplier))

    def multiplier_at(self, round_id: int) -> float:
        """The noise multiplier of a round."""
        return self.noise_multiplier if self.schedule is None else self.schedule.at(round_id)

    @property
    def moved(self) -> int:
        """How often what one device adds to a sum at most the sum moves, for a device that does something else.

        Replaced by another, a device moves it twice as far as it does when it is left out.
        """
        return 2 if self.budget.adjacency is Adjacency.REPLACE_ONE else 1

    @property
    def least_multiplier(self) -> float:
        """That of the noise on updates alone, in the round that has the least of it."""
        return self.noise_multiplier if self.split is None else self.split.update_multiplier

    @property
    def noise_per_clip_norm(self) -> float:
        """Least standard deviation of a sum's noise as a multiple of what one device adds to it at most."""
        return self.moved * self.least_multiplier

    def noise_per_clip_norm_at(self, round_id: int) -> float:
        """The same for a round."""
        return self.noise_per_clip_norm if self.schedule is None else self.moved * self.schedule.at(round_id)

    @property
    def most_noise_per_clip_norm(self) -> float:
        """The largest of them, for which a sum leaves room."""
        return self.noise_per_clip_norm if self.schedule is None else self.moved * max(self.schedule.noise_multipliers)

    @property
    def indicator_noise(self) -> float | None:
        """Standard deviation of the noise on adaptive clipping's count, in halves; None without it."""
        return None if self.split is None else self.moved * self.split.indicator_multiplier

    @property
    def words(self) -> str:
        """The claim, in a line."""
        b = self.budget
        amount = f"{self.noise_multiplier:.4g}" if self.schedule is None else f"{self.noise_multiplier:.4g} or more"
        return (
            f"epsilon {b.epsilon:.4g} at delta {b.delta:g} for a whole device ({b.adjacency} adjacency), which counts "
            f"in at most {b.participations} rounds; noise multiplier {amount}"
        )


def first_clip_norm(config: TaskConfig) -> AdaptiveClipNorm | None:
    """The clip norm of the first round, where it is adaptive, with how it moves; None otherwise."""
    settings, clip_norm = config.privacy, config.aggregation.clip_norm
    # Checked with the settings: where there is noise there is a clip norm.
    if not settings.adaptive_clipping or clip_norm is None:
        return None
    return AdaptiveClipNorm(
        clip_norm=clip_norm,
        target_quantile=settings.target_quantile,
        learning_rate=settings.clip_learning_rate,
        smallest=max(clip_norm * _LOWEST, SMALLEST_CLIP_NORM),
        largest=min(clip_norm * _HIGHEST, LARGEST_CLIP_NORM),
    )


def _split(config: TaskConfig, noise_multiplier: float) -> NoiseSplit | None:
    """See ``PrivacyPlan.split``.

    Raises:
        ConfigurationError: The noise would drown the bits of so few reports.
    """
    if not config.privacy.adaptive_clipping:
        return None
    least = 0.0
    if config.secure is not None:
        # Of n aggregators t - 1 may add none: the parts of the others are no narrower than can be accounted for.
        honest = config.secure.num_aggregators - (config.secure.threshold - 1)
        least = SMALLEST_STDDEV * math.sqrt(honest) * _SLACK / 2
    split = split_noise(noise_multiplier, config.buffer_size, least=least)
    if split is None:
        enough = fewest_updates(noise_multiplier, least=least)
        raise ConfigurationError(
            f"adaptive clipping would follow its noise among {config.buffer_size} reports at a noise multiplier of "
            f"{noise_multiplier:.4g}: raise task.buffer_size (--cohort) to {enough} or more, allow more epsilon, or "
            "leave task.privacy.adaptive_clipping (--adaptive-clipping) out"
        )
    return split
