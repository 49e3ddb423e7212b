"""The ledger: what releases have cost so far, asked before every further one.

A ledger is a value. ``check`` says what the account would be after a release, or refuses; ``charge`` makes the ledger
after it. Whoever releases charges first, makes the event durable, and only then draws noise: what fails afterwards has
been paid for. Nothing is ever paid back, by a rollback or otherwise, because nobody can take back what was seen.

One ledger holds one adjacency and one way of taking part: a bounded number of rounds for each client, or independent
coins. Both come with the budget, and an event that does not fit is refused before the account changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from client_sdk.protocol.accountant import SMALLEST_STDDEV, excess_of_sum, gaussian_rdp, rdp_to_epsilon
from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.calibration import (
    composed_multiplier,
    composed_rdp_epsilon,
    gaussian_epsilon,
    sampled_epsilon,
)
from server_ref.aggregation.errors import (
    AdjacencyMismatch,
    PrivacyBudgetExhausted,
    RoundAlreadyCharged,
    UnsupportedPrivacyEvent,
)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrivacyBudget(_Value):
    """What a run may spend, and what its epsilon means.

    Raises:
        ConfigurationError: Sampling where it amplifies nothing, or together with bounded participations.
    """

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)
    adjacency: Adjacency = Adjacency.ZERO_OUT
    participations: int | None = Field(None, ge=1, description="rounds one client takes part in at most; None: all")
    sampling_probability: float | None = Field(None, gt=0, le=1, description="of each client's coin; None: no sampling")

    @model_validator(mode="after")
    def _one_way_of_taking_part(self) -> Self:
        if self.sampling_probability is not None:
            if self.participations is not None:
                raise ConfigurationError(
                    "participations are bounded, or drawn by coins (sampling_probability), not both"
                )
            if self.adjacency is not Adjacency.ADD_REMOVE:
                raise ConfigurationError(
                    f"sampling amplifies privacy where nobody learns who took part; under {self.adjacency} adjacency "
                    "that is public: use add-remove, or leave sampling_probability out"
                )
        return self


class GaussianRelease(_Value):
    """One release with (discrete) Gaussian noise that was drawn in one place."""

    kind: Literal["gaussian"] = "gaussian"
    round_id: int = Field(ge=0)
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False, description="standard deviation / L2 sensitivity")
    adjacency: Adjacency
    sampling_probability: float | None = Field(None, gt=0, le=1)

    @property
    def effective_multiplier(self) -> float:
        """The noise multiplier that this release is accounted with."""
        return self.noise_multiplier


class DistributedRelease(_Value):
    """One release whose noise is a sum of discrete Gaussians, of contributors who do not know one another's.

    Raises:
        ConfigurationError: Noise too small for integers (``stddev`` < 3).
    """

    kind: Literal["distributed"] = "distributed"
    round_id: int = Field(ge=0)
    stddev: float = Field(gt=0, allow_inf_nan=False, description="of one contributor's noise, in steps of the grid")
    contributors: int = Field(ge=1, description="honest ones: the others' noise counts for nothing")
    sensitivity: float = Field(gt=0, allow_inf_nan=False, description="L2, in steps of the grid")
    size: int = Field(ge=1, description="coordinates")
    adjacency: Adjacency
    sampling_probability: None = None

    @model_validator(mode="after")
    def _enough_for_integers(self) -> Self:
        if self.stddev < SMALLEST_STDDEV:
            excess_of_sum(self.stddev, self.contributors)  # raises, and says what to change
        return self

    @property
    def effective_multiplier(self) -> float:
        """The noise multiplier that this release is accounted with: the third bound of ``distributed_rdp``."""
        ratio = self.sensitivity / (math.sqrt(self.contributors) * self.stddev)
        return 1 / (ratio + math.sqrt(self.size) * excess_of_sum(self.stddev, self.contributors))


PrivacyEvent = Annotated[GaussianRelease | DistributedRelease, Field(discriminator="kind")]


@dataclass(frozen=True)
class PrivacySpent:
    """What releases have cost: an epsilon with all that it takes to mean something.

    Attributes:
        epsilon: The lesser of the two bounds.
        epsilon_pld: By privacy loss distribution: exact where nothing is sampled (Gaussian releases compose in closed
            form), numeric and rounded up where something is. None where it was not needed.
        epsilon_rdp: By Renyi divergence.
        delta: At which both are taken.
        adjacency: Which data sets count as neighbours.
        releases: How many there were.
    """

    epsilon: float
    epsilon_pld: float | None
    epsilon_rdp: float
    delta: float
    adjacency: Adjacency
    releases: int

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.4g} at delta {self.delta:g} ({self.adjacency} adjacency, client level, "
            f"{self.releases} releases)"
        )


class PrivacyLedger(_Value):
    """The account of one run. Events in it never change, and none is ever removed.

    Example:
        >>> ledger = PrivacyLedger(budget=PrivacyBudget(epsilon=1.0, delta=1e-5))
        >>> event = GaussianRelease(round_id=0, noise_multiplier=4.0, adjacency=Adjacency.ZERO_OUT)
        >>> str(ledger.charge(event).spent())
        'epsilon 0.9263 at delta 1e-05 (zero-out adjacency, client level, 1 releases)'
    """

    budget: PrivacyBudget
    events: tuple[PrivacyEvent, ...] = ()

    @model_validator(mode="after")
    def _events_fit(self) -> Self:
        seen: set[int] = set()
        for event in self.events:
            self._require_fit(event, seen)
            seen.add(event.round_id)
        return self

    @classmethod
    def replay(cls, budget: PrivacyBudget, events: Iterable[GaussianRelease | DistributedRelease]) -> Self:
        """The ledger that a store's events make: all of them, whether or not they are within the budget."""
        return cls(budget=budget, events=tuple(events))

    def check(self, event: GaussianRelease | DistributedRelease) -> PrivacySpent:
        """What the account would be after a release. Asked before it, and before its noise is drawn.

        Raises:
            AdjacencyMismatch: The event's adjacency is not the ledger's.
            UnsupportedPrivacyEvent: Its sampling is not the budget's.
            RoundAlreadyCharged: Its round has been released.
            PrivacyBudgetExhausted: The budget would be exceeded.
        """
        self._require_fit(event, {e.round_id for e in self.events})
        after = self._spent((*self.events, event), most=self.budget.epsilon)
        if after.epsilon > self.budget.epsilon:
            raise PrivacyBudgetExhausted(
                f"after round {event.round_id} epsilon would be {after.epsilon:.6g}, beyond the budget of "
                f"{self.budget.epsilon:g} at delta {self.budget.delta:g} ({self.budget.adjacency} adjacency); nothing "
                "is released any more"
            )
        return after

    def charge(self, event: GaussianRelease | DistributedRelease) -> Self:
        """The ledger after a release; raises as ``check`` does, and then nothing has changed."""
        self.check(event)
        return _appended(self, event)

    def spent(self) -> PrivacySpent:
        """What all releases have cost, by both accounts."""
        return self._spent(self.events, most=0.0)

    def to_json(self) -> str:
        """Budget and events."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of ``to_json``.

        Raises:
            ConfigurationError: No ledger, or one whose events do not fit its budget's terms.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            raise ConfigurationError(f"the ledger is not readable: {e.error_count()} errors in it") from e

    def _require_fit(self, event: GaussianRelease | DistributedRelease, charged: set[int]) -> None:
        budget = self.budget
        if event.adjacency is not budget.adjacency:
            raise AdjacencyMismatch(
                f"round {event.round_id} is noised for {event.adjacency} adjacency; this ledger holds "
                f"{budget.adjacency} only"
            )
        if event.sampling_probability != budget.sampling_probability:
            raise UnsupportedPrivacyEvent(
                f"round {event.round_id} is sampled with probability {event.sampling_probability}; this ledger "
                f"accounts for {budget.sampling_probability}"
            )
        if event.round_id in charged:
            raise RoundAlreadyCharged(f"round {event.round_id} has been released and paid for")

    def _spent(self, events: tuple[GaussianRelease | DistributedRelease, ...], *, most: float) -> PrivacySpent:
        """The account of events; without the slower bound if the quicker one is at most ``most``."""
        budget = self.budget
        # One client is in ``participations`` rounds at most, in the worst case in those with the least noise.
        worst = sorted(e.effective_multiplier for e in events)[: budget.participations]
        by_pld: float | None = None
        if not events:
            by_rdp = by_pld = 0.0
        elif budget.sampling_probability is None:
            together = composed_multiplier(worst)
            by_rdp = rdp_to_epsilon(gaussian_rdp(together), budget.delta)
            by_pld = gaussian_epsilon(budget.delta, together)
        else:
            steps = tuple(sorted(Counter(worst).items()))
            quick = composed_rdp_epsilon(steps, budget.sampling_probability, budget.delta, quick=True)
            by_rdp = quick
            if quick > most:
                by_rdp = composed_rdp_epsilon(steps, budget.sampling_probability, budget.delta)
                by_pld = sampled_epsilon(steps, budget.sampling_probability, budget.delta)
        return PrivacySpent(
            epsilon=by_rdp if by_pld is None else min(by_pld, by_rdp),
            epsilon_pld=by_pld,
            epsilon_rdp=by_rdp,
            delta=budget.delta,
            adjacency=budget.adjacency,
            releases=len(events),
        )


class LedgerKeeper:
    """Holds the ledger of a run while it goes on, and asks it before every release. For use by several threads.

    Args:
        ledger: What has been spent before.
        persist: Makes an event durable. Called before the release, and before the ledger here changes; if it raises,
            nothing is released. What it made durable counts, whatever happens next.
    """

    def __init__(
        self, ledger: PrivacyLedger, persist: Callable[[GaussianRelease | DistributedRelease], None] | None = None
    ) -> None:
        self._ledger = ledger
        self._persist = persist
        self._lock = Lock()
        self._round: int | None = None

    @property
    def ledger(self) -> PrivacyLedger:
        """The ledger after the last charge."""
        return self._ledger

    @property
    def round_id(self) -> int:
        """The round that is open.

        Raises:
            UnsupportedPrivacyEvent: None is.
        """
        if self._round is None:
            raise UnsupportedPrivacyEvent("no round is open for a release; open one (open_round)")
        return self._round

    def restore(self, events: Iterable[GaussianRelease | DistributedRelease]) -> None:
        """Hold the ledger that a store's events make: after a restart, or where a charge did not become durable.

        The store is the truth; what it does not know of was not released.
        """
        with self._lock:
            self._ledger = PrivacyLedger.replay(self._ledger.budget, events)
            self._round = None

    def open_round(self, round_id: int) -> None:
        """Say which round the next release belongs to.

        Raises:
            RoundAlreadyCharged: It has been released.
        """
        if any(event.round_id == round_id for event in self._ledger.events):
            raise RoundAlreadyCharged(f"round {round_id} has been released and paid for")
        self._round = round_id

    def charge(self, event: GaussianRelease | DistributedRelease) -> PrivacySpent:
        """Pay for a release; see ``PrivacyLedger.check`` for what it raises."""
        with self._lock:
            spent = self._ledger.check(event)
            if self._persist is not None:
                self._persist(event)
            self._ledger = _appended(self._ledger, event)
            self._round = None
        return spent


def _appended(ledger: _Ledger, event: GaussianRelease | DistributedRelease) -> _Ledger:
    return ledger.model_copy(update={"events": (*ledger.events, event)})


_Ledger = TypeVar("_Ledger", bound=PrivacyLedger)
