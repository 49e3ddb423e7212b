"""What a run needs before its first round: devices with data, a program, the cost of a session, a server's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_sdk.atomic import write_atomically
from client_sdk.planner import plan_work
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError, MemoryBudgetExceeded
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import WITH_INNER_STEPS, Manifest, Role
from client_sdk.protocol.training import TrainingPlan, update_size
from mobile_export.bundle import ProgramBundle
from server_ref.config import TaskConfig
from server_ref.task import Task, load_task
from simulator.adversaries import AttackPlan
from simulator.config import SimulationConfig, told
from simulator.datasets import Dataset, Split, load_dataset
from simulator.embedded import write_server_config
from simulator.errors import ResumeMismatch
from simulator.folder import BUNDLE_FOLDER, SERVER_FOLDER, WORKLOAD_FILE, RunFolder
from simulator.partition import deal, parse_partition
from simulator.population import Population, Workload
from simulator.skew import Skew, Style, check_images, parse_skew

INITIAL_WEIGHTS_SEED: Final = 0
_EVALUATION_BATCH: Final = 256
# A lease this many times the slowest device's typical session lets practically everybody finish (four standard
# deviations of the jitter), and frees the slot of a vanished device soon enough.
_LEASE_MARGIN: Final = 3.0
_MIN_LEASE_S: Final = 60.0
# Where devices pause, most come back within this.
_LEASE_WITH_PAUSES_S: Final = 3600.0
# What a frame's header adds to the numbers, roughly; only simulated durations depend on it.
_FRAME_OVERHEAD_BYTES: Final = 700

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fleet:
    """The devices of a run and their data.

    Attributes:
        population: Who the devices are.
        dataset: What they learn from, honest.
        parts: Training rows of each device.
        attack: What some of them do instead of what they are told; None: all are honest.
        skew: How far their features differ, beside what their profiles say; then no two devices share an example.
    """

    population: Population
    dataset: Dataset
    parts: list[npt.NDArray[np.int64]]
    attack: AttackPlan | None = None
    skew: Skew = field(default_factory=Skew)

    @classmethod
    def of(cls, config: SimulationConfig) -> Fleet:
        """Deal the data set out to the devices.

        Raises:
            DatasetUnavailable: It has to be fetched first.
            PartitionError: More devices (or shards) than examples.
            AttackError: The attack cannot be carried out on this fleet or data set.
        """
        config.check()
        dataset = load_dataset(config.dataset)
        parts = deal(
            parse_partition(config.partition), dataset.train.y, config.devices, config.seed, dataset.train.groups
        )
        attack = AttackPlan.of(config, dataset.num_classes)
        population = Population(
            config.seed,
            config.devices,
            config.dropout,
            stragglers=config.stragglers,
            slowdown=config.slowdown,
            profiles=config.fleet_profiles,
        )
        skew = Skew() if config.skew is None else parse_skew(config.skew)
        if skew or population.profiles.skewed:
            train = dataset.train.x
            check_images(dataset.feature_shape, float(train.min()), float(train.max()), dataset.name)
        return cls(population, dataset, parts, attack, skew)

    @property
    def num_samples(self) -> list[int]:
        """Training examples of each device."""
        return [len(part) for part in self.parts]

    @property
    def training_data(self) -> Split:
        """What the devices learn from: all training examples, the attackers' ones as the attack changes them."""
        train = self.honest_data
        return train if self.attack is None else self.attack.poisoned(train, self.parts)

    @cached_property
    def honest_data(self) -> Split:
        """All training examples as the devices have them: without skew the data set's own arrays, else one copy."""
        train = self.dataset.train
        if not self.skew and not self.population.profiles.skewed:
            return train
        x = train.x.copy()
        for device, rows in enumerate(self.parts):
            style = self.style(device)
            if style is not None:
                x[rows] = style.apply(train.x[rows])
        x.flags.writeable = False
        return Split(x, train.y)

    def style(self, device: int) -> Style | None:
        """The device's way with pictures; None in a fleet whose features do not differ."""
        if not self.skew and not self.population.profiles.skewed:
            return None
        own = self.population.kind(device).skew
        skew = self.skew if own is None else self.skew.replaced(parse_skew(own))
        return Style.of(skew, self.population.seed, device)

    def label_counts(self) -> npt.NDArray[np.int64]:
        """int64[devices, classes]: how many examples of each class a device holds."""
        classes = self.dataset.num_classes
        return np.stack([np.bincount(self.dataset.train.y[part], minlength=classes) for part in self.parts])


class SessionCosts(BaseModel):
    """What durations are computed from; fixed when a run begins, so that a resumed one has the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops_per_example: float = Field(gt=0)
    program_bytes: int = Field(gt=0, description="program and manifest: a device's first download")
    model_bytes: int = Field(gt=0)
    report_bytes: int = Field(gt=0)
    flops_per_session: float | None = Field(None, gt=0, description="where the plan counts steps, not examples")

    def workload(self, plan: TrainingPlan, session: int) -> Workload:
        """Cost of a device's ``session``-th session of such training: the first one downloads the program too."""
        down = self.model_bytes + (self.program_bytes if session == 0 else 0)
        return Workload(self.flops_per_example, down, self.report_bytes, plan, self.flops_per_session)


def export_bundle(config: SimulationConfig, dataset: Dataset, folder: Path, say: Say) -> ProgramBundle:
    """Export the run's model into ``folder``, or find it there."""
    if (folder / "manifest.json").is_file():
        return ProgramBundle.open(folder)
    from mobile_export.export import ExportProgress, export_program  # noqa: PLC0415 - torch, only for a new run
    from mobile_export.models import build_model  # noqa: PLC0415

    def progress(step: ExportProgress) -> None:
        if step.stage == "cached":
            say(f"program: {config.model} found in the export cache")
        elif step.done in {1, step.total}:
            say(f"program: exporting {config.model}, step {step.done} of {step.total} (cached afterwards)")

    meta, adapting = config.plan.meta, _adapting_role(config)
    return export_program(
        build_model(config.model, dataset.feature_shape, dataset.num_classes, INITIAL_WEIGHTS_SEED),
        out_dir=folder,
        batch_sizes={
            Role.TRAIN: _exported_batches(config),
            Role.EVALUATE: (_EVALUATION_BATCH,),
            **({} if adapting is None else {adapting: (config.batch_size,)}),
        },
        inner_steps=(meta.inner_steps,) if meta is not None and adapting in WITH_INNER_STEPS else (),
        feature_shape=dataset.feature_shape,
        num_classes=dataset.num_classes,
        model_name=config.model,
        progress=progress,
    )


def _adapting_role(config: SimulationConfig) -> Role | None:
    """What the program has to do for meta-learning; None for other algorithms."""
    return None if config.plan.meta is None else Role(config.algorithm.replace("-", "_"))


def _exported_batches(config: SimulationConfig) -> tuple[int, ...]:
    """The planned one; for adaptive work also a quarter of it, for devices with little memory."""
    if config.local_work == "planned":
        return (config.batch_size,)
    return tuple(sorted({config.batch_size, max(1, config.batch_size // 4)}))


def local_plans(
    config: SimulationConfig, population: Population, manifest: Manifest, num_samples: Sequence[int]
) -> list[TrainingPlan]:
    """What each device trains: the plan of all, or, with adaptive work, what the SDK's planner makes of it.

    Raises:
        ConfigurationError: A kind of device has too little memory for the model.
    """
    plan = config.plan
    if not plan.adaptive:
        return [plan] * len(num_samples)
    plans = []
    for device, samples in enumerate(num_samples):
        profile = population.profile(device)
        try:
            work = plan_work(manifest, profile, plan, num_samples=samples, compression=config.compression)
        except MemoryBudgetExceeded as e:
            name = population.kind(device).name
            raise ConfigurationError(f"devices of profile {name!r} cannot train the model: {e}") from e
        plans.append(work.plan)
    return plans


def session_costs(folder: RunFolder, dataset: Dataset, bundle: ProgramBundle) -> SessionCosts:
    """Compute what a session costs, or read what was computed when the run began.

    Raises:
        ResumeMismatch: The file is damaged.
    """
    path = folder.path / WORKLOAD_FILE
    if path.exists():
        try:
            return SessionCosts.model_validate_json(path.read_bytes())
        except ValidationError as e:
            raise ResumeMismatch(f"{path} is damaged: {e}") from e
    config, manifest, plan = folder.config, bundle.manifest, folder.config.plan
    # SCAFFOLD's devices fetch the control beside the model, and send as much.
    down = 4 * update_size(plan, manifest.num_parameters)
    vectors = update_size(plan, SharedLayers.of(manifest.parameters, plan.personal).size)
    spec = CompressionSpec.parse(config.compression or "none")
    payload = 4 * vectors if spec.is_none else Codec(spec, vectors).max_bytes
    counted = None if plan.meta is None else config.work_scale * _flops_per_session(config, dataset, manifest)
    costs = SessionCosts(
        flops_per_example=config.work_scale * _flops_per_example(config.model, dataset),
        program_bytes=manifest.program_bytes + len(manifest.to_json()),
        model_bytes=down + _FRAME_OVERHEAD_BYTES,
        report_bytes=payload + _FRAME_OVERHEAD_BYTES,
        flops_per_session=counted,
    )
    write_atomically(path, costs.model_dump_json(indent=2).encode(), mode=0o644)
    return costs


def _flops_per_example(model_name: str, dataset: Dataset) -> float:
    """Floating-point operations of one example's forward and backward pass."""
    import torch  # noqa: PLC0415 - only for a new run
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    from mobile_export.models import build_model  # noqa: PLC0415

    model = build_model(model_name, dataset.feature_shape, dataset.num_classes, INITIAL_WEIGHTS_SEED)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *dataset.feature_shape)).sum().backward()
    return float(counter.get_total_flops())


def _flops_per_session(config: SimulationConfig, dataset: Dataset, manifest: Manifest) -> float:
    """Floating-point operations of one session of meta-learning."""
    from mobile_export.models import build_model  # noqa: PLC0415 - torch, only for a new run
    from simulator.personalization.operations import session_operations  # noqa: PLC0415

    model = build_model(config.model, dataset.feature_shape, dataset.num_classes, INITIAL_WEIGHTS_SEED)
    return float(session_operations(config.plan, model, manifest.parameters, dataset.feature_shape))


def lease_s(
    config: SimulationConfig,
    population: Population,
    costs: SessionCosts,
    num_samples: Sequence[int],
    plans: Sequence[TrainingPlan],
) -> float:
    """A lease that practically every device that does not vanish can keep; whole virtual seconds."""
    if config.lease is not None:
        return config.lease
    slowest = max(
        population.typical_duration_s(d, n, costs.workload(plan, 0))
        for d, (n, plan) in enumerate(zip(num_samples, plans, strict=True))
    )
    least = _LEASE_WITH_PAUSES_S if population.profiles.traced else _MIN_LEASE_S
    return max(least, math.ceil(_LEASE_MARGIN * slowest))


def task_settings(
    config: SimulationConfig,
    *,
    lease: float,
    check_in_interval_s: float,
    num_samples: Sequence[int],
    plans: Sequence[TrainingPlan] | None = None,
) -> dict[str, Any]:
    """The run's task as ``server_ref.config.TaskConfig`` has it, without its files; for both engines.

    Args:
        config: The run.
        lease: Seconds.
        check_in_interval_s: Mean time between two offers of a device.
        num_samples: Examples of each device.
        plans: What each device trains; by default what the configuration says.
    """
    plan = config.plan
    mine = [plan] * len(num_samples) if plans is None else plans
    if plan.algorithm == "fednova" and plan.max_steps is None:
        # What no device exceeds anyway: the server wants a bound on what devices claim.
        most = max(p.local_epochs * math.ceil(n / p.batch_size) for n, p in zip(num_samples, mine, strict=True))
        plan = plan.model_copy(update={"max_steps": most})
    aggregation = config.aggregation
    if aggregation.rule != "mean" and aggregation.num_byzantine is None and config.byzantine > 0:
        aggregation = aggregation.model_copy(update={"byzantine_fraction": config.byzantine})
    return {
        "rounds": config.rounds,
        "buffer_size": config.cohort_size,
        "concurrency": config.concurrency,
        "refill_at": config.refill_at,
        "lease_s": lease,
        "retry_min_s": check_in_interval_s / 2,
        "retry_max_s": check_in_interval_s,
        "weight_cap": max(num_samples),
        "seed": config.seed,
        "compression": config.compression,
        "population": config.devices,
        "plan": plan.model_dump(mode="json"),
        "aggregation": aggregation.model_dump(mode="json"),
        "optimizer": config.optimizer.model_dump(mode="json"),
        "staleness": config.staleness.model_dump(mode="json"),
        "delay_damping": config.delay_damping,
        "selection": config.selection.model_dump(mode="json"),
        "divergence": config.divergence.model_dump(mode="json"),
        "privacy": config.privacy.model_dump(mode="json"),
        "secure": None if config.secure is None else config.secure.model_dump(mode="json"),
    }


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin, whichever engine plays it.

    Attributes:
        bundle: The exported model.
        costs: What sessions cost.
        settings: Of the task, as ``task_settings`` has them.
        task: The same, read and checked as a server does when it starts.
        plans: What each device trains.
    """

    bundle: ProgramBundle
    costs: SessionCosts
    settings: dict[str, Any]
    task: Task
    plans: list[TrainingPlan]

    @classmethod
    def of(cls, folder: RunFolder, fleet: Fleet, say: Say) -> Self:
        """Export the model, whose size decides how long sessions last, and check the task's settings.

        Raises:
            PocketfedError: Set-up failed, or settings that do not go together.
        """
        config, population = folder.config, fleet.population
        bundle = export_bundle(config, fleet.dataset, folder.path / BUNDLE_FOLDER, say)
        costs = session_costs(folder, fleet.dataset, bundle)
        plans = local_plans(config, population, bundle.manifest, fleet.num_samples)
        settings = task_settings(
            config,
            lease=lease_s(config, population, costs, fleet.num_samples, plans),
            plans=plans,
            check_in_interval_s=population.check_in_interval_s,
            num_samples=fleet.num_samples,
        )
        try:
            task_config = TaskConfig.model_validate({"bundle": bundle.path, **settings})
        except ValidationError as e:
            raise ConfigurationError(told(e)) from e
        return cls(bundle, costs, settings, load_task(task_config), plans)


def write_server(
    folder: RunFolder, dataset: Dataset, task: dict[str, Any], aggregators: dict[str, Any] | None = None
) -> Path:
    """Write the embedded server's validation data and configuration.

    Args:
        folder: The run's.
        dataset: Brings the validation data.
        task: ``task_settings``.
        aggregators: Where its aggregators run, if not in its own process.

    Returns:
        The configuration file.
    """
    server = folder.path / SERVER_FOLDER
    server.mkdir(exist_ok=True)
    validation = server / "validation.npz"
    np.savez(validation, x=dataset.validation.x, y=dataset.validation.y)
    files = {"bundle": f"../{BUNDLE_FOLDER}", "validation_data": validation.name}
    return write_server_config(server, {**files, **task}, aggregators)


def check_fit(manifest: Manifest, dataset: Dataset) -> None:
    """Whether a foreign server's model takes this data set.

    Raises:
        ConfigurationError: It does not.
    """
    if manifest.feature_shape != dataset.feature_shape or manifest.num_classes < dataset.num_classes:
        raise ConfigurationError(
            f"the server trains {manifest.model_name!r} on features {list(manifest.feature_shape)} with "
            f"{manifest.num_classes} classes; {dataset.name} has {list(dataset.feature_shape)} with "
            f"{dataset.num_classes}"
        )
