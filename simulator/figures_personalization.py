"""Figures of personalisation: who gains, how adaptation goes, and how accuracies lie before and after."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from simulator.figures import Figure, axis
from simulator.personalization.distribution import size_of_tenth
from simulator.results import PersonalizationResult

# From the first round that is shown to the last but one; the last one is the blue of all that is final.
_EARLIER: Final = ("muted", "c4", "c2", "c3")
_BIN: Final = 5
"""Percentage points."""


def scatter(result: PersonalizationResult) -> Figure:
    """Every device by its two accuracies; above the diagonal are those that gain."""
    pairs = Counter(
        (round(100 * before, 2), round(100 * after, 2)) for before, after in result.per_device_accuracies.values()
    )
    kinds = (
        ("better with its own model", "c3", [p for p in pairs if p[1] > p[0]]),
        ("as good with either", "muted", [p for p in pairs if p[1] == p[0]]),
        ("worse with its own model", "c5", [p for p in pairs if p[1] < p[0]]),
    )
    low = max(0.0, min(min(pair) for pair in pairs) - 5)
    diagonal: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": [low, 100],
        "y": [low, 100],
        "line": {"color": "muted", "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
        "showlegend": False,
    }

    def marks(name: str, colour: str, at: list[tuple[float, float]]) -> Figure:
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [x for x, _ in at],
            "y": [y for _, y in at],
            "text": [_devices(pairs[pair]) for pair in at],
            "marker": {
                "color": colour,
                # The area tells how many devices are at one place.
                "size": [round(8 * float(np.sqrt(pairs[pair])), 1) for pair in at],
                "opacity": 0.75,
                "line": {"width": 0},
            },
            "hovertemplate": f"%{{text}}: %{{x}} % with the global model, %{{y}} % with its own<extra>{name}</extra>",
        }

    return {
        "data": [diagonal, *(marks(*kind) for kind in kinds if kind[2])],
        "layout": {
            "xaxis": axis("accuracy, global model (%)", range=[low, 101]),
            "yaxis": axis("accuracy, own model (%)", range=[low, 101]),
            "hovermode": "closest",
            "showlegend": True,
        },
    }


def gains(result: PersonalizationResult) -> Figure:
    """What each device gains, in order; the tenth that gains least is marked."""
    found = sorted(
        ((100 * (after - before), device) for device, (before, after) in result.per_device_accuracies.items()),
        key=lambda gain: (-gain[0], int(gain[1])),
    )
    marked = len(found) - size_of_tenth(len(found))

    def some(name: str, colour: str, first: int, end: int) -> Figure:
        return {
            "type": "bar",
            "name": name,
            "x": list(range(first + 1, end + 1)),
            "y": [round(gain, 2) for gain, _ in found[first:end]],
            "customdata": [f"device {device}" for _, device in found[first:end]],
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"%{{customdata}}: %{{y:+.1f}} points<extra>{name}</extra>",
        }

    tenth = some("the tenth that gains least", "c2", marked, len(found))
    return {
        "data": [*([some("the others", "c1", 0, marked)] if marked else []), tenth],
        "layout": {
            "bargap": 0.1,
            "xaxis": axis("devices, in order of their gain", showgrid=False, range=[0.4, len(found) + 0.6]),
            "yaxis": axis("gain (percentage points)", zeroline=True, zerolinewidth=2),
            "showlegend": True,
        },
    }


def curves(result: PersonalizationResult) -> Figure:
    """Mean accuracy after each step, one line for each round whose model devices adapted."""
    colours = [*_EARLIER[: len(result.curves) - 1], "c1"]

    def line(index: int) -> Figure:
        curve = result.curves[index]
        name = model_of(curve.round).removeprefix("model of ")
        last = index == len(result.curves) - 1
        return {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(range(len(curve.accuracy))),
            "y": [round(100 * value, 2) for value in curve.accuracy],
            "line": {"color": colours[index], "width": 3 if last else 2},
            "marker": {"color": colours[index], "size": 6},
            "hovertemplate": f"after %{{x}} steps: %{{y:.1f}} %<extra>{name}</extra>",
        }

    ticks: dict[str, Any] = {"dtick": 1} if result.steps <= 12 else {"nticks": 12}
    return {
        "data": [line(index) for index in range(len(result.curves))],
        "layout": {
            "xaxis": axis("steps of adaptation", range=[-0.2, result.steps + 0.2], **ticks),
            "yaxis": axis("mean accuracy (%)"),
            "showlegend": True,
        },
    }


def histogram(result: PersonalizationResult) -> Figure:
    """How many devices have which accuracy, before and after."""
    columns = np.array(list(result.per_device_accuracies.values()))
    low = int(columns.min() * 100 // _BIN) * _BIN
    edges = np.arange(low, 100 + _BIN, _BIN)

    def bars(name: str, colour: str, values: npt.NDArray[np.float64]) -> Figure:
        # Rounded: a hundred times 0.29, say, is a little less than 29. The last bin has both of its ends.
        counts, _ = np.histogram(np.round(100 * values, 6), edges)
        return {
            "type": "bar",
            "name": name,
            "x": (edges[:-1] + _BIN / 2).tolist(),
            "y": counts.tolist(),
            "customdata": [f"{edge} to {edge + _BIN}" for edge in edges[:-1].tolist()],
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"%{{customdata}} %: %{{y}}<extra>{name}</extra>",
        }

    return {
        "data": [bars("with the global model", "muted", columns[:, 0]), bars("with their own", "c1", columns[:, 1])],
        "layout": {
            "barmode": "group",
            "bargap": 0.12,
            "xaxis": axis("accuracy (%)", range=[low, 100], dtick=10 if low < 60 else _BIN),
            "yaxis": axis("devices", rangemode="tozero"),
            "showlegend": True,
        },
    }


def model_of(number: int) -> str:
    """What the model of a round is called."""
    return "initial model" if number == 0 else f"model of round {number}"


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"
