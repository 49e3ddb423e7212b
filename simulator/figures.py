"""The report's figures as plain plotly descriptions; colours are names that the page resolves for light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.profile import DeviceTier
from simulator.results import RoundResult, SimulationResults, TierResult
from simulator.sessions import Session

Figure = dict[str, Any]

TIER_NAMES: Final = {DeviceTier.HIGH_END: "high end", DeviceTier.MID_RANGE: "mid range", DeviceTier.LOW_END: "low end"}
TIER_COLOURS: Final = {DeviceTier.HIGH_END: "c3", DeviceTier.MID_RANGE: "c1", DeviceTier.LOW_END: "c2"}
MAX_POINTS: Final = 4000
MAX_COLUMNS: Final = 400


def axis(title: str, **more: object) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def rounds_axis(rounds: Sequence[RoundResult], **more: object) -> dict[str, Any]:
    """The horizontal axis of everything that is told round by round."""
    # Room for half a round on both sides, so that a single round is a point in the middle and not a corner.
    span = [rounds[0].round - 0.5, rounds[-1].round + 0.5]
    # Whole rounds only where few of them would else get fractional ticks.
    ticks = {"dtick": 1} if len(rounds) <= 10 else {"nticks": 12}
    return axis("round", range=span, **ticks, **more)


def line(rounds: Sequence[RoundResult], values: Sequence[float | None], name: str, colour: str, **more: Any) -> Figure:  # noqa: ANN401 - plotly's own vocabulary
    """A line over the rounds."""
    mode = "lines+markers" if len(rounds) <= 60 else "lines"
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [r.round for r in rounds],
        "y": list(values),
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 5},
        **more,
    }


def bars(rounds: Sequence[RoundResult], values: Sequence[float], name: str, colour: str, unit: str) -> Figure:
    """Bars over the rounds."""
    return {
        "type": "bar",
        "name": name,
        "x": [r.round for r in rounds],
        "y": list(values),
        "marker": {"color": colour, "line": {"width": 0}},
        "hovertemplate": f"round %{{x}}: %{{y:.3g}} {unit}<extra>{name}</extra>",
    }


def accuracy(results: SimulationResults) -> Figure:
    """Accuracy per round on the validation data; the test accuracy as one line."""
    rounds = results.rounds
    values = [None if r.accuracy is None else 100 * r.accuracy for r in rounds]
    data = [line(rounds, values, "validation", "c1", hovertemplate="round %{x}: %{y:.2f} %<extra>validation</extra>")]
    layout: dict[str, Any] = {"xaxis": rounds_axis(rounds), "yaxis": axis("accuracy (%)"), "showlegend": True}
    if results.final_accuracy is not None:
        test = 100 * results.final_accuracy
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"test, final model: {test:.2f} %",
                "x": [rounds[0].round - 0.5, rounds[-1].round + 0.5],
                "y": [test, test],
                "line": {"color": "c2", "width": 2, "dash": "dot"},
                "hoverinfo": "name",
            }
        )
    return {"data": data, "layout": layout}


def loss(results: SimulationResults) -> Figure:
    """Loss per round: the operator's validation data, and what the devices saw while they trained."""
    rounds = results.rounds
    shown = [("validation", "validation", "c1", [r.loss for r in rounds])]
    if any(r.train_loss is not None for r in rounds):
        shown.append(("on the devices, last local epoch", "devices", "c4", [r.train_loss for r in rounds]))
    return {
        "data": [
            line(rounds, values, name, colour, hovertemplate=f"round %{{x}}: %{{y:.4f}}<extra>{short}</extra>")
            for name, short, colour, values in shown
        ],
        "layout": {
            "xaxis": rounds_axis(rounds),
            "yaxis": axis("mean cross-entropy (nats)", rangemode="tozero"),
            "showlegend": True,
        },
    }


def byte_unit(largest: float) -> tuple[float, str]:
    """Scale and unit in which sizes up to the largest read well."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "B"


def bytes_per_round(results: SimulationResults) -> Figure:
    """Bars of the bytes that the devices of each round moved."""
    rounds = results.rounds
    scale, unit = byte_unit(max(max(r.bytes_up, r.bytes_down) for r in rounds))
    up, down = (
        [v / scale for v in values] for values in zip(*((r.bytes_up, r.bytes_down) for r in rounds), strict=True)
    )
    return {
        "data": [
            bars(rounds, up, "up (reports)", "c1", unit),
            bars(rounds, down, "down (models, programs)", "c3", unit),
        ],
        "layout": {
            "barmode": "group",
            "xaxis": rounds_axis(rounds),
            "yaxis": axis(f"{unit} per round", rangemode="tozero"),
            "showlegend": True,
        },
    }


def bytes_so_far(results: SimulationResults) -> Figure:
    """Running totals of the same."""
    rounds = results.rounds
    up, down = np.cumsum([r.bytes_up for r in rounds]), np.cumsum([r.bytes_down for r in rounds])
    scale, unit = byte_unit(float(max(up[-1], down[-1])))
    hover = f"up to round %{{x}}: %{{y:.3g}} {unit}"
    return {
        "data": [
            line(rounds, (up / scale).tolist(), "up (reports)", "c1", hovertemplate=f"{hover}<extra>up</extra>"),
            line(
                rounds,
                (down / scale).tolist(),
                "down (models, programs)",
                "c3",
                hovertemplate=f"{hover}<extra>down</extra>",
            ),
        ],
        "layout": {
            "xaxis": rounds_axis(rounds),
            "yaxis": axis(f"{unit} in all", rangemode="tozero"),
            "showlegend": True,
        },
    }


def tiers(rows: Sequence[TierResult]) -> Figure:
    """What became of the sessions of each tier, stacked."""
    kinds = (
        ("counted", "in a model", "c1"),
        ("late", "too late", "c4"),
        ("dropped", "dropped out", "c2"),
        ("refused", "refused or failed", "c5"),
        ("unfinished", "under way at the end", "muted"),
    )
    names = [f"{TIER_NAMES[row.tier]}<br>{row.devices} devices" for row in reversed(rows)]
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "name": label,
                "y": names,
                "x": [getattr(row, kind) for row in reversed(rows)],
                "marker": {"color": colour, "line": {"width": 0}},
                "hovertemplate": f"%{{x}} {label}<extra>%{{y}}</extra>",
            }
            for kind, label, colour in kinds
            if any(getattr(row, kind) for row in rows)
        ],
        "layout": {
            "barmode": "stack",
            "xaxis": axis("sessions"),
            "yaxis": axis("", automargin=True),
            "showlegend": True,
            "legend": {"traceorder": "normal"},
        },
    }


def _time_unit(seconds: float) -> tuple[float, str]:
    for scale, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * scale:
            return scale, unit
    return 1.0, "seconds"


def timeline(
    results: SimulationResults,
    sessions: Sequence[Session],
    counted: Sequence[Sequence[Session]],
    tier_of: Callable[[int], DeviceTier],
) -> tuple[Figure, int]:
    """Rounds as bars, with every report at its arrival; time counts from the opening of each round.

    Returns:
        The figure, and the share of reports drawn as one in how many.
    """
    rounds = results.rounds
    foreign = results.virtual_seconds is None
    opened = {r.round: 0.0 if foreign else r.opened_at_s for r in rounds}
    scale, unit = _time_unit(max(r.closed_at_s - r.opened_at_s for r in rounds))
    # Which round each report belongs to: the one that counted it, or else the one that it was meant for.
    place = {id(s): index + 1 for index, group in enumerate(counted) for s in group}
    arrived = [s for s in sessions if s.arrives_s is not None and s.round_id + 1 in opened]
    every = max(1, -(-len(arrived) // MAX_POINTS))
    kinds: dict[str, tuple[str, str, list[tuple[float, int, int]]]] = {
        f"report, {name}": (TIER_COLOURS[tier], "circle", []) for tier, name in TIER_NAMES.items()
    }
    kinds["too late"] = ("muted", "x-thin", [])
    for s in arrived[::every] if not foreign else []:
        kind = f"report, {TIER_NAMES[tier_of(s.device)]}" if id(s) in place else "too late"
        of_round = place.get(id(s), s.round_id + 1)
        kinds[kind][2].append((round(((s.arrives_s or 0.0) - opened[of_round]) / scale, 4), of_round, s.device))
    bars: Figure = {
        "type": "bar",
        "orientation": "h",
        "name": "round open",
        "x": [(r.closed_at_s - r.opened_at_s) / scale for r in rounds],
        "y": [r.round for r in rounds],
        "width": 0.84,
        "marker": {"color": "band", "line": {"width": 0}},
        "hovertemplate": f"round %{{y}}: open for %{{x:.3g}} {unit}<extra></extra>",
    }
    clock = "the server's time" if foreign else "virtual time"
    return {
        "data": [bars, *(_points(name, *kind, unit) for name, kind in kinds.items() if kind[2])],
        "layout": {
            "xaxis": axis(f"{clock} since the round opened ({unit})", rangemode="tozero"),
            "yaxis": axis(
                "round",
                range=[rounds[-1].round + 0.6, rounds[0].round - 0.6],
                **({"dtick": 1} if len(rounds) <= 20 else {}),
            ),
            "hovermode": "closest",
            "showlegend": True,
        },
    }, every


def _points(name: str, colour: str, symbol: str, marks: Sequence[tuple[float, int, int]], unit: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [time for time, _, _ in marks],
        "y": [of_round for _, of_round, _ in marks],
        "text": [f"device {device}" for _, _, device in marks],
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": 6,
            "opacity": 0.85,
            "line": {"color": colour, "width": 1},
        },
        "hovertemplate": f"round %{{y}}, after %{{x}} {unit}: %{{text}}<extra></extra>",
    }


def labels(counts: npt.NDArray[np.int64]) -> tuple[Figure, int]:
    """Heat map of each device's share of every class, sizes above; devices ordered by their commonest class.

    Args:
        counts: int64[devices, classes].

    Returns:
        The figure, and how many devices it shows.
    """
    devices, classes = counts.shape
    sizes = counts.sum(axis=1)
    commonest = counts.argmax(axis=1)
    share = counts[np.arange(devices), commonest] / sizes
    order = np.lexsort((-share, commonest))
    if devices > MAX_COLUMNS:
        order = order[np.linspace(0, devices - 1, MAX_COLUMNS).round().astype(np.int64)]
    shares = np.round(100 * counts[order] / sizes[order, None], 1)
    names = [f"device {d}" for d in order.tolist()]
    columns = list(range(len(order)))
    return {
        "data": [
            {
                "type": "bar",
                "x": columns,
                "y": sizes[order].tolist(),
                "customdata": names,
                "marker": {"color": "c1", "line": {"width": 0}},
                "yaxis": "y2",
                "hovertemplate": "%{customdata}: %{y} examples<extra></extra>",
            },
            {
                "type": "heatmap",
                "x": columns,
                "y": list(range(classes)),
                "z": shares.T.tolist(),
                "customdata": [names] * classes,
                "colorscale": "sequential",
                "zmin": 0,
                "zmax": 100,
                "colorbar": {"title": {"text": "% of device"}, "thickness": 12, "len": 0.7, "y": 0.35},
                "hovertemplate": "%{customdata}: %{z} % of class %{y}<extra></extra>",
            },
        ],
        "layout": {
            "xaxis": axis("devices, ordered by commonest class", showticklabels=False, showgrid=False),
            "yaxis": axis("class", domain=[0, 0.72], dtick=1, showgrid=False),
            "yaxis2": axis("examples", domain=[0.78, 1], rangemode="tozero", nticks=4),
            "bargap": 0.1,
            "showlegend": False,
        },
    }, len(order)
