"""How a run shows itself: a live line in a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from simulator.monitor import Display, Standing
from simulator.view import CommittedRound


def human_bytes(count: float) -> str:
    """A size in B, kB, MB, ... with three significant digits.

    >>> human_bytes(203_560_000)
    '204 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what would be shown as 1000 belongs to the next unit
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_time(seconds: float | None) -> str:
    """A duration as m:ss or h:mm:ss; a dash while unknown.

    >>> human_time(75.2)
    '1:15'
    """
    if seconds is None:
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def _figures(scored: CommittedRound | None, standing: Standing) -> str:
    accuracy = None if scored is None else scored.validation_accuracy
    loss = None if scored is None else scored.validation_loss
    saved = "" if standing.saved is None else f" ({100 * standing.saved:.0f} % saved)"
    return (
        f"validation accuracy {'-' if accuracy is None else f'{accuracy:.3f}'}  "
        f"loss {'-' if loss is None else f'{loss:.3f}'}  up {human_bytes(standing.bytes_up)}{saved}  "
        f"down {human_bytes(standing.bytes_down)}  {standing.clients_per_s:.0f} clients/s"
    )


def _notes(committed: CommittedRound) -> list[str]:
    """What became of the round's reports, where it is more than that they counted."""
    measured, notes = committed.measurements, []
    if committed.discarded:
        notes.append(f"+{committed.discarded} not needed")
    if measured.excluded:
        notes.append(f"{len(measured.excluded)} left out")
    if measured.clipped:
        notes.append(f"{measured.clipped} clipped")
    if any(measured.staleness):
        notes.append(f"at most {max(measured.staleness)} versions old")
    if measured.unchanged is not None:
        notes.append(f"model unchanged: {measured.unchanged}")
    return notes


class SilentDisplay:
    """``--no-progress``."""

    def show(self, standing: Standing) -> None:
        """Nothing."""

    def round_done(self, committed: CommittedRound, standing: Standing) -> None:
        """Nothing."""


class PlainDisplay:
    """One line a round, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def show(self, standing: Standing) -> None:
        """Nothing between rounds."""

    def round_done(self, committed: CommittedRound, standing: Standing) -> None:
        """One line."""
        notes = _notes(committed)
        reports = f"{committed.reports} ({', '.join(notes)})" if notes else f"{committed.reports}"
        self._out.write(
            f"round {committed.model_version}/{standing.of_rounds}  reports {reports}  "
            f"{_figures(committed, standing)}  ETA {human_time(standing.eta_s)}\n"
        )
        self._out.flush()


class LiveDisplay:
    """Two or three lines that redraw themselves, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._standing: Standing | None = None
        self._live = Live(self, console=console, refresh_per_second=8)

    def __rich__(self) -> RenderableType:
        """What to draw now; asked a few times a second, however often something happens."""
        standing = self._standing
        if standing is None:
            return Text("")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(f"round {standing.rounds}/{standing.of_rounds}"),
            ProgressBar(total=standing.of_rounds, completed=standing.rounds, width=24),
            Text(f"reports {standing.reports}/{standing.cohort}"),
            ProgressBar(total=standing.cohort, completed=standing.reports, width=12),
            Text(f"ETA {human_time(standing.eta_s)}"),
        )
        notes = [] if standing.latest is None else _notes(standing.latest)
        latest = [Text(f"latest round: {', '.join(notes)}")] if notes else []
        return Group(grid, Text(_figures(standing.latest, standing)), *latest)

    def show(self, standing: Standing) -> None:
        """Draw this from now on."""
        self._standing = standing

    def round_done(self, committed: CommittedRound, standing: Standing) -> None:  # noqa: ARG002 - part of standing
        """Draw this from now on."""
        self._standing = standing

    def __enter__(self) -> LiveDisplay:
        """Begin to draw."""
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the screen."""
        self._live.stop()


def plain_display() -> Display:
    """Plain lines on standard error."""
    return PlainDisplay(sys.stderr)
