"""The ``pocketfed`` command: a dispatcher, and the ``device`` command.

Each package registers its commands in the entry-point group ``pocketfed.commands``; a command is a function that
fills an ``argparse`` parser and returns the function that runs it. The dispatcher looks a command up by name and
loads that one alone, so that a device never loads the server's code, and imports no sibling package itself.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import time
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from client_sdk.protocol.errors import ConfigurationError, PocketfedError
from client_sdk.protocol.profile import DeviceTier

if TYPE_CHECKING:
    from client_sdk.power import PowerPolicy

Run = Callable[[argparse.Namespace], int]

GROUP = "pocketfed.commands"
DEBUG_VARIABLE = "POCKETFED_DEBUG"
# The extra that brings what a package's commands need; client_sdk needs none.
EXTRA_OF_PACKAGE: Mapping[str, str] = {"server_ref": "server", "mobile_export": "export", "simulator": "simulator"}
TIERS: Mapping[str, DeviceTier] = {"high": DeviceTier.HIGH_END, "mid": DeviceTier.MID_RANGE, "low": DeviceTier.LOW_END}

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
EXIT_BROKEN_PIPE = 141  # likewise for SIGPIPE

EXAMPLES = """\
examples:
  train a digit classifier on a simulated fleet, and write runs/first/report.html:
    pocketfed simulate --dataset digits --devices 20 --rounds 5 --model mlp --out runs/first

  run one device as a process of its own against a server:
    pocketfed device --server http://127.0.0.1:8470 --data shard.npz --state-dir state/device-1

`pocketfed COMMAND --help` explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: the command's own; 2 for a usage error or a ``PocketfedError`` (printed as one line, with
        a traceback only where ``POCKETFED_DEBUG=1``); 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}
    try:
        status = _dispatch(arguments, commands)
        sys.stdout.flush()  # here, where a reader that has left is no error
    except PocketfedError as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); flushing at exit must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return status


def _dispatch(arguments: list[str], commands: Mapping[str, EntryPoint]) -> int:
    if not arguments:
        print(_overview(commands), file=sys.stderr)
        return EXIT_USAGE
    name, *rest = arguments
    if name in {"-h", "--help"}:
        print(_overview(commands))
        return 0
    if name == "--version":
        print(f"pocketfed {version('pocketfed')}")
        return 0
    if name not in commands:
        return _fail(_unknown(name, commands))
    return _run_command(commands[name], rest)


def _run_command(entry: EntryPoint, arguments: list[str]) -> int:
    try:
        parser = _parser(entry)
        run: Run = entry.load()(parser)
        return run(parser.parse_args(arguments))
    except SystemExit as stop:  # argparse ends a process after --help and after a usage error
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    except ImportError as error:
        hint = _missing_extra(entry, error)
        if hint is None or os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        return _fail(f"`pocketfed {entry.name}` {hint}")


def _parser(entry: EntryPoint) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"pocketfed {entry.name}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def _overview(commands: Mapping[str, EntryPoint]) -> str:
    width = max(map(len, commands), default=0)
    lines = [
        "usage: pocketfed COMMAND [ARGUMENT ...]",
        "       pocketfed --help | --version",
        "",
        "Federated learning for phones: devices that run ExecuTorch programs, a server, a simulated fleet.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {_summary(entry)}" for name, entry in commands.items()),
        "",
        EXAMPLES,
    ]
    return "\n".join(lines).rstrip()


def _summary(entry: EntryPoint) -> str:
    """First line of the command's own description; a command that cannot be loaded says what it lacks."""
    parser = _parser(entry)
    try:
        entry.load()(parser)
    except ImportError as error:
        return f"({_missing_extra(entry, error) or error})"
    return (parser.description or "").strip().partition("\n")[0]


def _unknown(name: str, commands: Mapping[str, EntryPoint]) -> str:
    if name.startswith("-"):
        return f"the command comes first, its options after it; got {name}. Commands: {', '.join(commands)}"
    nearest = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean `pocketfed {nearest[0]}`?" if nearest else f"commands: {', '.join(commands)}"
    return f"there is no command {name!r}; {hint}"


def _missing_extra(entry: EntryPoint, error: ImportError) -> str | None:
    """What to install, where a third party is missing; None where the fault is our own."""
    package = entry.module.partition(".")[0]
    missing = (error.name or "").partition(".")[0]
    if package not in EXTRA_OF_PACKAGE or missing in {package, "client_sdk", *EXTRA_OF_PACKAGE}:
        return None
    return f"needs {missing or 'more packages'}: pip install 'pocketfed[{EXTRA_OF_PACKAGE[package]}]'"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USAGE


def device_command(parser: argparse.ArgumentParser) -> Run:
    """Fill the parser of ``pocketfed device``, and return the function that runs it."""
    parser.description = (
        "Run one device as a process of its own.\n\n"
        "The device enrols with the server (once; its key stays in the state directory), asks for work, trains the\n"
        "exported program on its own data, and uploads the update. The data never leaves the process. Stop it with\n"
        "Ctrl-C and start it again with the same state directory: it goes on where it was."
    )
    parser.epilog = (
        "examples:\n"
        "  take part until stopped:\n"
        "    pocketfed device --server http://127.0.0.1:8470 --data shard.npz --state-dir state/device-1\n"
        "  send one update and leave, pretending to be a low-end phone:\n"
        "    pocketfed device --server http://127.0.0.1:8470 --data shard.npz --state-dir state/device-2 "
        "--tier low --once\n"
        "  keep a model of its own as well, adapted after its rounds:\n"
        "    pocketfed device --server http://127.0.0.1:8470 --data shard.npz --state-dir state/device-3 --personalize"
    )
    parser.add_argument("--server", required=True, metavar="URL", help="base address of the server")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="the device's examples: an .npz file with x (float32, examples first) and y (int64 labels)",
    )
    parser.add_argument(
        "--state-dir", required=True, type=Path, metavar="DIR", help="keys, cached models, reports not yet delivered"
    )
    parser.add_argument(
        "--runtime",
        choices=("auto", "native", "pybindings"),
        default="auto",
        help="ExecuTorch adapter: the native shim (no torch), the official bindings (need torch), or the first that "
        "works (default: %(default)s)",
    )
    parser.add_argument(
        "--tier", choices=tuple(TIERS), default="mid", help="class of phone to report (default: %(default)s)"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="what the device calls itself in its progress lines (default: its id)"
    )
    parser.add_argument(
        "--server-key",
        nargs="+",
        metavar="HEX",
        help="the server's public key, as it says when it starts: no other reply is believed; several while it changes "
        "its key (default: the key of its first reply, kept in the state directory)",
    )
    parser.add_argument(
        "--aggregator-keys",
        type=Path,
        metavar="FILE",
        help="whom to trust: a JSON list of the aggregators' public sealing keys in hex, in their order. An assignment "
        "that would send the update to anyone else, or in the clear, is refused (default: the server's word)",
    )
    parser.add_argument(
        "--min-threshold",
        type=_positive,
        metavar="T",
        help="with --aggregator-keys: refuse an assignment if fewer than T aggregators could read the update (default: "
        "more than half of them)",
    )
    resources = parser.add_argument_group("when it works, and what it may use")
    resources.add_argument(
        "--power",
        choices=("watch", "ignore"),
        default="watch",
        help="watch: start above 20 %% battery and pause at 15 %%, pause when it is hot, rest as it warms up, resume "
        "from the checkpoint; ignore: work whatever holds (default: %(default)s)",
    )
    resources.add_argument(
        "--require",
        nargs="+",
        choices=("charging", "unmetered", "idle"),
        default=[],
        metavar="CONDITION",
        help="work only while charging, on an unmetered network, while nobody uses the device: any of charging, "
        "unmetered, idle",
    )
    resources.add_argument(
        "--quiet-hours",
        nargs="+",
        type=_quiet_hours,
        default=[],
        metavar="HH:MM-HH:MM",
        help="local times of day at which it does not work, such as 08:00-22:30",
    )
    resources.add_argument(
        "--memory-limit",
        type=_positive,
        metavar="MIB",
        help="what this process may use at most: training is planned for it, and refused where it does not fit",
    )
    resources.add_argument(
        "--run-for",
        type=_seconds,
        metavar="SECONDS",
        help="leave after so much time, with a checkpoint; the same command goes on from there",
    )
    resources.add_argument(
        "--checkpoint-key",
        type=Path,
        metavar="FILE",
        help="encrypt checkpoints and the personal model with the key in this file: 64 hex digits, as "
        "`openssl rand -hex 32` makes them",
    )
    _add_personal_flags(parser)
    private = parser.add_argument_group(
        "local privacy",
        "noise that this device adds to each report by itself, so that it need not trust the server; what it spends is "
        "noted in the state directory, over all runs (default: none)",
    )
    private.add_argument("--local-epsilon", type=float, metavar="E", help="of one report; needs the two below")
    private.add_argument("--local-clip", type=float, metavar="C", help="largest L2 norm of an update before the noise")
    private.add_argument(
        "--local-budget", type=float, metavar="E_TOTAL", help="largest epsilon of all reports together"
    )
    private.add_argument("--local-delta", type=float, metavar="D", help="of both (default: 1e-6)")
    stop = parser.add_mutually_exclusive_group()
    stop.add_argument("--once", action="store_true", help="leave after one accepted report")
    stop.add_argument(
        "--max-reports", type=_positive, metavar="N", help="leave after N accepted reports (default: run until stopped)"
    )
    return _run_device


def _add_personal_flags(parser: argparse.ArgumentParser) -> None:
    personal = parser.add_argument_group(
        "a model of its own",
        "after its rounds the device adapts the newest model to its own examples, judges it by those\nthat did not "
        "adapt it, and keeps the better one in the state directory (default: none)",
    )
    personal.add_argument(
        "--personalize",
        nargs="?",
        const="readapt",
        metavar="MERGE",
        help="adapt; and once there is a personal model and a newer global one: readapt the newer one, replace the "
        "personal one by it, or interpolate:A, the newer one plus A times what was learned (default: readapt)",
    )
    personal.add_argument(
        "--personal-steps", type=int, metavar="K", help="steps of adaptation (default: the task's, else 5)"
    )
    personal.add_argument("--personal-lr", type=float, metavar="X", help="learning rate of each (default: the task's)")
    personal.add_argument(
        "--personal-layers", metavar="NAMES", help="adapt these layers alone, with commas between them (default: all)"
    )


def _run_device(args: argparse.Namespace) -> int:
    if not args.data.is_file():
        raise ConfigurationError(f"--data {args.data}: no such file; name an .npz file with arrays x and y")
    from client_sdk.device import run_device  # noqa: PLC0415 - numpy and httpx are not needed for --help
    from client_sdk.personalization import chosen_config  # noqa: PLC0415 - likewise
    from client_sdk.privacy import local_policy  # noqa: PLC0415 - likewise

    return run_device(
        server_url=args.server,
        data=args.data,
        state_dir=args.state_dir,
        runtime=args.runtime,
        tier=TIERS[args.tier],
        name=args.name,
        max_reports=1 if args.once else args.max_reports,
        aggregator_keys=args.aggregator_keys,
        min_threshold=args.min_threshold,
        power_policy=_power_policy(args),
        memory_limit_mib=args.memory_limit,
        checkpoint_key=args.checkpoint_key,
        run_for_s=args.run_for,
        server_keys=args.server_key,
        personalization=chosen_config(
            args.personalize, steps=args.personal_steps, rate=args.personal_lr, layers=args.personal_layers
        ),
        local_privacy=local_policy(
            epsilon=args.local_epsilon, clip_norm=args.local_clip, budget=args.local_budget, delta=args.local_delta
        ),
    )


def _power_policy(args: argparse.Namespace) -> PowerPolicy | None:
    from client_sdk.power import PowerPolicy, QuietHours  # noqa: PLC0415 - not needed for --help

    if args.power == "ignore":
        if args.require or args.quiet_hours:
            raise ConfigurationError("--require and --quiet-hours mean nothing with --power ignore; drop one of them")
        return None
    return PowerPolicy(
        require_charging="charging" in args.require,
        require_unmetered="unmetered" in args.require,
        require_idle="idle" in args.require,
        quiet_hours=tuple(QuietHours(begin=begin, end=end) for begin, end in args.quiet_hours),
    )


def _quiet_hours(text: str) -> tuple[time, time]:
    begin, _, end = text.partition("-")
    try:
        hours = time.fromisoformat(begin), time.fromisoformat(end)
    except ValueError:
        hours = time(), time()
    if hours[0] == hours[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a stretch of the day such as 08:00-22:30")
    return hours


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
