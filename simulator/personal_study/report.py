"""The study as a page and pictures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from simulator.personal_study.chart import Line, chart
from simulator.personal_study.outcome import LATER, Outcome
from simulator.personal_study.settings import (
    FEDAVG,
    PROTECTED,
    PROTECTIONS,
    SPEAKERS,
    WORLDS,
    StudySettings,
    methods_of,
)
from simulator.personal_study.training import INNER_STEPS

TARGETS: Final = (0.7, 0.8, 0.9)
"""Accuracies that newcomers want, in the part on steps."""


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        settings: What was compared.
        outcomes: By ``Cell.key``.
    """

    settings: StudySettings
    outcomes: Mapping[str, Outcome]

    def of(self, part: str, *names: str) -> list[Outcome]:
        """Of all seeds."""
        return [self.outcomes["; ".join([part, *names, str(seed)])] for seed in self.settings.seeds]


def as_markdown(study: Study) -> str:
    """The page of docs/: tables, and how to make them again."""
    s = study.settings
    lead = (
        "Written by `make personalization`; do not edit. Accuracies in percent on the test split, means over devices, "
        f"then over {len(s.seeds)} seeds, with the range over the seeds in brackets. *Global* is the model of all as "
        f"it is, *personal* is what {INNER_STEPS} steps of adaptation make of it on a device; every method trains with "
        f"{INNER_STEPS} steps a device and round. Rates were chosen with one seed, by few trials, on the validation "
        "split for the languages and for MAML on fashion-mnist's labels, else on test examples: no method had a "
        "search, and small differences mean nothing. The global model of FedPer has an output layer that nobody "
        "trained: its personal models are what counts."
    )
    lines = [
        "# Figures of personalisation",
        "",
        lead,
        "",
        *_gains(study),
        *_newcomers(study),
        *_kept(study),
        *_steps(study),
        *_languages(study),
        *_protections(study),
    ]
    return "\n".join(lines)


def as_pictures(study: Study) -> dict[str, str]:
    """Name of a file -> SVG."""
    long = study.of("steps", WORLDS[2].name, "maml")
    by_round = [
        Line(f"after {number} rounds", _points([o.by_round[number] for o in long]))
        for number in study.settings.looked_at()
    ]
    pictures = {
        "personalization-steps.svg": chart(
            "New devices adapt faster the longer MAML trains", "steps of adaptation", by_round
        )
    }
    for name, part, world in (
        ("personalization.svg", "gain", WORLDS[2]),
        ("personalization-languages.svg", "languages", SPEAKERS),
    ):
        lines = [
            Line(m.name, _points([o.curve for o in study.of(part, world.name, m.name)])) for m in methods_of(world)
        ]
        pictures[name] = chart(f"Adaptation: {world.name}", "steps of adaptation", lines)
    return pictures


def _points(curves: list[tuple[float, ...]]) -> list[tuple[float, float]]:
    return [(step, statistics.mean(values)) for step, values in enumerate(zip(*curves, strict=True))]


def _gains(study: Study) -> Iterator[str]:
    s = study.settings
    yield from _heading(
        "Global and personal",
        f"100 devices, of which 20 train in each of {s.rounds} rounds. The last but one column is against the global "
        "model of FedAvg, which was not trained to be adapted: what a fleet would have without personalisation. Worst "
        "decile: the tenth of the devices that each model serves worst; losing: devices that FedAvg's or their "
        "method's own global model served better than their personal one.",
    )
    yield "| fleet | method | global | personal | gain over FedAvg's global | worst decile: global, personal | losing |"
    yield "|---|---|---|---|---|---|---|"
    for world in WORLDS:
        plain = study.of("gain", world.name, FEDAVG)
        for method in methods_of(world):
            found = study.of("gain", world.name, method.name)
            gains = [o.curve[INNER_STEPS] - p.of_all for o, p in zip(found, plain, strict=True)]
            worst = f"{_mean(plain, lambda o: o.worst_of_all)}, {_mean(found, lambda o: o.worst)}"
            yield (
                f"| {world.name} | {method.name} | {_cell(found, lambda o: o.of_all)} | "
                f"{_cell(found, lambda o: o.curve[INNER_STEPS])} | {_range(gains, sign=True)} | {worst} | "
                f"{_mean(found, lambda o: o.losing)} |"
            )
    yield ""
    yield "The global model of FedPer has output layers that nobody trained: its column says nothing."
    yield ""
    yield "![Adaptation of devices that took part](img/personalization.svg)"
    yield ""


def _newcomers(study: Study) -> Iterator[str]:
    few = study.settings.few
    yield from _heading(
        f"New devices with {few} examples",
        f"20 devices that never took part, each with {few} examples, start from the global model.",
    )
    yield "| fleet | method | 0 steps | 1 step | 5 steps | 10 steps | gain of 5 steps |"
    yield "|---|---|---|---|---|---|---|"
    for world in WORLDS:
        for method in methods_of(world):
            found = study.of("gain", world.name, method.name)
            steps = " | ".join(_mean_of([o.newcomers[k] for o in found]) for k in (0, 1, 5, study.settings.adaptation))
            gain = _range([o.newcomers[INNER_STEPS] - o.newcomers[0] for o in found], sign=True)
            yield f"| {world.name} | {method.name} | {steps} | {gain} |"
    yield ""


def _kept(study: Study) -> Iterator[str]:
    policies = ("readapt", "interpolate, share 0.5", "interpolate, share 1")
    yield from _heading(
        "When a new global model comes",
        f"{LATER} rounds later a new global model comes to devices that had adapted the old one. Share of the gain "
        "over the global model that each merge policy leaves (above 100: more than there was), in percent; "
        "`replace` leaves nothing by definition.",
    )
    yield "| fleet | method | " + " | ".join(policies) + " |"
    yield "|---|---|" + "---|" * len(policies)
    for world in WORLDS:
        for method in methods_of(world):
            if method.personal:
                continue
            found = study.of("gain", world.name, method.name)
            yield f"| {world.name} | {method.name} | " + " | ".join(_left(found, p) for p in policies) + " |"
    yield ""


def _steps(study: Study) -> Iterator[str]:
    s = study.settings
    world = WORLDS[2]
    found = study.of("steps", world.name, "maml")
    yield from _heading(
        f"{s.long_rounds} rounds of MAML",
        f"{world.name}: 20 devices that never took part adapt the models of some rounds. The right half says after how "
        "many steps their mean accuracy was there (between steps by a straight line); a dash: not within "
        f"{s.adaptation} steps.",
    )
    shown = (0, 1, 2, 5, s.adaptation)
    targets = " | ".join(f"steps to {100 * t:.0f} %" for t in TARGETS)
    yield "| rounds trained | " + " | ".join(f"{k} steps" for k in shown) + f" | {targets} |"
    yield "|---|" + "---|" * (len(shown) + len(TARGETS))
    for number in s.looked_at():
        cells = [_mean_of([o.by_round[number][k] for o in found]) for k in shown]
        needed = [_needed([o.by_round[number] for o in found], t) for t in TARGETS]
        yield f"| {number} | " + " | ".join([*cells, *needed]) + " |"
    yield ""
    yield "![Adaptation of new devices by rounds trained](img/personalization-steps.svg)"
    yield ""


def _languages(study: Study) -> Iterator[str]:
    s = study.settings
    yield from _heading(
        "Languages",
        f"Which byte comes next, in manual pages of eight languages: {SPEAKERS.devices} devices, each with one "
        f"language, {SPEAKERS.cohort} of which train in each of {s.language_rounds} rounds. Each cell is "
        f"global, then personal after {SPEAKERS.adaptation_steps} steps; the last column of the second table has each "
        "device's models on another language's text: the global one keeps all, the personal ones specialise.",
    )
    names = list(study.of("languages", SPEAKERS.name, FEDAVG)[0].groups)
    yield "| accuracy | " + " | ".join(names) + " | all |"
    yield "|---|" + "---|" * (len(names) + 1)
    for method in methods_of(SPEAKERS):
        found = study.of("languages", SPEAKERS.name, method.name)
        cells = [_pair([o.groups[n] for o in found], 100, 1) for n in names]
        everybody = _pair([(o.of_all, o.curve[SPEAKERS.adaptation_steps]) for o in found], 100, 1)
        yield f"| {method.name} | " + " | ".join([*cells, everybody]) + " |"
    yield ""
    yield "| bits per byte | " + " | ".join(names) + " | another language |"
    yield "|---|" + "---|" * (len(names) + 1)
    for method in methods_of(SPEAKERS):
        found = study.of("languages", SPEAKERS.name, method.name)
        cells = [_pair([o.bits[n] for o in found], 1, 2) for n in names]
        elsewhere = _pair([o.elsewhere or (0.0, 0.0) for o in found], 1, 2)
        yield f"| {method.name} | " + " | ".join([*cells, elsewhere]) + " |"
    yield ""
    yield "![Adaptation to a language](img/personalization-languages.svg)"
    yield ""


def _protections(study: Study) -> Iterator[str]:
    yield from _heading(
        "MAML behind protections",
        f"Whole runs through the reference server's pipeline: {PROTECTED['dataset']}, softmax regression, "
        f"{PROTECTED['devices']} devices with two classes each, {PROTECTED['cohort']} in each of "
        f"{study.settings.protected_rounds} rounds. Epsilon at client level, zero-out adjacency, delta 1e-5, over the "
        "whole run; its noise has no seed. Attackers are no one's loss: honest devices are judged.",
    )
    yield "| meta-gradients | global | personal | gain | worst decile: global, personal |"
    yield "|---|---|---|---|---|"
    for name in PROTECTIONS:
        found = study.of("protection", name)
        own = _cell(found, lambda o: o.groups[""][1])
        gain = _range([o.groups[""][1] - o.of_all for o in found], sign=True)
        worst = f"{_mean(found, lambda o: o.worst_of_all)}, {_mean(found, lambda o: o.worst)}"
        yield f"| {name} | {_cell(found, lambda o: o.of_all)} | {own} | {gain} | {worst} |"
    yield ""


def _pair(values: list[tuple[float, float]], scale: float, places: int) -> str:
    """Mean of the global and mean of the personal figures."""
    before, after = (statistics.mean(column) for column in zip(*values, strict=True))
    return f"{scale * before:.{places}f} {scale * after:.{places}f}"


def _heading(title: str, text: str) -> Iterator[str]:
    yield from (f"## {title}", "", text, "")


def _needed(curves: list[tuple[float, ...]], target: float) -> str:
    """Steps until the mean curve reaches a target for the first time."""
    points = _points(curves)
    if points[0][1] >= target:
        return "0"
    for (_, before), (step, after) in itertools.pairwise(points):
        if after >= target:
            return f"{step - (after - target) / (after - before):.1f}"
    return "-"


def _left(found: list[Outcome], policy: str) -> str:
    values = [o.kept[policy] for o in found]
    known = [v for v in values if v is not None]
    return _range(known) if len(known) == len(values) else "no gain to keep"


def _mean(found: list[Outcome], of: Callable[[Outcome], float]) -> str:
    return _mean_of([of(o) for o in found])


def _mean_of(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}"


def _cell(found: list[Outcome], of: Callable[[Outcome], float]) -> str:
    return _range([of(o) for o in found])


def _range(values: list[float], *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    percent = [100 * v for v in values]
    return f"{statistics.mean(percent):{form}} [{min(percent):{form}}, {max(percent):{form}}]"
