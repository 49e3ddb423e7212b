"""What the days of the devices did to a run: when they may start, what paused sessions, what they were lost to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from simulator.population import Population
from simulator.results import DaysResult
from simulator.sessions import Outcome, Session
from simulator.traces import VANISHED, FleetTraces

MOST_DEVICES: Final = 300
"""So many are looked at: enough to tell shares within a few per cent, and over in about a second."""


def days_of(
    population: Population, sessions: Iterable[Session], *, most_devices: int = MOST_DEVICES
) -> DaysResult | None:
    """The result.

    Args:
        population: Who took part.
        sessions: All sessions of the run.
        most_devices: To look at, where there are more.

    Returns:
        None where no device has a day.
    """
    if not population.profiles.traced:
        return None
    devices = evenly(population.devices, most_devices)
    by_hour = FleetTraces(population).reasons_by_hour(devices)
    pauses, lost = Counter[str](), Counter[str]()
    paused = resumed = 0
    for session in sessions:
        pauses.update(session.pauses)
        paused += bool(session.pauses)
        if session.end is not None and session.end.outcome is Outcome.DROPPED:
            lost[session.end.reason or VANISHED] += 1
        else:
            resumed += bool(session.pauses)
    reasons = Counter({reason: n for reason, n in sum(by_hour, Counter[str | None]()).items() if reason is not None})
    return DaysResult(
        devices=len(devices),
        may_start=tuple(hour[None] / hour.total() for hour in by_hour),
        kept_away={r: tuple(hour[r] / hour.total() for hour in by_hour) for r in _commonest_first(reasons)},
        paused=paused,
        resumed=resumed,
        pauses=_commonest_first(pauses),
        lost=_commonest_first(lost),
    )


def evenly(devices: int, at_most: int) -> Sequence[int]:
    """At most so many of 0 .. devices - 1, as far apart from one another as possible."""
    shown = min(devices, at_most)
    return [i * devices // shown for i in range(shown)]


def _commonest_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
