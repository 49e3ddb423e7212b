"""An aggregator's own account of the privacy that its sums have spent, durable in its own database.

A release is charged in the transaction that records the commit, and the signature leaves only after that transaction:
what was signed has been paid for, whether or not the sum is ever opened. Nothing is paid back.
"""

from __future__ import annotations

import math
from fractions import Fraction

from pydantic import TypeAdapter
from sqlalchemy.engine import Connection

from server_ref.aggregation.accounting import (
    DistributedRelease,
    PrivacyBudget,
    PrivacyEvent,
    PrivacyLedger,
    PrivacySpent,
)
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.errors import PrivacyError
from server_ref.secure import queries
from server_ref.secure.errors import BudgetSpent
from server_ref.secure.messages import RoundStatement
from server_ref.secure.parameters import PinnedParameters, PinnedPrivacy
from server_ref.secure.rules import honest_contributors

_EVENT: TypeAdapter[PrivacyEvent] = TypeAdapter(PrivacyEvent)


def release_of(
    statement: RoundStatement, pinned: PinnedParameters, privacy: PinnedPrivacy, size: int
) -> DistributedRelease:
    """What opening the statement's sums costs.

    The parts of a partition are disjoint, so a device is in one of them, and that one has the full noise: all parts
    together cost what one sum does. Update and indicator are one release: their ratios of sensitivity to noise add up
    in squares. The coarser of the two noises decides how far the sum of integers is from one Gaussian.

    Args:
        statement: Within the pinned parameters.
        pinned: The aggregator's own parameters.
        privacy: Of them, those of the noise.
        size: Coordinates of the update.
    """
    # A device replaced by another moves the sum by twice what its absence does.
    moved = 2 if privacy.adjacency is Adjacency.REPLACE_ONE else 1
    if privacy.device_noise_variance is not None and privacy.honest_devices is not None:
        return DistributedRelease(
            round_id=statement.round_id,
            stddev=math.sqrt(Fraction(privacy.device_noise_variance)),
            contributors=privacy.honest_devices,
            sensitivity=moved * pinned.bounds.norm_bound,
            size=size,
            adjacency=privacy.adjacency,
        )
    parameters = statement.parameters
    honest = honest_contributors(statement, pinned)
    ratio = 1 / parameters.noise_multiplier
    stddev = math.sqrt(parameters.noise_variance(honest))
    if parameters.indicator_noise_multiplier is not None:
        ratio = math.hypot(ratio, 1 / parameters.indicator_noise_multiplier)
        stddev = min(stddev, math.sqrt(parameters.indicator_variance(honest)))
    return DistributedRelease(
        round_id=statement.round_id,
        stddev=stddev,
        contributors=honest,
        sensitivity=moved * ratio * math.sqrt(honest) * stddev,
        size=size + pinned.indicator,
        adjacency=privacy.adjacency,
    )


def load_ledger(connection: Connection, privacy: PinnedPrivacy) -> PrivacyLedger:
    """All that was ever charged here."""
    budget = PrivacyBudget(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        adjacency=privacy.adjacency,
        participations=privacy.max_participations,
    )
    return PrivacyLedger.replay(budget, map(_EVENT.validate_json, queries.load_events(connection)))


def check_budget(connection: Connection, event: DistributedRelease, privacy: PinnedPrivacy) -> PrivacySpent:
    """What the account would be after this release.

    Raises:
        BudgetSpent: The budget would be exceeded, or there have been as many releases as there may be.
    """
    ledger = load_ledger(connection, privacy)
    if len(ledger.events) >= privacy.max_rounds:
        raise BudgetSpent(f"there have been {len(ledger.events)} releases, as many as there may be")
    try:
        return ledger.check(event)
    except PrivacyError as e:
        raise BudgetSpent(str(e)) from e


def charge(connection: Connection, event: DistributedRelease) -> None:
    """Pay for a release that was checked in the same transaction."""
    queries.append_event(connection, event.round_id, event.model_dump_json())
