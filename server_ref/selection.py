"""Who gets work: slow devices are asked less often, but never below a floor; or everybody equally often.

Devices come by themselves (the server cannot call them), so selection is a decision at check-in: accept, or tell the
device to come back. It looks at two facts of each device that the server knows itself, how long its reports took and
how many there were. Time and chance are arguments; the state is a function of the rows (device, latency) in their
order, so that a restart or another replica rebuilds it from the table of assignments.

Selection by speed is biased towards the data of fast devices; the floor bounds by how much. It is no privacy
amplification: who takes part is neither secret nor independent of the devices' own behaviour.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Final

from client_sdk.protocol.errors import ConfigurationError

LATENCIES_KEPT: Final = 10
"""Latest latencies of a device that its speed is judged by."""

MIN_LATENCY_S: Final = 1e-6
"""Shorter ones count as this long, so that no device is infinitely preferred."""


class SelectionPolicy(StrEnum):
    """What a device's chance depends on."""

    FAIR = "fair"
    """How often it took part: who is ahead waits for the devices that are behind, but for the floor."""

    FAST = "fast"
    """How long its reports take: the slower beside the median device, the less often, down to the floor."""


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
    _check_floor(floor)
    known = {device: _checked(s) for device, s in latencies.items() if s is not None}
    mean = math.fsum(known.values()) / len(known) if known else 1.0
    speeds = {device: 1 / known.get(device, mean) for device in latencies}
    total = math.fsum(speeds.values())
    return {device: floor / len(speeds) + (1 - floor) * speed / total for device, speed in speeds.items()}


def jain_index(counts: Iterable[int]) -> float:
    """Jain's fairness index of how often each device was selected: 1 if equally often, 1/n if it was always the same.

    1 for no devices, and where nobody was ever selected.

    Source: R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination" (1984).
    """
    values = list(counts)
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def selection_ratio(counts: Mapping[str, int], slow: Iterable[str]) -> float:
    """How often a slow device was selected, on average, beside one of the others: 1 is equally often.

    Raises:
        ConfigurationError: No slow devices, no others, or the others were never selected.
    """
    slow = set(slow)
    slow_counts = [n for device, n in counts.items() if device in slow]
    other_counts = [n for device, n in counts.items() if device not in slow]
    if not slow_counts or not sum(other_counts):
        raise ConfigurationError("a ratio needs slow devices, and others that were selected")
    return (sum(slow_counts) / len(slow_counts)) / (sum(other_counts) / len(other_counts))


class LatencyTracker:
    """The latest latencies of each device. Memory: ``LATENCIES_KEPT`` numbers for each device that ever reported."""

    def __init__(self) -> None:
        self._latencies: dict[str, deque[float]] = {}

    def record(self, device_id: str, latency_s: float) -> float:
        """Take a report's latency in; the device's new mean.

        Raises:
            ConfigurationError: Negative, infinite or NaN; nothing is recorded.
        """
        latency_s = _checked(latency_s)
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


class Selector:
    """Decides at check-in whether a device gets work.

    ``fast``: with probability ``floor + (1 - floor) * min(1, median latency / its latency)``. The median, not the best:
    one device that claims to be a thousand times faster cannot turn all others away.
    ``fair``: always while it has no more reports than the tenth of all devices that has the fewest, else with
    probability ``floor``. (Devices that never come back hold that number down; the others are then all accepted with
    the floor: slower, and no less fairly.)
    A device that never reported is accepted; nothing would be learned about it otherwise.

    Guarantees: the state, and so every decision, follows from the sequence of ``record`` calls alone. An instance is
    used by one thread at a time.

    Args:
        policy: What the chance depends on.
        floor: Least probability of acceptance, above 0 up to 1; 1 accepts everybody.

    Raises:
        ConfigurationError: A floor outside (0, 1].
    """

    def __init__(self, policy: SelectionPolicy = SelectionPolicy.FAST, *, floor: float = 0.2) -> None:
        _check_floor(floor)
        if floor == 0:
            raise ConfigurationError("with floor=0 a slow device might never be asked again; use a positive floor")
        self.policy = policy
        self.floor = floor
        self._latencies = LatencyTracker()
        self._costs: dict[str, float] = {}
        self._sorted: list[float] = []
        self._counts: dict[str, int] = {}

    @classmethod
    def from_history(
        cls, rows: Iterable[tuple[str, float]], policy: SelectionPolicy = SelectionPolicy.FAST, *, floor: float = 0.2
    ) -> Selector:
        """The state after these reports: (device, latency in seconds), oldest first.

        Raises:
            ConfigurationError: As the constructor and ``record``.
        """
        selector = cls(policy, floor=floor)
        for device_id, latency_s in rows:
            selector.record(device_id, latency_s)
        return selector

    def record(self, device_id: str, latency_s: float) -> None:
        """A device has reported, so long after it was given work. O(log n) and one move in a sorted list.

        For a lease that expired the length of the lease may be recorded: it took at least that long.

        Raises:
            ConfigurationError: A latency that is negative or not finite; nothing is recorded.
        """
        latency_s = self._latencies.record(device_id, latency_s)
        self._counts[device_id] = self._counts.get(device_id, 0) + 1
        cost = latency_s if self.policy is SelectionPolicy.FAST else float(self._counts[device_id])
        former = self._costs.get(device_id)
        if former is not None:
            del self._sorted[bisect.bisect_left(self._sorted, former)]
        bisect.insort(self._sorted, cost)
        self._costs[device_id] = cost

    def acceptance(self, device_id: str) -> float:
        """Probability with which this device is accepted now, ``floor`` to 1."""
        cost = self._costs.get(device_id)
        if cost is None:
            return 1.0
        fast = self.policy is SelectionPolicy.FAST
        reference = self._sorted[(len(self._sorted) - 1) // (2 if fast else 10)]
        if cost <= reference:
            return 1.0
        return self.floor + (1 - self.floor) * reference / cost if fast else self.floor

    def accept(self, device_id: str, draw: float) -> bool:
        """Whether the device gets work.

        Args:
            device_id: Who asks.
            draw: Uniform from [0, 1), from whoever owns the randomness.
        """
        return draw < self.acceptance(device_id)

    def probabilities(self) -> dict[str, float]:
        """Chance of each device that ever reported to be the next one accepted, if all ask equally often."""
        chances = {device: self.acceptance(device) for device in self._costs}
        total = math.fsum(chances.values())
        return {device: chance / total for device, chance in chances.items()}

    @property
    def counts(self) -> Mapping[str, int]:
        """Reports of each device."""
        return dict(self._counts)


def _mean(latencies: deque[float]) -> float:
    return math.fsum(latencies) / len(latencies)


def _check_floor(floor: float) -> None:
    if not 0 <= floor <= 1:
        raise ConfigurationError(f"floor={floor} must lie between 0 and 1: it is the share that goes to all alike")


def _checked(latency_s: float) -> float:
    """A latency that can be counted with."""
    if not 0 <= latency_s < math.inf:
        raise ConfigurationError(f"a latency of {latency_s} seconds")
    return max(latency_s, MIN_LATENCY_S)
