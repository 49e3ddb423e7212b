"""Figures of what the server made of the reports: bytes, exclusions, norms, ages, and who took part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from client_sdk.protocol.profile import DeviceTier
from simulator.figures import TIER_COLOURS, TIER_NAMES, Figure, axis, bars, byte_unit, line, rounds_axis
from simulator.results import RoundResult

# More bars than this are narrower than the gaps between them.
_MAX_BINS: Final = 30


def bytes_saved(rounds: Sequence[RoundResult]) -> Figure:
    """Bytes of the counted reports beside those of their updates as float32."""
    scale, unit = byte_unit(max(r.bytes_dense for r in rounds))
    return {
        "data": [
            bars(rounds, [r.bytes_dense / scale for r in rounds], "as float32", "band", unit),
            bars(rounds, [r.bytes_counted / scale for r in rounds], "sent", "c1", unit),
        ],
        "layout": {
            "barmode": "overlay",
            "xaxis": rounds_axis(rounds),
            "yaxis": axis(f"{unit} per round", rangemode="tozero"),
            "showlegend": True,
        },
    }


def exclusions(rounds: Sequence[RoundResult], *, attacked: bool) -> Figure:
    """Reports that the robust rule left out; where devices attack, whose they were, and downwards what it missed."""
    if not attacked:
        kinds = [("left out", "c1", [len(r.excluded) for r in rounds], 1)]
    else:
        kinds = [
            ("attackers', left out", "c3", [r.excluded_attackers for r in rounds], 1),
            ("honest, left out", "c4", [len(r.excluded) - r.excluded_attackers for r in rounds], 1),
            ("attackers', let in", "c5", [r.attackers - r.excluded_attackers for r in rounds], -1),
        ]
    data = [
        {
            **bars(rounds, [sign * n for n in counts], name, colour, "reports"),
            "customdata": counts,
            "hovertemplate": f"round %{{x}}: %{{customdata}} {name}<extra></extra>",
        }
        for name, colour, counts, sign in kinds
    ]
    top = max(len(r.excluded) for r in rounds)
    bottom = max(r.attackers - r.excluded_attackers for r in rounds)
    step = max(1, math.ceil((top + bottom) / 8))
    ticks = [*range(-step * (bottom // step), 0, step), *range(0, top + 1, step)]
    title = "let in / left out (reports)" if attacked else "reports"
    return {
        "data": data,
        "layout": {
            "barmode": "relative",
            "xaxis": rounds_axis(rounds),
            "yaxis": axis(title, tickvals=ticks, ticktext=[str(abs(t)) for t in ticks]),
            "showlegend": True,
        },
    }


def norms(rounds: Sequence[RoundResult], clip_norm: float | None) -> Figure:
    """L2 norms of what was added up, on a logarithmic axis; where updates are clipped, theirs and how many were cut."""
    shown = [("aggregate", [r.aggregate_norm for r in rounds], "c1")]
    if any(r.norm_median is not None for r in rounds):
        shown += [
            ("median update", [r.norm_median for r in rounds], "c3"),
            ("largest update", [r.norm_max for r in rounds], "c2"),
        ]
    data = [
        # A logarithm of nothing cannot be drawn: a gap.
        line(
            rounds,
            [v or None for v in values],
            name,
            colour,
            hovertemplate=f"round %{{x}}: %{{y:.3g}}<extra>{name}</extra>",
        )
        for name, values, colour in shown
    ]
    if clip_norm is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"clipped to {clip_norm:g}",
                "x": [rounds[0].round - 0.5, rounds[-1].round + 0.5],
                "y": [clip_norm, clip_norm],
                "line": {"color": "muted", "width": 2, "dash": "dot"},
                "hoverinfo": "name",
            }
        )
    return {
        "data": data,
        "layout": {
            "xaxis": rounds_axis(rounds),
            "yaxis": axis("L2 norm (logarithmic)", type="log", **_decades([v for _, vs, _ in shown for v in vs if v])),
            "showlegend": True,
        },
    }


def clipped(rounds: Sequence[RoundResult]) -> Figure:
    """How many updates were clipped."""
    return {
        "data": [
            bars(rounds, [r.clipped for r in rounds], "clipped", "c2", "reports"),
            bars(rounds, [r.reports - r.clipped for r in rounds], "as they came", "band", "reports"),
        ],
        "layout": {
            "barmode": "stack",
            "xaxis": rounds_axis(rounds),
            "yaxis": axis("reports", rangemode="tozero"),
            "showlegend": True,
        },
    }


def staleness(ages: Counter[int]) -> Figure:
    """Histogram of the counted reports' ages."""
    values = list(range(max(ages) + 1))
    return {
        "data": [
            {
                "type": "bar",
                "name": "reports",
                "x": values,
                "y": [ages[age] for age in values],
                "marker": {"color": "c1", "line": {"width": 0}},
                "hovertemplate": "%{x} versions old: %{y} reports<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": axis("age: model versions made since the report's model", **_whole_ticks(len(values))),
            "yaxis": axis("counted reports", rangemode="tozero"),
            "bargap": 0.15,
            "showlegend": False,
        },
    }


def participation(times: Sequence[int], tier_of: Callable[[int], DeviceTier]) -> Figure:
    """Histogram of how often a device counted, by tier.

    Args:
        times: Device -> reports of it that are part of a model.
        tier_of: Device -> tier.
    """
    width = max(1, math.ceil((max(times) + 1) / _MAX_BINS))
    starts = list(range(0, max(times) + 1, width))
    names = [str(s) if width == 1 else f"{s}-{s + width - 1}" for s in starts]
    found = Counter((tier_of(device), n // width) for device, n in enumerate(times))
    return {
        "data": [
            {
                "type": "bar",
                "name": name,
                "x": names,
                "y": [found[tier, index] for index in range(len(starts))],
                "marker": {"color": TIER_COLOURS[tier], "line": {"width": 0}},
                "hovertemplate": f"%{{y}} {name} devices counted %{{x}} times<extra></extra>",
            }
            for tier, name in TIER_NAMES.items()
        ],
        "layout": {
            "barmode": "stack",
            "xaxis": axis("reports of a device that are part of a model", type="category"),
            "yaxis": axis("devices", rangemode="tozero"),
            "bargap": 0.15,
            "showlegend": True,
        },
    }


def _decades(values: Sequence[float]) -> dict[str, str | int]:
    """Ticks of a logarithmic axis: those of a linear one on short ranges, then 1, 2, 5, then whole decades."""
    decades = math.log10(max(values) / min(values))
    if decades <= 1:
        return {}
    return {"dtick": "D2" if decades <= 3 else math.ceil(decades / 10)}


def _whole_ticks(values: int) -> dict[str, int]:
    return {"dtick": 1} if values <= 20 else {"nticks": 12}
