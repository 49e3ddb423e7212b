"""One device's session: an assignment, from check-in to the end of its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from client_sdk.protocol.errors import NotEnoughExamples, PocketfedError, ProtocolError, TrainingDiverged
from client_sdk.protocol.messages import Assignment


class Outcome(StrEnum):
    """How a session ended, as the device sees it."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    """Its round was over (over-selection) or its model too old."""
    FAILED = "failed"
    """Its report was refused for what is in it, or could not be made: the assignment is given back."""
    DROPPED = "dropped"
    """The device vanished, or would have been later than its lease."""


@dataclass(frozen=True)
class SessionEnd:
    """The end of a session.

    Attributes:
        outcome: How it ended.
        bytes_up: Bytes of bodies that it really sent.
        bytes_down: Bytes of bodies that it really received.
        reason: Why it was refused, failed or lost: a problem's type, or what kept the device from training.
    """

    outcome: Outcome
    bytes_up: int = 0
    bytes_down: int = 0
    reason: str | None = None


def failure_reason(error: PocketfedError) -> str:
    """What a session that failed says of why, by either engine."""
    match error:
        case ProtocolError():
            return error.slug
        case TrainingDiverged():
            return "training-diverged"
        case NotEnoughExamples():
            return "too-few-examples"
        case _:
            return "training-failed"


@dataclass(slots=True)
class Session:
    """One assignment of one device; small, because a run keeps all of them for its report.

    Attributes:
        device: Number of the device.
        number: Number of the assignment.
        round_id: Round in which it was given.
        model_version: Model that it starts from.
        started_s: Virtual time of the assignment; on a foreign server, seconds since the run began.
        arrives_s: When its report arrives; None if it never will, or while nobody knows.
        end: None while it lasts.
        pauses: How often it stood still, and why.
    """

    device: int
    number: int
    round_id: int
    model_version: int
    started_s: float
    arrives_s: float | None
    end: SessionEnd | None = None
    pauses: tuple[str, ...] = ()

    @classmethod
    def of(cls, device: int, assignment: Assignment, started_s: float, arrives_s: float | None) -> Self:
        """The session that an assignment begins."""
        a = assignment
        return cls(device, a.assignment_number, a.round_id, a.model_version, started_s, arrives_s)

    @property
    def order(self) -> tuple[float, int]:
        """Place of its report among all: arrival, then assignment number."""
        return (float("inf") if self.arrives_s is None else self.arrives_s, self.number)


class VirtualRounds:
    """Which reports are in time by virtual time alone, told one arrival after the other.

    Whether an upload beat its round's commit is a race on this machine; a device that remembers what it has sent must
    not depend on who won it.

    Args:
        buffer_size: Reports per model update.
        tolerance: Model versions that a report may lag behind, at each version.
    """

    def __init__(self, buffer_size: int, tolerance: Callable[[int], int]) -> None:
        self._buffer_size = buffer_size
        self._tolerance = tolerance
        self._in_time = 0

    def arrive(self, model_version: int) -> bool:
        """The next report in order of arrival: whether the server, at that time, would still want it."""
        version = self._in_time // self._buffer_size
        in_time = version - model_version <= self._tolerance(version)
        self._in_time += in_time
        return in_time


def counted_sessions(
    sessions: Iterable[Session], reports: Iterable[int], tolerance: Callable[[int], int]
) -> list[list[Session]]:
    """Which sessions each round counted, by the rule that the server closes its buffers with.

    Whether an upload *beat* its round's commit depends on the speed of this machine; whether its report *counts*
    depends on virtual time alone, and that is what this tells.

    Args:
        sessions: All sessions of the run.
        reports: Reports that each committed round counted, oldest first.
        tolerance: Model versions that a report may lag behind, at each version; never rises.

    Returns:
        For each round its counted sessions, in order of arrival.
    """
    pending = sorted((s for s in sessions if s.arrives_s is not None), key=lambda s: s.order)
    rounds: list[list[Session]] = []
    for version, wanted in enumerate(reports):
        counted: list[Session] = []
        rest: list[Session] = []
        for session in pending:
            age = version - session.model_version
            if 0 <= age <= tolerance(version) and len(counted) < wanted:
                counted.append(session)
            elif age < tolerance(version + 1):
                rest.append(session)
        rounds.append(counted)
        pending = rest
    return rounds
