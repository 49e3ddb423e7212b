"""``pocketfed robustness``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_INTERRUPTED = 130

_EPILOG = """\
examples:
  a first look, under a minute; then open runs/look/report.html:
    pocketfed robustness --rules mean,krum,median --attacks none,sign-flip,scaling,alie:1.5 \\
        --fractions 0.2 --rounds 10 --out runs/look

  everything, on digits; Ctrl-C at any time, and the same command goes on:
    pocketfed robustness --out runs/robustness

  more seeds, another rule: finished cells are kept, only new ones are run:
    pocketfed robustness --seeds 1,2,3 --rules mean,krum,multi-krum,nnm+krum --out runs/robustness

  one attack in many strengths, on a harder data set:
    pocketfed data fashion-mnist
    pocketfed robustness --dataset fashion-mnist --attacks none,ipm:0.1,ipm:0.5,ipm:2,ipm:10 --out runs/ipm

What happens: for each rule, attack, fraction and seed a fleet is trained from the same initial model, and its last
model is scored on the test split. Every device reports in every round, so that exactly the fraction attacks; the rule
is told how many. At fraction 0 there is only the attack none; none at another fraction tells what the rule's caution
costs where nobody attacks. What attackers know, and what each attack does: docs/attacks.md.

Rules: mean, krum, multi-krum, trimmed-mean, median, geometric-median, centered-clipping, bulyan; all but the mean also
after nearest-neighbour mixing or bucketing: nnm+krum, bucketing+median.

DIR gets report.html and img/*.svg (heat-maps), table.csv (a line for each cell), results.json (everything),
robustness-table.md, and what going on needs.
"""


def robustness_command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Fill the parser of ``pocketfed robustness``, and return the function that runs it."""
    parser.description = (
        "Compare aggregation rules under attack: accuracy by rule, attack and fraction of attackers.\n\n"
        "Devices train in batches in this process and its workers; their updates go through the server's own pipeline."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study; an unfinished one goes on")
    add = parser.add_argument_group("what is compared").add_argument
    add("--rules", metavar="LIST", help="aggregation rules (default: all of them, without mixing)")
    add("--attacks", metavar="LIST", help="attacks, as `simulate --attack` takes them, and none (default: 16 of them)")
    add("--fractions", default="0,0.1,0.2,0.3", metavar="LIST", help="of attackers (default: %(default)s)")
    add("--seeds", default="1", metavar="LIST", help="repetitions (default: %(default)s)")
    # Defaults are those of StudySettings, or of the data set.
    add = parser.add_argument_group("what is trained").add_argument
    add("--dataset", choices=("digits", "fashion-mnist"), help="training data (default: digits)")
    add("--model", choices=("softmax", "mlp", "cnn"), help="reference model (default: mlp)")
    add("--devices", type=int, metavar="N", help="reports in each round (default: 40 for digits, else 50)")
    add("--rounds", type=int, metavar="R", help="model updates (default: 20)")
    add("--partition", metavar="HOW", help="iid, dirichlet:ALPHA or shards:K (default: dirichlet:1)")
    add("--epochs", type=int, metavar="E", help="passes over a device's examples (default: 2 for digits, else 1)")
    add("--batch-size", type=int, metavar="B", help="examples per step (default: 8 for digits, else 32)")
    add("--lr", dest="learning_rate", type=float, metavar="X", help="learning rate (default: 0.3 for digits, else 0.1)")
    add = parser.add_argument_group("how it is carried out (does not change the result)").add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)")
    add("--overwrite", action="store_true", help="forget the study in DIR and begin anew")
    add("--no-progress", action="store_true", help="no progress on standard error")
    return _run


_SETTINGS = ("dataset", "model", "devices", "rounds", "partition", "epochs", "batch_size", "learning_rate")


def _run(args: argparse.Namespace) -> int:
    from client_sdk.protocol.errors import ConfigurationError  # noqa: PLC0415 - keep --help cheap
    from simulator.datasets import load_dataset  # noqa: PLC0415
    from simulator.robustness.config import DEFAULT_ATTACKS, DEFAULT_RULES, Axes, StudySettings  # noqa: PLC0415
    from simulator.robustness.folder import StudyFolder  # noqa: PLC0415
    from simulator.robustness.report import write_study  # noqa: PLC0415
    from simulator.robustness.study import run_study  # noqa: PLC0415
    from simulator.robustness.summary import Summary  # noqa: PLC0415

    if args.workers < 1:
        raise ConfigurationError(f"--workers must be at least 1, got {args.workers}")
    settings = StudySettings.parse({k: getattr(args, k) for k in _SETTINGS if getattr(args, k) is not None})
    axes = Axes.parse(
        args.rules or ",".join(DEFAULT_RULES), args.attacks or ",".join(DEFAULT_ATTACKS), args.fractions, args.seeds
    )
    # Before anything is written: what every worker would stumble over.
    axes.check(settings, load_dataset(settings.dataset).num_classes)
    cells = list(axes.cells())
    display = _display(quiet=args.no_progress)
    with StudyFolder(args.out, settings, overwrite=args.overwrite) as folder:
        kept = sum(cell.key in folder.done for cell in cells)
        display.begin(len(cells), kept)
        try:
            finished = run_study(folder, cells, workers=args.workers, tell=display.tell, say=display.say)
        finally:
            display.end()
            # Also what an error leaves behind is worth a look.
            summary = Summary.of(settings, axes, folder.done)
            write_study(folder.path, summary)
    return _conclude(args.out, summary, finished=finished)


def _conclude(out: Path, summary: Any, *, finished: bool) -> int:  # noqa: ANN401 - its type would load the simulator
    for fraction in summary.axes.fractions:
        if fraction > 0:
            print(f"worst attack on each rule, {summary.settings.attackers(fraction)} attackers:")
            for rule in summary.rules:
                worst = summary.worst(rule, fraction)
                print(f"  {rule:24} " + ("n/a" if worst is None else f"{worst[1].words()}, {worst[0]}"))
    print(f"report          {out / 'report.html'}\ntable           {out / 'table.csv'}", flush=True)
    if finished:
        return 0
    print(f"interrupted; the same command goes on, finished cells are kept in {out}", file=sys.stderr)
    return EXIT_INTERRUPTED


def _display(*, quiet: bool) -> Any:  # noqa: ANN401 - as above
    from simulator.robustness.display import LiveDisplay, PlainDisplay, SilentDisplay, is_terminal  # noqa: PLC0415

    if quiet:
        return SilentDisplay()
    return LiveDisplay() if is_terminal() else PlainDisplay(sys.stderr)
