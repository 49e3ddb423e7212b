"""When a device stops working: its caller says so, or the time it was given is over."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable


class Stopper:
    """The caller's event and, where there is one, a budget of time; asked between two steps.

    Args:
        event: Set by the caller to end the work.
        budget_s: Seconds from now after which no new step begins; None for no limit.
        monotonic: Seconds of a clock that nobody sets back.
    """

    def __init__(
        self,
        event: threading.Event | None = None,
        *,
        budget_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.event = event or threading.Event()
        self._monotonic = monotonic
        self._ends_at = math.inf if budget_s is None else monotonic() + budget_s

    def remaining_s(self) -> float:
        """What is left of the budget, at least 0; infinity without one."""
        return max(0.0, self._ends_at - self._monotonic()) if math.isfinite(self._ends_at) else math.inf

    def is_set(self) -> bool:
        """Whether to stop before the next step."""
        return self.event.is_set() or self.remaining_s() == 0
