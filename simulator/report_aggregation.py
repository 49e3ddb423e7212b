"""The report's section on aggregation: what the server made of the reports. Only what is in use is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from client_sdk.protocol.compression import CompressionMethod, CompressionSpec
from client_sdk.protocol.errors import PROBLEM_PREFIX, from_problem
from client_sdk.protocol.profile import DeviceTier
from server_ref.combinations import BY_COORDINATE
from simulator import figures_aggregation as figures
from simulator import tally
from simulator.progress import human_bytes
from simulator.report_page import Page, pairs
from simulator.results import SimulationResults

# What a device's own failure is called in place of a problem's type.
_FAILURES: Final = {
    "training-diverged": "Local training left the finite numbers; nothing was sent.",
    "too-few-examples": "The device had no two different examples to learn from and to judge by; nothing was sent.",
    "training-failed": "Local training failed; nothing was sent.",
}
_SPARSE: Final = frozenset({CompressionMethod.TOPK, CompressionMethod.THRESHOLD, CompressionMethod.RANDOMK})
_UNCHANGED: Final = {
    "TooManyByzantine": "the rule does not stand so many dishonest reports among so few",
    "NonFiniteUpdate": "the aggregate was not finite",
    "InvalidUpdate": "the new weights would not have been finite",
    "EmptyAggregate": "nothing was left to aggregate",
    "CohortTooSmall": "too few reports were left for a sum to be opened",
    "RoundAbandoned": "too many aggregators can never sign it",
    "PrivacyBudgetExhausted": "the privacy budget is spent",
    "BudgetSpent": "the privacy budget is spent, as the aggregators have it",
}


def alerts(page: Page, results: SimulationResults) -> None:
    """What nobody should overlook: a task that was halted, rounds that made no new model."""
    done, of_rounds = len(results.rounds), results.config.rounds
    if results.halted is not None:
        page.alert(
            f"Training was halted after round {done} of {of_rounds}"
            if done
            else "Training was halted in its first round",
            f"Why: {escape(results.halted)}. {escape(_best_words(results))} Before you start again: a smaller learning "
            "rate (<code>--lr</code>, <code>--server-lr</code>), clipping (<code>--clip-norm</code>), less staleness, "
            f"{_feedback_words(results)}or, where devices may be dishonest, a rule that stands them "
            "(<code>--rule</code>).",
            bad=True,
        )
    unchanged = tally.unchanged(results)
    if unchanged:
        told = "; ".join(
            f"{_numbers(rounds)}: {_UNCHANGED.get(reason, reason)} ({reason})" for reason, rounds in unchanged.items()
        )
        page.alert(
            f"{sum(map(len, unchanged.values()))} of {done} rounds left the model as it was",
            f"Round {escape(told)}. Their reports are spent; the old weights lived on.",
            bad=True,
        )

    still = tally.zero(results)
    if still:
        page.alert(
            f"{len(still)} of {done} rounds aggregated to zero",
            f"Round {_numbers(still)}: what the reports became was 0 in every coordinate.{_sparse_words(results)}",
            bad=True,
        )


def section(page: Page, results: SimulationResults, times: Sequence[int], tier_of: Callable[[int], DeviceTier]) -> None:
    """The section.

    Args:
        page: Where to.
        results: Of the run.
        times: Device -> reports of it that are part of a model.
        tier_of: Device -> tier.
    """
    page.section("Aggregation")
    steps = {slot: title for slot, title in results.pipeline.items() if not title.startswith("none")}
    boxes = [
        pairs(steps, "What the server does with the reports, in this order")
        + _degraded_words(results)
        + _attack_words(results)
    ]
    if results.refusals:
        boxes.append(_refusals(results))
    page.boxes(*boxes)
    if results.rounds:
        page.row(*_figures(page, results, times, tier_of))


def _figures(
    page: Page, results: SimulationResults, times: Sequence[int], tier_of: Callable[[int], DeviceTier]
) -> list[str]:
    rounds, shown = results.rounds, []
    saved = tally.saving(results)
    if saved is not None:
        words = (
            f"The counted reports took {human_bytes(saved.sent)}, everything in them included; their updates alone "
            f"would take {human_bytes(saved.dense)} as float32: {_percent(saved.share)} saved."
        )
        shown.append(page.figure("bytes-saved", "Bytes of the reports", figures.bytes_saved(rounds), words))
    if any(r.excluded for r in rounds):
        attacked = results.config.attack is not None
        plot = figures.exclusions(rounds, attacked=attacked)
        shown.append(page.figure("excluded", "Reports that the rule left out", plot, _exclusion_words(results)))
    clip_norm = results.config.aggregation.clip_norm if results.config.server is None else None
    if any(r.aggregate_norm or r.norm_max for r in rounds):
        shown.append(page.figure("norms", "Norms", figures.norms(rounds, clip_norm), _norm_words(results)))
    if any(r.norm_median is not None for r in rounds):
        clipped, reports = sum(r.clipped for r in rounds), sum(r.reports for r in rounds)
        words = f"{clipped} of {reports} counted updates were longer than allowed and were scaled down."
        shown.append(page.figure("clipped", "Clipped updates", figures.clipped(rounds), words))
    ages = tally.ages(results)
    if any(ages):
        shown.append(page.figure("staleness", "Staleness", figures.staleness(ages), _age_words(results, ages)))
    if tally.selects(results) and any(times):
        plot = figures.participation(times, tier_of)
        shown.append(page.figure("participation", "Who took part", plot, _participation_words(results, times)))
    return shown


def _exclusion_words(results: SimulationResults) -> str:
    """What the robust rule left out, and how often it was right."""
    found, config = tally.exclusions(results), results.config
    rule = "The server's rule" if config.server is not None else f"The rule ({config.aggregation.rule})"
    words = f"{rule} left {found.excluded} of {found.reports} counted reports out"
    reckoned = [r.num_byzantine for r in results.rounds if r.num_byzantine is not None]
    if reckoned:
        low, high = min(reckoned), max(reckoned)
        words += f"; it reckoned with {low if low == high else f'{low} to {high}'} dishonest ones a round"
    if config.attack is not None and found.precision is not None:
        words += f". {found.caught} of those were attackers' (precision {_percent(found.precision)})"
        if found.recall is not None:
            words += (
                f"; of the attackers' {found.attackers} reports {found.attackers - found.caught} were let in (recall "
                f"{_percent(found.recall)})"
            )
    return words + "." + _overrun_words(results)


def _overrun_words(results: SimulationResults) -> str:
    """A fraction of the fleet is a fraction of a round on average only: rounds that the rule was not built to stand."""
    overrun = sum(r.num_byzantine is not None and r.attackers > r.num_byzantine for r in results.rounds)
    if not overrun:
        return ""
    return f" In {overrun} of {len(results.rounds)} rounds more attackers reported than the rule reckoned with."


def _degraded_words(results: SimulationResults) -> str:
    degraded = [r.num_byzantine or 0 for r in results.rounds if r.degraded]
    if not degraded:
        return ""
    least = min(degraded)
    return (
        f"<p>In {len(degraded)} of {len(results.rounds)} rounds the buffer was too small: the rule stood {least} "
        f"dishonest report{'' if least == 1 else 's'} (degraded mode).</p>"
    )


def _attack_words(results: SimulationResults) -> str:
    """Where devices attack and no figure tells what became of it."""
    found, attack = tally.exclusions(results), results.config.attack
    if attack is None or found.excluded:
        return ""
    return (
        f"<p>{found.attackers} of {found.reports} counted reports were attackers' ({escape(attack)}). This way of "
        f"reducing leaves no report out as a whole.{_overrun_words(results)}</p>"
    )


def _refusals(results: SimulationResults) -> str:
    rows = [
        (reason, sessions, _FAILURES.get(reason) or from_problem(PROBLEM_PREFIX + reason).title)
        for reason, sessions in results.refusals.items()
    ]
    body = "".join(
        f'<tr><th scope="row"><code>{escape(reason)}</code></th><td class="n">{sessions}</td>'
        f"<td>{escape(words)}</td></tr>"
        for reason, sessions, words in rows
    )
    return f"<table><caption>Reports that are in no model, and why</caption>{body}</table>"


def _norm_words(results: SimulationResults) -> str:
    known = [(r.round, r.aggregate_norm) for r in results.rounds if r.aggregate_norm is not None]
    words = []
    if known:
        (first, at_first), (last, at_last), (peak, at_peak) = known[0], known[-1], max(known, key=lambda pair: pair[1])
        words.append(
            f"The aggregate of a round's updates was {at_first:.3g} long in round {first}, {at_last:.3g} in round "
            f"{last}, and at most {at_peak:.3g} (round {peak})."
        )
    medians = [r.norm_median for r in results.rounds if r.norm_median is not None]
    largest = [r.norm_max for r in results.rounds if r.norm_max is not None]
    if medians and largest:
        words.append(
            f"Before clipping, the rounds' median updates were {min(medians):.3g} to {max(medians):.3g} long, the "
            f"longest of all {max(largest):.3g}."
        )
    return " ".join(words)


def _age_words(results: SimulationResults, ages: Counter[int]) -> str:
    reports = ages.total()
    words = (
        f"{_percent(ages[0] / reports)} of {reports} counted reports started from the model that they changed; on "
        f"average they were {tally.mean_age(ages):.2f} versions old, the oldest {max(ages)}"
    )
    if results.config.server is None:
        words += f" (accepted: up to {results.config.max_staleness})"
    return words + "."


def _participation_words(results: SimulationResults, times: Sequence[int]) -> str:
    never = sum(n == 0 for n in times)
    words = f"A device counted {min(times)} to {max(times)} times"
    words += f"; {never} of {len(times)} never did" if never else ""
    words += f". Jain's fairness index is {results.jain_index:.3f} (1: all equally often)."
    if results.slow_share is not None:
        slow = "straggler" if results.config.stragglers > 0 else "low-end device"
        words += f" A {slow} counted {results.slow_share:.2f} times as often as another device."
    return words


def _feedback_words(results: SimulationResults) -> str:
    """What is not sent now is sent later, and a delay bounds the learning rate as staleness does."""
    line = results.config.compression
    if line is None or not CompressionSpec.parse(line).error_feedback:
        return ""
    return f"a compression that sends more (<code>{escape(line)}</code> delays what it leaves out), "


def _sparse_words(results: SimulationResults) -> str:
    """A rule that looks at one coordinate at a time sees the zeros of the many who did not send it."""
    line, rule = results.config.compression, results.config.aggregation.rule
    if line is None or rule not in BY_COORDINATE or CompressionSpec.parse(line).method not in _SPARSE:
        return ""
    return (
        f" Most reports hold 0 at most coordinates (<code>{escape(line)}</code>), and so does their {escape(rule)}. "
        "Take a rule that compares whole updates (multi-krum, geometric-median, centered-clipping), or a compression "
        "that sends every value (<code>quantize:8</code>)."
    )


def _best_words(results: SimulationResults) -> str:
    scored = [(r.accuracy, r.round) for r in results.rounds if r.accuracy is not None]
    if not scored:
        return ""
    accuracy, best = max(scored, key=lambda pair: (pair[0], -pair[1]))
    return f"The best model so far was that of round {best} (validation accuracy {_percent(accuracy)})."


def extra_columns(results: SimulationResults) -> dict[str, list[str]]:
    """Columns of the table of rounds, for what is in use."""
    rounds, found = results.rounds, dict[str, list[str]]()
    if tally.saving(results) is not None:
        found["as float32"] = [human_bytes(r.bytes_dense) for r in rounds]
    if any(r.excluded for r in rounds):
        found["left out"] = [str(len(r.excluded)) for r in rounds]
    if any(r.attackers for r in rounds):
        found["attackers"] = [str(r.attackers) for r in rounds]
    if any(r.norm_median is not None for r in rounds):
        found["clipped"] = [str(r.clipped) for r in rounds]
    if any(age for r in rounds for age in r.staleness):
        found["oldest"] = [str(max(r.staleness, default=0)) for r in rounds]
    if any(r.unchanged for r in rounds):
        found["unchanged"] = [r.unchanged or "" for r in rounds]
    return found


def _numbers(rounds: Sequence[int]) -> str:
    """The first few, and how many more there are."""
    first = ", ".join(map(str, rounds[:8]))
    return first if len(rounds) <= 8 else f"{first} and {len(rounds) - 8} more"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
