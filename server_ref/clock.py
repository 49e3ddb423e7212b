"""Time as an argument: the wall clock, and a clock that only moves when a simulation says so."""

from __future__ import annotations

import time
from typing import Protocol

from client_sdk.protocol.errors import ConfigurationError


class Clock(Protocol):
    """Source of the server's idea of now, in seconds."""

    @property
    def is_virtual(self) -> bool:
        """Whether devices state the time (a simulation) instead of the server."""
        ...

    def now(self) -> float:
        """Seconds since the epoch, or since the simulation began."""
        ...

    def advance(self, now_s: float) -> float:
        """Accept a time stated by a device; the time that holds afterwards."""
        ...


class WallClock:
    """Seconds since the epoch, never going backwards within one process."""

    is_virtual = False

    def __init__(self) -> None:
        self._last = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        self._last = max(self._last, time.time())
        return self._last

    def advance(self, now_s: float) -> float:
        """Refuse: nobody tells this clock the time.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(f"virtual time {now_s} was sent to a server that runs on the wall clock")


class VirtualClock:
    """Time stated by a simulation's check-ins; it starts at ``start_s`` and never goes backwards."""

    is_virtual = True

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        """The latest time stated."""
        return self._now

    def advance(self, now_s: float) -> float:
        """Move to ``now_s`` where it lies ahead."""
        self._now = max(self._now, now_s)
        return self._now
