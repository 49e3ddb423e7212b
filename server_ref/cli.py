"""``pocketfed serve``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server_ref.flags import add_aggregation_flags, aggregation_settings, merged

_EPILOG = """\
examples:
  pocketfed export mlp --out bundles/mlp --feature-shape 784 --classes 10
  pocketfed serve --bundle bundles/mlp --data-dir state --validation-data val.npz --rounds 40 \\
      --buffer 20
  pocketfed serve --bundle bundles/mlp --data-dir state --rule multi-krum --byzantine 0.2 --buffer 20
  pocketfed serve --bundle bundles/mlp --data-dir state --async --buffer 10 --compression topk:0.01
  pocketfed serve --config server.toml

A configuration file holds the same settings (and more) as TOML:

  data_dir = "state"
  port = 8470
  [task]
  bundle = "bundles/mlp"
  validation_data = "val.npz"
  rounds = 40
  buffer_size = 20          # reports per model update
  concurrency = 24          # devices at work at once: 120 %, for drop-outs
  [task.plan]
  local_epochs = 2
  batch_size = 32
  learning_rate = 0.1
  [task.aggregation]
  rule = "multi-krum"
  byzantine_fraction = 0.2

Environment variables override the file (POCKETFED_TASK__ROUNDS=80), flags override both. Once it
listens, the server prints one line of JSON with its url; the API is documented at /docs. It may be
killed at any moment: a restart on the same data_dir loses no acknowledged report.
"""


def serve_command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Run the reference server."""
    parser.description = "Run the reference server: it hands out work, sums reports exactly and makes the next model."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "pocketfed serve (--config FILE | --bundle DIR --data-dir DIR) [options]"
    add = parser.add_argument_group("where things are").add_argument
    add("--config", type=Path, metavar="FILE", help="TOML file with the settings, these flags' and more")
    add("--data-dir", type=Path, metavar="DIR", help="database and blobs live here")
    add("--bundle", type=Path, metavar="DIR", help="exported program: program.pte, manifest.json, weights.safetensors")
    add("--validation-data", type=Path, metavar="NPZ", help="x and y to score each new model on (default: no scores)")
    add("--host", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, help="port to listen on (default: 8470; 0 picks a free one)")
    add = parser.add_argument_group("rounds").add_argument
    add("--rounds", type=int, metavar="R", help="model updates until the task is finished (default: 10)")
    add("--buffer", type=int, metavar="N", help="reports per model update (default: 10)")
    add(
        "--concurrency",
        type=int,
        metavar="N",
        help="devices at work at once (default: the buffer; with --async twice --buffer)",
    )
    add("--lease", type=float, metavar="SECONDS", help="time that a device has for its report (default: 600)")
    add("--population", type=int, metavar="N", help="devices in all (--algorithm scaffold needs to know)")
    add = parser.add_argument_group("local training").add_argument
    add("--epochs", type=int, metavar="N", help="passes over a device's examples (default: 1)")
    add("--batch-size", type=int, metavar="N", help="examples per step (default: 32)")
    add("--lr", type=float, metavar="RATE", help="learning rate (default: 0.1)")
    add("--prox-mu", type=float, metavar="MU", help="FedProx's pull towards the global model (default: 0, FedAvg)")
    add_aggregation_flags(parser)
    parser.add_argument_group("dishonest devices").add_argument(
        "--byzantine",
        type=float,
        metavar="F",
        help="fraction of a buffer's updates that the --rule stands, instead of --num-byzantine (default: estimated)",
    )
    return run_serve


def run_serve(args: argparse.Namespace) -> int:
    """Read the configuration and serve."""
    from server_ref.config import load_config  # noqa: PLC0415 - `pocketfed --help` must not load the server
    from server_ref.serve import serve  # noqa: PLC0415

    flags: dict[str, Any] = {"data_dir": args.data_dir, "host": args.host, "port": args.port}
    task: dict[str, Any] = {
        "bundle": args.bundle,
        "validation_data": args.validation_data,
        "rounds": args.rounds,
        "buffer_size": args.buffer,
        "concurrency": args.concurrency,
        "lease_s": args.lease,
        "population": args.population,
        "aggregation": {"byzantine_fraction": args.byzantine},
        "plan": {
            "local_epochs": args.epochs,
            "batch_size": args.batch_size,
            "learning_rate": args.lr,
            "prox_mu": args.prox_mu,
        },
    }
    overrides = _without_none(flags)
    if args.asynchronous and args.buffer is not None and args.concurrency is None:
        # So that devices train while a buffer fills, which is the point.
        task["concurrency"] = 2 * args.buffer
    given = merged(aggregation_settings(args, rounds=args.rounds), _without_none(task))
    if given:
        overrides["task"] = given
    return serve(load_config(args.config, overrides))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings without those that no flag gave."""
    cleaned = {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {k: v for k, v in cleaned.items() if v is not None and v != {}}
