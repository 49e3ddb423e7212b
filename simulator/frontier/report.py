"""The frontier as a page and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simulator.frontier.config import DELTA, MODES, NONE, FrontierSettings, Mode
from simulator.frontier.run import Outcome
from simulator.robustness.heatmap import Panel, Scale, Square, heatmap


@dataclass(frozen=True)
class Frontier:
    """A finished study.

    Attributes:
        settings: What was compared.
        outcomes: By ``Cell.key``.
    """

    settings: FrontierSettings
    outcomes: Mapping[str, Outcome]

    def of(self, mode: Mode, epsilon: float | None, fraction: float) -> dict[str, float]:
        """Test accuracy by attack."""
        return {
            cell.attack: self.outcomes[cell.key].test or 0.0
            for cell in self.settings.cells()
            if (cell.mode, cell.epsilon, cell.fraction) == (mode, epsilon, fraction)
        }

    def worst(self, mode: Mode, epsilon: float | None, fraction: float) -> tuple[str, float]:
        """The attack that leaves least, and what it leaves."""
        found = self.of(mode, epsilon, fraction)
        attack = min(found, key=found.__getitem__)
        return attack, found[attack]

    @property
    def baseline(self) -> float:
        """Test accuracy of the mean without noise and without attackers."""
        return self.worst(MODES[0], None, 0.0)[1]


def as_markdown(frontier: Frontier) -> str:
    """The page of docs/: tables, and how to make them again."""
    s = frontier.settings
    lines = [
        "# Frontier summary",
        "",
        "Written by `make frontier`; do not edit. What it means: [frontier.md](frontier.md).",
        "",
        _study(frontier),
        "",
        "## Under the worst attack tried",
        "",
        f"Attacks: {', '.join(f'`{a}`' for a in s.attacks)}. **Bold**: within 5 points of the mean without either.",
        "",
        "| mode | epsilon | " + " | ".join(_attackers(f) for f in s.fractions) + " |",
        "|---|---|" + "---|" * len(s.fractions),
    ]
    for mode in MODES:
        for epsilon in s.epsilons:
            cells = [_bold(frontier, frontier.worst(mode, epsilon, f)[1]) for f in s.fractions]
            lines.append(f"| {mode.name} | {_budget(epsilon)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## By attack",
        "",
        "| mode | epsilon | attack | " + " | ".join(_attackers(f) for f in s.fractions) + " |",
    ]
    lines.append("|---|---|---|" + "---|" * len(s.fractions))
    for mode in MODES:
        for epsilon in s.epsilons:
            for attack in s.attacks:
                found = [frontier.of(mode, epsilon, f) for f in s.fractions]
                cells = [f"{100 * by.get(attack, by.get(NONE, 0.0)):.1f}" for by in found]
                lines.append(f"| {mode.name} | {_budget(epsilon)} | `{attack}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Modes",
        "",
        "| mode | clip norm | server learning rate | buckets | bad buckets it stands |",
        "|---|---|---|---|---|",
    ]
    for mode in MODES:
        buckets = f"{mode.buckets} | {mode.num_byzantine}" if mode.buckets else "- | -"
        lines.append(f"| {mode.name} | {mode.clip_norm:g} | {mode.learning_rate:g} | {buckets} |")
    return "\n".join([*lines, ""])


def as_picture(frontier: Frontier) -> str:
    """A heat-map: accuracy under the worst attack, by budget and fraction of attackers."""
    s = frontier.settings
    panels = []
    for mode in MODES:
        rows = []
        for epsilon in s.epsilons:
            squares = []
            for fraction in s.fractions:
                attack, value = frontier.worst(mode, epsilon, fraction)
                words = f"{mode.name}, {_budget(epsilon)}, {_attackers(fraction)}, worst attack {attack}: {value:.1%}"
                squares.append(Square(value, f"{100 * value:.1f}", words))
            name = "no noise" if epsilon is None else f"epsilon {epsilon:g}"
            rows.append((name, squares))
        panels.append(Panel(mode.name, rows))
    lead = f"{s.dataset}, {s.devices} devices, {s.rounds} rounds; test accuracy under the worst attack tried"
    scale = Scale(frontier.baseline - 0.3, frontier.baseline, "test accuracy, percent")
    columns = [f"{fraction:.0%} attack" for fraction in s.fractions]
    return heatmap("Privacy against attackers", lead, columns, panels, scale)


def _study(frontier: Frontier) -> str:
    s = frontier.settings
    return (
        f"{s.dataset}, softmax regression, {s.devices} devices, all of which take part in each of {s.rounds} rounds; "
        f"epsilon at client level, zero-out adjacency, delta {DELTA:g}, over the whole run. Test accuracy in percent; "
        f"without noise and attackers the mean reaches {100 * frontier.baseline:.1f}."
    )


def _attackers(fraction: float) -> str:
    return f"{fraction:.0%} attack" if fraction else "nobody attacks"


def _budget(epsilon: float | None) -> str:
    return "no noise" if epsilon is None else f"{epsilon:g}"


def _bold(frontier: Frontier, value: float) -> str:
    text = f"{100 * value:.1f}"
    return f"**{text}**" if value >= frontier.baseline - 0.05 else text
