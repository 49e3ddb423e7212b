"""What the round engine deals in: the policy, assignments with their reports, a closing buffer. Values only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import WaitReason


class AssignmentState(StrEnum):
    """Life of an assignment. Only ``outstanding`` and ``reported`` are live."""

    OUTSTANDING = "outstanding"
    REPORTED = "reported"
    COUNTED = "counted"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    ABANDONED = "abandoned"


LIVE_STATES = (AssignmentState.OUTSTANDING, AssignmentState.REPORTED)


@dataclass(frozen=True)
class RoundPolicy:
    """The three numbers of a round, and its limits.

    Attributes:
        buffer_size: Reports per model update.
        concurrency: Devices at work at once.
        refill_at: Free slots before new devices are invited.
        max_staleness: Model versions an update may lag behind.
        lease_s: Seconds from assignment to the deadline of its report.
        weight_cap: Largest public weight; sample counts are cut to it.
        rounds: Model updates until the task is finished.
    """

    buffer_size: int
    concurrency: int
    refill_at: int
    max_staleness: int
    lease_s: float
    weight_cap: int
    rounds: int

    def __post_init__(self) -> None:
        if min(self.buffer_size, self.concurrency, self.refill_at, self.weight_cap, self.rounds) < 1:
            raise ConfigurationError("buffer_size, concurrency, refill_at, weight_cap and rounds must be at least 1")
        if self.refill_at > self.concurrency:
            raise ConfigurationError(
                f"refill_at={self.refill_at} can never be reached with concurrency={self.concurrency}; lower refill_at"
            )
        if self.max_staleness < 0 or self.lease_s <= 0:
            raise ConfigurationError("max_staleness must not be negative and lease_s must be positive")
        if self.max_staleness == 0 and self.concurrency < self.buffer_size and self.refill_at == self.concurrency:
            # Sound, but every round then takes several waves; refuse it as the likely typo it is.
            raise ConfigurationError(
                f"concurrency={self.concurrency} cannot fill buffer_size={self.buffer_size} in one wave; "
                "raise concurrency or lower refill_at"
            )


@dataclass(frozen=True)
class ReportFile:
    """A durable report: what the engine and the table keep of it. The bytes are a blob."""

    report_id: str
    sha256: str
    num_bytes: int
    train_loss: float

    @property
    def blob_key(self) -> str:
        """Where the bytes are. The hash keeps two bodies sent under one report id apart."""
        return f"reports/{self.report_id}.{self.sha256[:16]}"


@dataclass
class AssignmentRecord:
    """One assignment as the engine and the table know it. ``arrival`` is the report's place in time."""

    number: int
    assignment_id: str
    device_id: str
    round_id: int
    model_version: int
    weight: int
    issued_at: float
    deadline: float
    arrival: float | None = None
    state: AssignmentState = AssignmentState.OUTSTANDING
    report: ReportFile | None = None
    counted_in: int | None = None

    @property
    def order(self) -> tuple[float, int]:
        """Position of its report among others: arrival, then assignment number."""
        return (float("inf") if self.arrival is None else self.arrival, self.number)


@dataclass(frozen=True)
class Waiting:
    """No assignment now, and why."""

    reason: WaitReason


@dataclass(frozen=True)
class Closing:
    """A buffer ready to be committed: its reports in assignment order, and the time at which it closes."""

    round_id: int
    counted: tuple[AssignmentRecord, ...]
    closed_at: float

    @property
    def total_weight(self) -> int:
        """Of the counted reports."""
        return sum(r.weight for r in self.counted)

    @property
    def train_loss(self) -> float | None:
        """Weighted mean of the losses that the devices stated; None where all withhold theirs, or it is not finite."""
        records = [(r.weight, r.report.train_loss) for r in self.counted if r.report is not None]
        stated = [(weight, loss) for weight, loss in records if not math.isnan(loss)]
        if not stated:
            return None
        mean = sum(weight * loss for weight, loss in stated) / sum(weight for weight, _ in stated)
        return mean if math.isfinite(mean) else None
