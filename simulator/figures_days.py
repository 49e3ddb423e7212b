"""Figures of a fleet with a day: who may start when, what sessions stood still for, and who did the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from simulator.figures import TIER_NAMES, Figure, axis
from simulator.results import DaysResult, TierResult

REASON_NAMES: Final = {
    "battery-low": "battery low",
    "battery-empty": "battery nearly empty",
    "not-charging": "not charging",
    "hot": "warm",
    "overheated": "too hot",
    "user-active": "in use",
    "busy": "busy",
    "network": "no network it may use",
    "quiet-hours": "quiet hours",
    "unavailable": "app may not run",
    "vanished": "vanished for good",
    "too-slow": "too slow for its lease",
}
_REASON_COLOURS: Final = ("c2", "c4", "c5", "c1", "muted")
_MAY_START: Final = "may start"


def availability(days: DaysResult) -> Figure:
    """For each hour the shares of devices that may start, and that may not, by reason; stacked to all."""
    shown = [(_MAY_START, "c3", days.may_start)]
    for index, (reason, shares) in enumerate(days.kept_away.items()):
        shown.append((REASON_NAMES.get(reason, reason), _REASON_COLOURS[min(index, len(_REASON_COLOURS) - 1)], shares))
    return {
        "data": [
            {
                "type": "bar",
                "name": name,
                "x": [hour + 0.5 for hour in range(len(shares))],
                "y": [round(100 * share, 2) for share in shares],
                "customdata": [f"{hour}:00 to {hour + 1}:00" for hour in range(len(shares))],
                "marker": {"color": colour, "line": {"width": 0}},
                "hovertemplate": f"%{{customdata}}: %{{y:.1f}} %<extra>{name}</extra>",
            }
            for name, colour, shares in shown
        ],
        "layout": {
            "barmode": "stack",
            "bargap": 0.08,
            "xaxis": axis("hour of the day (UTC)", range=[0, 24], dtick=3),
            "yaxis": axis("share of devices (%)", range=[0, 100]),
            "showlegend": True,
            "legend": {"traceorder": "normal"},
        },
    }


def disturbances(days: DaysResult) -> Figure:
    """How often sessions stood still, and how many were lost, by reason."""
    reasons = sorted({*days.pauses, *days.lost}, key=lambda r: (days.pauses.get(r, 0) + days.lost.get(r, 0), r))
    names = [REASON_NAMES.get(reason, reason) for reason in reasons]

    def trace(counts: Mapping[str, int], name: str, colour: str) -> Figure:
        return {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": [counts.get(reason, 0) for reason in reasons],
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"%{{y}}: %{{x}}<extra>{name}</extra>",
        }

    return {
        "data": [trace(days.lost, "sessions lost", "c2"), trace(days.pauses, "pauses", "c1")],
        "layout": {
            "barmode": "group",
            "xaxis": axis("times", rangemode="tozero"),
            "yaxis": axis("", automargin=True),
            "showlegend": True,
            "legend": {"traceorder": "reversed"},
        },
    }


def work(rows: Sequence[TierResult]) -> Figure:
    """Each tier's share of the devices, of the sessions, of the reports in a model, and of what they trained."""
    shown = (
        ("devices", "muted", [row.devices for row in rows]),
        ("sessions", "c4", [sessions_of(row) for row in rows]),
        ("reports in a model", "c1", [row.counted for row in rows]),
        ("examples trained for them", "c3", [row.examples or 0 for row in rows]),
    )
    return {
        "data": [
            {
                "type": "bar",
                "name": name,
                "x": [TIER_NAMES[row.tier] for row in rows],
                "y": [round(100 * value / max(1, sum(values)), 2) for value in values],
                "customdata": values,
                "marker": {"color": colour, "line": {"width": 0}},
                "hovertemplate": f"%{{x}}: %{{y:.1f}} % (%{{customdata}})<extra>{name}</extra>",
            }
            for name, colour, values in shown
        ],
        "layout": {
            "barmode": "group",
            "xaxis": axis(""),
            "yaxis": axis("share of all tiers (%)", rangemode="tozero"),
            "showlegend": True,
        },
    }


def sessions_of(row: TierResult) -> int:
    """All sessions of a tier."""
    return row.counted + row.late + row.dropped + row.refused + row.unfinished
