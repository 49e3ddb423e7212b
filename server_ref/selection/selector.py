"""Who gets work, decided at check-in by a chance."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from enum import StrEnum

from client_sdk.protocol.errors import ConfigurationError
from server_ref.selection.latency import LatencyTracker, check_floor


class SelectionPolicy(StrEnum):
    """What a device's chance depends on."""

    FAIR = "fair"
    """How often it took part: who is ahead waits for the devices that are behind, but for the floor."""

    FAST = "fast"
    """How long its reports take: the slower beside the median device, the less often, down to the floor."""


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
        check_floor(floor)
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
