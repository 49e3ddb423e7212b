"""What an integrated task may spend: its ledger, its noise, and how often each worker may count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from client_sdk.protocol.errors import ConfigurationError, ReportMismatch
from server_ref.aggregation.accounting import (
    GaussianRelease,
    LedgerKeeper,
    PrivacyBudget,
    PrivacyEvent,
    PrivacyLedger,
)
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.calibration import calibrate
from server_ref.aggregation.integrated_config import FederatedConfig


@dataclass
class Spending:
    """The account of a task; one thread at a time.

    Attributes:
        keeper: The ledger.
        noise_multiplier: Of every release, the vote's too.
        most: Aggregates in which one worker counts at most; None for no limit.
        counted: In how many each has counted.
    """

    keeper: LedgerKeeper
    noise_multiplier: float
    most: int | None
    counted: Counter[str]
    _affordable: int = -1

    @classmethod
    def of(
        cls,
        config: FederatedConfig,
        ledger: PrivacyLedger | None = None,
        counted: Mapping[str, int] | None = None,
        persist: Callable[[PrivacyEvent], None] | None = None,
    ) -> Spending | None:
        """A task's account; None without privacy.

        Raises:
            ConfigurationError: A ledger of another budget, or without the counts that its budget rests on.
        """
        privacy = config.privacy
        if not privacy.enabled:
            return None
        budget = PrivacyBudget(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            adjacency=Adjacency(privacy.adjacency),
            participations=None if config.most is None else config.releases,
        )
        ledger = ledger or PrivacyLedger(budget=budget)
        if ledger.budget != budget:
            raise ConfigurationError("the ledger is of another budget than the configuration's; go on with its own")
        if ledger.events and config.most is not None and counted is None:
            raise ConfigurationError("participations are bounded: say how often each worker has counted (counted)")
        z = calibrate(privacy.epsilon, privacy.delta, participations=config.releases)
        return cls(LedgerKeeper(ledger, persist), z, config.most, Counter(counted))

    def next_release(self) -> int:
        """Its number in the ledger, where a vote has one too."""
        return 1 + max((event.round_id for event in self.keeper.ledger.events), default=-1)

    def check(self, worker_id: str) -> None:
        """Whether another release can be paid, and this worker be in it. Asked before an update is looked at.

        Raises:
            PrivacyBudgetExhausted: It cannot.
            ReportMismatch: The worker has counted as often as its privacy allows.
        """
        ledger = self.keeper.ledger
        if self._affordable != len(ledger.events):
            event = GaussianRelease(
                round_id=self.next_release(),
                noise_multiplier=self.noise_multiplier,
                adjacency=ledger.budget.adjacency,
            )
            ledger.check(event)
            self._affordable = len(ledger.events)
        if self.most is not None and self.counted[worker_id] >= self.most:
            raise ReportMismatch(f"this worker has counted in {self.most} aggregates, and its privacy allows no more")
