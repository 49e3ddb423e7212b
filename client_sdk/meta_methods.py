"""Which methods of a program a meta-learning plan takes: known before the program is opened. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from client_sdk.descent import descent_method
from client_sdk.protocol.errors import ConfigurationError, UnknownMethod
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.program import Manifest, MethodSpec, Role
from client_sdk.protocol.training import TrainingPlan


@dataclass(frozen=True)
class MetaMethods:
    """The methods of one session.

    Attributes:
        steps: Takes the steps that lead from weights to weights; None where ``query`` takes them by itself.
        query: Sums gradients over query examples; None where none are.
    """

    steps: MethodSpec | None
    query: MethodSpec | None

    @property
    def all(self) -> tuple[MethodSpec, ...]:
        """Those that are called."""
        return tuple(method for method in (self.steps, self.query) if method is not None)


def meta_methods(manifest: Manifest, plan: TrainingPlan, slice_size: int | None = None) -> MetaMethods:
    """Choose by what a program has.

    ``maml`` and ``per-fedavg`` need the method that is theirs. ``fomaml`` takes its own, else steps of descent and
    then ``grad``; ``reptile`` takes steps of descent.

    Args:
        manifest: Of the program.
        plan: With ``meta``.
        slice_size: Make each batch of ``grad`` calls of this size, which reptile and fomaml can do in little memory;
            None for as few calls as there can be.

    Raises:
        UnknownMethod: The program has none; the message says how it is exported.
        ConfigurationError: The plan has no ``meta``, or its algorithm is not made of slices.
    """
    meta, size = meta_of(plan), plan.batch_size
    if slice_size is not None:
        if plan.algorithm not in {"reptile", "fomaml"}:
            raise ConfigurationError(f"{plan.algorithm} is not made of slices: leave slice_size out")
        sliced = manifest.method(Role.GRAD, slice_size)
        return MetaMethods(sliced, sliced if plan.algorithm == "fomaml" else None)
    match plan.algorithm:
        case "maml":
            return MetaMethods(None, manifest.adapting_method(Role.MAML, size, meta.inner_steps))
        case "per-fedavg":
            if size not in manifest.batch_sizes(Role.PER_FEDAVG):
                raise UnknownMethod(
                    f"{manifest.model_name} has no per_fedavg method for batches of {size}; it has "
                    f"{list(manifest.batch_sizes(Role.PER_FEDAVG))}: export it with --batch-sizes per_fedavg={size}"
                )
            return MetaMethods(manifest.method(Role.PER_FEDAVG, size), None)
        case "fomaml":
            try:
                return MetaMethods(None, manifest.adapting_method(Role.FOMAML, size, meta.inner_steps))
            except UnknownMethod:
                sizes = _slices(manifest, size)
                if not sizes:
                    raise
                steps = descent_method(manifest, size, meta.inner_steps)
                return MetaMethods(steps, manifest.method(Role.GRAD, sizes[0]))
        case _:
            return MetaMethods(descent_method(manifest, size, meta.inner_steps), None)


def meta_ways(manifest: Manifest, plan: TrainingPlan) -> Iterator[tuple[MetaMethods, int | None]]:
    """Methods and slice size: what is taken without a budget first, then what may need less memory.

    Raises:
        UnknownMethod: See ``meta_methods``.
    """
    first = meta_methods(manifest, plan)
    yield first, None
    if plan.algorithm in {"reptile", "fomaml"}:
        for size in _slices(manifest, plan.batch_size):
            sliced = meta_methods(manifest, plan, size)
            if sliced != first:
                yield sliced, size


def meta_of(plan: TrainingPlan) -> MetaPlan:
    """The plan's part that only meta-learning has.

    Raises:
        ConfigurationError: It has none.
    """
    if plan.meta is None:
        raise ConfigurationError(f"{plan.algorithm} is not meta-learning")
    return plan.meta


def _slices(manifest: Manifest, batch_size: int) -> list[int]:
    """Sizes of ``grad`` that divide a batch, the largest first."""
    return sorted((size for size in manifest.batch_sizes(Role.GRAD) if batch_size % size == 0), reverse=True)
