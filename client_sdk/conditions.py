"""What a device can tell of its surroundings, and where it learns it: battery, heat, load, user, network.

What could not be read is None (``UNKNOWN`` for the network), never a guess: what an unknown means is for the policy to
say (``client_sdk.power``).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from itertools import pairwise
from typing import Final, Protocol, runtime_checkable

MIN_TEMPERATURE_C: Final = -40.0
MAX_TEMPERATURE_C: Final = 150.0
"""Sensors that are not connected report what no phone survives; beyond these a reading is no temperature."""


class ThermalStatus(IntEnum):
    """How hot the system says it is; the numbers are Android's ``PowerManager.THERMAL_STATUS_*``, so they compare."""

    NONE = 0
    LIGHT = 1
    """Throttled, and nobody notices."""
    MODERATE = 2
    """Throttled; the user is not much disturbed."""
    SEVERE = 3
    """Throttled so that the user notices."""
    CRITICAL = 4
    """The platform does all that it can to cool down; also Android's EMERGENCY and SHUTDOWN."""

    @classmethod
    def of_android(cls, status: int) -> ThermalStatus:
        """The status that Android's number stands for; EMERGENCY (5) and SHUTDOWN (6) are critical, too.

        Raises:
            ValueError: A negative number.
        """
        return cls(min(status, cls.CRITICAL))


class Network(StrEnum):
    """What bytes cost the user now."""

    NONE = "none"
    """There is no route to anywhere."""
    METERED = "metered"
    """Bytes may cost money: a cellular network, or a hotspot that is one."""
    UNMETERED = "unmetered"
    """Wi-Fi, a cable."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Conditions:
    """One reading.

    Attributes:
        battery_level: In [0, 1]; None where there is no battery or it cannot be read.
        charging: Whether the battery is being charged, or full on external power.
        temperature_c: Of what the user can feel: the battery, else the skin; degrees Celsius. Not of the processor,
            which is hot by design.
        thermal: What the system itself says of its heat.
        load: Runnable processes per core, averaged over a minute.
        user_active: Whether somebody is using the device.
        network: What an upload would cost.
    """

    battery_level: float | None = None
    charging: bool | None = None
    temperature_c: float | None = None
    thermal: ThermalStatus | None = None
    load: float | None = None
    user_active: bool | None = None
    network: Network = Network.UNKNOWN

    def __post_init__(self) -> None:
        if self.battery_level is not None and not 0 <= self.battery_level <= 1:
            raise ValueError(f"battery_level must lie in [0, 1], got {self.battery_level}")
        low, high = MIN_TEMPERATURE_C, MAX_TEMPERATURE_C
        if self.temperature_c is not None and not low <= self.temperature_c <= high:
            raise ValueError(f"temperature_c must lie in [{low:g}, {high:g}], got {self.temperature_c}")
        if self.load is not None and not 0 <= self.load < math.inf:
            raise ValueError(f"load must be finite and not negative, got {self.load}")


@runtime_checkable
class ConditionsSource(Protocol):
    """Where readings come from; an app on a phone brings its own.

    ``read`` never raises, returns within milliseconds, and may be called from any one thread at a time. What it cannot
    find out is None.
    """

    def read(self) -> Conditions:
        """What holds now."""
        ...


class ScriptedSource:
    """Gives one reading after another, then the last one forever; for tests.

    Attributes:
        reads: How often it was asked.
    """

    def __init__(self, first: Conditions, *later: Conditions) -> None:
        self._script = (first, *later)
        self.reads = 0

    def read(self) -> Conditions:
        """The next reading."""
        reading = self._script[min(self.reads, len(self._script) - 1)]
        self.reads += 1
        return reading


class TimelineSource:
    """Conditions as a function of time, for simulations: each change holds until the next one."""

    def __init__(
        self,
        changes: Sequence[tuple[float, Conditions]],
        clock: Callable[[], float],
        *,
        period_s: float | None = None,
    ) -> None:
        """Follow a timeline.

        Args:
            changes: ``(seconds, conditions)`` in order of time. Before the first one the last one holds if the
                timeline repeats, else the first.
            clock: Seconds.
            period_s: Repeat after so many seconds: 86400 for a day.

        Raises:
            ValueError: No changes, not in order, or beyond the period.
        """
        times = [at for at, _ in changes]
        if not times or any(a >= b for a, b in pairwise(times)):
            raise ValueError("a timeline has at least one change, and each is later than the one before")
        if period_s is not None and not 0 <= times[0] <= times[-1] < period_s:
            raise ValueError(f"the changes of a timeline that repeats every {period_s:g} s lie in [0, {period_s:g})")
        self._times = times
        self._conditions = [conditions for _, conditions in changes]
        self._clock = clock
        self._period_s = period_s

    def read(self) -> Conditions:
        """What holds at the clock's time."""
        now = self._clock()
        if self._period_s is not None:
            return self._conditions[bisect.bisect_right(self._times, now % self._period_s) - 1]
        return self._conditions[max(0, bisect.bisect_right(self._times, now) - 1)]
