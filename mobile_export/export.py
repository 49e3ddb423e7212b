"""``export_program``: a model and a loss in, a verified bundle out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn

from client_sdk.protocol.folders import cache_folder
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE, Role
from client_sdk.protocol.shamir import Scheme
from mobile_export.blueprint import Blueprint, draw_blueprint, method_kinds
from mobile_export.bundle import ProgramBundle, refuse_foreign_folder, replacing_folder
from mobile_export.cache import PARITY_FILE, ExportCache, copy_bundle
from mobile_export.decompositions import DecompositionTable, decomposition_table
from mobile_export.int8 import Int8Body
from mobile_export.int8_parity import check_int8
from mobile_export.int8_toolchain import lower_int8
from mobile_export.manifest import build_manifest
from mobile_export.methods import Loss, cross_entropy
from mobile_export.parity import REPEATS, TOLERANCE, Int8Parity, ParityReport, check_parity
from mobile_export.toolchain import emit, lower

DEFAULT_BATCH_SIZES: Mapping[Role, tuple[int, ...]] = MappingProxyType(
    {Role.GRAD: (8, 32), Role.TRAIN: (8, 32), Role.EVALUATE: (256,), Role.INFER: (1, 32)}
)

Stage = Literal["trace", "lower", "emit", "check", "cached"]
Runtime = Literal["native", "pybindings", "auto"]


@dataclass(frozen=True)
class ExportProgress:
    """One finished step of an export.

    Attributes:
        stage: What was done; ``cached`` means that all of the rest was found in the cache.
        method: Method it was done to; empty for the whole program.
        done: Steps finished so far.
        total: Steps of the whole export.
    """

    stage: Stage
    method: str
    done: int
    total: int


class _Steps:
    """Counts finished steps and tells the caller."""

    def __init__(self, total: int, callback: Callable[[ExportProgress], None] | None) -> None:
        self._total = total
        self._done = 0
        self._callback = callback

    def finish(self, stage: Stage, method: str = "") -> None:
        self._done = self._total if stage == "cached" else self._done + 1
        if self._callback is not None:
            self._callback(ExportProgress(stage, method, self._done, self._total))


def export_program(
    model: nn.Module,
    loss: Loss | None = None,
    example_batch: tuple[Tensor, Tensor] | None = None,
    *,
    out_dir: str | Path,
    batch_sizes: Mapping[Role, Sequence[int]] = DEFAULT_BATCH_SIZES,
    inner_steps: Sequence[int] = (),
    feature_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    model_name: str | None = None,
    constants: Mapping[str, int | float] | None = None,
    share: Scheme | None = None,
    int8: Int8Body | None = None,
    parity: bool = True,
    tolerance: float = TOLERANCE,
    runtime: Runtime = "auto",
    use_cache: bool = True,
    cache_dir: str | Path | None = None,
    decompositions: DecompositionTable | None = None,
    progress: Callable[[ExportProgress], None] | None = None,
) -> ProgramBundle:
    """Export a model as a bundle that devices train, evaluate and run.

    The program holds one method for each role and batch size, named ``{role}_b{batch_size}``, or
    ``{role}_k{inner_steps}_b{batch_size}`` where it takes several steps; their signatures are those of
    ``client_sdk.protocol.program``. The model's present parameters become the initial weights; the model is
    not changed.

    An export takes seconds to a minute, so its result is kept in a cache whose key is the hash of the traced graphs,
    the initial weights, every option that shapes the program, and the releases of torch, ExecuTorch and the
    exporter. An export without the gate, or with other decompositions, is not cached.

    The folder appears whole or not at all, also when the process is killed; nothing is written when an export is
    refused.

    Args:
        model: Float32 parameters only: no buffers, no randomness, no branches on data.
        loss: ``(logits [B, C], y [B] int64) -> losses [B]``; cross-entropy by default.
        example_batch: ``(x [B, ...] float32, y [B] int64)``, of which only the shape is used; any B.
        out_dir: Folder to write; an existing bundle in it is replaced.
        batch_sizes: Batch sizes for each role; a role that is not named is left out.
        inner_steps: Numbers of steps K of the methods that take several in one call (roles adapt, reptile, maml,
            fomaml), each with each of their batch sizes; such a method takes fewer steps too, for the time of K.
        feature_shape: Shape of one example, instead of ``example_batch``; by default the model's own
            ``feature_shape`` attribute, which the reference models have.
        num_classes: Number of logits to expect; what the model gives by default.
        model_name: Name to show; the class's by default.
        constants: Numbers to ship with the program, as constant methods and in the manifest.
        share: Add the method ``share``, for devices that have no native kernels to split an update with; how it splits:
            modulo 2**61 - 1, without packing.
        int8: What the ``infer_int8`` methods freeze in int8, for which ``batch_sizes`` has to name sizes.
        parity: Run the parity gate (see ``check_parity``). Without it the program is only opened once.
        tolerance: Largest relative error that the gate allows.
        runtime: Adapter that opens the program.
        use_cache: Look the export up in the cache, and keep it there.
        cache_dir: Cache folder; ``$POCKETFED_CACHE/exports`` or the user's cache folder by default.
        decompositions: Operators to rewrite, instead of ``decomposition_table()``.
        progress: Called after each step.

    Returns:
        The bundle in ``out_dir``.

    Raises:
        UnsupportedModel: The model or the loss cannot be exported; names the layer.
        ParityError: The program does not compute what the model computes.
        MissingOperator: ExecuTorch has no kernel for an operator; names it.
        RuntimeUnavailable: No ExecuTorch adapter can run here, so nothing could be verified.
        ConfigurationError: Options that do not fit together, or a folder that cannot be written.
    """
    target = Path(out_dir)
    refuse_foreign_folder(target)
    checks = REPEATS + 1 if parity else 0
    roles = [kind.role for kind in method_kinds(batch_sizes, inner_steps)] + [Role.SHARE] * (share is not None)
    checked_once = roles.count(Role.INFER_INT8) * max(0, checks - 1)
    steps = _Steps(len(roles) * (2 + checks) - checked_once + 1, progress)
    blueprint = draw_blueprint(
        model,
        loss or cross_entropy,
        batch_sizes=batch_sizes,
        inner_steps=inner_steps,
        example_batch=example_batch,
        feature_shape=feature_shape,
        num_classes=num_classes,
        model_name=model_name,
        constants=constants or {},
        decompositions=decomposition_table() if decompositions is None else decompositions,
        share=share,
        int8=int8,
        traced=lambda method: steps.finish("trace", method),
    )
    key = blueprint.content_key()

    def build(folder: Path) -> ProgramBundle:
        bundle = _write_bundle(blueprint, key, folder, steps)
        if not parity:
            bundle.load(runtime).close()
            return bundle
        report = check_parity(
            bundle,
            model,
            loss,
            tolerance=tolerance,
            runtime=runtime,
            progress=lambda method: steps.finish("check", method),
        )
        if int8 is not None:
            report = report.model_copy(
                update={"int8": _check_int8(bundle, blueprint, model, int8, runtime=runtime, steps=steps)}
            )
        return replace(bundle, parity=report)

    if not (use_cache and parity and decompositions is None):
        with replacing_folder(target) as folder:
            bundle = build(folder)
        return replace(bundle, path=target)

    cache = ExportCache(cache_folder("exports") if cache_dir is None else Path(cache_dir))
    with cache.locked(key):
        entry = cache.find(key, tolerance)
        if entry is None:
            with cache.writing(key) as folder:
                bundle = build(folder)
                (folder / PARITY_FILE).write_text(_report(bundle).model_dump_json())
        else:
            bundle = entry
            steps.finish("cached")
        copy_bundle(cache.folder(key), target)
    return replace(bundle, path=target)


def _check_int8(
    bundle: ProgramBundle,
    blueprint: Blueprint,
    model: nn.Module,
    body: Int8Body,
    *,
    runtime: Runtime,
    steps: _Steps,
) -> tuple[Int8Parity, ...]:
    found = []
    program = bundle.load(runtime)
    try:
        for method in bundle.manifest.methods:
            if method.role is Role.INFER_INT8:
                found.append(check_int8(program, method, blueprint.methods[method.name].graph, model, body))
                steps.finish("check", method.name)
    finally:
        program.close()
    return tuple(found)


def _report(bundle: ProgramBundle) -> ParityReport:
    if bundle.parity is None:
        raise RuntimeError("only programs that passed the parity gate are cached")
    return bundle.parity


def _write_bundle(blueprint: Blueprint, key: str, folder: Path, steps: _Steps) -> ProgramBundle:
    """Lower and serialise all methods, and write the three files; the folder is a scratch one."""
    edges = {}
    for name, method in blueprint.methods.items():
        lowering = lower_int8 if method.kind.role is Role.INFER_INT8 else lower
        edges[name] = lowering(method.graph, method.inputs)
        steps.finish("lower", name)
    program = emit(edges, blueprint.constants)
    steps.finish("emit")
    manifest = build_manifest(program, blueprint, key)
    (folder / PROGRAM_FILE).write_bytes(program)
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    (folder / WEIGHTS_FILE).write_bytes(blueprint.weights_file)
    return ProgramBundle(folder, manifest)
