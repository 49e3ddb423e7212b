"""The buffer of a private task: what it releases is paid for, drawn once, and durable before anything uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from server_ref.aggregation.accounting import GaussianRelease, LedgerKeeper
from server_ref.aggregation.batch import Aggregate, PrivateAggregate, Update
from server_ref.aggregation.errors import NoiseMissing
from server_ref.assignments import AssignmentRecord
from server_ref.privacy_plan import PrivacyPlan


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
            PrivacyBudgetExhausted: The budget does not allow another release; no noise was drawn.
            PocketfedError: As the inner buffer's.
        """
        found = self._releases.load_release(version)
        if found is not None:
            return found
        event = GaussianRelease(
            round_id=version, noise_multiplier=self._plan.noise_multiplier, adjacency=self._plan.budget.adjacency
        )
        self._keeper.ledger.check(event)
        self._keeper.open_round(version)
        aggregate = self._inner.reduce(counted, version)
        if not isinstance(aggregate, PrivateAggregate):
            raise NoiseMissing("an aggregate without noise left the pipeline of a private task; nothing is released")
        if all(e.round_id != version for e in self._keeper.ledger.events):
            # The aggregators drew the noise, and have ledgers of their own; this one says what the model cost.
            self._keeper.charge(event)
        self._releases.save_release(event, aggregate)
        return aggregate
