"""A study's outcome as data and as words: over the seeds of each rule, attack and fraction."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from simulator.results import versions
from simulator.robustness.cell import CellResult
from simulator.robustness.config import NONE, Axes, StudySettings

WORST: Final = "worst attack"
_COLUMNS: Final = (
    "rule", "attack", "fraction", "num_byzantine", "seed", "status", "rounds", "accuracy", "trigger_success",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds.

    Attributes:
        mean: Over all seeds.
        low: Smallest.
        high: Largest.
        count: Seeds.
    """

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are no values."""
        return cls(fmean(values), min(values), max(values), len(values)) if values else None

    def percent(self) -> str:
        """The mean with one decimal, without its sign."""
        return f"{100 * self.mean:.1f}"

    def words(self) -> str:
        """Mean and range."""
        if self.count == 1:
            return f"{100 * self.mean:.1f} %"
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f} over {self.count} seeds)"


@dataclass(frozen=True)
class Entry:
    """One rule under one attack by one fraction.

    Attributes:
        accuracy: None where the rule refuses so many attackers, or no cell is done yet.
        trigger_success: None where the attack is no backdoor.
        note: Why there is no figure, or what happened besides.
    """

    accuracy: Spread | None
    trigger_success: Spread | None
    note: str = ""


Key = tuple[str, str, float]


@dataclass(frozen=True)
class Summary:
    """All entries of a study's axes.

    Attributes:
        settings: What all cells share.
        axes: What was varied.
        cells: The finished cells on these axes.
        entries: (rule, attack, fraction) -> entry, of all that have a finished cell.
    """

    settings: StudySettings
    axes: Axes
    cells: tuple[CellResult, ...]
    entries: Mapping[Key, Entry]

    @classmethod
    def of(cls, settings: StudySettings, axes: Axes, done: Mapping[tuple[str, str, float, int], CellResult]) -> Summary:
        """Collect what is done of the axes' cells."""
        cells = tuple(done[cell.key] for cell in axes.cells() if cell.key in done)
        groups: dict[Key, list[CellResult]] = {}
        for result in cells:
            groups.setdefault((result.rule, result.attack, result.fraction), []).append(result)
        return cls(settings, axes, cells, {key: _entry(group) for key, group in groups.items()})

    @property
    def rules(self) -> list[str]:
        """Names of the rules."""
        return [str(rule) for rule in self.axes.rules]

    def attacks(self, fraction: float) -> list[str]:
        """Names of the attacks of a fraction."""
        names = [str(attack or NONE) for attack in self.axes.attacks]
        return names if fraction > 0 else [name for name in names if name == NONE]

    def backdoors(self) -> list[str]:
        """Attacks for which a trigger is scored, ``none`` among them if it was asked for."""
        scored = {attack for (_, attack, _), entry in self.entries.items() if entry.trigger_success is not None}
        names = [name for name in self.attacks(1.0) if name in scored]
        return names if names != [NONE] else []

    def worst(self, rule: str, fraction: float) -> tuple[str, Spread] | None:
        """The attack that leaves this rule the lowest mean accuracy, and that accuracy."""
        found = [
            (name, entry.accuracy)
            for name in self.attacks(fraction)
            if name != NONE
            and (entry := self.entries.get((rule, name, fraction))) is not None
            and entry.accuracy is not None
        ]
        return min(found, key=lambda pair: pair[1].mean, default=None)


def _entry(group: Sequence[CellResult]) -> Entry:
    notes = {f"{r.status}: {r.detail}" for r in group if r.status != "completed"}
    return Entry(
        Spread.of([r.accuracy for r in group if r.accuracy is not None]),
        Spread.of([r.trigger_success for r in group if r.trigger_success is not None]),
        "; ".join(sorted(notes)),
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """Everything: settings, axes, entries, cells, versions. Plain JSON values."""
    axes = summary.axes
    return {
        "format": 1,
        "settings": summary.settings.model_dump(),
        "axes": {
            "rules": summary.rules,
            "attacks": summary.attacks(1.0),
            "fractions": list(axes.fractions),
            "seeds": list(axes.seeds),
        },
        "complete": len(summary.cells) == sum(1 for _ in axes.cells()),
        "entries": [
            {
                "rule": rule,
                "attack": attack,
                "fraction": fraction,
                "accuracy": entry.accuracy and vars(entry.accuracy),
                "trigger_success": entry.trigger_success and vars(entry.trigger_success),
                "note": entry.note,
            }
            for (rule, attack, fraction), entry in summary.entries.items()
        ],
        "cells": [cell.model_dump() for cell in summary.cells],
        "versions": versions(),
    }


def as_csv(cells: Iterable[CellResult]) -> str:
    """One line a cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cell.model_dump() for cell in cells)
    return out.getvalue()


def command_of(settings: StudySettings, axes: Axes) -> str:
    """The command that repeats a study."""
    values = settings.model_dump()
    defaults = StudySettings.parse({"dataset": settings.dataset}).model_dump()
    flags = {"learning_rate": "--lr"}
    given = [f"{flags.get(k, '--' + k.replace('_', '-'))} {v}" for k, v in values.items() if v != defaults[k]]
    lists = [
        f"--rules {','.join(map(str, axes.rules))}",
        f"--attacks {','.join(str(a or NONE) for a in axes.attacks)}",
        f"--fractions {','.join(f'{f:g}' for f in axes.fractions)}",
        f"--seeds {','.join(map(str, axes.seeds))}",
    ]
    return " ".join(["pocketfed robustness", f"--dataset {settings.dataset}", *given, *lists, "--out DIR"])
