"""Kinds of devices, by what they declare coarsely and openly: strata of ``diverse``.

Each fact is a device's own word, so a kind is bounded in number and decided once: labels count only if the operator
listed them, counts of examples fall into buckets by powers of four, and the tiers are three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from server_ref.selection.speed import TIER_CODES

SAMPLE_BUCKETS: Final = 8
"""1-3, 4-15, 16-63, ... examples; the last one is open."""

HOUR_BLOCKS: Final = 4
"""Quarters of the day, UTC."""

MAX_STRATA: Final = 64
"""Labels that an operator may list."""


@dataclass(frozen=True)
class DeviceFacts:
    """What ``diverse`` looks at.

    Attributes:
        tier: Of the device.
        num_samples: Examples that it holds; None: unknown.
        stratum: A label that its app declares, such as a language or a region; None: none.
        hour: Hour of the day, UTC, at which it is usually available, 0 to 23; None: unknown, or not to be told apart.
    """

    tier: DeviceTier = DeviceTier.MID_RANGE
    num_samples: int | None = None
    stratum: str | None = None
    hour: int | None = None

    @classmethod
    def of(cls, known: DeviceProfile | DeviceFacts | None) -> DeviceFacts:
        """From whatever is known of a device."""
        if known is None:
            return cls()
        return known if isinstance(known, DeviceFacts) else cls(tier=known.device_type)


class Strata:
    """Numbers the kinds: equal labels, sizes, tiers and hours have one number, whatever else there is.

    Args:
        labels: Those told apart; all others are one.

    Raises:
        ConfigurationError: Too many labels, or one twice.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        if len(labels) > MAX_STRATA or len(set(labels)) < len(labels):
            raise ConfigurationError(f"strata are at most {MAX_STRATA} different labels")
        self._labels = {label: number for number, label in enumerate(sorted(labels), start=1)}

    def code(self, facts: DeviceFacts) -> int:
        """Number of the facts' kind."""
        label = 0 if facts.stratum is None else self._labels.get(facts.stratum, 0)
        hour = 0 if facts.hour is None else 1 + facts.hour % 24 * HOUR_BLOCKS // 24
        size = 0 if facts.num_samples is None else 1 + sample_bucket(facts.num_samples)
        code = label
        for digit, base in (
            (TIER_CODES[facts.tier], len(TIER_CODES)),
            (size, SAMPLE_BUCKETS + 1),
            (hour, HOUR_BLOCKS + 1),
        ):
            code = code * base + digit
        return code


def sample_bucket(num_samples: int) -> int:
    """Bucket of a number of examples, 0 to ``SAMPLE_BUCKETS - 1``."""
    return min(max(0, num_samples.bit_length() - 1) // 2, SAMPLE_BUCKETS - 1)
