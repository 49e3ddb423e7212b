"""The report's section on privacy and secrecy: what is claimed, against whom, what is not, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

from simulator import figures_privacy as figures
from simulator import tally
from simulator.report_page import Page, columns, pairs
from simulator.results import PrivacyResult, SecrecyResult, SimulationResults

_NEIGHBOURS: Final = {
    "zero-out": "with a device's updates in it as with zeros in their place",
    "add-remove": "with a device as without it",
    "replace-one": "with a device's updates in it as with any others in their place",
}
_CHECKS: Final = {
    "trust-devices": "that shares are well-formed and belong together; not what is in them",
    "projections": "besides, the range and the norm of each update, by projections that are opened",
}
_REASONS: Final = {
    "unsealable": "does not open with the aggregator's key, for this assignment and these terms",
    "terms": "was made under other terms than the aggregator's",
    "malformed": "is no share of the right length",
    "header-mismatch": "is not the share that its header names",
    "conflict": "came before, with another content",
    "parity": "its shares do not belong together",
    "projections": "is longer than it claims, or beyond the field's range",
    "not-selected": "was left out by the rule, by its distances to the others",
    "not-compared": "was not among those that the rule compared",
}
_INTEGRITY: Final = {
    "unchecked": "as many as it takes, so that a wrong one would not have shown",
    "checked": "more than it takes, and all agreed",
    "corrected": "some were wrong, and were left out",
}
_LARGEST_EXPONENT: Final = 700.0


def in_use(results: SimulationResults) -> bool:
    """Whether there is anything to tell."""
    return results.privacy is not None or results.secrecy is not None


def cards(results: SimulationResults) -> list[tuple[str, str, str, str]]:
    """The one headline figure."""
    claim, secrecy = results.privacy, results.secrecy
    if claim is not None:
        note = f"of {claim.epsilon:.4g}, delta {claim.delta:g}, {claim.adjacency}"
        return [("epsilon spent", f"{claim.spent:.4g}", note, "")]
    if secrecy is not None:
        note = "one process: no secrecy" if secrecy.embedded else f"fewer than {secrecy.threshold} learn nothing"
        return [("aggregators", f"{secrecy.num_aggregators}", note, "")]
    return []


def section(page: Page, results: SimulationResults) -> None:
    """The section, where noise or shares were in use."""
    if not in_use(results):
        return
    page.section("Privacy and secrecy")
    _alerts(page, results)
    boxes = []
    if results.privacy is not None:
        boxes.append(_claim(results, results.privacy))
    if results.secrecy is not None:
        boxes.append(_sharing(results, results.secrecy))
    page.boxes(*boxes)
    page.add(
        '<div class="box"><strong>Not covered</strong><ul>'
        + "".join(f"<li>{escape(words)}</li>" for words in not_covered(results))
        + "</ul></div>"
    )
    if results.rounds:
        shown = _figures(page, results)
        if shown:
            page.row(*shown)
    tables = [_aggregators(results), _rejections(results)]
    if any(tables):
        page.boxes(*filter(None, tables))


# --- in words ------------------------------------------------------------------------------------------------


def against(results: SimulationResults) -> str:
    """Whom the claim holds against."""
    public = "whoever sees models and the server's figures"
    secrecy, ours = results.secrecy, results.config.server is None
    if secrecy is None:
        return f"{public}; not the server, which sees every update as it is"
    if secrecy.embedded:
        return f"{public}; not the operator, in whose one process all shares come together"
    together = (
        f"the server, any {secrecy.threshold - 1} of the aggregators, the other devices and {public}, all together"
    )
    if ours:
        return f"{together}, if different people run the aggregators; in this run one machine ran them all"
    if secrecy.embedded is None:
        return f"{together}, if the aggregators are not in one hand, which the server does not tell"
    return f"{together}, if different people run the aggregators"


def holders(results: SimulationResults, secrecy: SecrecyResult) -> str:
    """Who has the aggregators."""
    if secrecy.embedded:
        return "all in one process: no secrecy from its operator"
    if results.config.server is None:
        return "a process, a key and a store each, all on this machine: a rehearsal of different operators"
    return "the server does not tell" if secrecy.embedded is None else "elsewhere, with keys that the server pins"


def not_covered(results: SimulationResults) -> list[str]:
    """What nobody should read into the claim."""
    claim, secrecy = results.privacy, results.secrecy
    found = []
    if claim is None:
        found.append(
            "Sums and models carry no noise: no epsilon is claimed, and a model may give away examples. The fewer "
            "reports a sum has, the more it says about one of them."
        )
    else:
        if secrecy is None:
            found.append("The server and its operator: they see every update before noise is added.")
        if claim.adjacency != "add-remove":
            found.append("That a device takes part, when, and how long it takes: public.")
        found.append("Several runs on the same data, to choose settings by: each costs its own epsilon.")
        found.append("Devices that do not follow the protocol: what those reveal of themselves.")
    if secrecy is not None:
        found.append(
            f"Any {secrecy.threshold} aggregators together: they can open every update."
            if not secrecy.embedded
            else "Whoever runs the server: all aggregators are in its process."
        )
        if results.config.aggregation.rule != "mean" and results.config.privacy.buckets is None:
            found.append(
                "The distances between the updates of a round are opened to the server, hence how they lie to one "
                "another, and which were chosen."
            )
        if secrecy.checks == "projections":
            found.append(
                "Random projections and the norm of each update are opened to the server: no epsilon holds against "
                "whoever sees them."
            )
        else:
            found.append("Nobody sees what a device sends: a dishonest one can shift a sum by any amount.")
    if results.config.server is None:
        found.append("This page: it shows what the simulated devices hold, which no server knows.")
    return found


def _claim(results: SimulationResults, claim: PrivacyResult) -> str:
    words = (
        f"What was released is about as likely {_NEIGHBOURS[claim.adjacency]}: seeing it changes the odds of any "
        "conclusion about the data of one device by a factor of at most "
        f"exp(epsilon) = {_factor(claim.epsilon)}, but for a chance of about {claim.delta:g}."
    )
    rows: dict[str, object] = {
        "budget": f"epsilon {claim.epsilon:.4g} at delta {claim.delta:g}, for a whole device",
        "spent": f"epsilon {claim.spent:.4g}",
        "adjacency": claim.adjacency,
        "a device counts in": "any number of rounds"
        if claim.participations is None
        else f"at most {claim.participations} rounds",
        "noise is added by": _noise_words(claim),
        "noise multiplier": claim.noise_multiplier,
        "against": against(results),
    }
    if claim.buckets is not None:
        rows["buckets"] = f"{claim.buckets} noised sums a round, each device in one of them"
    return f"<p>{escape(words)}</p>{pairs(rows, 'Differential privacy')}"


def _noise_words(claim: PrivacyResult) -> str:
    match claim.noise:
        case "server":
            return "the server, which sees the sum without it"
        case "aggregators":
            return "the aggregators, none of whom knows it all"
        case "devices":
            return f"the devices, of which {claim.honest_devices} of each sum are relied on to have added theirs"


def _factor(epsilon: float) -> str:
    factor = math.exp(min(epsilon, _LARGEST_EXPONENT))
    return f"{factor:.3g}" if factor < 100 or factor >= 1e6 else f"{factor:,.0f}"


def _sharing(results: SimulationResults, secrecy: SecrecyResult) -> str:
    needed = secrecy.threshold + secrecy.packing - 1
    rows: dict[str, object] = {
        "shares": f"{secrecy.num_aggregators} of each update; fewer than {secrecy.threshold} say nothing, {needed} "
        "open a sum",
        "the server learns": "the sum of a round" + ("" if results.privacy is None else ", with its noise"),
        "aggregators": holders(results, secrecy),
        "fewest reports of a sum": secrecy.minimum_cohort,
        "checked": _CHECKS.get(secrecy.checks, secrecy.checks),
        "field": {"m61": "2^61 - 1", "m127": "2^127 - 1"}.get(secrecy.field, secrecy.field)
        + (f", {secrecy.packing} coordinates in a share" if secrecy.packing > 1 else ""),
        "sealed by": secrecy.suite,
    }
    found = [f"{_INTEGRITY[kind]} ({_few(rounds)})" for kind, rounds in _by_integrity(results).items()]
    if found:
        rows["answers to open a sum"] = "; ".join(found)
    return pairs(rows, "Secret sharing")


def _by_integrity(results: SimulationResults) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for r in results.rounds:
        if r.integrity is not None:
            found.setdefault(r.integrity, []).append(r.round)
    return found


def _few(rounds: Sequence[int]) -> str:
    """Rounds in short: a stretch by its ends, else the first few."""
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    if rounds[-1] - rounds[0] == len(rounds) - 1:
        return f"rounds {rounds[0]} to {rounds[-1]}"
    first = ", ".join(map(str, rounds[:8]))
    return f"rounds {first}" if len(rounds) <= 8 else f"rounds {first} and {len(rounds) - 8} more"


def _alerts(page: Page, results: SimulationResults) -> None:
    wrong = tally.tampered(results)
    if wrong:
        told = "; ".join(f"aggregator {index} in {_few(rounds)}" for index, rounds in wrong.items())
        page.alert(
            "Wrong answers of aggregators",
            f"{escape(told[:1].upper() + told[1:])}. They were located and left out of the sums, which are right.",
            bad=True,
        )
    if results.secrecy is not None and results.secrecy.embedded:
        page.alert(
            "All aggregators ran in one process: no secrecy from its operator",
            "The protocol is the real one, but whoever can look into that process can open every update. "
            "<code>--aggregators processes</code> starts real services; in production different people run them.",
        )


# --- figures and tables ---------------------------------------------------------------------------------------


def _figures(page: Page, results: SimulationResults) -> list[str]:
    shown = []
    claim = results.privacy
    if claim is not None and any(r.epsilon is not None for r in results.rounds):
        plot = figures.epsilon(results, claim)
        shown.append(page.figure("epsilon", "Epsilon spent", plot, _epsilon_words(results, claim)))
    if any(length is not None for length in tally.noise_lengths(results)):
        plot = figures.noise(results, tally.longest_mean(results))
        shown.append(page.figure("noise", "Noise beside signal", plot, noise_words(results)))
    per_coordinate = tally.bytes_per_coordinate(results)
    if results.secrecy is not None and per_coordinate is not None:
        plot = figures.upload(per_coordinate)
        words = upload_words(results.secrecy, per_coordinate)
        shown.append(page.figure("upload", "What shares cost to send", plot, words, "low"))
    reasons = [reason for reason, _ in tally.shares_rejected(results).most_common()]
    if reasons:
        plot = figures.rejected(results, reasons)
        words = f"{tally.shares_rejected(results).total()} reports were left out of the sums that they were sent for."
        shown.append(page.figure("rejected", "Rejected shares", plot, words))
    return shown


def _epsilon_words(results: SimulationResults, claim: PrivacyResult) -> str:
    done = len(results.rounds)
    words = f"{claim.spent:.4g} of {claim.epsilon:.4g} after {done} rounds"
    if claim.participations is not None and claim.participations < done:
        words += (
            f". A device counts in at most {claim.participations} rounds: after so many, further ones cost nothing more"
        )
    return words + ". What is spent never comes back, and rounds that failed after it was spent count too."


def noise_words(results: SimulationResults) -> str:
    """How much of the aggregates was noise."""
    found = [
        (r, length)
        for r, length in zip(results.rounds, tally.noise_lengths(results), strict=True)
        if length and r.aggregate_norm is not None
    ]
    if not found:
        return "No round released anything."
    last, length = found[-1]
    norm = last.aggregate_norm or 0.0
    words = f"In round {last.round} the aggregate was {norm:.3g} long, and noise alone is expected to be {length:.3g}"
    most = tally.longest_mean(results)
    words += "" if most is None else f": at least {length / most:.2g} times as long as what the updates come to"
    words += ". "
    if results.privacy is not None and results.privacy.noise != "server":
        words += (
            f"All {results.privacy.noise} add their part, and the account relies on those of the honest ones alone: "
            "there is more noise than is accounted for. "
        )
    return words + "More reports a round, fewer parameters, fewer rounds or a larger epsilon make it less."


def upload_words(secrecy: SecrecyResult, per_coordinate: float) -> str:
    """What sharing costs a device."""
    return (
        f"{per_coordinate:.3g} bytes a coordinate, sealing included: {per_coordinate / figures.FLOAT32_BYTES:.3g} "
        f"times a plain float32. Of {secrecy.num_aggregators} shares {secrecy.threshold - 1} are seeds of 32 bytes; "
        "each of the others holds all that is shared of the update."
    )


def _aggregators(results: SimulationResults) -> str:
    """A line for each aggregator: in how many rounds it did its part."""
    secrecy = results.secrecy
    if secrecy is None or not any(r.opened_by for r in results.rounds):
        return ""
    wrong = tally.tampered(results)
    rows = [
        (
            index,
            sum(index in r.noise_from for r in results.rounds),
            sum(index in r.opened_by for r in results.rounds),
            len(wrong.get(index, ())),
        )
        for index in range(1, secrecy.num_aggregators + 1)
    ]
    heads = ["aggregator", "rounds with its noise", "rounds it answered", "wrong answers"]
    keep = [0, 1, 2, 3] if any(r.noise_from for r in results.rounds) else [0, 2, 3]
    return columns([heads[i] for i in keep], [[row[i] for i in keep] for row in rows])


def _rejections(results: SimulationResults) -> str:
    found = tally.shares_rejected(results)
    if not found:
        return ""
    body = "".join(
        f'<tr><th scope="row"><code>{escape(reason)}</code></th><td class="n">{reports}</td>'
        f"<td>{escape(_REASONS.get(reason, ''))}</td></tr>"
        for reason, reports in found.most_common()
    )
    return f"<table><caption>Reports that were left out of a sum, and why</caption>{body}</table>"


def extra_columns(results: SimulationResults) -> dict[str, list[str]]:
    """Columns of the table of rounds, for what is in use."""
    rounds, found = results.rounds, dict[str, list[str]]()
    if results.privacy is not None:
        found["epsilon"] = ["-" if r.epsilon is None else f"{r.epsilon:.4g}" for r in rounds]
        found["noise per coordinate"] = ["-" if r.noise_stddev is None else f"{r.noise_stddev:.3g}" for r in rounds]
    if results.secrecy is not None:
        found["opened by"] = [" ".join(map(str, r.opened_by)) or "-" for r in rounds]
    if any(r.shares_rejected for r in rounds):
        found["shares rejected"] = [str(sum(r.shares_rejected.values())) for r in rounds]
    return found
