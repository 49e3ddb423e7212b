"""The report's section on personalisation; a run in which devices do not adapt has none."""

from __future__ import annotations

from client_sdk.protocol.meta_learning import META_ALGORITHMS
from simulator import figures_personalization as figures
from simulator.report_page import Page, pairs
from simulator.results import PersonalizationResult, SimulationResults


def section(page: Page, results: SimulationResults) -> None:
    """The section."""
    found = results.personalization
    if found is None:
        return
    page.section("Personalisation")
    if results.config.algorithm in META_ALGORITHMS:
        page.add(
            f"<p>The global model of {results.config.algorithm} is meant to be adapted: what counts is how good it is "
            "after the steps, and its own accuracy may be low.</p>"
        )
    page.row(
        page.figure("adaptation", "Adaptation, step by step", figures.curves(found), _curve_words(found)),
        page.figure("personal", "Global beside personal models", figures.scatter(found), _pair_words(found)),
    )
    page.row(
        page.figure("gains", "What each device gains", figures.gains(found), _gain_words(found)),
        page.figure("accuracies", "Accuracies before and after", figures.histogram(found), _spread_words(found)),
    )
    page.boxes(pairs(_facts(found), "How devices adapted"), pairs(_figures(found), "What it gave"))


def cards(results: SimulationResults) -> list[tuple[str, str, str, str]]:
    """The headline figure."""
    found = results.personalization
    if found is None:
        return []
    gain = round(100 * found.personalization_gain, 1)
    size = f"{abs(gain):.1f}\N{NO-BREAK SPACE}points"
    beside = f"{size} above" if gain > 0 else f"{size} below" if gain < 0 else "as good as"
    note = f"{beside} the global one, on what each device will see next"
    return [("personal models", percent(found.personalized_accuracy), note, "")]


def percent(share: float) -> str:
    """A share in words."""
    # The figure stays with its sign at the end of a line.
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """A difference of shares in words."""
    rounded = round(100 * difference, 1)
    if rounded == 0:
        return "no change"
    return f"{rounded:+.1f}\N{NO-BREAK SPACE}points".replace("-", "\N{MINUS SIGN}")


def merged(share: float) -> str:
    """What of a device's own was laid over the new model, in words."""
    return "all" if share == 1 else f"{100 * share:g}\N{NO-BREAK SPACE}%"


def _curve_words(found: PersonalizationResult) -> str:
    last = found.curves[-1]
    told = (
        f"Adapted from the {figures.model_of(last.round)}: {percent(last.accuracy[0])} before the first step, "
        f"{percent(last.accuracy[1])} after one, {percent(last.accuracy[-1])} after {found.steps}."
    )
    if len(found.curves) > 1:
        first = found.curves[0]
        told += f" From the {figures.model_of(first.round)}, after as many: {percent(first.accuracy[-1])}."
    return f"{told} Means over devices, on examples of the validation split."


def _pair_words(found: PersonalizationResult) -> str:
    devices = "device" if found.devices == 1 else "devices"
    return (
        f"{found.devices} {devices}, each judged by {found.examples} test examples of its own classes and in its own "
        f"style: {percent(found.global_accuracy)} on average with the global model, "
        f"{percent(found.personalized_accuracy)} with its own ({points(found.personalization_gain)}). The larger a "
        "mark, the more devices."
    )


def _gain_words(found: PersonalizationResult) -> str:
    fair, worst = found.fairness, found.worst_decile
    who = "The device that gains least" if worst.devices == 1 else f"The {worst.devices} that gain least, on average"
    return (
        f"{who}: {points(fair.worst_decile_gain)}; {percent(fair.losing)} of the devices are worse off with their own "
        "model than with the global one."
    )


def _spread_words(found: PersonalizationResult) -> str:
    worst, fair = found.worst_decile, found.fairness
    return (
        f"The tenth that each model serves worst: {percent(worst.global_accuracy)} with the global one, "
        f"{percent(worst.personalized_accuracy)} with their own. Standard deviation over devices: "
        f"{100 * fair.global_stddev:.1f} before, {100 * fair.personalized_stddev:.1f} points after."
    )


def _facts(found: PersonalizationResult) -> dict[str, object]:
    return {
        "steps": found.steps,
        "learning rate": found.learning_rate,
        "examples a step, at most": found.batch_size,
        "layers that never leave a device": ", ".join(found.personal_layers) or "none",
        "devices judged": found.devices,
        "examples that judge each": found.examples,
    }


def _figures(found: PersonalizationResult) -> dict[str, object]:
    fair = found.fairness
    told: dict[str, object] = {
        "gain": points(found.personalization_gain),
        "gain of the worst served tenth": points(found.worst_decile.personalization_gain),
        "Jain's index of accuracies": f"{fair.global_jain:.3f} before, {fair.personalized_jain:.3f} after",
        "devices that lose": percent(fair.losing),
    }
    for row in found.forgetting:
        kept = "nothing was gained" if row.kept is None else f"{percent(row.kept)} of {points(row.gain_before)}"
        told[f"kept under a new model, with {merged(row.personal_share)} of their own"] = kept
    return told
