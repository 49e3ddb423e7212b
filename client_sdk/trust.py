"""What a device insists on before it takes part, whatever the server says: to whom it sends, and how often."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from client_sdk.errors import ParticipationsSpent, UntrustedAggregators
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import Assignment, SealingKeyHex
from client_sdk.store import DeviceStore

AggregatorKeys = tuple[str, ...]
"""Public sealing keys in hex, that of aggregator 1 first."""

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


def is_trusted(assignment: Assignment, trusted: AggregatorKeys | None) -> bool:
    """Whether the update goes to these aggregators and to nobody else; None trusts whomever the server names."""
    return trusted is None or (assignment.secure is not None and assignment.secure.aggregator_keys == trusted)


def check_willing(assignment: Assignment, trusted: AggregatorKeys | None, store: DeviceStore) -> None:
    """Refuse what the device was told not to do. Asked before training, and before anything is sealed.

    Raises:
        UntrustedAggregators: The update would be shared among others than ``trusted``, or sent in the clear.
        ParticipationsSpent: The device has taken part as often as the plan allows.
        StateDirUnusable: How often that was cannot be read.
    """
    plan = assignment.secure
    if not is_trusted(assignment, trusted):
        asked = "the update in the clear" if plan is None else "shares for other aggregators"
        raise UntrustedAggregators(f"the assignment asks for {asked}; this device trusts the aggregators it was given")
    if plan is None or plan.max_participations is None:
        return
    taken = store.participations(assignment.task_id, besides=assignment.assignment_id)
    if taken >= plan.max_participations:
        raise ParticipationsSpent(
            f"the privacy of task {assignment.task_id} allows a device {plan.max_participations} reports; this one has "
            f"sealed {taken}"
        )
