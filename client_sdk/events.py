"""What a device tells the app that embeds it while it works. Frozen values; ids and counts, never data."""

from __future__ import annotations

from dataclasses import dataclass

from client_sdk.personalization import PersonalRecord
from client_sdk.protocol.messages import Assignment


@dataclass(frozen=True)
class Enrolled:
    """The server knows this device."""

    device_id: str


@dataclass(frozen=True)
class CheckedIn:
    """The server gave an assignment."""

    assignment: Assignment


@dataclass(frozen=True)
class Downloaded:
    """A blob is on the device; ``num_bytes`` is 0 where it was there already."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class TrainingProgress:
    """Some examples more were trained on (an example counts once per epoch); ``loss`` is their mean loss."""

    examples: int
    total_examples: int
    loss: float


@dataclass(frozen=True)
class TrainingResumed:
    """Training goes on from a checkpoint, in this epoch (from 0) and after so many optimizer steps."""

    epoch: int
    steps: int


@dataclass(frozen=True)
class Paused:
    """The step in hand may not go on now; what was done so far is kept.

    ``step`` is ``download``, ``training``, ``upload`` or ``adaptation``; of the last nothing is kept, it begins anew.

    ``reason`` is a ``PauseReason``, for the app to act on; ``detail`` a sentence for people.
    """

    step: str
    reason: str
    detail: str


@dataclass(frozen=True)
class CheckpointFailed:
    """A checkpoint could not be kept (the disk is full, ...); training goes on, and a death costs more of it."""

    detail: str


@dataclass(frozen=True)
class Personalized:
    """There is a new personal model; its record says how it was judged, and whether it serves or the global one."""

    record: PersonalRecord


@dataclass(frozen=True)
class PersonalModelSetAside:
    """The personal model serves no longer: it was adapted for another program than the newest model's.

    Nothing of it is mixed into the new one. Its file stays until newer ones displace it.
    """

    model_version: int
    program_sha256: str


@dataclass(frozen=True)
class NotPersonalized:
    """The personal model is as it was; ``detail`` says what prevented a new one."""

    detail: str


@dataclass(frozen=True)
class Uploaded:
    """The server holds the report, durably.

    ``num_bytes`` is what was sent, all of it; ``dense_bytes`` what the update alone takes as plain float32, None where
    an earlier process made the report and its model's manifest is gone.
    """

    report_id: str
    assignment: Assignment
    num_bytes: int
    dense_bytes: int | None


@dataclass(frozen=True)
class Waiting:
    """The device waits ``delay_s`` seconds before it goes on."""

    delay_s: float
    reason: str


@dataclass(frozen=True)
class Dropped:
    """The assignment came to nothing."""

    assignment: Assignment
    reason: str


@dataclass(frozen=True)
class Finished:
    """The device stops."""

    cause: str
    detail: str
    reports: int


Event = (
    Enrolled
    | CheckedIn
    | Downloaded
    | TrainingProgress
    | TrainingResumed
    | Paused
    | CheckpointFailed
    | Personalized
    | PersonalModelSetAside
    | NotPersonalized
    | Uploaded
    | Waiting
    | Dropped
    | Finished
)
