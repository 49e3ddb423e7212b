"""Totals over a run's rounds, for its report and its last words on the console."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from client_sdk.protocol.errors import LeaseExpired, StaleReport
from simulator.results import SimulationResults

# Nobody's fault: the round was over.
_TOO_LATE = frozenset({StaleReport.slug, LeaseExpired.slug})


@dataclass(frozen=True)
class Saving:
    """What compression saved.

    Attributes:
        sent: Bytes of the counted reports, everything in them included.
        dense: Bytes of their updates alone, as float32.
    """

    sent: int
    dense: int

    @property
    def share(self) -> float:
        """Of the dense bytes, what was not sent."""
        return 1 - self.sent / self.dense


@dataclass(frozen=True)
class Exclusions:
    """What a robust rule left out.

    Attributes:
        reports: Counted reports.
        excluded: Those of them that were left out.
        attackers: Those of all that were attackers'.
        caught: Attackers' reports that were left out.
    """

    reports: int
    excluded: int
    attackers: int
    caught: int

    @property
    def precision(self) -> float | None:
        """Attackers' share of what was left out; None if nothing was."""
        return self.caught / self.excluded if self.excluded else None

    @property
    def recall(self) -> float | None:
        """Share of the attackers' reports that was left out; None if there were none."""
        return self.caught / self.attackers if self.attackers else None


def saving(results: SimulationResults) -> Saving | None:
    """None where nothing was saved."""
    sent = sum(r.bytes_counted for r in results.rounds)
    dense = sum(r.bytes_dense for r in results.rounds)
    return Saving(sent, dense) if 0 < sent < dense else None


def exclusions(results: SimulationResults) -> Exclusions:
    """Over all rounds."""
    return Exclusions(
        reports=sum(r.reports for r in results.rounds),
        excluded=sum(len(r.excluded) for r in results.rounds),
        attackers=sum(r.attackers for r in results.rounds),
        caught=sum(r.excluded_attackers for r in results.rounds),
    )


def ages(results: SimulationResults) -> Counter[int]:
    """Staleness -> counted reports."""
    found = Counter[int]()
    for r in results.rounds:
        found.update(r.staleness)
    return found


def mean_age(found: Counter[int]) -> float:
    """Of at least one report."""
    return sum(age * reports for age, reports in found.items()) / found.total()


def failures(results: SimulationResults) -> dict[str, int]:
    """Sessions that came to nothing by what was in them, by reason."""
    return {reason: n for reason, n in results.refusals.items() if reason not in _TOO_LATE}


def unchanged(results: SimulationResults) -> dict[str, list[int]]:
    """Error -> rounds that left the model as it was."""
    found: dict[str, list[int]] = {}
    for r in results.rounds:
        if r.unchanged is not None:
            found.setdefault(r.unchanged, []).append(r.round)
    return found


def zero(results: SimulationResults) -> list[int]:
    """Rounds whose aggregate was 0 in every coordinate."""
    return [r.round for r in results.rounds if r.aggregate_norm == 0]


def selects(results: SimulationResults) -> bool:
    """Whether speed has a say in who takes part."""
    config = results.config
    return config.selection.policy != "any" or config.overselect > 1 or config.max_staleness > 0
