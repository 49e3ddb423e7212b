"""Totals over a run's rounds, for its report and its last words on the console."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from client_sdk.protocol.errors import LeaseExpired, StaleReport
from client_sdk.protocol.secure import shared_size
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


def noise_lengths(results: SimulationResults) -> list[float | None]:
    """For each round the L2 length that the noise in its aggregate has by itself, all but exactly.

    In so many coordinates it hardly varies. Aggregators together add more than is accounted for: the account trusts in
    the noise of all but ``threshold - 1`` of them, who may know their own. So do devices. None without noise, and where
    it cannot be known: under a rule on noised buckets, or where a foreign server shares updates of unknown length.
    """
    claim, secrecy, config = results.privacy, results.secrecy, results.config
    if claim is None or claim.buckets is not None or (secrecy is not None and config.server is not None):
        return [None] * len(results.rounds)
    size = results.parameters if secrecy is None else shared_size(config.compression, results.parameters)
    lengths: list[float | None] = []
    for r in results.rounds:
        surplus = 1.0
        if claim.honest_devices is not None:
            surplus = (r.reports - sum(r.shares_rejected.values())) / claim.honest_devices
        elif secrecy is not None and r.noise_from:
            surplus = len(r.noise_from) / (len(r.noise_from) - secrecy.threshold + 1)
        lengths.append(None if r.noise_stddev is None else r.noise_stddev * math.sqrt(surplus * size))
    return lengths


def longest_mean(results: SimulationResults) -> float | None:
    """L2 length that the mean of clipped updates has at most; None where their sum is stretched, or nobody knows."""
    config = results.config
    stretched = config.delay_damping is not None or (results.secrecy is not None and config.compression is not None)
    known = config.server is None and config.aggregation.clip_scope == "global" and not stretched
    return config.aggregation.clip_norm if known else None


def bytes_per_coordinate(results: SimulationResults) -> float | None:
    """Of the counted reports, everything in them included; None where there were none."""
    reports = sum(r.reports for r in results.rounds)
    return sum(r.bytes_counted for r in results.rounds) / (reports * results.parameters) if reports else None


def shares_rejected(results: SimulationResults) -> Counter[str]:
    """Reason -> reports that aggregators left out of a sum."""
    found = Counter[str]()
    for r in results.rounds:
        found.update(r.shares_rejected)
    return found


def tampered(results: SimulationResults) -> dict[int, list[int]]:
    """Aggregator -> rounds in which its answer was wrong."""
    found: dict[int, list[int]] = {}
    for r in results.rounds:
        for index in r.tampered:
            found.setdefault(index, []).append(r.round)
    return dict(sorted(found.items()))


def unchecked(results: SimulationResults) -> list[int]:
    """Rounds whose sum was opened with so few answers that a wrong one would not have shown."""
    return [r.round for r in results.rounds if r.integrity == "unchecked"]
