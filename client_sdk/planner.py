"""What of an assignment a device trains at once: batch, slices and epochs, from the exported memory plan and its RAM.

A device's budget is what its process takes anyway, plus a fraction of its memory for what training adds. Examples that
the app holds are part of the former, and no matter how many, they are not held against the latter. The fraction
is small because an app in the background is the first that a phone short of memory kills: with 1/8, phones of 512 MiB,
2 GiB and 8 GiB train the reference model in batches of 8, 32 and 64 (docs/device-resources.md has the arithmetic).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from client_sdk.footprint import BASELINE_BYTES, MIB, MemoryEstimate, estimate_memory, mib
from client_sdk.meta_methods import meta_ways
from client_sdk.protocol.errors import ConfigurationError, MemoryBudgetExceeded
from client_sdk.protocol.messages import SecurePlan
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Manifest, MethodSpec, Role
from client_sdk.protocol.training import TrainingPlan, adapted

MEMORY_FRACTION: Final = 1 / 8
"""Share of a device's memory that training may add to its process."""


@dataclass(frozen=True)
class LocalWork:
    """What a device trains of an assignment, and what that takes.

    Attributes:
        plan: The plan as it is really trained; not adaptive.
        slice_size: Batch size of the ``grad`` method that makes a batch of slices; None for the fused step.
        accumulation_steps: Calls that make one optimizer step.
        estimate: What the process takes at most, item by item.
        budget_bytes: What it may take.
    """

    plan: TrainingPlan
    slice_size: int | None
    accumulation_steps: int
    estimate: MemoryEstimate
    budget_bytes: int

    @property
    def local_epochs(self) -> int:
        """Passes over the device's examples."""
        return self.plan.local_epochs


def plan_work(
    manifest: Manifest,
    profile: DeviceProfile,
    plan: TrainingPlan,
    *,
    num_samples: int,
    memory_fraction: float = MEMORY_FRACTION,
    baseline_bytes: int = BASELINE_BYTES["native"],
    budget_bytes: int | None = None,
    compression: str | None = None,
    secure: SecurePlan | None = None,
) -> LocalWork:
    """Choose how to train within the device's memory.

    A plan that is not adaptive is kept; only how its batches are made is chosen: the fused step, else the largest
    exported slices that divide the batch and fit. Of an adaptive one, the batch is the largest exported size up to the
    planned one that fits, and the epochs follow the device's tier.

    Args:
        manifest: Of the program; the program need not be there yet.
        profile: The device's memory and tier.
        plan: What the assignment asks for.
        num_samples: Examples that it will train on.
        memory_fraction: In (0, 1], see ``MEMORY_FRACTION``.
        baseline_bytes: What the process takes before a program is opened: ``BASELINE_BYTES`` of its runtime, or an
            app's own (``client_sdk.memory_budget.resident_bytes``). Without ``budget_bytes`` it does not decide.
        budget_bytes: What the whole process may take, instead of the baseline and the fraction. Then the baseline
            should count the examples that the process holds.
        compression: Of the report.
        secure: How the update is shared, where it is.

    Raises:
        MemoryBudgetExceeded: Nothing fits; says what the least that was tried takes, item by item, what most of that
            is, and what would fit.
        UnknownMethod: The program cannot train with the planned batch size; the message lists what it can.
        ConfigurationError: No examples, a fraction out of range, or a compression that this device does not know.
    """
    if not 0 < memory_fraction <= 1:
        raise ConfigurationError(f"memory_fraction must lie in (0, 1], got {memory_fraction}")
    if num_samples < 1:
        raise ConfigurationError("there is nothing to train on: num_samples must be at least 1")
    if budget_bytes is None:
        budget_bytes = baseline_bytes + int(memory_fraction * profile.available_memory_mb * MIB)
    refused = []
    for way in _ways(manifest, plan):
        mine = adapted(plan, profile.device_type, way.batch_size) if plan.adaptive else plan
        method, *also = way.methods
        estimate = estimate_memory(
            manifest,
            method,
            mine,
            num_samples=num_samples,
            baseline_bytes=baseline_bytes,
            compression=compression,
            secure=secure,
            also=also,
        )
        if estimate.total_bytes <= budget_bytes:
            calls = way.batch_size // method.batch_size
            return LocalWork(mine, way.slice_size, calls, estimate, budget_bytes)
        refused.append(estimate)
    raise _refusal(manifest, plan, budget_bytes, min(refused, key=lambda estimate: estimate.total_bytes))


def optimal_batch_size(
    manifest: Manifest,
    profile: DeviceProfile,
    *,
    num_samples: int,
    memory_fraction: float = MEMORY_FRACTION,
    baseline_bytes: int = BASELINE_BYTES["native"],
) -> int:
    """The largest batch size that the program was exported with and that the device's memory allows.

    Raises:
        MemoryBudgetExceeded: None fits; see ``plan_work``.
        ConfigurationError: See ``plan_work``.
    """
    most = max(_training_sizes(manifest), default=1)
    return plan_work(
        manifest,
        profile,
        TrainingPlan(batch_size=most, adaptive=True),
        num_samples=num_samples,
        memory_fraction=memory_fraction,
        baseline_bytes=baseline_bytes,
    ).plan.batch_size


def _training_sizes(manifest: Manifest) -> set[int]:
    return {*manifest.batch_sizes(Role.TRAIN), *manifest.batch_sizes(Role.GRAD)}


def _by_size(manifest: Manifest, role: Role) -> dict[int, MethodSpec]:
    """Batch size -> method, the largest first."""
    found = (m for m in manifest.methods if m.role is role)
    return {m.batch_size: m for m in sorted(found, key=lambda m: m.batch_size, reverse=True)}


@dataclass(frozen=True)
class _Way:
    """One way to train: methods, examples of a step, and the slices that it is made of, if it is."""

    methods: tuple[MethodSpec, ...]
    batch_size: int
    slice_size: int | None


def _ways(manifest: Manifest, plan: TrainingPlan) -> Iterator[_Way]:
    """Ways to do a plan, the one first that is taken without a budget."""
    if plan.meta is not None:
        for methods, slice_size in meta_ways(manifest, plan):
            yield _Way(methods.all, plan.batch_size, slice_size)
        return
    for method, batch_size in _adaptive(manifest, plan) if plan.adaptive else _sliced(manifest, plan):
        yield _Way((method,), batch_size, None if method.role is Role.TRAIN else method.batch_size)


def _adaptive(manifest: Manifest, plan: TrainingPlan) -> Iterator[tuple[MethodSpec, int]]:
    """``(method, batch size)``, the largest batch first; each as one call."""
    methods = _by_size(manifest, Role.GRAD) | _by_size(manifest, Role.TRAIN)
    sizes = sorted((size for size in methods if size <= plan.batch_size), reverse=True)
    if not sizes:
        yield manifest.training_method(plan.batch_size), plan.batch_size  # says what the program has
    for size in sizes:
        yield methods[size], size


def _sliced(manifest: Manifest, plan: TrainingPlan) -> Iterator[tuple[MethodSpec, int]]:
    """``(method, batch size)`` for the planned batch: what is trained without a budget first, then smaller slices."""
    first = manifest.training_method(plan.batch_size)
    yield first, plan.batch_size
    for size, method in _by_size(manifest, Role.GRAD).items():
        if plan.batch_size % size == 0 and (first.role is Role.TRAIN or size < first.batch_size):
            yield method, plan.batch_size


def _refusal(manifest: Manifest, plan: TrainingPlan, budget_bytes: int, least: MemoryEstimate) -> MemoryBudgetExceeded:
    says = (
        f"training {manifest.model_name} in batches of {'up to ' if plan.adaptive else ''}{plan.batch_size} does not "
        f"fit into {mib(budget_bytes)} MiB. The least takes {least}."
    )
    if least.process_bytes >= budget_bytes:
        return MemoryBudgetExceeded(f"{says} The process alone takes all of it: allow that much")
    first, added = least.added[0], sum(item.num_bytes for item in least.added)
    if 2 * sum(item.num_bytes for item in least.added if item.by_batch) < added:
        return MemoryBudgetExceeded(
            f"{says} Most of what training adds is the same for all batches, first of all "
            f"{mib(first.num_bytes)} MiB of {first.name}: allow that much"
        )
    if plan.adaptive:
        remedy = f"export {manifest.model_name} with smaller batches"
    elif plan.algorithm in {"maml", "per-fedavg"}:
        remedy = f"export {manifest.model_name} with smaller batches"
        if plan.algorithm == "maml":
            remedy += " or fewer inner steps, or train it by fomaml, which goes back through none of them"
    else:
        smaller = [size for size in sorted(_training_sizes(manifest)) if size < plan.batch_size]
        remedy = f"export {manifest.model_name} with smaller grad slices that divide {plan.batch_size}"
        if smaller and plan.meta is None:
            remedy += f", or make the plan adaptive: its smallest batch is then {smaller[0]}"
    return MemoryBudgetExceeded(f"{says} Allow that much, or {remedy}")
