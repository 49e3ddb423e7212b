"""When to save a checkpoint: often enough to lose little, seldom enough to cost little. A value; no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Self

from client_sdk.protocol.errors import ConfigurationError

DEFAULT_PERIOD_S: Final = 30.0
"""What a kill costs at most, on a device whose disk is not slow."""
DEFAULT_MAX_FRACTION: Final = 0.02
"""Of the training time that saving may take."""


@dataclass(frozen=True)
class CheckpointSchedule:
    """A save is due ``period_s`` after the last one, or later where a save is dear.

    After a save that took c seconds the next one is due no sooner than ``c / max_fraction`` later: so of the time
    between two saves, the former took at most that fraction.

    Attributes:
        period_s: Seconds between saves.
        max_fraction: Bound of a save's cost over the time until the next one.
        since: When training began or was last saved, on the caller's monotonic clock in seconds; None before.
        cost_s: What the last save took.
    """

    period_s: float = DEFAULT_PERIOD_S
    max_fraction: float = DEFAULT_MAX_FRACTION
    since: float | None = None
    cost_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.period_s > 0 and 0 < self.max_fraction <= 1):
            raise ConfigurationError(
                f"a checkpoint schedule needs period_s > 0 and max_fraction in (0, 1], "
                f"got {self.period_s} and {self.max_fraction}"
            )

    def begun(self, now: float) -> Self:
        """The schedule of a training that begins, or goes on, now."""
        return replace(self, since=now)

    def due(self, now: float) -> bool:
        """Whether to save now; False before training has begun."""
        return self.since is not None and now - self.since >= max(self.period_s, self.cost_s / self.max_fraction)

    def saved(self, now: float, cost_s: float) -> Self:
        """The schedule after a save, or a failed one, that ended now and took so long."""
        return replace(self, since=now, cost_s=cost_s)
