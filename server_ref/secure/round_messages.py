"""What goes into a secure round at the coordinator, what comes out, and what of it is kept in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from client_sdk.protocol.messages import Id128, Message
from server_ref.secure.distance_messages import DistanceRequest
from server_ref.secure.messages import (
    ChallengeRequest,
    CommitSignature,
    DeliveredShare,
    RevealRequest,
    RoundId,
    RoundStatement,
    SetEntry,
    ShareHeader,
)


@dataclass(frozen=True)
class SealedReport:
    """One device's report, as the coordinator has it.

    Attributes:
        header: What all aggregators are told of it.
        load: The sealed share for the aggregator with an index, from 1; called when it is to be sent.
        weight: Public integer weight in the sum.
        part: Which part of a partition it belongs to, from 0, in the mode ``buckets``.
    """

    header: ShareHeader
    load: Callable[[int], bytes] = field(repr=False)
    weight: int = 1
    part: int = 0

    @property
    def report_id(self) -> str:
        """The report's id."""
        return self.header.report_id

    def share(self, index: int) -> DeliveredShare:
        """What an aggregator is given."""
        return DeliveredShare(self.header, self.load(index))

    def entry(self) -> SetEntry:
        """How a set names it."""
        header = self.header
        return SetEntry(
            report_id=header.report_id, device_id=header.device_id, digest=header.digest(), weight=self.weight
        )


class Parity(StrEnum):
    """Whether reports' shares are checked against each other before they are summed (``Stage.CHECK``)."""

    OFF = "off"
    WHEN_POSSIBLE = "when-possible"
    """A round whose check was cut short by a failing aggregator goes on without."""
    REQUIRED = "required"
    """Such a round waits for that aggregator."""


class Phase(StrEnum):
    """How far a round has come. What was begun is finished with the same set."""

    CHECKING = "checking"
    """Reports may have been challenged, which happens once: the set can still lose some, and gains none."""
    CONTRIBUTING = "contributing"
    """The set is fixed, and noise may have been drawn; another run may begin."""
    COMMITTING = "committing"
    """An aggregator may have signed: no other statement can be signed any more."""
    COMMITTED = "committed"
    """A quorum has signed: the sum may be known, and will never be another."""
    ABANDONED = "abandoned"


class Challenge(Message):
    """Reports challenged together, and the commitments from the moment that they are fixed."""

    request: ChallengeRequest
    reveal: RevealRequest | None = None


class RoundState(Message):
    """What a coordinator keeps of an unfinished round: everything that another one needs to finish it.

    Attributes:
        rejected: Reports that are left out, and why.
        challenges: What was challenged.
        parity: What became of the check; empty before it.
        cohort: Reports that are compared with each other, where a rule selects: once, and in no other company.
        statement: What is summed, once that is fixed.
        signatures: Those that are known.
    """

    round_id: RoundId
    phase: Phase
    rejected: dict[Id128, str] = Field(default_factory=dict)
    challenges: tuple[Challenge, ...] = ()
    parity: str = ""
    cohort: DistanceRequest | None = None
    statement: RoundStatement | None = None
    signatures: tuple[CommitSignature, ...] = ()


class SaveState(Protocol):
    """Keeps a round's state durably."""

    def __call__(self, state: RoundState, **changes: Any) -> RoundState:  # noqa: ANN401 - fields of the state
        """The state with the changes, kept."""
        ...


class Journal(Protocol):
    """Where a coordinator keeps the state of its rounds, beside its own."""

    def load(self, round_id: int) -> str | None:
        """The state saved last for this round, if any."""
        ...

    def save(self, round_id: int, state_json: str) -> None:
        """Keep the state; durable when it returns."""
        ...


class Integrity(StrEnum):
    """What is known of the answers that opened a sum."""

    UNCHECKED = "unchecked"
    """There were only as many as it takes: a wrong one would not show."""
    CHECKED = "checked"
    """There were more, and all agree."""
    CORRECTED = "corrected"
    """Some were wrong, and were left out."""


@dataclass(frozen=True)
class SecureSum:
    """What a round gives: the same bits whenever it is run again.

    Attributes:
        sums: For each part, int64 ``[size]``: the sum of ``weight * codes``, with its noise if the task has any.
        indicator_sums: For each part, the sum of the adaptive-clipping indicators, in halves; None without.
        counted: For each part, the ids of the reports in it, in order.
        total_weights: For each part, the sum of their weights.
        rejected: Reports that do not count, and why.
        statement: What the aggregators signed: noise multiplier, bound and largest weight are in it.
        measurements: Plain values for logs and the round's record. They may differ from one run to another.
    """

    sums: tuple[npt.NDArray[np.int64], ...]
    indicator_sums: tuple[int, ...] | None
    counted: tuple[tuple[str, ...], ...]
    total_weights: tuple[int, ...]
    rejected: Mapping[str, str]
    statement: RoundStatement
    measurements: Mapping[str, Any]
