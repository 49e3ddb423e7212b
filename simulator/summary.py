"""The last words of a run on the console: what came out, and, where it was in use, what aggregation did."""

from __future__ import annotations

from pathlib import Path

from simulator import report_days, report_personalization, report_privacy, tally
from simulator.progress import human_bytes, human_time
from simulator.results import SimulationResults


def summary_of(results: SimulationResults, folder: Path) -> list[str]:
    """Lines to print.

    Args:
        results: Of the run.
        folder: Where they are.
    """
    of_rounds = f" of {results.config.rounds}" if results.halted is not None else ""
    status = "halted" if results.halted is not None else results.status
    lines = [f"{status} after {len(results.rounds)}{of_rounds} rounds in {human_time(results.seconds)}"]
    if results.halted is not None:
        lines.append(_line("why", results.halted))
    if results.final_accuracy is not None:
        lines.append(_line("test accuracy", f"{results.final_accuracy:.4f}"))
    lines += _personalization(results)
    lines += [
        _line("model", results.model_sha256 or "-"),
        _line("traffic", f"{human_bytes(results.bytes_up)} up, {human_bytes(results.bytes_down)} down"),
        *_protection(results),
        *_aggregation(results),
        *_days(results),
        _line("throughput", f"{results.clients_per_second:.0f} clients/s"),
        _line("results", str(folder / "results.json")),
        _line("report", str(folder / "report.html")),
    ]
    return lines


def _protection(results: SimulationResults) -> list[str]:
    lines = []
    claim, secrecy = results.privacy, results.secrecy
    if claim is not None:
        rounds = "" if claim.participations is None else f", {claim.participations} rounds each at most"
        lines.append(
            _line(
                "privacy",
                f"epsilon {claim.epsilon:.4g} at delta {claim.delta:g} for a whole device ({claim.adjacency}{rounds}); "
                f"spent {claim.spent:.4g}",
            )
        )
        lines.append(_line("  against", report_privacy.against(results)))
    if secrecy is not None:
        lines.append(
            _line(
                "secrecy",
                f"{secrecy.threshold} of {secrecy.num_aggregators} aggregators; "
                f"{report_privacy.holders(results, secrecy)}",
            )
        )
    rejected = tally.shares_rejected(results)
    if rejected:
        reasons = ", ".join(f"{reason} {n}" for reason, n in rejected.most_common())
        lines.append(_line("shares rejected", f"{rejected.total()} reports ({reasons})"))
    wrong = tally.tampered(results)
    if wrong:
        told = ", ".join(f"aggregator {index} in {len(rounds)} rounds" for index, rounds in wrong.items())
        lines.append(_line("wrong answers", f"{told}; corrected"))
    return lines


def _aggregation(results: SimulationResults) -> list[str]:
    lines = []
    saved = tally.saving(results)
    if saved is not None:
        lines.append(
            _line("saved", f"{_percent(saved.share)} ({human_bytes(saved.sent)} instead of {human_bytes(saved.dense)})")
        )
    found = tally.exclusions(results)
    if found.excluded:
        words = f"{found.excluded} of {found.reports} reports"
        if found.precision is not None and found.recall is not None:
            words += (
                f"; {found.caught} were attackers' (precision {_percent(found.precision)}), of all {found.attackers} "
                f"of theirs (recall {_percent(found.recall)})"
            )
        lines.append(_line("left out", words))
    clipped = sum(r.clipped for r in results.rounds)
    if clipped:
        lines.append(_line("clipped", f"{clipped} of {found.reports} reports"))
    ages = tally.ages(results)
    if any(ages):
        lines.append(_line("staleness", f"{tally.mean_age(ages):.2f} versions on average, at most {max(ages)}"))
    if tally.selects(results) and results.slow_share is not None:
        words = f"Jain's index {results.jain_index:.3f}; slow devices counted {results.slow_share:.2f} times as often"
        lines.append(_line("fairness", words))
    failed = tally.failures(results)
    if failed:
        reasons = ", ".join(f"{reason} {n}" for reason, n in failed.items())
        lines.append(_line("refused", f"{sum(failed.values())} reports ({reasons})"))
    unchanged = tally.unchanged(results)
    if unchanged:
        rounds = sum(map(len, unchanged.values()))
        lines.append(_line("unchanged", f"{rounds} rounds left the model as it was ({', '.join(unchanged)})"))
    still = tally.zero(results)
    if still:
        lines.append(_line("zero", f"{len(still)} rounds: what became of their reports was 0 in every coordinate"))
    return lines


def _personalization(results: SimulationResults) -> list[str]:
    found = results.personalization
    if found is None:
        return []
    points, worst = report_personalization.points, found.worst_decile
    before, after = _percent(found.global_accuracy), _percent(found.personalized_accuracy)
    # Of layers that all devices keep, the common model has but the initial values.
    common = "by the common layers alone" if results.config.personal else "before"
    words = f"{after} on {found.devices} devices after {found.steps} steps, {before} {common}"
    tenth = f"worst tenth {_percent(worst.personalized_accuracy)}, {_percent(worst.global_accuracy)} {common}"
    losing = f"{_percent(found.fairness.losing)} of the devices lose"
    # A console may know neither of the two characters.
    gain = points(found.personalization_gain).replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    return [_line("personal models", f"{words} ({gain})"), _line("  spread", f"{tenth}; {losing}")]


def _days(results: SimulationResults) -> list[str]:
    days = results.days
    if days is None:
        return []
    lines = [_line("paused", f"{days.paused} sessions ({report_days.reasons(days.pauses)}); {days.resumed} went on")]
    if days.lost:
        lines.append(_line("lost", f"{sum(days.lost.values())} sessions ({report_days.reasons(days.lost)})"))
    return lines if days.paused else lines[1:]


def _line(name: str, words: str) -> str:
    return f"{name:<16}{words}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
