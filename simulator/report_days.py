"""The report's section on a fleet with a day; a fleet that is always available has none."""

from __future__ import annotations

from collections.abc import Mapping

from simulator import figures_days as figures
from simulator.figures import TIER_NAMES
from simulator.progress import human_time
from simulator.report_page import Page
from simulator.results import DaysResult, SimulationResults


def section(page: Page, results: SimulationResults) -> None:
    """The section."""
    days = results.days
    if days is None:
        return
    page.section("The devices' day")
    shown = [
        page.figure("availability", "Devices that may start a session", figures.availability(days), _hours_words(days))
    ]
    if days.pauses or days.lost:
        plot = figures.disturbances(days)
        shown.append(page.figure("disturbances", "Sessions that stood still or were lost", plot, _session_words(days)))
    if any(row.counted for row in results.tiers):
        shown.append(page.figure("work", "Who did the work", figures.work(results.tiers), _work_words(results)))
    page.row(*shown)


def cards(results: SimulationResults) -> list[tuple[str, str, str, str]]:
    """The headline figure: how much of their days the run took."""
    if results.days is None or results.virtual_seconds is None:
        return []
    return [("virtual time", human_time(results.virtual_seconds), "from midnight on", "")]


def reasons(counts: Mapping[str, int]) -> str:
    """Counts by reason in words, the commonest first."""
    return ", ".join(f"{figures.REASON_NAMES.get(reason, reason)} {n}" for reason, n in counts.items())


def _hours_words(days: DaysResult) -> str:
    best, worst = (pick(range(24), key=days.may_start.__getitem__) for pick in (max, min))
    of = f"the {days.devices} devices looked at" if days.devices > 1 else "the one device"
    return (
        f"Of {of}, most may start between {best}:00 and {best + 1}:00 ({_percent(days.may_start[best])}), fewest "
        f"between {worst}:00 and {worst + 1}:00 ({_percent(days.may_start[worst])}). Drawn is the first day of "
        "virtual time, which begins at midnight; one that several reasons keep away counts under one of them."
    )


def _session_words(days: DaysResult) -> str:
    words = (
        f"{days.paused} sessions stood still, {sum(days.pauses.values())} times in all; {days.resumed} of them were "
        f"taken up again and came to their end in time."
        if days.paused
        else "No session stood still."
    )
    lost = sum(days.lost.values())
    return words + (f" {lost} sessions never reported: {reasons(days.lost)}." if lost else " None was lost.")


def _work_words(results: SimulationResults) -> str:
    examples = sum(row.examples or 0 for row in results.tiers)
    devices = results.config.devices
    told = "; ".join(
        f"{TIER_NAMES[row.tier]}: {_percent(row.devices / devices)} of the devices, "
        f"{_percent((row.examples or 0) / max(1, examples))} of the examples trained"
        for row in results.tiers
    )
    return f"{told}. Examples are those of reports in a model, in all their epochs: {examples:,}."


def _percent(share: float) -> str:
    # The figure stays with its sign at the end of a line.
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
