"""``report.html``: one self-contained page that opens offline, in light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from client_sdk.atomic import write_atomically
from client_sdk.protocol.profile import DeviceTier
from simulator import figures, report_aggregation, report_days, report_personalization, report_privacy, tally
from simulator.command import command_of
from simulator.config import SimulationConfig, flat
from simulator.folder import REPORT_FILE
from simulator.progress import human_bytes, human_time
from simulator.report_page import Page, columns, pairs
from simulator.results import SimulationResults
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

    page = Page()
    _head(page, results)
    report_aggregation.alerts(page, results)
    times = Counter(s.device for group in counted for s in group)
    if results.rounds:
        page.section("Learning")
        page.row(
            page.figure("accuracy", "Accuracy per round", figures.accuracy(results), _accuracy_words(results)),
            page.figure(
                "loss",
                "Loss per round",
                figures.loss(results),
                _loss_words(results),
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
    report_personalization.section(page, results)
    report_aggregation.section(page, results, [times[d] for d in range(len(label_counts))], tier_of)
    report_privacy.section(page, results)
    page.section("Devices")
    if results.rounds:
        page.row(
            page.figure("tiers", "Sessions per device tier", figures.tiers(results.tiers), _tier_words(results), "low")
        )
        timeline, every = figures.timeline(results, sessions, counted, tier_of)
        page.row(page.figure("timeline", "Rounds over time", timeline, _timeline_words(results, every), "high"))
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
    report_days.section(page, results)
    _tables(page, results)
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


def _loss_words(results: SimulationResults) -> str:
    words = "Validation loss of each round's new model"
    if any(r.train_loss is not None for r in results.rounds):
        return f"{words}, and the mean loss that its devices reported."
    return f"{words}. Devices kept their own losses to themselves."


def _tier_words(results: SimulationResults) -> str:
    return (
        "; ".join(
            f"{figures.TIER_NAMES[t.tier]}: {t.counted} in a model, {t.late} too late, {t.dropped} dropped out"
            + (f", {t.refused} refused or failed" if t.refused else "")
            for t in results.tiers
        )
        + "."
    )


def _timeline_words(results: SimulationResults, every: int) -> str:
    if results.virtual_seconds is None:
        return "Each bar is the time in which a round's buffer was open, on the server's own clock."
    unit = "minutes:seconds" if results.virtual_seconds < 3599.5 else "hours:minutes:seconds"
    words = (
        "Each bar is the time in which a round's buffer was open; each mark is a report at its arrival. Time is "
        "simulated: it follows from the seed and the devices' profiles. "
        f"All rounds together took {human_time(results.virtual_seconds)} ({unit}) of it."
    )
    return words if every == 1 else f"{words} One report in {every} is drawn."


def _head(page: Page, results: SimulationResults) -> None:
    """Title, status, headline figures."""
    c = results.config
    status = "halted" if results.halted is not None else results.status
    page.add(
        f'<h1>{escape(_title(results))}<span class="status {status}">{status}</span></h1>'
        f'<p class="lead">{escape(c.partition)} partition, seed {c.seed}, {c.cohort_size} reports a round, '
        f"{_work(c)}; {results.parameters:,} parameters; server: {escape(results.server)}</p>"
    )
    accuracy = [r.accuracy for r in results.rounds if r.accuracy is not None]
    cards = [
        ("test accuracy", _percent(results.final_accuracy), "measured once, at the end", "main")
        if results.status == "completed"
        else ("validation accuracy", _percent(accuracy[-1] if accuracy else None), "the run was interrupted", "main"),
        ("rounds", f"{len(results.rounds)}", f"of {c.rounds}", ""),
        ("devices", f"{c.devices:,}", f"{results.sessions:,} sessions", ""),
        ("sent by devices", human_bytes(results.bytes_up), "reports", ""),
        ("received by devices", human_bytes(results.bytes_down), "models and programs", ""),
        ("time of the rounds", human_time(results.seconds), f"{results.clients_per_second:.0f} sessions/s", ""),
    ]
    cards += report_days.cards(results) + report_privacy.cards(results)
    saved = tally.saving(results)
    if saved is not None:
        note = f"{human_bytes(saved.sent)} instead of {human_bytes(saved.dense)}"
        cards.insert(4, ("saved by compression", f"{100 * saved.share:.1f} %", note, ""))
    cards[1:1] = report_personalization.cards(results)
    page.cards(cards)
    if results.status == "interrupted":
        words = (
            "It goes on from where it stopped with <code>pocketfed simulate --resume --out DIR</code>; test accuracy "
            "is measured when it is complete."
            if results.repeatable
            else "The server goes on without it."
        )
        page.alert("This run was interrupted", words)


def _work(config: SimulationConfig) -> str:
    meta = config.plan.meta
    if meta is None:
        return f"{config.epochs} local epochs"
    return f"{config.algorithm} through {meta.inner_steps} steps of adaptation"


def _tables(page: Page, results: SimulationResults) -> None:
    """Rounds, configuration, versions, and how to repeat it."""
    if results.rounds:
        page.section("Rounds")
        page.add(
            '<details class="box"><summary>All rounds as a table</summary><div class="scroll">'
            f"{_rounds_table(results)}</div></details>"
        )
    page.section("Configuration")
    run = {
        "server": results.server,
        "ran the model": results.runtime,
        "worker threads": results.workers,
        "data set": f"{results.dataset.train:,} train, {results.dataset.validation:,} validation, "
        f"{results.dataset.test:,} test",
        "data set SHA-256": results.dataset.sha256,
        "model SHA-256": results.model_sha256 or "-",
        **results.versions,
    }
    page.boxes(pairs(_settings(results.config)), pairs(run))
    page.section("Repeat it")
    words = (
        "The same command gives the same model, bit for bit, on the same machine with the same versions."
        if results.repeatable
        else "Repeating this run gives another model: it used a foreign server and its clock."
        if results.config.server is not None
        else "Repeating this run gives another model: nobody can repeat the noise of its privacy."
    )
    page.add(f'<div class="box">{words}<pre>{escape(command_of(results.config))}</pre></div>')


def _settings(config: SimulationConfig) -> dict[str, object]:
    """What was set, and what is always worth telling; of nested sections only what is not the default."""
    defaults = flat(type(config)().model_dump(mode="json"))
    found: dict[str, object] = {}
    for path, value in flat(config.model_dump(mode="json", exclude={"format", "server", "profiles"})).items():
        if value in (None, []) or (len(path) > 1 and value == defaults.get(path)):
            continue
        # A name that says its section itself: meta_learning_rate.
        name = path[1:] if len(path) > 1 and path[1].startswith(f"{path[0]}_") else path
        found[" ".join(name).replace("_", " ")] = value
    if config.plan.meta is not None:
        # Its steps are counted.
        del found["epochs"]
    found["cohort"] = config.cohort_size
    found["profiles"] = config.fleet_profiles.title or "your own"
    return found


def _rounds_table(results: SimulationResults) -> str:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rounds = results.rounds
    cells: dict[str, list[str]] = {
        "round": [str(r.round) for r in rounds],
        "accuracy": [_percent(r.accuracy) for r in rounds],
        "loss": [number(r.loss, 4) for r in rounds],
        "train loss": [number(r.train_loss, 4) for r in rounds],
        "reports": [str(r.reports) for r in rounds],
        "discarded": [str(r.discarded) for r in rounds],
        "up": [human_bytes(r.bytes_up) for r in rounds],
        "down": [human_bytes(r.bytes_down) for r in rounds],
        "seconds": [number(r.seconds, 2) for r in rounds],
        "closed at (s)": [number(r.closed_at_s, 1) for r in rounds],
        **report_aggregation.extra_columns(results),
        **report_privacy.extra_columns(results),
    }
    return columns(list(cells), zip(*cells.values(), strict=True))
