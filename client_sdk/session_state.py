"""What a device's session is made of: phases, actions, the state that is saved, and how it waits.

Values only; the rules that change them are in ``client_sdk.session``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.errors import PocketfedError
from client_sdk.protocol.messages import Assignment, Id128, Sha256

AbandonReason = Literal["interrupted", "no-memory", "training-failed", "privacy", "user"]


class Phase(StrEnum):
    """Where a device is in its life."""

    IDLE = "idle"
    ELIGIBLE = "eligible"
    CHECKED_IN = "checked-in"
    ASSIGNED = "assigned"
    DOWNLOADING = "downloading"
    TRAINING = "training"
    SEALED = "sealed"
    UPLOADING = "uploading"
    ABANDONING = "abandoning"
    DONE = "done"


# Phases that hold an assignment, and those whose next step is a signed request.
WITH_ASSIGNMENT: Final = frozenset(Phase) - {Phase.IDLE, Phase.ELIGIBLE, Phase.CHECKED_IN}
SIGNED_PHASES: Final = frozenset({Phase.ELIGIBLE, Phase.SEALED, Phase.UPLOADING, Phase.ABANDONING})


# --- actions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckConditions:
    """See whether the device may work now (power, network, storage)."""


@dataclass(frozen=True)
class Enrol:
    """Introduce the public key to the server."""


@dataclass(frozen=True)
class CheckIn:
    """Ask for work."""


@dataclass(frozen=True)
class Download:
    """Fetch the blobs that are not there yet."""

    sha256s: tuple[str, ...]


@dataclass(frozen=True)
class Train:
    """Train, then make the report durable under ``report_id``."""

    assignment: Assignment
    report_id: str


@dataclass(frozen=True)
class Upload:
    """Send the sealed report."""

    report_id: str


@dataclass(frozen=True)
class Abandon:
    """Give the assignment back."""

    assignment_id: str
    reason: AbandonReason


@dataclass(frozen=True)
class Discard:
    """The assignment is over: the sealed report, if any, may go."""

    report_id: str
    accepted: bool
    detail: str


@dataclass(frozen=True)
class Sleep:
    """Wait ``delay_s``, drawn between ``min_s`` and ``max_s``; until ``ends_at``, where the wait has begun already."""

    min_s: float
    max_s: float
    delay_s: float
    reason: str
    ends_at: float | None = None

    def left_s(self, now: float) -> float:
        """What is left of the wait, between 0 and ``delay_s``: a clock that was set back does not prolong it."""
        return self.delay_s if self.ends_at is None else min(self.delay_s, max(0.0, self.ends_at - now))


@dataclass(frozen=True)
class Stop:
    """Nothing more to do in this process. A later process goes on from the saved state."""

    cause: Literal["finished", "enough-reports", "gave-up", "refused"]
    detail: str
    error: PocketfedError | None = None


Action = CheckConditions | Enrol | CheckIn | Download | Train | Upload | Abandon | Discard | Sleep | Stop
REMOTE = (Enrol, CheckIn, Download, Upload, Abandon)
PAUSABLE = (Download, Train, Upload)


# --- state ---------------------------------------------------------------------------------------------------


# Clocks are corrected by so much every day.
_CLOCK_SLACK_S: Final = 60.0


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pause(_Frozen):
    """A wait that was drawn already, so that a restart does not draw again."""

    min_s: float = Field(ge=0, allow_inf_nan=False)
    max_s: float = Field(ge=0, allow_inf_nan=False)
    delay_s: float = Field(ge=0, allow_inf_nan=False)
    reason: str
    asked: bool = Field(description="whether the server named the window; our own back-off ends with the process")
    ends_at: float | None = Field(None, description="once it has begun: when it ends, on the device's own clock")


class SessionState(_Frozen):
    """All that a device must not forget, apart from its key and the sealed report's bytes."""

    format: Literal[1] = 1
    device_id: Id128
    phase: Phase = Phase.IDLE
    enrolled: bool = False
    assignment: Assignment | None = None
    lease_begun_at: float | None = Field(None, description="seconds on the device's own clock")
    lease_ends_at: float | None = Field(None, description="likewise")
    report_id: Id128 | None = None
    report_sha256: Sha256 | None = None
    blobs: tuple[Sha256, ...] = Field((), description="blobs of the assignment that are on the device")
    abandon_reason: AbandonReason = "interrupted"
    accepted: bool = False
    detail: str = ""
    pause: Pause | None = None
    attempts: int = Field(0, ge=0, description="failures in a row of the present step")
    fruitless: int = Field(0, ge=0, description="assignments in a row that came to nothing")
    training_failures: int = Field(0, ge=0, description="... of which the device's own failures")
    reports: int = Field(0, ge=0, description="accepted reports in this device's life")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        held = self.phase in WITH_ASSIGNMENT
        if held != (self.assignment is not None) or held != (self.report_id is not None):
            raise ValueError(f"phase {self.phase} {'needs' if held else 'excludes'} an assignment and its report id")
        if self.phase in {Phase.SEALED, Phase.UPLOADING} and self.report_sha256 is None:
            raise ValueError(f"phase {self.phase} needs the sealed report's hash")
        return self

    def is_lease_over(self, now: float) -> bool:
        """Whether nothing that is done for the assignment can count any more.

        A clock that was set back before the lease began says nothing of it: then it counts as over, since the server
        hands an assignment that still stands out again.
        """
        if self.lease_ends_at is None:
            return False
        set_back = self.lease_begun_at is not None and now < self.lease_begun_at - _CLOCK_SLACK_S
        return set_back or now > self.lease_ends_at

    def resumed(self) -> SessionState:
        """This state in a new process: failures are counted anew, and only a pause the server asked for remains."""
        keep = self.pause is not None and self.pause.asked
        return self.model_copy(
            update={"attempts": 0, "training_failures": 0, "fruitless": 0, "pause": self.pause if keep else None}
        )


@dataclass(frozen=True)
class RetryPolicy:
    """How a device waits and when it gives up.

    Without a window from the server the wait before attempt ``k + 1`` is uniform in ``[0, min(cap_s, base_s 2^k)]``
    (full jitter: devices that failed together do not come back together). With one, it is uniform in the window.

    Attributes:
        base_s: Ceiling of the first wait.
        cap_s: Largest ceiling of our own waits.
        max_wait_s: Largest wait a server can impose; a day, so that no reply can put a device to sleep for good.
        max_lease_s: Longest time that a device works for one assignment, whatever the server says; a week.
        max_attempts: Failures in a row of one step after which the session stops (the state is kept).
        max_training_failures: Own failures in a row after which it stops.
    """

    base_s: float = 1.0
    cap_s: float = 300.0
    max_wait_s: float = 86_400.0
    max_lease_s: float = 604_800.0
    max_attempts: int = 12
    max_training_failures: int = 3

    def draw(
        self, rng: random.Random, failures: int, window: tuple[float, float] | None, reason: str = "", *, asked: bool
    ) -> Pause:
        """A wait before the next attempt, after ``failures`` of them."""
        if window is None:
            # The exponent is bounded so that 2^k stays a float.
            low, high = 0.0, min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 60))
        else:
            low, high = min(window[0], self.max_wait_s), min(window[1], self.max_wait_s)
        return Pause(min_s=low, max_s=high, delay_s=rng.uniform(low, high), reason=reason, asked=asked)
