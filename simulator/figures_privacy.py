"""Figures of privacy and secrecy: the budget, noise beside signal, what shares cost to send, and what was refused."""

from __future__ import annotations

from collections.abc import Sequence

from simulator import tally
from simulator.figures import Figure, axis, bars, line, rounds_axis
from simulator.results import PrivacyResult, SimulationResults

_COLOURS = ("c2", "c4", "c5", "c1", "c3", "muted")
FLOAT32_BYTES = 4.0


def epsilon(results: SimulationResults, claim: PrivacyResult) -> Figure:
    """What had been spent after each round, beside the budget."""
    rounds = results.rounds
    return {
        "data": [
            line(
                rounds,
                [r.epsilon for r in rounds],
                "spent so far",
                "c1",
                hovertemplate="after round %{x}: epsilon %{y:.4g}<extra></extra>",
            ),
            _level(results, claim.epsilon, f"budget: {claim.epsilon:.4g}", "c5"),
        ],
        "layout": {
            "xaxis": rounds_axis(rounds),
            "yaxis": axis("epsilon", rangemode="tozero"),
            "showlegend": True,
        },
    }


def noise(results: SimulationResults, longest: float | None) -> Figure:
    """The aggregate's length, that of the noise in it, and what the mean of clipped updates can be at most."""
    rounds = results.rounds
    shown = (("noised aggregate", [r.aggregate_norm for r in rounds], "c1"),)
    data = [
        line(rounds, values, name, colour, hovertemplate=f"round %{{x}}: %{{y:.3g}}<extra>{name}</extra>")
        for name, values, colour in (*shown, ("of it the noise, expected", tally.noise_lengths(results), "c2"))
    ]
    if longest is not None:
        data.append(_level(results, longest, f"mean of the updates, at most: {longest:g}", "c3"))
    return {
        "data": data,
        "layout": {
            "xaxis": rounds_axis(rounds),
            "yaxis": axis("L2 norm", rangemode="tozero"),
            "showlegend": True,
        },
    }


def upload(per_coordinate: float) -> Figure:
    """Bytes of a report for each coordinate of the model, beside those of a plain float32."""
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "y": ["as sent, in shares", "as float32, in the clear"],
                "x": [per_coordinate, FLOAT32_BYTES],
                "marker": {"color": "c1", "line": {"width": 0}},
                "hovertemplate": "%{y}: %{x:.3g} bytes<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": axis("bytes per coordinate", rangemode="tozero"),
            "yaxis": axis("", automargin=True),
            "bargap": 0.4,
            "showlegend": False,
        },
    }


def rejected(results: SimulationResults, reasons: Sequence[str]) -> Figure:
    """Reports that were left out of the sums, by reason."""
    rounds = results.rounds
    return {
        "data": [
            bars(rounds, [r.shares_rejected.get(reason, 0) for r in rounds], reason, colour, "reports")
            for reason, colour in zip(reasons, (_COLOURS[i % len(_COLOURS)] for i in range(len(reasons))), strict=True)
        ],
        "layout": {
            "barmode": "stack",
            "xaxis": rounds_axis(rounds),
            "yaxis": axis("reports", rangemode="tozero"),
            "showlegend": True,
        },
    }


def _level(results: SimulationResults, value: float, name: str, colour: str) -> Figure:
    """One dotted line across all rounds."""
    rounds = results.rounds
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [rounds[0].round - 0.5, rounds[-1].round + 0.5],
        "y": [value, value],
        "line": {"color": colour, "width": 2, "dash": "dot"},
        "hoverinfo": "name",
    }
