"""Whether a program can train what a plan asks for: otherwise every device would find out by itself."""

from __future__ import annotations

from client_sdk.protocol.errors import ConfigurationError, UnknownMethod
from client_sdk.protocol.program import Manifest, Role
from client_sdk.protocol.training import TrainingPlan


def require_methods(plan: TrainingPlan, manifest: Manifest) -> None:
    """Refuse a plan that no device could fulfil.

    Reptile's steps and those of first-order MAML are ordinary ones, which devices take one by one where the program has
    no method that takes all of them at once; the second-order gradients of the others need a method of their own.

    Raises:
        ConfigurationError: The message says how to export the program.
    """
    meta, size = plan.meta, plan.batch_size
    try:
        if meta is not None and plan.algorithm == "maml":
            manifest.adapting_method(Role.MAML, size, meta.inner_steps)
        elif plan.algorithm == "per-fedavg":
            _require_meta_steps(manifest, size)
        elif meta is None or not _has_all_steps_at_once(plan, manifest):
            manifest.training_method(size)
            if plan.algorithm == "fomaml":
                _require_gradient(manifest, size)
    except UnknownMethod as e:
        also = "" if plan.algorithm in {"maml", "per-fedavg"} else "; or export the bundle with that size"
        raise ConfigurationError(f"task.plan.batch_size: {e}{also}") from e


def _has_all_steps_at_once(plan: TrainingPlan, manifest: Manifest) -> bool:
    """Whether there is one method for the whole adaptation, of a plan that does not need it."""
    if plan.meta is None:
        return False
    try:
        manifest.adapting_method(Role(plan.algorithm), plan.batch_size, plan.meta.inner_steps)
    except UnknownMethod:
        return False
    return True


def _require_meta_steps(manifest: Manifest, size: int) -> None:
    if size not in manifest.batch_sizes(Role.PER_FEDAVG):
        there = list(manifest.batch_sizes(Role.PER_FEDAVG))
        raise UnknownMethod(
            f"{manifest.model_name} has per_fedavg methods for batches of {there}, not of {size}: export it with "
            f"--batch-sizes per_fedavg={size}"
        )


def _require_gradient(manifest: Manifest, size: int) -> None:
    """Of the query examples at the adapted weights."""
    if not any(size % slices == 0 for slices in manifest.batch_sizes(Role.GRAD)):
        raise UnknownMethod(
            f"{manifest.model_name} gives no gradient of batches of {size}: export it with --batch-sizes grad={size}"
        )
