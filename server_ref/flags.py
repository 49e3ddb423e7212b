"""The flags that say how updates are aggregated: the same for ``pocketfed serve`` and ``pocketfed simulate``."""

from __future__ import annotations

import argparse
from typing import Any, Final

from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError
from server_ref.protection import SecureConfig

RULES: Final = (
    "mean",
    "krum",
    "multi-krum",
    "trimmed-mean",
    "median",
    "geometric-median",
    "centered-clipping",
    "bulyan",
)
META_ALGORITHMS: Final = ("maml", "fomaml", "reptile", "per-fedavg")  # the protocol's, whose module loads numpy
OPTIMIZERS: Final = ("sgd", "adagrad", "adam", "yogi")
ASYNC_STALENESS: Final = 10
"""Staleness that ``--async`` accepts unless told."""


def add_aggregation_flags(parser: argparse.ArgumentParser, *, meta_rate: str = "0.05") -> None:
    """Add the flags, in six groups. Every default is None: what is not given stays as the configuration has it.

    Args:
        parser: Of the command.
        meta_rate: What the configuration has for ``--meta-lr``, in words.
    """
    add = parser.add_argument_group("aggregation").add_argument
    add(
        "--rule",
        choices=RULES,
        metavar="RULE",
        help=f"how a round's updates become one: {RULES[0]} (default), or a rule that stands dishonest ones: "
        f"{', '.join(RULES[1:])}",
    )
    add("--num-byzantine", type=int, metavar="N", help="dishonest updates of a buffer that the rule stands")
    add(
        "--degraded",
        action="store_true",
        help="stand fewer dishonest updates where the buffer is too small for the rule, instead of refusing",
    )
    add(
        "--mixing",
        choices=("none", "bucketing", "nnm"),
        help="before the rule: means of random buckets, or of nearest neighbours (default: none)",
    )
    add("--distances", choices=("exact", "sketch", "sampled"), help="how Krum compares updates (default: exact)")
    add("--clip-norm", type=float, metavar="C", help="largest L2 norm of an update (default: not clipped)")
    add(
        "--clip-scope",
        choices=("global", "layer"),
        help="one norm for the whole update, or one per layer (default: global)",
    )
    add(
        "--weighting",
        choices=("samples", "uniform"),
        help="a report weighs its number of examples, or 1 (default: samples; the rules weigh all alike)",
    )
    add("--optimizer", choices=OPTIMIZERS, help="what applies the aggregate to the model (default: sgd)")
    add("--server-lr", type=float, metavar="RATE", help="its learning rate (default: 1; with meta-gradients --meta-lr)")
    add("--server-momentum", type=float, metavar="BETA", help="momentum of sgd (default: 0)")
    add = parser.add_argument_group("what devices send").add_argument
    add(
        "--algorithm",
        choices=("fedavg", "scaffold", "fednova"),
        help="what devices train and send (default: fedavg; FedProx is --prox-mu)",
    )
    add("--max-steps", type=int, metavar="N", help="end local training after so many steps (default: no limit)")
    add(
        "--compression",
        metavar="SPEC",
        help="topk:0.01, randomk:0.1, threshold:1e-3, sketch:0.05 or quantize:8; more after commas: topk:0.01,bits=8 "
        "or quantize:4,rotate (default: none)",
    )
    _add_personal_flags(parser, meta_rate)
    add = parser.add_argument_group("asynchronous rounds").add_argument
    add(
        "--async",
        dest="asynchronous",
        action="store_true",
        help="make a model of every full buffer, whatever models its updates started from",
    )
    add(
        "--max-staleness",
        type=int,
        metavar="N",
        help=f"model versions that an update may lag behind (default: 0; with --async {ASYNC_STALENESS})",
    )
    add(
        "--staleness",
        metavar="WEIGHTS",
        help="what age costs: polynomial:EXPONENT, constant, or adaptive:FIRST..LAST over the run "
        "(default: polynomial:0.5)",
    )
    add("--tighten", type=int, metavar="ROUNDS", help="let the accepted staleness fall to 0 over so many rounds")
    add("--stale-lr", action="store_true", help="divide the server's learning rate by 1 + the buffer's mean staleness")
    add(
        "--delay-damping",
        type=float,
        metavar="D",
        help="correct stale updates by the steps they missed; D is about learning rate x curvature (default: off)",
    )
    add = parser.add_argument_group("who gets work").add_argument
    add(
        "--selection",
        choices=("any", "fair", "fast", "diverse"),
        help="any: who comes first; fair: who has taken part less; fast: the faster ones; diverse: all kinds of device "
        "(default: any)",
    )
    add(
        "--selection-floor",
        type=float,
        metavar="F",
        help="share of the places that fast gives by turns, and diverse to all kinds alike (default: 0.2)",
    )
    _add_privacy_flags(parser)


def _add_personal_flags(parser: argparse.ArgumentParser, meta_rate: str) -> None:
    add = parser.add_argument_group("models that adapt").add_argument
    add(
        "--personalize",
        choices=META_ALGORITHMS,
        help="learn a model that a few steps on a device's own examples make a good one of; instead of --algorithm",
    )
    add("--inner-steps", type=int, metavar="K", help="steps of --lr that adapt it, on every device (default: 5)")
    add(
        "--query-fraction",
        type=float,
        metavar="F",
        help="share of a device's examples that adaptation never sees, and that judge it (default: 0.2)",
    )
    add(
        "--meta-lr",
        type=float,
        metavar="RATE",
        help="of per-fedavg's local meta steps, and of the server with maml, fomaml and per-fedavg "
        f"(default: {meta_rate})",
    )
    add(
        "--personal-layers",
        metavar="NAMES",
        help="layers that each device keeps for itself and never sends, such as output or fc1.bias,output; with fedavg "
        "and reptile (default: none)",
    )


def _add_privacy_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("privacy and secrecy").add_argument
    add(
        "--epsilon",
        type=float,
        metavar="E",
        help="client-level differential privacy: budget of the whole run; needs --clip-norm (default: none)",
    )
    add("--delta", type=float, metavar="D", help="chance that epsilon does not hold (default: 1e-5)")
    add("--noise-multiplier", type=float, metavar="Z", help="the noise itself, in clip norms, instead of --epsilon")
    add(
        "--noise",
        choices=("server", "aggregators", "devices"),
        help="who adds it (default: the server; with --secure the aggregators)",
    )
    add(
        "--honest-devices",
        type=int,
        metavar="N",
        help="with --noise devices: so many of each sum's are relied on to have added theirs",
    )
    add(
        "--noise-schedule",
        choices=("constant", "linear", "exponential", "step"),
        help="how the noise changes over the run, fixed before it begins (default: constant)",
    )
    add("--final-noise", type=float, metavar="F", help="the last round's noise beside the first one's (default: 0.5)")
    add(
        "--adjacency",
        choices=("zero-out", "replace-one"),
        help="what epsilon protects a device from being told from: reporting nothing, or anything (default: zero-out)",
    )
    add(
        "--max-participations",
        type=int,
        metavar="K",
        help="rounds that count a device at most; the fewer, the less noise (default: all)",
    )
    add(
        "--adaptive-clipping",
        action="store_true",
        help="let the clip norm follow a noised count of the updates within it, from --clip-norm on",
    )
    add("--target-quantile", type=float, metavar="Q", help="share of the updates that should be (default: 0.5)")
    add("--buckets", type=int, metavar="R", help="noised sums of disjoint groups, from which a robust --rule makes one")
    add(
        "--secure",
        metavar="TofN",
        help="share each update among N aggregators, T of which learn their sum and fewer nothing, such as 3of5",
    )
    add("--field", choices=("m61", "m127"), help="of the shares: 2^61 - 1 or 2^127 - 1 (default: m61)")
    add("--packing", type=int, choices=(1, 2), help="coordinates in a share; 2 halves the upload (default: 1)")
    add(
        "--checks",
        choices=("trust-devices", "projections"),
        help="what is checked of updates that nobody sees (default: trust-devices)",
    )
    add("--minimum-cohort", type=int, metavar="N", help="fewest reports that a sum may be opened of (default: 2)")


def aggregation_settings(args: argparse.Namespace, *, rounds: int | None) -> dict[str, Any]:
    """The given flags as settings of a task, nested like its configuration file.

    Args:
        args: Parsed flags.
        rounds: Length of the run, for what follows its progress; None if no flag says it.

    Raises:
        ConfigurationError: A flag that cannot be read, or that is missing beside another.
    """
    task: dict[str, Any] = _given(
        compression=args.compression,
        delay_damping=args.delay_damping,
        aggregation=_given(
            rule=args.rule,
            num_byzantine=args.num_byzantine,
            degraded=args.degraded or None,
            mixing=args.mixing,
            distances=args.distances,
            clip_norm=args.clip_norm,
            clip_scope=args.clip_scope,
            weighting=args.weighting,
        ),
        optimizer=_given(name=args.optimizer, learning_rate=args.server_lr, momentum=args.server_momentum),
        plan=_plan(args),
        selection=_given(policy=args.selection, floor=args.selection_floor),
        staleness=_staleness(args, rounds),
        privacy=_privacy(args),
        secure=_secure(args),
    )
    if args.asynchronous:
        task["refill_at"] = 1
    return task


def _given(**values: Any) -> dict[str, Any]:  # noqa: ANN401 - flags of any type
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    if args.personalize is not None and args.algorithm is not None:
        raise ConfigurationError("--personalize and --algorithm both say what devices train: leave one of them out")
    meta = _given(inner_steps=args.inner_steps, query_fraction=args.query_fraction, meta_learning_rate=args.meta_lr)
    found = _given(algorithm=args.personalize or args.algorithm, max_steps=args.max_steps, meta=meta)
    if args.personalize is not None:
        # Also where all of it stays as it is by default: meta-learning is what has this section.
        found["meta"] = meta
    if args.personal_layers is not None:
        found["personal"] = [name.strip() for name in args.personal_layers.split(",")]
    return found


def _privacy(args: argparse.Namespace) -> dict[str, Any]:
    found = _given(
        epsilon=args.epsilon,
        delta=args.delta,
        noise_multiplier=args.noise_multiplier,
        noise_schedule=args.noise_schedule,
        final_noise=args.final_noise,
        adjacency=args.adjacency,
        honest_devices=args.honest_devices,
        max_participations=args.max_participations,
        buckets=args.buckets,
        adaptive_clipping=args.adaptive_clipping or None,
        target_quantile=args.target_quantile,
    )
    noise = args.noise
    if noise is None and (args.epsilon is not None or args.noise_multiplier is not None):
        noise = "server" if args.secure is None else "aggregators"
    return found | _given(noise=noise)


def _secure(args: argparse.Namespace) -> dict[str, Any]:
    found = _given(
        field=args.field,
        packing=args.packing,
        checks=args.checks,
        minimum_cohort=args.minimum_cohort,
    )
    if args.secure is None:
        if found:
            raise ConfigurationError(f"--{next(iter(found)).replace('_', '-')} is about shares: add --secure 3of5")
        return {}
    try:
        shares = SecureConfig.parse(args.secure)
    except ValueError as e:
        # pydantic's own report says more than is wanted of one flag.
        reason = str(e) if not isinstance(e, ValidationError) else e.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"--secure: {reason}") from e
    return {"threshold": shares.threshold, "num_aggregators": shares.num_aggregators, **found}


def _staleness(args: argparse.Namespace, rounds: int | None) -> dict[str, Any]:
    latest = args.max_staleness
    if latest is None and args.asynchronous:
        latest = ASYNC_STALENESS
    found = _given(max_staleness=latest, tighten_rounds=args.tighten, scale_learning_rate=args.stale_lr or None)
    if args.staleness is not None:
        found |= _weights(args.staleness, rounds)
    if found and "max_staleness" not in found:
        raise ConfigurationError("how staleness is weighed only matters where it is accepted: add --async")
    return found


def _weights(text: str, rounds: int | None) -> dict[str, Any]:
    name, _, exponents = text.partition(":")
    first, _, last = exponents.partition("..")
    try:
        match name:
            case "constant" if not exponents:
                return {"weighting": name}
            case "polynomial" if not last:
                return {"weighting": name, **_floats(exponent=first)}
            case "adaptive":
                if rounds is None:
                    raise ConfigurationError("--staleness adaptive follows the run's progress: give --rounds too")
                return {"weighting": name, "total_rounds": rounds, **_floats(exponent=first, final_exponent=last)}
    except ValueError:
        pass
    raise ConfigurationError(
        f"--staleness {text} cannot be read; give constant, polynomial, polynomial:0.5, adaptive or adaptive:0.5..2"
    )


def _floats(**texts: str) -> dict[str, float]:
    return {name: float(text) for name, text in texts.items() if text}


def merged(*settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, the later ones over the earlier ones.

    Example:
        >>> merged({"plan": {"batch_size": 8}, "rounds": 3}, {"plan": {"learning_rate": 0.1}})
        {'plan': {'batch_size': 8, 'learning_rate': 0.1}, 'rounds': 3}
    """
    out: dict[str, Any] = {}
    for each in settings:
        for name, value in each.items():
            old = out.get(name)
            out[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out
