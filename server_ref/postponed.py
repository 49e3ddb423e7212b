"""Work that has to wait for others, and is tried again by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_FIRST_S: Final = 1.0
_LONGEST_S: Final = 30.0


class Postponed:
    """Waits longer each time in a row; what comes in meanwhile does not make it try sooner.

    Args:
        retry: Tries again; called from a thread of its own.
        clock: Monotonic seconds.
    """

    def __init__(self, retry: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._retry = retry
        self._clock = clock
        self._pause_s = 0.0
        self._due = 0.0
        self._timer: threading.Timer | None = None
        self._stopped = False
        self._lock = threading.Lock()

    @property
    def waiting(self) -> bool:
        """Whether it is too early to try again."""
        return self._clock() < self._due

    def again(self) -> None:
        """It did not work: try later."""
        self._pause_s = min(_LONGEST_S, 2 * self._pause_s or _FIRST_S)
        self._due = self._clock() + self._pause_s
        with self._lock:
            self._cancel()
            if self._stopped:
                return
            # A little late, so that it is not too early by a rounding.
            self._timer = threading.Timer(self._pause_s + 0.01, self._retry)
            self._timer.daemon = True
            self._timer.start()

    def done(self) -> None:
        """It worked: the next wait is short again."""
        self._pause_s = self._due = 0.0

    def stop(self) -> None:
        """Do not try again, whatever fails from here on."""
        with self._lock:
            self._stopped = True
            self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
