"""What a device insists on before it takes part, whatever the server says: to whom it sends, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from client_sdk.errors import ParticipationsSpent, UntrustedAggregators
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import Assignment, SealingKeyHex
from client_sdk.store import DeviceStore

AggregatorKeys = tuple[str, ...]
"""Public sealing keys in hex, that of aggregator 1 first."""


@dataclass(frozen=True)
class TrustedAggregators:
    """Those that a device sends shares to, and how many of them it takes to read its update.

    The threshold is part of it: honest aggregators open no share that was made for a lower one than they pin, but two
    dishonest ones would if the device was told 2.

    Attributes:
        keys: Theirs.
        min_threshold: The least threshold that the device accepts; None for more than half of them.

    Raises:
        ConfigurationError: A threshold that so many do not have.
    """

    keys: AggregatorKeys
    min_threshold: int | None = None

    def __post_init__(self) -> None:
        if self.min_threshold is not None and not 2 <= self.min_threshold <= len(self.keys):
            raise ConfigurationError(
                f"the least threshold of {len(self.keys)} aggregators is a number from 2 to {len(self.keys)}, "
                f"not {self.min_threshold}"
            )

    @property
    def least(self) -> int:
        """Fewer than so many of them must not be able to read an update."""
        return len(self.keys) // 2 + 1 if self.min_threshold is None else self.min_threshold


def trusted_aggregators(keys: Sequence[str] | None, min_threshold: int | None) -> TrustedAggregators | None:
    """Those with these keys; None where a device was told none.

    Raises:
        ConfigurationError: A threshold that so many do not have, or one of nobody.
    """
    if keys is not None:
        return TrustedAggregators(tuple(keys), min_threshold)
    if min_threshold is not None:
        raise ConfigurationError("a least threshold is one of trusted aggregators: give their keys too")
    return None


_KEYS = TypeAdapter(list[SealingKeyHex])


def load_aggregator_keys(path: Path) -> AggregatorKeys:
    """The keys that a device trusts: a JSON list of public sealing keys in hex, that of aggregator 1 first.

    Raises:
        ConfigurationError: No such file, or something else in it.
    """
    try:
        keys = tuple(_KEYS.validate_json(path.read_bytes()))
    except OSError as e:
        raise ConfigurationError(f"{path}: {e.strerror}; name a JSON list of the aggregators' sealing keys") from e
    except ValidationError as e:
        raise ConfigurationError(
            f'{path} is not a JSON list of public sealing keys in lower-case hex, such as ["5f01...", "a3c2..."]'
        ) from e
    if len(keys) < 2 or len(set(keys)) < len(keys):
        raise ConfigurationError(f"{path} must name at least two sealing keys, no two of them alike")
    return keys


def is_trusted(assignment: Assignment, trusted: TrustedAggregators | None) -> bool:
    """Whether the update goes to these aggregators and to nobody else; None trusts whomever the server names."""
    if trusted is None:
        return True
    plan = assignment.secure
    return plan is not None and plan.aggregator_keys == trusted.keys and plan.threshold >= trusted.least


def check_willing(assignment: Assignment, trusted: TrustedAggregators | None, store: DeviceStore) -> None:
    """Refuse what the device was told not to do. Asked before training, and before anything is sealed.

    Raises:
        UntrustedAggregators: The update would be shared among others than ``trusted`` or so that fewer of them could
            read it, or sent in the clear.
        ParticipationsSpent: The device has taken part as often as the plan allows.
        StateDirUnusable: How often that was cannot be read.
    """
    plan = assignment.secure
    if trusted is not None and not is_trusted(assignment, trusted):
        if plan is None:
            asked = "the update in the clear"
        elif plan.aggregator_keys != trusted.keys:
            asked = "shares for other aggregators"
        else:
            asked = f"shares that any {plan.threshold} aggregators can read, fewer than {trusted.least}"
        raise UntrustedAggregators(f"the assignment asks for {asked}; this device trusts the aggregators it was given")
    if plan is None or plan.max_participations is None:
        return
    taken = store.participations(assignment.task_id, besides=assignment.assignment_id)
    if taken >= plan.max_participations:
        raise ParticipationsSpent(
            f"the privacy of task {assignment.task_id} allows a device {plan.max_participations} reports; this one has "
            f"sealed {taken}"
        )
