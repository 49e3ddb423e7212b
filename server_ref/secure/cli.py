"""``pocketfed aggregator``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

SUITES = ("x25519", "mlkem768-x25519")

_EPILOG = """\
examples:
  # each of five parties, on its own machine: make keys, hand the printed part to the others
  pocketfed aggregator init --index 1 --dir agg1 > agg1.json
  # anybody, from all five parts; everybody compares the printed fingerprint and takes the file
  pocketfed aggregator peers agg1.json agg2.json agg3.json agg4.json agg5.json > peers.json
  # each party, once its configuration (agg1/aggregator.toml) is filled in
  pocketfed aggregator --index 1 --config agg1/aggregator.toml

Environment variables override the file (POCKETFED_AGGREGATOR_PORT=8481), flags override both. Once it listens, the
aggregator prints one line of JSON with its url. It may be killed at any moment: a restart on the same data_dir repeats
the answers that it gave, and never gives others.
"""

_TEMPLATE = """\
# Configuration of aggregator {index}. What stands under [parameters] is this party's own demand: the coordinator can
# ask for more noise, never for less. All aggregators of a task have the same [parameters].
index = {index}
data_dir = "state"
key_file = "keys.json"
peers_file = "peers.json"        # from `pocketfed aggregator peers`, the same file for every party
coordinator_key = ""             # fill in: printed by `pocketfed aggregator coordinator`
host = "127.0.0.1"
port = 8471

[parameters]
num_aggregators = 5
threshold = 3                    # any 2 aggregators together learn nothing but what all may know
min_cohort = 100                 # a sum of fewer reports is never given
clip_norm = 1.0                  # L2 norm that every device clips its update to
fraction_bits = 24               # the grid's step is 2^-24

[parameters.privacy]             # without this table no noise is added, and sums are exact
noise_multiplier = 4.0           # noise of a sum, over clip_norm
max_rounds = 100                 # releases in the whole run
epsilon = 8.0                    # the budget: a release beyond it is refused
delta = 1e-5
"""


def aggregator_command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Run one aggregator of secret-shared updates."""
    parser.description = (
        "Run one aggregator of secret-shared updates: it holds one share of each, and gives sums only.\n\n"
        "Each aggregator is meant to be run by another party, with keys and a configuration of its own."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "pocketfed aggregator [--index I] --config FILE [options]\n       pocketfed aggregator ACTION ..."
    add = parser.add_argument_group("settings").add_argument
    add("--config", type=Path, metavar="FILE", help="TOML file with the settings")
    add("--index", type=int, metavar="I", help="which aggregator this is, from 1")
    add("--data-dir", type=Path, metavar="DIR", help="this aggregator's own database and blobs")
    add("--key-file", type=Path, metavar="FILE", help="its private keys")
    add("--peers-file", type=Path, metavar="FILE", help="public keys of all aggregators")
    add("--host", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, help="port to listen on (default: 8471; 0 picks a free one)")
    parser.set_defaults(run_action=_run_serve)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", prog="pocketfed aggregator")
    _add_init(actions.add_parser("init", help="make an aggregator's keys, and a configuration to fill in"))
    _add_peers(actions.add_parser("peers", help="assemble the aggregators' public parts into the peers' file"))
    _add_coordinator(actions.add_parser("coordinator", help="make the coordinator's key"))
    _add_parameters(actions.add_parser("parameters", help="print what a server's task expects aggregators to pin"))
    return _run


def _run(args: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = args.run_action
    return run(args)


def _run_serve(args: argparse.Namespace) -> int:
    from server_ref.secure.config import load_settings  # noqa: PLC0415 - `pocketfed --help` must not load the server
    from server_ref.secure.serve import serve  # noqa: PLC0415

    names = ("index", "data_dir", "key_file", "peers_file", "host", "port")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return serve(load_settings(args.config, given))


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make an aggregator's keys, unless the folder has them, and print their public part as JSON. The private part\n"
        "stays in DIR/keys.json, readable by its owner only, and is never overwritten. DIR/aggregator.toml is written\n"
        "too, unless it exists: a configuration to fill in."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--index", type=int, required=True, metavar="I", help="which aggregator this is, from 1")
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--suite", choices=SUITES, default=SUITES[0], help="how shares are sealed (default: %(default)s)"
    )
    parser.set_defaults(run_action=_run_init)


def _run_init(args: argparse.Namespace) -> int:
    from client_sdk.protocol.errors import ConfigurationError  # noqa: PLC0415
    from client_sdk.protocol.messages import MAX_AGGREGATORS  # noqa: PLC0415
    from client_sdk.protocol.sealing import SealingSuite  # noqa: PLC0415
    from server_ref.secure.keys import create_keys  # noqa: PLC0415

    if not 1 <= args.index <= MAX_AGGREGATORS:
        raise ConfigurationError(f"--index is from 1 to {MAX_AGGREGATORS}, not {args.index}")
    part, created = create_keys(args.dir / "keys.json", args.index, SealingSuite(args.suite))
    config = args.dir / "aggregator.toml"
    try:
        with config.open("x", encoding="utf-8") as file:
            file.write(_TEMPLATE.format(index=args.index))
        print(f"wrote {config}: fill in coordinator_key and [parameters]", file=sys.stderr)
    except FileExistsError:
        print(f"{config} exists and is left as it is", file=sys.stderr)
    except OSError as e:
        raise ConfigurationError(f"cannot write {config}: {e.strerror or e}") from e
    if not created:
        print(f"the keys in {args.dir} exist and are left as they are; this is their public part", file=sys.stderr)
    print(part.model_dump_json())
    return 0


def _add_peers(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Assemble the public parts that `init` printed into the peers' file, on standard output. Its fingerprint goes\n"
        "to standard error: all parties compare it over another channel, since who replaces a key here reads shares."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", type=Path, nargs="+", metavar="FILE", help="one public part of each aggregator")
    parser.set_defaults(run_action=_run_peers)


def _run_peers(args: argparse.Namespace) -> int:
    from server_ref.secure.keys import Peers, PublicPart, read_public  # noqa: PLC0415

    peers = Peers.of([read_public(path, PublicPart) for path in args.parts])
    print(peers.model_dump_json(indent=2))
    print(f"{len(peers.peers)} aggregators; fingerprint {peers.fingerprint()}", file=sys.stderr)
    return 0


def _add_coordinator(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make the coordinator's key, unless the file has one, and print the public part, which every aggregator's\n"
        "configuration names as coordinator_key."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--key-file", type=Path, required=True, metavar="FILE", help="where the private key goes")
    parser.set_defaults(run_action=_run_coordinator)


def _run_coordinator(args: argparse.Namespace) -> int:
    from server_ref.secure.keys import create_coordinator_key  # noqa: PLC0415

    key, created = create_coordinator_key(args.key_file)
    if not created:
        print(f"{args.key_file} exists and is left as it is", file=sys.stderr)
    print(key.public)
    return 0


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the tables [parameters] and [parameters.privacy] that the aggregators of a server's task have in their\n"
        "configurations. Their operators read them before they pin them: from then on nobody can ask for less."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--server-config", type=Path, required=True, metavar="FILE", help="the configuration of `pocketfed serve`"
    )
    parser.set_defaults(run_action=_run_parameters)


def _run_parameters(args: argparse.Namespace) -> int:
    from client_sdk.protocol.errors import ConfigurationError  # noqa: PLC0415
    from server_ref.config import load_config  # noqa: PLC0415
    from server_ref.settings import toml_table  # noqa: PLC0415
    from server_ref.task import load_task  # noqa: PLC0415

    sharing = load_task(load_config(args.server_config).task).sharing
    if sharing is None:
        raise ConfigurationError(f"{args.server_config}: the updates of this task are not shared; set task.secure")
    print("\n".join(toml_table("parameters", sharing.pinned.model_dump(mode="json"))[1:]))
    return 0
