"""``pocketfed simulate`` and ``pocketfed data``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

DEFAULT_ROUNDS: Final = 60
EXIT_HALTED = 3
EXIT_INTERRUPTED = 130

_SIMULATE_EPILOG = """\
examples:
  a first run, some seconds; then open runs/first/report.html:
    pocketfed simulate --devices 20 --rounds 5 --out runs/first

  200 phones with two thirds of the classes each, on a real image data set:
    pocketfed data fashion-mnist
    pocketfed simulate --dataset fashion-mnist --model mlp --devices 200 --rounds 40 \\
        --partition dirichlet:0.5 --out runs/fashion

  one phone in ten vanishes; invite a third more than needed, keep the first to report:
    pocketfed simulate --dropout 0.1 --overselect 1.3 --out runs/dropouts

  asynchronous: a model of every 10 reports, 40 devices always at work, at most 8 versions behind:
    pocketfed simulate --async --buffer 10 --overselect 4 --max-staleness 8 --out runs/async

  a fifth of the devices are dishonest and hide among the honest ones; a rule that stands them:
    pocketfed simulate --attack alie:1.5 --byzantine 0.2 --rule multi-krum --out runs/attacked

  devices send one value in a hundred, and the rest later:
    pocketfed simulate --compression topk:0.01 --out runs/small

  the same sessions and rounds without server and HTTP, trained in batches: for large fleets
    pocketfed simulate --engine cohort --devices 1000 --cohort 100 --out runs/large

  differential privacy for whole devices, epsilon 8; the more reports a round, the less the noise matters:
    pocketfed simulate --model softmax --engine cohort --devices 1000 --cohort 300 --rounds 20 --partition iid \\
        --clip-norm 1 --epsilon 8 --max-participations 10 --out runs/private

  the server learns noised sums only: updates are shared among 5 aggregators, any 3 of which open a sum:
    pocketfed simulate --model softmax --devices 50 --cohort 40 --rounds 10 --clip-norm 1 --epsilon 8 \\
        --secure 3of5 --aggregators processes --out runs/shared

  a model that five steps on a phone's own pictures make its own, where everybody writes a little aslant:
    pocketfed simulate --personalize fomaml --skew rotation:45 --partition shards:2 --rounds 100 --out runs/fomaml
    pocketfed simulate --adapt-steps 5 --skew rotation:45 --partition shards:2 --rounds 100 --out runs/fine-tuned

  go on after Ctrl-C (or after the machine went down):
    pocketfed simulate --resume --out runs/fashion

What happens: the training data is dealt out to the devices, the model is exported to an ExecuTorch
program (cached), a server starts on loopback, and every device runs the SDK against it over HTTP:
enrol, check in, download, train, upload. Time is simulated, so a seed gives the same model however
fast the machine is and however many workers run (but for the noise of differential privacy, which
nobody can repeat). The devices' keys are derived from the seed:
simulation identities, never for a production server.

DIR gets results.json (every figure), report.html (plots, opens offline), and what --resume needs.
Exit status: 0 after the last round, 3 if training was halted before it, 130 if it was interrupted.
"""


def simulate_command(  # noqa: PLR0915 - one statement a flag
    parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], int]:
    """Fill the parser of ``pocketfed simulate``, and return the function that runs it."""
    from server_ref.flags import add_aggregation_flags  # noqa: PLC0415 - `pocketfed --help` loads no server
    from simulator.recipes import told_meta_rates, told_rates  # noqa: PLC0415 - as above

    parser.description = (
        "Train a model on a simulated fleet, and write a report.\n\n"
        "Every device runs the real thing: the client SDK with an exported ExecuTorch program, over HTTP,\n"
        "against the reference server. Only the devices' clock is simulated."
    )
    parser.usage = "pocketfed simulate --out DIR [options]"
    parser.epilog = _SIMULATE_EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # Defaults are those of SimulationConfig; None tells what was given from what was not, which --resume must know.
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for results and report; new or empty")
    what = parser.add_argument_group("what is trained")
    add = what.add_argument
    add(
        "--dataset",
        choices=("digits", "fashion-mnist", "fashion-mnist-14", "manpages"),
        help="training data; fashion-mnist-14: pooled and of one length, for linear private models; manpages: text in "
        "eight languages (default: digits)",
    )
    add(
        "--model",
        choices=("softmax", "mlp", "cnn", "byte-mlp", "byte-gru"),
        help="reference model; byte-mlp and byte-gru are for text (default: mlp, for fashion-mnist-14 softmax, "
        "for manpages byte-mlp)",
    )
    add("--devices", type=int, metavar="N", help="size of the fleet (default: 100)")
    add(
        "--partition",
        metavar="HOW",
        help="iid, dirichlet:ALPHA, shards:K or by-group (default: dirichlet:0.5, for manpages by-group)",
    )
    add("--skew", metavar="HOW", help="how devices' pictures differ, e.g. rotation:30,brightness:0.2 (default: none)")
    add(
        "--profiles",
        metavar="FILE",
        help="what the fleet is made of: a TOML or JSON file, or steady (default), or phones, which have a day",
    )
    add("--seed", type=int, metavar="S", help="fixes the whole run (default: 1)")
    add(
        "--engine",
        choices=("devices", "cohort"),
        help="devices: each runs the real SDK (default); cohort: the same run, trained in batches in this process",
    )
    add(
        "--aggregators",
        choices=("embedded", "processes"),
        help="with --secure: all in the server's process (default), or each a real service in one of its own",
    )
    rounds = parser.add_argument_group("rounds")
    add = rounds.add_argument
    add("--rounds", type=int, metavar="R", help="model updates (default: 60)")
    add(
        "--cohort",
        "--buffer",
        type=int,
        metavar="K",
        help="reports per model update (default: a fifth of the fleet, 10 or more)",
    )
    add("--overselect", type=float, metavar="X", help="devices invited per report needed, 1.0 or more (default: 1.0)")
    add("--refill-at", type=int, metavar="N", help="asynchronous: invite again when N slots are free (default: all)")
    add("--stragglers", type=float, metavar="F", help="fraction of the fleet that is slow for good (default: 0)")
    add("--slowdown", type=float, metavar="X", help="how many times longer their sessions take (default: 10)")
    add("--dropout", type=float, metavar="P", help="probability that an invited device vanishes (default: 0)")
    add("--lease", type=float, metavar="S", help="seconds that the server waits for a report (default: by the slowest)")
    local = parser.add_argument_group("local training")
    add = local.add_argument
    add(
        "--epochs",
        type=int,
        metavar="E",
        help="passes over a device's examples (default: 5 for digits and fashion-mnist, else 1)",
    )
    add(
        "--batch-size",
        type=int,
        metavar="B",
        help="examples per step (default: 16 for fashion-mnist and manpages, else 8)",
    )
    add("--lr", dest="learning_rate", type=float, metavar="X", help=f"learning rate (default: {told_rates()})")
    add(
        "--local-work",
        choices=("planned", "adaptive"),
        help="adaptive: epochs and batch are the most, and each device does what its tier and memory allow",
    )
    add("--work-scale", type=float, metavar="X", help="let an example cost X times what it costs (default: 1)")
    add("--prox-mu", type=float, metavar="MU", help="FedProx's coefficient (default: 0, FedAvg)")
    add = parser.add_argument_group("what adaptation gives").add_argument
    add(
        "--adapt-steps",
        type=int,
        metavar="K",
        help="every device takes K steps on its own examples from the finished model, and both are judged by what it "
        "will see next (default: --inner-steps with --personalize; 5 with --personal-layers; else 0, not at all)",
    )
    add("--adapt-lr", dest="adapt_learning_rate", type=float, metavar="X", help="their rate (default: --lr)")
    add = parser.add_argument_group("attackers").add_argument
    add(
        "--attack",
        metavar="NAME",
        help="what dishonest devices do, e.g. sign-flip, scaling:100, alie, ipm:0.5, backdoor:target=0",
    )
    add(
        "--byzantine",
        type=float,
        metavar="F",
        help="fraction of the fleet that is dishonest, and that the --rule is built to stand (default: 0)",
    )
    add_aggregation_flags(parser, meta_rate=told_meta_rates())
    other = parser.add_argument_group("another server")
    add = other.add_argument
    add("--server", metavar="URL", help="use a running server: its clock, rounds, model and plan; not repeatable")
    how = parser.add_argument_group("how it is carried out (does not change the result)")
    add = how.add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="training threads (default: %(default)s)")
    add(
        "--runtime", choices=("auto", "native", "pybindings"), default="auto", help="ExecuTorch adapter (default: auto)"
    )
    add("--resume", action="store_true", help="go on with the run in DIR; its configuration is kept")
    add("--overwrite", action="store_true", help="replace an earlier run in DIR")
    add("--no-progress", action="store_true", help="no progress on standard error")
    return _run_simulate


_CONFIG_FLAGS = (
    "dataset", "model", "devices", "partition", "seed", "rounds", "cohort", "overselect", "refill_at", "dropout",
    "stragglers", "slowdown", "epochs", "batch_size", "learning_rate", "prox_mu", "attack", "byzantine", "engine",
    "aggregators", "server", "skew", "local_work", "lease", "work_scale", "adapt_steps", "adapt_learning_rate",
)  # fmt: skip


def _run_simulate(args: argparse.Namespace) -> int:
    from client_sdk.protocol.errors import ConfigurationError  # noqa: PLC0415 - keep --help cheap
    from simulator.config import SimulationConfig  # noqa: PLC0415
    from simulator.folder import RunFolder  # noqa: PLC0415

    given = given_settings(args)
    if args.workers < 1:
        raise ConfigurationError(f"--workers must be at least 1, got {args.workers}")
    if args.resume and args.overwrite:
        raise ConfigurationError("--resume goes on with a run and --overwrite begins it anew; leave one of them out")
    config = SimulationConfig.parse(given)
    if args.resume:
        folder = RunFolder.resume(args.out, given)
    else:
        folder = RunFolder.begin(args.out, config, overwrite=args.overwrite)
    with folder:
        return _simulate(args, folder)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as fields of ``SimulationConfig``; nothing about those that were not given."""
    from client_sdk.protocol.errors import ConfigurationError  # noqa: PLC0415 - keep --help cheap
    from server_ref.flags import aggregation_settings, merged  # noqa: PLC0415

    rounds = DEFAULT_ROUNDS if args.rounds is None else args.rounds
    settings = aggregation_settings(args, rounds=rounds)
    privacy = settings.get("privacy", {})
    idle = [name for name in ("delta", "adjacency") if name in privacy]
    if idle and "noise" not in privacy and not args.resume:
        raise ConfigurationError(
            f"--{idle[0]} is about what an epsilon means, and nobody adds noise: add --epsilon, or leave it out"
        )
    settings |= settings.pop("plan", {})
    if args.personalize is not None and args.epochs is not None:
        raise ConfigurationError(f"--personalize {args.personalize} takes --inner-steps steps: leave --epochs out")
    if args.asynchronous and args.overselect is None:
        # So that devices train while a buffer fills, which is the point.
        settings["overselect"] = 2.0
    if args.profiles is not None:
        from simulator.profiles import read_profiles  # noqa: PLC0415

        settings["profiles"] = read_profiles(args.profiles)
    return merged(settings, {k: getattr(args, k) for k in _CONFIG_FLAGS if getattr(args, k) is not None})


def _simulate(args: argparse.Namespace, folder: Any) -> int:  # noqa: ANN401 - its type would load the simulator
    from rich.console import Console  # noqa: PLC0415

    from simulator.progress import LiveDisplay, SilentDisplay, plain_display  # noqa: PLC0415
    from simulator.run import RunOptions, run_simulation  # noqa: PLC0415

    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        if not args.no_progress:
            console.print(line, markup=False)

    def run(display: Any) -> Any:  # noqa: ANN401 - as above
        return run_simulation(folder, RunOptions(runtime=args.runtime, workers=args.workers, display=display, say=say))

    if args.no_progress:
        results = run(SilentDisplay())
    elif console.is_terminal:
        with LiveDisplay(console) as live:
            results = run(live)
    else:
        results = run(plain_display())
    return _tell(folder.path, results)


def _tell(out: Path, results: Any) -> int:  # noqa: ANN401 - its type would load the simulator
    from simulator.summary import summary_of  # noqa: PLC0415 - as above

    print("\n".join(summary_of(results, out)), flush=True)
    if results.status == "completed":
        return 0 if results.halted is None else EXIT_HALTED
    if results.config.server is None:
        print(f"interrupted; go on with: pocketfed simulate --resume --out {out}", file=sys.stderr)
    return EXIT_INTERRUPTED


def data_command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Fill the parser of ``pocketfed data``, and return the function that runs it."""
    parser.description = (
        "Fetch a data set for simulations.\n\n"
        "fashion-mnist comes from Debian's package dataset-fashion-mnist (31 MB), without root; every file's SHA-256\n"
        "is compared with a pinned one. manpages is text in eight languages, of the manual pages that Debian's\n"
        "packages manpages, manpages-de, ... carry (19 MB); the hash of what was made of them is kept with it\n"
        "(docs/languages.md). digits needs no fetching: scikit-learn brings it."
    )
    parser.epilog = (
        "examples:\n"
        "  pocketfed data fashion-mnist\n"
        "  pocketfed data fashion-mnist --from ~/Downloads/fashion    (the four *-ubyte.gz files, from elsewhere)\n"
        "  pocketfed data manpages --from ~/Downloads/debs            (the packages, or a finished corpus)\n"
        "  pocketfed data manpages && pocketfed simulate --dataset manpages --devices 80 --engine cohort \\\n"
        "      --rounds 100 --out runs/languages\n"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", choices=("digits", "fashion-mnist", "manpages"), help="which data set")
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="take the files from this folder")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where to keep the files (default: where simulations look: $POCKETFED_CACHE/data or the user's cache)",
    )  # fmt: skip
    return _run_data


def _run_data(args: argparse.Namespace) -> int:
    from client_sdk.protocol.folders import cache_folder  # noqa: PLC0415
    from simulator.fetch import FASHION_MNIST, fetch, install_from_folder, is_current  # noqa: PLC0415

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.dataset == "digits":
        print("digits comes with scikit-learn; nothing to fetch")
        return 0
    target = args.out or cache_folder("data") / args.dataset
    if args.dataset == "manpages":
        _make_corpus(target, args.source, say)
    elif is_current(FASHION_MNIST, target):
        say("all files are there and unharmed")
    elif args.source:
        install_from_folder(FASHION_MNIST, args.source, target, say)
    else:
        fetch(FASHION_MNIST, target, say)
    print(target)
    return 0


def _make_corpus(target: Path, source: Path | None, say: Callable[[str], None]) -> None:
    from simulator.fetch import corpus_from_folder, fetch_corpus  # noqa: PLC0415
    from simulator.languages import is_whole  # noqa: PLC0415

    if is_whole(target):
        say("all files are there and unharmed")
    elif source:
        corpus_from_folder(source, target, say)
    else:
        fetch_corpus(target, say)
