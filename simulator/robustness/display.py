"""How a study shows its progress: a live line in a terminal, a line for each cell elsewhere, or nothing."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from simulator.progress import human_time
from simulator.robustness.cell import CellResult


def words_of(result: CellResult) -> str:
    """A finished cell in one line."""
    what = f"{result.rule} against {result.attack}, {result.num_byzantine} attackers, seed {result.seed}"
    if result.accuracy is None:
        return f"{what}: {result.status}"
    more = "" if result.status == "completed" else f", {result.status} after {result.rounds} rounds"
    return f"{what}: accuracy {result.accuracy:.3f}{more}"


def is_terminal() -> bool:
    """Whether standard error is one."""
    return Console(stderr=True).is_terminal


class SilentDisplay:
    """``--no-progress``."""

    def begin(self, total: int, done: int) -> None:
        """Nothing."""

    def tell(self, result: CellResult, done: int, total: int, left_s: float | None) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class PlainDisplay:
    """Lines, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def begin(self, total: int, done: int) -> None:
        """How much there is to do."""
        self.say(f"{total} cells, {done} of them done already")

    def tell(self, result: CellResult, done: int, total: int, left_s: float | None) -> None:
        """One line."""
        self.say(f"cell {done}/{total}  {words_of(result)}  ETA {human_time(left_s)}")

    def say(self, line: str) -> None:
        """One line."""
        self._out.write(line + "\n")
        self._out.flush()

    def end(self) -> None:
        """Nothing."""


class LiveDisplay:
    """A bar that redraws itself, and the last cell."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("cells"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("ETA {task.fields[eta]}  {task.description}", markup=False),
            console=Console(stderr=True, highlight=False),
        )

    def begin(self, total: int, done: int) -> None:
        """Begin to draw."""
        self._task = self._progress.add_task("the workers are starting", total=total, completed=done, eta="-")
        self._progress.start()

    def tell(self, result: CellResult, done: int, total: int, left_s: float | None) -> None:
        """Move on."""
        self._progress.update(
            self._task, total=total, completed=done, eta=human_time(left_s), description=words_of(result)
        )

    def say(self, line: str) -> None:
        """One line above the bar."""
        self._progress.console.print(line, markup=False)

    def end(self) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()
