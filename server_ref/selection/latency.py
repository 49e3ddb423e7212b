"""How long devices take, and chances that follow from it: for whoever draws devices by their speed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

from client_sdk.protocol.errors import ConfigurationError

LATENCIES_KEPT: Final = 10
"""Latest latencies of a device that its speed is judged by."""

MIN_LATENCY_S: Final = 1e-6
"""Shorter ones count as this long, so that no device is infinitely preferred."""


def selection_probabilities(latencies: Mapping[str, float | None], *, floor: float = 0.2) -> dict[str, float]:
    """Chance of each device to be the next one selected, from how long its reports take.

    Args:
        latencies: Device -> its mean latency in seconds, None where nothing is known.
        floor: Part of the probability that is shared out equally, 0 to 1.

    Returns:
        Device -> probability: ``floor / n + (1 - floor) * (1 / latency) / sum(1 / latency)``. They sum to 1 (to
        rounding), none is below ``floor / n``, and a slower device never has more. A device of which nothing is known
        counts with the mean latency of the others. Empty for no devices.

    Raises:
        ConfigurationError: A floor outside 0 to 1, or a latency that is negative or not finite.
    """
    check_floor(floor)
    known = {device: checked_latency(s) for device, s in latencies.items() if s is not None}
    mean = math.fsum(known.values()) / len(known) if known else 1.0
    speeds = {device: 1 / known.get(device, mean) for device in latencies}
    total = math.fsum(speeds.values())
    return {device: floor / len(speeds) + (1 - floor) * speed / total for device, speed in speeds.items()}


class LatencyTracker:
    """The latest latencies of each device. Memory: ``LATENCIES_KEPT`` numbers for each device that ever reported."""

    def __init__(self) -> None:
        self._latencies: dict[str, deque[float]] = {}

    def record(self, device_id: str, latency_s: float) -> float:
        """Take a report's latency in; the device's new mean.

        Raises:
            ConfigurationError: Negative, infinite or NaN; nothing is recorded.
        """
        latency_s = checked_latency(latency_s)
        latencies = self._latencies.setdefault(device_id, deque(maxlen=LATENCIES_KEPT))
        latencies.append(latency_s)
        return _mean(latencies)

    def mean(self, device_id: str) -> float | None:
        """Mean of the device's latest latencies, in seconds; None if it never reported."""
        latencies = self._latencies.get(device_id)
        return None if latencies is None else _mean(latencies)

    def means(self) -> dict[str, float]:
        """Mean of each device that reported, in the order of their first reports."""
        return {device: _mean(latencies) for device, latencies in self._latencies.items()}

    def rows(self) -> Iterator[tuple[str, float]]:
        """(device, latency) pairs that rebuild this state when they are recorded in order."""
        for device, latencies in self._latencies.items():
            for latency_s in latencies:
                yield device, latency_s


def _mean(latencies: deque[float]) -> float:
    return math.fsum(latencies) / len(latencies)


def check_floor(floor: float) -> None:
    """Refuse a share that is none."""
    if not 0 <= floor <= 1:
        raise ConfigurationError(f"floor={floor} must lie between 0 and 1: it is the share that goes to all alike")


def checked_latency(latency_s: float) -> float:
    """A latency that can be counted with."""
    if not 0 <= latency_s < math.inf:
        raise ConfigurationError(f"a latency of {latency_s} seconds")
    return max(latency_s, MIN_LATENCY_S)
