"""Noticing early that training goes wrong: norms of updates that explode, a loss that rises and stays up.

Two detectors, both pure: a frozen policy, a small frozen state that goes to JSON and back, and ``next(state, ...)``. A
server that restarts goes on with the state it stored. Nothing here looks at single updates: what is watched is the
norm of a round's aggregate and the loss on data of the server's own, so noise that protects the aggregate protects
this as well.

**Norms** come first: a learning rate beyond the stability bound multiplies them by the same factor round after round,
long before the loss of a model that was good leaves its noise. The median of the last few is compared with the lowest
such median so far. Growth from there counts only above the level at which training started, since updates that shrank
to a thousandth may well grow tenfold. A single norm far outside of the last ones, measured by their median absolute
deviation, is a warning and no more.

**Losses** are compared, by their logarithms, with the best exponentially smoothed loss so far. ``patience`` rounds at
or above ``factor`` times the best are divergence; a round less than half of that way up forgets the count, one in
between keeps it (hysteresis: a loss that swings around the threshold does not escape). Where the losses themselves are
noisy, which the median absolute deviation of their steps tells, the threshold rises with the noise, up to
``factor**2``: the best of hundreds of noisy losses lies far below the honest rest. A rise of less than ``least_rise``
of the first loss does not count, so that a loss of nearly 0 may double.

docs/numerics.md has the measured rates of false alarms and the delays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from itertools import pairwise
from statistics import median
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from client_sdk.protocol.errors import ConfigurationError, DivergenceDetected

Logarithm = Annotated[float, Field(ge=-750, le=750)]
"""Of any positive float64."""

_SMALLEST_LOSS, _LARGEST_LOSS = 1e-300, 1e300


class Health(StrEnum):
    """How training does."""

    HEALTHY = "healthy"
    """Nothing to report."""

    SUSPECT = "suspect"
    """Something stands out; it may pass."""

    DIVERGED = "diverged"
    """Training left its course. Stays until the state is rolled back."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NormState(_Value):
    """What a ``NormMonitor`` remembers.

    Attributes:
        recent: Logarithms of the last norms, oldest first; zeros are left out.
        first: Median of the first full span of logarithms; None before.
        lowest: Lowest such median so far; None before.
        health: The last verdict.
        reason: Why it is not healthy.
    """

    recent: tuple[Logarithm, ...] = ()
    first: Logarithm | None = None
    lowest: Logarithm | None = None
    health: Health = Health.HEALTHY
    reason: str = ""


class NormMonitor(_Value):
    """Watches the norms of the rounds' aggregates.

    Attributes:
        factor: Growth of the norms' median, beside the lowest one, that is divergence.
        span: Norms in that median.
        window: Norms with which a single one is compared.
        deviations: Median absolute deviations (scaled to a normal distribution's standard deviation, of the norms'
            logarithms) above the window's median that make a norm stand out.
        least_deviation: Smallest standard deviation of the logarithms that is believed: 0.1 is about 10 %.
    """

    factor: float = Field(10.0, gt=1, allow_inf_nan=False)
    span: int = Field(5, ge=1)
    window: int = Field(20, ge=5)
    deviations: float = Field(6.0, gt=0, allow_inf_nan=False)
    least_deviation: float = Field(0.1, gt=0, allow_inf_nan=False)

    def next(self, state: NormState, norm: float) -> NormState:
        """The state after one more round.

        Args:
            state: Before; ``NormState()`` at the start.
            norm: L2 norm of the round's aggregate. 0 is no evidence; NaN or infinity is divergence at once.

        Raises:
            ConfigurationError: A negative norm.
        """
        if norm < 0:
            raise ConfigurationError(f"a norm of {norm}")
        if state.health is Health.DIVERGED or norm == 0:
            return state
        if not math.isfinite(norm):
            return state.model_copy(update=_diverged("the norm of an aggregate is not finite"))
        value = math.log(norm)
        recent = (*state.recent, value)[-self.window :]
        first, lowest = state.first, state.lowest
        health, reason = Health.HEALTHY, ""
        if self._stands_out(state.recent, value):
            health, reason = Health.SUSPECT, f"the norm {norm:.3g} stands out from those of the last rounds"
        if len(recent) >= self.span:
            level = median(recent[-self.span :])
            first = level if first is None else first
            lowest = level if lowest is None else min(lowest, level)
            if level - lowest >= math.log(self.factor) and level > first:
                health = Health.DIVERGED
                growth = math.exp(min(level - lowest, 700))
                reason = f"the norms of the aggregates grew to {growth:.3g} times their lowest level"
        return NormState(recent=recent, first=first, lowest=lowest, health=health, reason=reason)

    def _stands_out(self, recent: tuple[float, ...], value: float) -> bool:
        if len(recent) < self.window:
            return False
        centre = median(recent)
        return value - centre > self.deviations * max(_deviation(recent, centre), self.least_deviation)


class DivergenceState(_Value):
    """What a ``DivergenceDetector`` remembers. Losses are kept as logarithms.

    Attributes:
        losses: How many were seen.
        first: The first one; None before.
        recent: The last ones, oldest first.
        smoothed: Their exponential mean; None before the first.
        best: Lowest such mean so far, from ``warm_up`` losses on; None before.
        strikes: Rounds, since the last good one, in which the loss was too high.
        health: The last verdict.
        reason: Why it is not healthy.
        norms: State of the norms' monitor.
    """

    losses: int = Field(0, ge=0)
    first: Logarithm | None = None
    recent: tuple[Logarithm, ...] = ()
    smoothed: Logarithm | None = None
    best: Logarithm | None = None
    strikes: int = Field(0, ge=0)
    health: Health = Health.HEALTHY
    reason: str = ""
    norms: NormState = NormState()

    def after_rollback(self) -> DivergenceState:
        """The state to go on with after an earlier model was restored: the best loss is kept, the verdict is not."""
        return DivergenceState(losses=self.losses, first=self.first, smoothed=self.best, best=self.best)


class DivergenceDetector(_Value):
    """Decides, round by round, whether training has diverged.

    Attributes:
        factor: Loss, beside the best smoothed one, that is too much.
        patience: Rounds of it that are divergence.
        smoothing: Weight of the newest loss in the exponential mean (of the first ones: their plain mean).
        warm_up: Losses before the first comparison.
        window: Losses from which their noise is estimated.
        deviations: Standard deviations of that noise above the best loss that are not too much.
        least_rise: Rise, as a fraction of the first loss, below which nothing counts.
        norms: Watches the aggregates' norms.
    """

    factor: float = Field(2.0, gt=1, allow_inf_nan=False)
    patience: int = Field(5, ge=1)
    smoothing: float = Field(0.2, gt=0, le=1)
    warm_up: int = Field(3, ge=1)
    window: int = Field(20, ge=5)
    deviations: float = Field(4.0, ge=0, allow_inf_nan=False)
    least_rise: float = Field(0.05, ge=0, allow_inf_nan=False)
    norms: NormMonitor = NormMonitor()

    def next(self, state: DivergenceState, *, loss: float | None = None, norm: float | None = None) -> DivergenceState:
        """The state after one more round.

        Args:
            state: Before; ``DivergenceState()`` at the start.
            loss: Loss of the round's model on the server's data, 0 or more; None where it was not evaluated. NaN or
                infinity is divergence at once.
            norm: L2 norm of the round's aggregate, 0 or more; None where it is not known.

        Raises:
            ConfigurationError: A negative loss or norm.
        """
        if loss is not None and loss < 0:
            raise ConfigurationError(f"a loss of {loss}: multiples of the best loss say nothing about negative ones")
        if state.health is Health.DIVERGED:
            return state
        if norm is not None:
            state = state.model_copy(update={"norms": self.norms.next(state.norms, norm)})
        if loss is not None:
            state = self._after_loss(state, loss)
        if state.health is not Health.DIVERGED and state.norms.health is Health.DIVERGED:
            return state.model_copy(update=_diverged(state.norms.reason))
        if state.health is Health.HEALTHY and state.norms.health is Health.SUSPECT:
            return state.model_copy(update={"health": Health.SUSPECT, "reason": state.norms.reason})
        return state

    def check(self, state: DivergenceState) -> None:
        """Let a run go on.

        Raises:
            DivergenceDetected: It has diverged; the message says by what.
        """
        if state.health is Health.DIVERGED:
            raise DivergenceDetected(state.reason)

    def _after_loss(self, state: DivergenceState, loss: float) -> DivergenceState:
        if not loss <= _LARGEST_LOSS:
            return state.model_copy(update=_diverged("the loss is not finite"))
        losses = state.losses + 1
        first = math.log(max(loss, _SMALLEST_LOSS)) if state.first is None else state.first
        # Nothing below a billionth of the first loss matters, and 0 has no logarithm.
        value = math.log(max(loss, math.exp(first) * 1e-9, _SMALLEST_LOSS))
        recent = (*state.recent, value)[-self.window :]
        before = value if state.smoothed is None else state.smoothed
        smoothed = before + max(self.smoothing, 1 / losses) * (value - before)
        best, strikes, health, reason = state.best, 0, Health.HEALTHY, ""
        if losses >= self.warm_up:
            best = smoothed if best is None else min(best, smoothed)
            strikes = self._strikes(
                state.strikes, loss, value, best, least=self.least_rise * math.exp(first), recent=recent
            )
            if strikes:
                health = Health.DIVERGED if strikes >= self.patience else Health.SUSPECT
                reason = f"a loss of {loss:.3g} after a best of {math.exp(best):.3g}, too high for {strikes} rounds"
        return DivergenceState(
            losses=losses,
            first=first,
            recent=recent,
            smoothed=smoothed,
            best=best,
            strikes=strikes,
            health=health,
            reason=reason,
            norms=state.norms,
        )

    def _strikes(
        self, before: int, loss: float, value: float, best: float, *, least: float, recent: tuple[float, ...]
    ) -> int:
        tolerated = math.log(self.factor)
        threshold = min(max(tolerated, self.deviations * _noise(recent)), 2 * tolerated)
        if loss - math.exp(best) < least or value - best < threshold / 2:
            return 0
        return before + 1 if value - best >= threshold else before


def _noise(values: tuple[float, ...]) -> float:
    """Standard deviation of values around their trend, from their steps: twice its variance is that of a step."""
    if len(values) < 5:
        return 0.0
    steps = [b - a for a, b in pairwise(values)]
    return _deviation(steps, median(steps)) / math.sqrt(2)


def _deviation(values: Iterable[float], centre: float) -> float:
    """Median absolute deviation, scaled so that it is the standard deviation of a normal distribution."""
    return 1.4826 * median(abs(x - centre) for x in values)


def _diverged(reason: str) -> dict[str, object]:
    return {"health": Health.DIVERGED, "reason": reason}
