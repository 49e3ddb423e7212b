"""``pocketfed audit``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.audit.one_run import AuditOutcome, AuditPlan, Claimed

EXIT_SURPRISED = 1

_EPILOG = """\
examples:
  everything, some minutes; figures go to audit.md:
    pocketfed audit --out audit.md

  a first look, some seconds:
    pocketfed audit --canaries 128 --size 256 --rounds 40

What happens: every sensitivity that the product claims is tried on cohorts that differ in one client; then the
private pipeline runs with canaries that take part or not by a coin each, and an attacker guesses the coins from what
it published. The same is done to servers with a planted bug, which have to be found out.

Exit status: 0 if every claim stands and every planted bug is found, 1 otherwise. Passing is no proof: docs/audit.md.
"""


def audit_command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Fill the parser of ``pocketfed audit``, and return the function that runs it."""
    parser.description = "Try to refute the privacy that the implementation claims."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="write the findings there, as Markdown (default: print them)")
    add("--canaries", type=int, default=1000, metavar="M", help="clients with a coin each (default: %(default)s)")
    add("--size", type=int, default=20_000, metavar="D", help="coordinates of an update (default: %(default)s)")
    add("--rounds", type=int, default=20, metavar="T", help="of the product's servers (default: %(default)s)")
    add(
        "--planted-rounds",
        type=int,
        default=50,
        metavar="T",
        help="of servers with a planted bug (default: %(default)s)",
    )
    add("--seed", type=int, metavar="S", help="of canaries and coins, never of noise (default: none)")
    return _run


def _run(args: argparse.Namespace) -> int:
    from client_sdk.atomic import write_atomically  # noqa: PLC0415 - keep --help cheap
    from simulator.audit.claims import all_claims, calibrated, sqrt_ratio  # noqa: PLC0415
    from simulator.audit.neighbours import check  # noqa: PLC0415
    from simulator.audit.one_run import AuditPlan, audit  # noqa: PLC0415
    from simulator.audit.report import Findings, as_markdown  # noqa: PLC0415
    from simulator.audit.servers import PLANTED, REAL  # noqa: PLC0415

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    real = AuditPlan(args.canaries, args.size, args.rounds, args.seed)
    # What a bug shows does not depend on the number of coordinates; only the running time does.
    planted = AuditPlan(args.canaries, min(args.size, 5 * args.canaries), args.planted_rounds, args.seed)
    say("neighbouring data: every claimed sensitivity")
    claims = [check(claim) for claim in all_claims()]
    wrong = [check(claim) for claim in calibrated("planted: C sqrt(ratio)", sqrt_ratio)]

    def audited(servers: Sequence[Claimed], plan: AuditPlan) -> list[AuditOutcome]:
        found = []
        for claimed in servers:
            say(f"one run: {claimed.name}")
            found.append(audit(claimed, plan))
            say(f"  epsilon >= {found[-1].bound.epsilon:.3f} (claimed {claimed.epsilon:g})")
        return found

    findings = Findings(claims, wrong, audited(REAL, real), audited(PLANTED, planted), real, planted)
    page = as_markdown(findings)
    if args.out is None:
        print(page)
    else:
        write_atomically(args.out, page.encode(), mode=0o644)
        print(args.out)
    for line in findings.surprises:
        say(line)
    return EXIT_SURPRISED if findings.surprises else 0
