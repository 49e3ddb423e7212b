"""The buffer of a private task: what it releases is paid for, drawn once, and durable before anything uses it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from client_sdk.protocol.errors import StorageUnavailable
from server_ref.aggregation.accounting import GaussianRelease, LedgerKeeper
from server_ref.aggregation.batch import Aggregate, PrivateAggregate, Update
from server_ref.aggregation.errors import NoiseMissing
from server_ref.assignments import AssignmentRecord
from server_ref.privacy_plan import PrivacyPlan

_MEMBERS: Final = "released_set"
"""Among a release's measurements: the reports that it was made of."""


class Buffer(Protocol):
    """The open buffer, whatever is known of what is in it."""

    def reset(self) -> None:
        """Forget everything; the durable set rebuilds it."""
        ...

    def fold(self, record: AssignmentRecord, update: Update, version: int) -> None:
        """Add one accepted report, where it can be looked into."""
        ...

    def reduce(self, counted: Sequence[AssignmentRecord], version: int) -> Aggregate:
        """The aggregate of these reports, for the model after ``version``."""
        ...


class Releases(Protocol):
    """Where releases are kept, and what they cost."""

    def load_release(self, round_id: int) -> PrivateAggregate | None:
        """What was released in a round that is not committed yet; None for nothing."""
        ...

    def save_release(self, event: GaussianRelease, aggregate: PrivateAggregate) -> None:
        """Keep a release together with what it costs: both are durable when this returns, or neither is."""
        ...


class MemoryReleases:
    """Keeps nothing: for rounds that end with the process, and of which only their models are seen."""

    def load_release(self, round_id: int) -> PrivateAggregate | None:  # noqa: ARG002 - the protocol's signature
        """Nothing."""
        return None

    def save_release(self, event: GaussianRelease, aggregate: PrivateAggregate) -> None:
        """Nothing is kept."""


class PrivateBuffer:
    """A buffer whose aggregate carries noise.

    A crash between the draw and the commit goes on with what was drawn: two draws for one sum would give it away by
    their mean, and would be paid for once.

    Args:
        inner: Makes the aggregate, with noise from this server or from the aggregators.
        keeper: The task's ledger, in memory; what ``releases`` keeps is the truth.
        plan: Noise and budget.
        releases: Where they are kept.
    """

    def __init__(self, inner: Buffer, keeper: LedgerKeeper, plan: PrivacyPlan, releases: Releases) -> None:
        self._inner = inner
        self._keeper = keeper
        self._plan = plan
        self._releases = releases

    def reset(self) -> None:
        """See ``Buffer``."""
        self._inner.reset()

    def fold(self, record: AssignmentRecord, update: Update, version: int) -> None:
        """See ``Buffer``."""
        self._inner.fold(record, update, version)

    def reduce(self, counted: Sequence[AssignmentRecord], version: int) -> Aggregate:
        """The private aggregate: the one that was drawn before, if any.

        Raises:
            PocketfedError: As ``release_once``, and the inner buffer's own.
        """
        return release_once(
            self._keeper,
            self._plan,
            self._releases,
            round_id=version,
            reduce=lambda: self._inner.reduce(counted, version),
            counted=counted,
        )


def set_of(counted: Sequence[AssignmentRecord]) -> str:
    """Name of a set of reports, whatever their order."""
    numbers = ",".join(str(number) for number in sorted(r.number for r in counted))
    return hashlib.sha256(numbers.encode("ascii")).hexdigest()


def release_once(
    keeper: LedgerKeeper,
    plan: PrivacyPlan,
    releases: Releases,
    *,
    round_id: int,
    reduce: Callable[[], Aggregate],
    counted: Sequence[AssignmentRecord],
) -> PrivateAggregate:
    """A round's release: the one that was drawn before, or a new one that is paid for and kept before it is used.

    Args:
        keeper: The task's ledger, in memory.
        plan: Noise and budget.
        releases: Where releases are kept.
        round_id: Of the round.
        reduce: Makes the aggregate, with noise.
        counted: The reports that it is made of.

    Raises:
        StorageUnavailable: What was drawn before was of other reports: nothing more is released.
        PrivacyBudgetExhausted: The budget does not allow another release; no noise was drawn.
        NoiseMissing: The aggregate has none.
    """
    members = set_of(counted)
    found = releases.load_release(round_id)
    if found is not None:
        if found.measurements.get(_MEMBERS) != members:
            raise StorageUnavailable(f"round {round_id} was released for other reports than those it would commit")
        return found
    multiplier = plan.multiplier_at(round_id)
    event = GaussianRelease(round_id=round_id, noise_multiplier=multiplier, adjacency=plan.budget.adjacency)
    spent = keeper.ledger.check(event)
    keeper.open_round(round_id)
    aggregate = reduce()
    if not isinstance(aggregate, PrivateAggregate):
        raise NoiseMissing("an aggregate without noise left the pipeline of a private task; nothing is released")
    if all(e.round_id != round_id for e in keeper.ledger.events):
        # The aggregators drew the noise, and have ledgers of their own; this one says what the model cost.
        keeper.charge(event)
    said = {
        "privacy": {
            "epsilon": spent.epsilon,
            "delta": spent.delta,
            "adjacency": str(spent.adjacency),
            "noise_multiplier": multiplier,
            "noise_stddev": aggregate.noise_stddev,
        }
    }
    aggregate = replace(aggregate, measurements={**aggregate.measurements, **said, _MEMBERS: members})
    releases.save_release(event, aggregate)
    return aggregate
