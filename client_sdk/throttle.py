"""What a training loop asks before and after each program call: whether to go on, and how long to rest."""

from __future__ import annotations

import time
from collections.abc import Callable

from client_sdk.power import ALLOWED, PowerMonitor, Verdict

_SHORTEST_REST_S = 0.05
"""Rests are saved up to this: a pause of a millisecond costs the processor's wake-up and cools nothing."""


class Governor:
    """Stands between a training loop and the power policy. One instance per training; one thread.

    The conditions are read before a call if ``check_every_calls`` calls or ``check_every_s`` seconds have passed since
    the last reading, so a condition that fails is seen after at most so many calls. A hard reason then stops the next
    call. A soft one is granted until the step boundary, but for at most ``grace_calls`` calls, through which the
    conditions are read each time: if they mend, training goes on.

    Attributes:
        worked_s: Seconds at work so far.
        rested_s: Seconds asked to rest so far.
    """

    def __init__(
        self,
        monitor: PowerMonitor,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Govern one training.

        Args:
            monitor: What is asked.
            monotonic: Seconds, never running backwards.
            sleep: Rests so many seconds. Whoever wants to end a rest early gives one that returns early
                (``threading.Event.wait``).
        """
        self._monitor = monitor
        self._policy = monitor.policy
        self._monotonic = monotonic
        self._sleep = sleep
        self._calls_until_check = 0
        self._checked_at = -float("inf")
        self._granted = 0  # calls since a soft reason came up
        self._in_grace = False
        self._duty = 1.0
        self._owed_s = 0.0
        self.worked_s = 0.0
        self.rested_s = 0.0

    def before_call(self, at_step_boundary: bool) -> Verdict:
        """Whether the next call may run.

        Args:
            at_step_boundary: Whether no optimizer step is half done: stopping here loses no work.

        Returns:
            Allowed; allowed with a reason, where a soft one is in its grace; or not.
        """
        now = self._monotonic()
        due = self._calls_until_check <= 0 or now - self._checked_at >= self._policy.check_every_s
        if not (due or self._in_grace):
            self._calls_until_check -= 1
            return ALLOWED
        reading = self._monitor.read()
        verdict = self._monitor.judge(reading)
        self._duty = self._policy.duty_cycle(reading)
        self._checked_at = now
        self._calls_until_check = self._policy.check_every_calls - 1
        if verdict.allowed:
            self._in_grace, self._granted = False, 0
            return verdict
        if verdict.hard or at_step_boundary or self._granted >= self._policy.grace_calls:
            return verdict
        self._in_grace = True
        self._granted += 1
        return Verdict(allowed=True, reason=verdict.reason, detail=verdict.detail)

    def after_call(self, seconds: float) -> None:
        """Note a call, and rest as the duty cycle of the last reading says.

        Args:
            seconds: How long the call took.
        """
        self.worked_s += seconds
        self._owed_s += seconds * (1 / self._duty - 1)
        if self._owed_s >= _SHORTEST_REST_S:
            self._sleep(self._owed_s)
            self.rested_s += self._owed_s
            self._owed_s = 0.0
