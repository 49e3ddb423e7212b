"""What a study leaves in its folder: data, table, pictures, and a page that opens offline."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Final

from client_sdk.atomic import write_atomically
from simulator.report_page import STYLE
from simulator.robustness.config import NONE
from simulator.robustness.folder import (
    CSV_FILE,
    PICTURES,
    REPORT_FILE,
    RESULTS_FILE,
    SUMMARY_FILE,
)
from simulator.robustness.heatmap import Panel, Scale, Square, heatmap
from simulator.robustness.summary import WORST, Entry, Spread, Summary, as_csv, as_json, command_of

ACCURACY_PICTURE: Final = "robustness.svg"
BACKDOOR_PICTURE: Final = "robustness-backdoor.svg"
# Both data sets have ten classes.
_GUESSING: Final = 0.1
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def write_study(folder: Path, summary: Summary) -> None:
    """Write everything that is made of the finished cells."""
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    accuracy = accuracy_map(summary)
    backdoor = backdoor_map(summary)
    files = {
        folder / RESULTS_FILE: json.dumps(as_json(summary), indent=1) + "\n",
        folder / CSV_FILE: as_csv(summary.cells),
        folder / SUMMARY_FILE: as_markdown(summary),
        folder / REPORT_FILE: page(summary, accuracy, backdoor),
        pictures / ACCURACY_PICTURE: accuracy,
    }
    if backdoor is None:
        (pictures / BACKDOOR_PICTURE).unlink(missing_ok=True)
    else:
        files[pictures / BACKDOOR_PICTURE] = backdoor
    for path, text in files.items():
        write_atomically(path, text.encode(), mode=0o644)


# --- pictures ---------------------------------------------------------------------------------------------------


def accuracy_map(summary: Summary) -> str:
    """Rules across, attacks down, one panel for each fraction; the worst attack on each rule below."""
    panels = []
    for fraction in summary.axes.fractions:
        rows = [
            (name, [_accuracy_square(summary, rule, name, fraction) for rule in summary.rules])
            for name in summary.attacks(fraction)
        ]
        worst = [_worst_square(summary, rule, fraction) for rule in summary.rules]
        set_apart = int(any(square.value is not None for square in worst))
        if set_apart:
            rows.append((WORST, worst))
        panels.append(Panel(_panel_title(summary, fraction), rows, set_apart))
    honest = [e.accuracy.mean for (_, name, _), e in summary.entries.items() if name == NONE and e.accuracy]
    best = max(honest, default=1.0)
    return heatmap(
        "Test accuracy by rule and attack",
        _setting(summary),
        summary.rules,
        panels,
        Scale(_GUESSING, max(best, 2 * _GUESSING), "test accuracy, from guessing to the best without attack"),
    )


def backdoor_map(summary: Summary) -> str | None:
    """How often the trigger works; None where nothing planted one."""
    names = summary.backdoors()
    fractions = [f for f in summary.axes.fractions if f > 0]
    if not names or not fractions:
        return None
    panels = [
        Panel(
            _panel_title(summary, fraction),
            [(name, [_trigger_square(summary, rule, name, fraction) for rule in summary.rules]) for name in names],
        )
        for fraction in fractions
    ]
    return heatmap(
        "Success of the backdoor by rule",
        "Test images of other classes that the trigger turns into the attackers' target",
        summary.rules,
        panels,
        Scale(1.0, 0.0, "success of the trigger; low is good"),
    )


def _panel_title(summary: Summary, fraction: float) -> str:
    if fraction == 0:
        return "no attackers"
    attackers = summary.settings.attackers(fraction)
    return f"{attackers} of {summary.settings.devices} attack"


def _accuracy_square(summary: Summary, rule: str, attack: str, fraction: float) -> Square:
    return _square(summary.entries.get((rule, attack, fraction)), f"{rule} against {attack}", trigger=False)


def _trigger_square(summary: Summary, rule: str, attack: str, fraction: float) -> Square:
    return _square(summary.entries.get((rule, attack, fraction)), f"{rule} against {attack}", trigger=True)


def _square(entry: Entry | None, what: str, *, trigger: bool) -> Square:
    if entry is None:
        return Square(None, "", f"{what}: not run yet")
    spread: Spread | None = entry.trigger_success if trigger else entry.accuracy
    note = f" ({entry.note})" if entry.note else ""
    if spread is None:
        return Square(None, "n/a", f"{what}{note}")
    return Square(spread.mean, spread.percent(), f"{what}: {spread.words()}{note}")


def _worst_square(summary: Summary, rule: str, fraction: float) -> Square:
    worst = summary.worst(rule, fraction)
    if worst is None:
        return Square(None, "n/a", f"{rule}: no figure")
    name, spread = worst
    return Square(spread.mean, spread.percent(), f"{rule}, worst attack {name}: {spread.words()}")


def _setting(summary: Summary) -> str:
    s = summary.settings
    seeds = len(summary.axes.seeds)
    return (
        f"{s.dataset}, {s.model}, {s.devices} devices, {s.partition}, all report in each of {s.rounds} rounds, mean of "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )


# --- words ------------------------------------------------------------------------------------------------------


def as_markdown(summary: Summary) -> str:
    """The tables as a page of documentation."""
    lines = [
        "# Robustness table",
        "",
        "Written by the study itself; what it means is in [attacks](attacks.md#what-stands-what).",
        "",
        f"![Test accuracy by rule and attack]({PICTURES}/{ACCURACY_PICTURE})",
        "",
    ]
    if summary.backdoors():
        lines += [f"![Success of the backdoor by rule]({PICTURES}/{BACKDOOR_PICTURE})", ""]
    lines += [
        "```sh",
        *_wrapped(command_of(summary.settings, summary.axes)),
        "```",
        "",
        f"{_setting(summary)}. Figures are test accuracy in percent.",
        "`n/a`: the rule does not stand so many attackers, and says so before the first round.",
        "",
    ]
    for fraction in summary.axes.fractions:
        lines += [f"## {_panel_title(summary, fraction).capitalize()}", ""]
        lines += _table(
            summary,
            [
                (f"`{name}`", [_accuracy_square(summary, rule, name, fraction).text for rule in summary.rules])
                for name in summary.attacks(fraction)
            ]
            + ([_worst_row(summary, fraction)] if fraction > 0 else []),
        )
    if names := summary.backdoors():
        lines += ["## Success of the trigger (%)", ""]
        for fraction in [f for f in summary.axes.fractions if f > 0]:
            lines += [f"{_panel_title(summary, fraction).capitalize()}:", ""]
            lines += _table(
                summary,
                [
                    (f"`{name}`", [_trigger_square(summary, rule, name, fraction).text for rule in summary.rules])
                    for name in names
                ],
            )
    return "\n".join(lines).rstrip() + "\n"


def _worst_row(summary: Summary, fraction: float) -> tuple[str, list[str]]:
    cells = []
    for rule in summary.rules:
        worst = summary.worst(rule, fraction)
        cells.append("n/a" if worst is None else f"{worst[1].percent()} (`{worst[0]}`)")
    return WORST, cells


def _table(summary: Summary, rows: list[tuple[str, list[str]]]) -> list[str]:
    return [
        f"| attack | {' | '.join(f'`{rule}`' for rule in summary.rules)} |",
        "|---" * (len(summary.rules) + 1) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
    ]


def _wrapped(command: str) -> list[str]:
    """A command over several lines, broken before its flags."""
    first, *flags = command.split(" --")
    return [f"{first} \\", *(f"    --{flag} \\" for flag in flags[:-1]), f"    --{flags[-1]}"]


def page(summary: Summary, accuracy: str, backdoor: str | None) -> str:
    """The report: the pictures, which say everything when a pointer rests on them, and how to repeat it."""
    complete = len(summary.cells), sum(1 for _ in summary.axes.cells())
    state = "completed" if complete[0] == complete[1] else "interrupted"
    figures = [accuracy] if backdoor is None else [accuracy, backdoor]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pocketfed: robustness, {escape(summary.settings.dataset)}</title>"
        f"<style>{STYLE}\nfigure svg {{ max-width: 100%; height: auto; }}</style></head>\n<body><main>\n"
        f'<h1>Robustness study<span class="status {state}">{complete[0]} of {complete[1]} cells</span></h1>'
        f'<p class="lead">{escape(_setting(summary))}. Rest the pointer on a square for its range over the seeds.</p>'
        + "".join(f'<figure class="scroll">{figure}</figure>' for figure in figures)
        + f'<h2>Repeat it</h2><div class="box"><pre>{escape(command_of(summary.settings, summary.axes))}</pre></div>'
        "\n</main></body></html>\n"
    )
