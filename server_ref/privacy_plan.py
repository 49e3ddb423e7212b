"""What a task's privacy settings come to: the noise of every round, and the budget that its ledger holds it to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from server_ref.aggregation.accounting import PrivacyBudget
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.calibration import NoiseSchedule, calibrate, composed_multiplier, gaussian_epsilon
from server_ref.config import TaskConfig

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
    """

    noise_multiplier: float
    budget: PrivacyBudget
    schedule: NoiseSchedule | None = None

    @classmethod
    def of(cls, config: TaskConfig) -> Self | None:
        """A task's plan; None where nobody adds noise.

        No amplification by sampling is claimed: devices come by themselves, and who was chosen is public. What counts
        is in how many rounds one device can be counted.

        Raises:
            ConfigurationError: A budget that no noise keeps.
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
        return cls(noise_multiplier, budget, schedule)

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
    def noise_per_clip_norm(self) -> float:
        """Least standard deviation of a sum's noise as a multiple of what one device adds to it at most."""
        return self.moved * self.noise_multiplier

    @property
    def most_noise_per_clip_norm(self) -> float:
        """The largest of them, for which a sum leaves room."""
        most = self.noise_multiplier if self.schedule is None else max(self.schedule.noise_multipliers)
        return self.moved * most

    @property
    def words(self) -> str:
        """The claim, in a line."""
        b = self.budget
        amount = f"{self.noise_multiplier:.4g}" if self.schedule is None else f"{self.noise_multiplier:.4g} or more"
        return (
            f"epsilon {b.epsilon:.4g} at delta {b.delta:g} for a whole device ({b.adjacency} adjacency), which counts "
            f"in at most {b.participations} rounds; noise multiplier {amount}"
        )
