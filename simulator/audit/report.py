"""The audit's findings as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from simulator.audit.neighbours import Verdict
from simulator.audit.one_run import ERROR, AuditOutcome, AuditPlan

_NEIGHBOURS: Final = (
    "The largest distance of two outcomes whose cohorts differ in one client, as a part of the claimed sensitivity. "
    "Above 1 the claim is refuted."
)


@dataclass(frozen=True)
class Findings:
    """Everything that an audit found.

    Attributes:
        claims: Of the neighbouring-data test, on what the product claims.
        wrong_claims: Likewise, on claims that are known to be wrong.
        real: Of the one-run audit, on the product.
        planted: Likewise, on servers with a planted bug.
        real_plan: How much was tried on the product.
        planted_plan: How much was tried on the others.
    """

    claims: Sequence[Verdict]
    wrong_claims: Sequence[Verdict]
    real: Sequence[AuditOutcome]
    planted: Sequence[AuditOutcome]
    real_plan: AuditPlan
    planted_plan: AuditPlan

    @property
    def surprises(self) -> list[str]:
        """What should not be: a refuted claim, or a planted bug that was not found."""
        found = [f"refuted: {v.claim.name} ({v.claim.adjacency})" for v in self.claims if not v.holds]
        found += [f"refuted: {o.claimed.name}" for o in self.real if not o.holds]
        found += [f"not found: {v.claim.name} ({v.claim.adjacency})" for v in self.wrong_claims if v.holds]
        found += [f"not found: {o.claimed.name}" for o in self.planted if o.holds]
        return found


def as_markdown(findings: Findings) -> str:
    """The page of docs/."""
    real, planted = findings.real_plan, findings.planted_plan
    lines = [
        "# Audit summary",
        "",
        "Written by `make audit`; do not edit. What the tests are, and what they cannot show: [audit.md](audit.md).",
        "",
        "## Neighbouring data",
        "",
        _NEIGHBOURS,
        "",
        "| claim | adjacency | claimed | largest distance / claimed | |",
        "|---|---|---|---|---|",
        *(_claim_row(v) for v in findings.claims),
        *(_claim_row(v, planted=True) for v in findings.wrong_claims),
        "",
        "## One run",
        "",
        _one_run(real, planted),
        "",
        "| server | claimed epsilon | lower bound | right guesses | canaries take part | attacker | |",
        "|---|---|---|---|---|---|---|",
        *(_server_row(o) for o in findings.real),
        *(_server_row(o, planted=True) for o in findings.planted),
        "",
    ]
    return "\n".join(lines)


def _one_run(real: AuditPlan, planted: AuditPlan) -> str:
    return (
        f"Lower bounds on epsilon at the claim's delta, wrong with a probability of at most {ERROR:.0%} each. The "
        f"product: {real.canaries} canaries, {real.size} coordinates, {real.rounds} rounds. Planted bugs: "
        f"{planted.canaries} canaries, {planted.size} coordinates, {planted.rounds} rounds."
    )


def _claim_row(verdict: Verdict, *, planted: bool = False) -> str:
    claim = verdict.claim
    return (
        f"| {claim.name} | {claim.adjacency} | {claim.sensitivity:.4g} | {verdict.attained:.4f} | "
        f"{_mark(holds=verdict.holds, planted=planted)} |"
    )


def _server_row(outcome: AuditOutcome, *, planted: bool = False) -> str:
    claimed, bound = outcome.claimed, outcome.bound
    return (
        f"| {claimed.name} | {claimed.epsilon:g} | {bound.epsilon:.3f} | {bound.guesses.right} of {bound.guesses.made} "
        f"| {outcome.program} | {bound.strategy} | {_mark(holds=outcome.holds, planted=planted)} |"
    )


def _mark(*, holds: bool, planted: bool) -> str:
    if planted:
        return "**not found**" if holds else "planted, refuted"
    return "stands" if holds else "**refuted**"
