"""``pocketfed export``: a reference model, or one of the user's own, as a bundle in a folder."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import Role
from client_sdk.protocol.shamir import Scheme
from mobile_export.int8_cli import add_int8_options, int8_body, load_weights

if TYPE_CHECKING:
    from torch import nn

    from mobile_export.bundle import ProgramBundle
    from mobile_export.export import ExportProgress

_DOING = {
    "trace": "tracing",
    "lower": "lowering",
    "emit": "serialising",
    "check": "comparing with eager PyTorch:",
    "cached": "found in the cache",
}


def export_command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Fill the parser of ``pocketfed export``, and return the function that runs it."""
    parser.description = (
        "Export a model as a program that phones train.\n\n"
        "Writes program.pte (one ExecuTorch program with a method for each role and batch size), manifest.json\n"
        "(signatures, memory, hashes) and weights.safetensors (initial weights) into a folder. The program is run\n"
        "against eager PyTorch before it is written; an export that differs is refused. Exports are cached by\n"
        "content in $POCKETFED_CACHE/exports (or the user's cache folder)."
    )
    parser.epilog = (
        "examples:\n"
        "  a 784-64-10 perceptron for 28x28 images:\n"
        "    pocketfed export mlp --feature-shape 28x28 --classes 10 --hidden 64 --out bundles/mlp\n"
        "  a small CNN for scikit-learn's digits, with the batch sizes that a task needs:\n"
        "    pocketfed export cnn --feature-shape 8x8 --classes 10 --batch-sizes train=16 evaluate=128 "
        "--out bundles/digits\n"
        "  what MAML with five inner steps and a personal model need:\n"
        "    pocketfed export mlp --feature-shape 8x8 --batch-sizes train=8 evaluate=128 infer=1 maml=8 adapt=8 "
        "--inner-steps 5 --out bundles/meta\n"
        "  a model of one's own: `make_model()` in my_models.py returns an nn.Module:\n"
        "    pocketfed export my_models:make_model --feature-shape 12 --out bundles/own"
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="softmax, mlp, cnn, byte-mlp, byte-gru, or MODULE:CALLABLE, which returns an nn.Module",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; a bundle is replaced")
    parser.add_argument(
        "--feature-shape",
        type=_shape,
        metavar="SHAPE",
        help="shape of one example, such as 784 or 28x28 (default: 784 for the reference models, 16 for those of "
        "text, else the model's own feature_shape)",
    )
    parser.add_argument(
        "--classes",
        type=_positive,
        metavar="N",
        help="number of logits (default: 10 for the reference models, 256 for text)",
    )
    parser.add_argument(
        "--hidden", type=_sizes, metavar="N[,N...]", help="widths of the hidden layers of mlp or cnn (default: 64, 32)"
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=_batch_sizes,
        metavar="ROLE=N[,N...]",
        help="batch sizes for each of grad, train, evaluate, infer, of adapt, reptile, maml, fomaml, per_fedavg, and "
        "of infer_int8 (see --int8-head); a role that is not named is left out (default: grad=8,32 train=8,32 "
        "evaluate=256 infer=1,32)",
    )
    parser.add_argument(
        "--inner-steps",
        type=_sizes,
        default=(),
        metavar="K[,K...]",
        help="steps that adapt, reptile, maml and fomaml take in one call; fewer are a matter of the mask (needed for "
        "these, else none)",
    )
    parser.add_argument(
        "--share",
        type=_scheme,
        metavar="TofN",
        help="add a method that splits an update into N shares, of which T open a sum, e.g. 3of5 (default: none)",
    )
    add_int8_options(parser)
    parser.add_argument(
        "--loss", metavar="MODULE:CALLABLE", help="per-example loss (logits, y) -> [B] (default: cross-entropy)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: %(default)s)")
    parser.add_argument(
        "--runtime",
        choices=("auto", "native", "pybindings"),
        default="auto",
        help="ExecuTorch adapter that runs the comparison (default: %(default)s)",
    )
    parser.add_argument("--no-cache", action="store_true", help="export anew, and keep nothing")
    return _run


def _run(args: argparse.Namespace) -> int:
    from mobile_export.export import DEFAULT_BATCH_SIZES, export_program  # noqa: PLC0415 - torch; not for --help

    started = time.monotonic()
    batch_sizes = {r: sizes for item in args.batch_sizes for r, sizes in item.items()} if args.batch_sizes else None
    model = _model(args)
    if args.weights is not None:
        load_weights(model, args.weights)
    with _progress_bar() as progress:
        bundle = export_program(
            model,
            _named(args.loss, "--loss") if args.loss else None,
            out_dir=args.out,
            batch_sizes=batch_sizes or DEFAULT_BATCH_SIZES,
            inner_steps=args.inner_steps,
            feature_shape=args.feature_shape,
            num_classes=args.classes,
            model_name=None if ":" in args.model else args.model,
            share=args.share,
            int8=int8_body(tuple(args.int8_head), args.calibration),
            runtime=args.runtime,
            use_cache=not args.no_cache,
            progress=progress,
        )
    print(_summary(bundle, time.monotonic() - started))
    return 0


def _model(args: argparse.Namespace) -> nn.Module:
    import torch  # noqa: PLC0415 - not for --help

    from mobile_export.models import REFERENCE_MODELS, build_model  # noqa: PLC0415

    if args.model in REFERENCE_MODELS:
        text = args.model.startswith("byte-")
        args.feature_shape = args.feature_shape or ((16,) if text else (784,))
        args.classes = args.classes or (256 if text else 10)
        return build_model(args.model, args.feature_shape, args.classes, args.seed, hidden=args.hidden)
    if ":" not in args.model:
        raise ConfigurationError(
            f"no reference model is called {args.model!r}; there are {', '.join(REFERENCE_MODELS)}, or name your own "
            "as MODULE:CALLABLE"
        )
    if args.hidden is not None:
        raise ConfigurationError("--hidden is for mlp and cnn; a model of your own fixes its widths itself")
    with torch.random.fork_rng(devices=[]):
        # Layers draw their values from the global generator; without a seed no export would be found again.
        torch.manual_seed(args.seed)
        model = _named(args.model, "MODEL")()
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(f"{args.model} returned {type(model).__name__}, not an nn.Module")
    return model


def _named(target: str, option: str) -> Callable[..., Any]:
    """Import ``module.path:callable``, looking in the working directory too."""
    module_name, _, attribute = target.partition(":")
    with _importable(Path.cwd()):
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as e:
            raise ConfigurationError(f"{option} {target}: {e}; write MODULE:CALLABLE, as in my_models:make") from e
    if not callable(found):
        raise ConfigurationError(f"{option} {target} is not callable")
    return found  # type: ignore[no-any-return]  # whatever the user named


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[ExportProgress], None]]:
    from rich.console import Console  # noqa: PLC0415 - not for --help
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("exporting", total=None)

        def update(step: ExportProgress) -> None:
            bar.update(
                task, description=f"{_DOING[step.stage]} {step.method}".strip(), completed=step.done, total=step.total
            )

        yield update


def _summary(bundle: ProgramBundle, seconds: float) -> str:
    manifest = bundle.manifest
    sizes = ", ".join(f"{p.name} {_kib(p.stat().st_size)}" for p in sorted(bundle.path.iterdir()))
    features = "x".join(map(str, manifest.feature_shape))
    lines = [
        f"bundle   {bundle.path} ({'from the cache' if bundle.cached else 'exported'}, {seconds:.1f} s)",
        f"model    {manifest.model_name}: {features} -> {manifest.num_classes}, {manifest.num_parameters:,} parameters",
        f"files    {sizes}",
        f"program  {len(manifest.operators)} operators; SHA-256 {manifest.program_sha256}",
    ]
    if bundle.parity is not None and bundle.parity.outputs:
        worst = bundle.parity.worst
        lines.append(
            f"parity   passed: the largest error is {worst.error:.1e} ({worst.method}, {worst.output}); "
            f"{bundle.parity.tolerance:.0e} is allowed"
        )
    if bundle.parity is not None:
        lines += [
            f"int8     {one.method}: {one.agreement:.1%} of {one.examples} examples get the float model's answer; its "
            f"logits are {one.float_error:.1e} away"
            for one in bundle.parity.int8
        ]
    width = max(len(m.name) for m in manifest.methods)
    lines += ["", f"{'method':<{width}}  planned memory"]
    lines += [f"{m.name:<{width}}  {_kib(m.planned_memory_bytes):>14}" for m in manifest.methods]
    return "\n".join(lines)


def _kib(num_bytes: int) -> str:
    return f"{num_bytes / 1024:,.1f} KiB"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.replace(",", "x").split("x"))


def _batch_sizes(text: str) -> dict[Role, tuple[int, ...]]:
    role, equals, sizes = text.partition("=")
    roles = [r.value for r in Role if r is not Role.SHARE]
    if not equals or role not in roles:
        raise argparse.ArgumentTypeError(f"write ROLE=N[,N...] with one of {', '.join(roles)}; got {text!r}")
    return {Role(role): _sizes(sizes)}


def _scheme(text: str) -> Scheme:
    threshold, of, num_shares = text.partition("of")
    if not (of and threshold.isdecimal() and num_shares.isdecimal()):
        raise argparse.ArgumentTypeError(f"write TofN, as in 3of5; got {text!r}")
    try:
        return Scheme(int(threshold), int(num_shares))
    except ConfigurationError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
