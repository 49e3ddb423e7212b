"""``report.html``: one self-contained page that opens offline, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.atomic import write_atomically
from client_sdk.protocol.profile import DeviceTier
from simulator import figures
from simulator.command import command_of
from simulator.folder import REPORT_FILE
from simulator.progress import human_bytes, human_time
from simulator.report_page import POLICY, SCRIPT, STYLE
from simulator.results import RoundResult, SimulationResults
from simulator.sessions import Session


def write_report(
    folder: Path,
    results: SimulationResults,
    *,
    label_counts: npt.NDArray[np.int64],
    sessions: Sequence[Session],
    counted: Sequence[Sequence[Session]],
    tier_of: Callable[[int], DeviceTier],
) -> Path:
    """Write the report of a run.

    Args:
        folder: Where to.
        results: What ``results.json`` says.
        label_counts: int64[devices, classes], examples of each class on each device.
        sessions: All sessions.
        counted: The sessions that each round counted.
        tier_of: Device -> tier.

    Returns:
        The file.
    """
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - megabytes, and only for the report

    page = _Page()
    page.head(results)
    if results.rounds:
        page.section("Learning")
        page.row(
            page.figure("accuracy", "Accuracy per round", figures.accuracy(results), _accuracy_words(results)),
            page.figure(
                "loss",
                "Loss per round",
                figures.loss(results),
                "Validation loss of each round's new model, and the mean loss that its devices reported.",
            ),
        )
        page.section("Traffic")
        page.row(
            page.figure(
                "bytes-round",
                "Bytes per round",
                figures.bytes_per_round(results),
                "Bodies sent and received by the devices assigned in each round, measured on the wire.",
            ),
            page.figure(
                "bytes-total",
                "Bytes so far",
                figures.bytes_so_far(results),
                f"In all {human_bytes(results.bytes_up)} up and {human_bytes(results.bytes_down)} down.",
            ),
        )
        page.section("Devices")
        page.row(
            page.figure("tiers", "Sessions per device tier", figures.tiers(results.tiers), _tier_words(results), "low")
        )
        timeline, every = figures.timeline(results, sessions, counted, tier_of)
        page.row(page.figure("timeline", "Rounds over time", timeline, _timeline_words(results, every), "high"))
    else:
        page.section("Devices")
    heat, shown = figures.labels(label_counts)
    page.row(
        page.figure(
            "labels",
            "Which classes the devices hold",
            heat,
            f"Each column is one device ({_of(shown, len(label_counts))}): how many examples it has, and what share of "
            f"them each class takes. Partition {results.config.partition}.",
            "high",
        )
    )
    page.tables(results)
    path = folder / REPORT_FILE
    write_atomically(path, page.render(f"pocketfed: {_title(results)}", get_plotlyjs()).encode(), mode=0o644)
    return path


def _title(results: SimulationResults) -> str:
    c = results.config
    return f"{c.dataset}, {c.model}, {c.devices} devices"


def _of(shown: int, total: int) -> str:
    return f"all {total}" if shown == total else f"{shown} of {total}, evenly picked"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _accuracy_words(results: SimulationResults) -> str:
    last = results.rounds[-1]
    words = f"Validation accuracy after round {last.round}: {_percent(last.accuracy)}."
    if results.final_accuracy is not None:
        words += f" Test accuracy of the final model, measured once: {_percent(results.final_accuracy)}."
    return words


def _tier_words(results: SimulationResults) -> str:
    return (
        "; ".join(
            f"{figures.TIER_NAMES[t.tier]}: {t.counted} in a model, {t.late} too late, {t.dropped} dropped out"
            for t in results.tiers
        )
        + "."
    )


def _timeline_words(results: SimulationResults, every: int) -> str:
    if results.virtual_seconds is None:
        return "Each bar is the time in which a round's buffer was open, on the server's own clock."
    words = (
        "Each bar is the time in which a round's buffer was open; each mark is a report at its arrival. Time is "
        "simulated: it follows from the seed and the devices' profiles. "
        f"All rounds together took {human_time(results.virtual_seconds)} (minutes:seconds) of it."
    )
    return words if every == 1 else f"{words} One report in {every} is drawn."


class _Page:
    """Collects HTML and figures."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._figures: dict[str, Any] = {}

    def head(self, results: SimulationResults) -> None:
        """Title, status, headline figures."""
        c = results.config
        self._parts.append(
            f"<h1>{escape(_title(results))}"
            f'<span class="status {results.status}">{results.status}</span></h1>'
            f'<p class="lead">{escape(c.partition)} partition, seed {c.seed}, {c.cohort_size} reports a round, '
            f"{c.epochs} local epochs; {results.parameters:,} parameters; server: {escape(results.server)}</p>"
        )
        accuracy = [r.accuracy for r in results.rounds if r.accuracy is not None]
        cards = [
            ("test accuracy", _percent(results.final_accuracy), "measured once, at the end", "main")
            if results.status == "completed"
            else (
                "validation accuracy",
                _percent(accuracy[-1] if accuracy else None),
                "the run was interrupted",
                "main",
            ),
            ("rounds", f"{len(results.rounds)}", f"of {c.rounds}", ""),
            ("devices", f"{c.devices:,}", f"{results.sessions:,} sessions", ""),
            ("sent by devices", human_bytes(results.bytes_up), "reports", ""),
            ("received by devices", human_bytes(results.bytes_down), "models and programs", ""),
            ("time of the rounds", human_time(results.seconds), f"{results.clients_per_second:.0f} sessions/s", ""),
        ]
        self._parts.append(
            '<dl class="cards">'
            + "".join(
                f'<div class="card {kind}"><dt>{name}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'
                for name, value, note, kind in cards
            )
            + "</dl>"
        )
        if results.status == "interrupted":
            how = (
                "It goes on from where it stopped with <code>pocketfed simulate --resume --out DIR</code>; test "
                "accuracy is measured when it is complete."
                if results.repeatable
                else "The server goes on without it."
            )
            self._parts.append(f'<p class="box">This run was interrupted. {how}</p>')

    def section(self, title: str) -> None:
        """A heading."""
        self._parts.append(f"<h2>{escape(title)}</h2>")

    def figure(self, name: str, title: str, figure: figures.Figure, words: str, height: str = "") -> str:
        """A plot with its title and the words that say the same."""
        self._figures[name] = figure
        return (
            f'<figure aria-labelledby="{name}-title"><h3 id="{name}-title">{escape(title)}</h3>'
            f'<div class="plot {height}" id="{name}" role="img" aria-label="{escape(title)}. {escape(words)}"></div>'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )

    def row(self, *figures_: str) -> None:
        """Figures beside each other, where there is room."""
        self._parts.append(f'<div class="row">{"".join(figures_)}</div>')

    def tables(self, results: SimulationResults) -> None:
        """Rounds, configuration, versions, and how to repeat it."""
        if results.rounds:
            self.section("Rounds")
            self._parts.append(
                '<details class="box"><summary>All rounds as a table</summary><div class="scroll">'
                f"{_rounds_table(results.rounds)}</div></details>"
            )
        self.section("Configuration")
        config = {k.replace("_", " "): v for k, v in results.config.model_dump(exclude={"format", "server"}).items()}
        config["cohort"] = results.config.cohort_size
        run = {
            "server": results.server,
            "ExecuTorch runtime": results.runtime,
            "worker threads": results.workers,
            "data set": f"{results.dataset.train:,} train, {results.dataset.validation:,} validation, "
            f"{results.dataset.test:,} test",
            "data set SHA-256": results.dataset.sha256,
            "model SHA-256": results.model_sha256 or "-",
            **results.versions,
        }
        self._parts.append(
            f'<div class="row"><div class="box">{_pairs(config)}</div><div class="box">{_pairs(run)}</div></div>'
        )
        self.section("Repeat it")
        words = (
            "The same command gives the same model, bit for bit, on the same machine with the same versions."
            if results.repeatable
            else "This run used a foreign server and its clock: repeating it gives another model."
        )
        self._parts.append(f'<div class="box">{words}<pre>{escape(command_of(results.config))}</pre></div>')

    def render(self, title: str, plotly_js: str) -> str:
        """The whole page."""
        # "</" inside a script element would end it, whatever the quotes around it.
        data = json.dumps(self._figures, separators=(",", ":")).replace("</", "<\\/")
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
            + "\n".join(self._parts)
            + f'\n</main>\n<script type="application/json" id="figures">{data}</script>\n'
            f"<script>{plotly_js}</script>\n<script>{SCRIPT}</script>\n</body></html>\n"
        )


def _pairs(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th scope='row'>{escape(str(k))}</th><td>{_cell(v)}</td></tr>" for k, v in values.items())
    return f"<table>{rows}</table>"


def _cell(value: Any) -> str:  # noqa: ANN401 - configuration values
    if value is None:
        return "default"
    text = escape(f"{value:g}" if isinstance(value, float) else str(value))
    return f"<code>{text}</code>" if len(text) == 64 else text


def _rounds_table(rounds: Sequence[RoundResult]) -> str:
    heads = (
        "round",
        "accuracy",
        "loss",
        "train loss",
        "reports",
        "discarded",
        "up",
        "down",
        "seconds",
        "closed at (s)",
    )
    head = "".join(f'<th scope="col" class="n">{h}</th>' for h in heads)

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{cell}</td>'
            for cell in (
                r.round,
                _percent(r.accuracy),
                number(r.loss, 4),
                number(r.train_loss, 4),
                r.reports,
                r.discarded,
                human_bytes(r.bytes_up),
                human_bytes(r.bytes_down),
                number(r.seconds, 2),
                number(r.closed_at_s, 1),
            )
        )
        + "</tr>"
        for r in rounds
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
