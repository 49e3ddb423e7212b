"""The server's configuration: a TOML file, environment variables, flags; closed, frozen, checked at start.

Precedence: command-line flags, then ``POCKETFED_*`` environment variables (``POCKETFED_TASK__ROUNDS=40``), then the
file, then the defaults below. Unknown keys are refused, so that a typo is an error and not a silent default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.server_optim import OptimizerConfig
from server_ref.aggregation.staleness import StalenessPolicy
from server_ref.assignments import RoundPolicy
from server_ref.protection import PrivacyConfig, SecureConfig
from server_ref.settings import explain, layered, read_toml

_LONGEST_S = 1e9
"""Seconds: what a message to a device can say."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AggregationConfig(_Section):
    """How a buffer's updates become one."""

    rule: Literal[
        "mean", "krum", "multi-krum", "trimmed-mean", "median", "geometric-median", "centered-clipping", "bulyan"
    ] = Field("mean", description="the mean, or a rule that stands dishonest updates")
    num_byzantine: int | None = Field(
        None, ge=0, description="dishonest updates of a buffer that a robust rule stands; 0: none"
    )
    byzantine_fraction: float | None = Field(
        None, ge=0, lt=0.5, description="the same as a fraction of the buffer; neither: estimated from each buffer"
    )
    mixing: Literal["none", "bucketing", "nnm"] = Field(
        "none", description="before a robust rule: means of random buckets, or of nearest neighbours"
    )
    bucket_size: int = Field(2, ge=1, description="updates in a bucket")
    distances: Literal["exact", "sketch", "sampled"] = Field(
        "exact", description="how Krum's distances are computed: exactly, from sketches, or to sampled peers"
    )
    degraded: bool = Field(
        default=False,
        description="if the buffer is too small for the rule, stand as many as it can; else it is refused",
    )
    selected: int | None = Field(None, ge=1, description="updates that multi-krum averages; default: n - f - 2")
    clip_norm: float | None = Field(None, gt=0, allow_inf_nan=False, description="largest L2 norm of an update")
    clip_scope: Literal["global", "layer"] = Field("global", description="one norm for the update, or one per layer")
    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="a report weighs its (capped) number of examples, or 1"
    )
    arithmetic: Literal["float", "fixed"] = Field("float", description="exact sum in float64 bins or on the int64 grid")


class SelectionConfig(_Section):
    """Who gets a free slot."""

    policy: Literal["any", "fair", "fast", "diverse"] = Field(
        "any",
        description="any: who comes first; fair: who has taken part less; fast: the faster ones; diverse: all kinds",
    )
    floor: float = Field(
        0.2, gt=0, le=1, description="share of the places that fast gives by turns, and diverse to all kinds alike"
    )
    patience_s: float | None = Field(
        None,
        gt=0,
        le=_LONGEST_S,
        description="a round asks twice as many devices after so long; default: within which three quarters of them "
        "come again, at most an hour, at least retry_max_s and a tenth of the lease",
    )


class DivergenceConfig(_Section):
    """When training is halted by itself."""

    enabled: bool = Field(default=True, description="halt a task whose loss or updates explode")
    factor: float = Field(2.0, gt=1, allow_inf_nan=False, description="loss beside the best one that is too much")
    patience: int = Field(5, ge=1, description="rounds in a row")


class TaskConfig(_Section):
    """What is trained, and by which rounds."""

    bundle: Path = Field(description="folder with program.pte, manifest.json and weights.safetensors")
    validation_data: Path | None = Field(None, description=".npz with x (float32) and y (int64); None: no evaluation")
    rounds: int = Field(10, ge=1, description="model updates until the task is finished")
    buffer_size: int = Field(10, ge=1, description="reports per model update")
    concurrency: int | None = Field(None, ge=1, description="devices at work at once; default: buffer_size")
    refill_at: int | None = Field(None, ge=1, description="free slots before new invitations; default: concurrency")
    lease_s: float = Field(600.0, gt=0, le=_LONGEST_S, description="seconds from assignment to deadline")
    retry_min_s: float = Field(2.0, ge=0, le=_LONGEST_S, description="shortest wait told to a device that got no work")
    retry_max_s: float = Field(10.0, ge=0, le=_LONGEST_S, description="longest wait told to a device that got no work")
    weight_cap: int = Field(1024, ge=1, le=2**20, description="sample counts above it weigh no more")
    max_abs: float = Field(1024.0, gt=0, le=1e8, description="largest value an update may hold")
    resolution: float = Field(
        1e-8, ge=2.0**-149, le=1e8, description="magnitudes from here on are summed without any rounding"
    )
    seed: int = Field(0, ge=0, description="drives shuffles, compression and selection, nothing secret")
    compression: str | None = Field(None, description="of the updates, such as topk:0.01; none by default")
    population: int | None = Field(None, ge=1, description="devices in all; scaffold needs to know")
    plan: TrainingPlan = TrainingPlan()
    aggregation: AggregationConfig = AggregationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    staleness: StalenessPolicy = StalenessPolicy(max_staleness=0)
    delay_damping: float | None = Field(
        None, gt=0, le=1, description="correct stale updates by the steps they missed: learning rate times curvature"
    )
    selection: SelectionConfig = SelectionConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secure: SecureConfig | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.retry_max_s < self.retry_min_s:
            raise ValueError("retry_max_s lies below retry_min_s")
        return self

    @model_validator(mode="after")
    def _protected(self) -> Self:
        """Combinations that mean nothing; what the mathematics rules out is refused by the pipeline."""
        if (self.privacy.enabled or self.secure is not None) and self.aggregation.clip_norm is None:
            raise ValueError("updates that are shared or noised need a bound: set aggregation.clip_norm")
        if self.privacy.noise in {"aggregators", "devices"} and self.secure is None:
            raise ValueError(
                f"{self.privacy.noise} can add noise to shares only: set task.secure, or privacy.noise = server"
            )
        if self.privacy.noise == "server" and self.secure is not None:
            raise ValueError("this server sees no sum without noise to add some: set privacy.noise = aggregators")
        if self.privacy.honest_devices is not None:
            if self.privacy.honest_devices > self.buffer_size:
                raise ValueError("honest_devices cannot be more than the reports of a sum (buffer_size)")
            if self.staleness.max_staleness > 0:
                raise ValueError("the noise of devices would be weighted by their age: set max_staleness = 0")
        return self

    @property
    def max_weight(self) -> int:
        """Largest public weight of a report. SCAFFOLD's control is a plain mean of devices: its reports weigh 1.

        So do those of a private task: a weight is what one device can move the sum by, and the noise grows with it.
        """
        uniform = (
            self.aggregation.weighting == "uniform"
            or self.plan.algorithm == "scaffold"
            or self.privacy.enabled
            # Rules weigh all alike, on shares too.
            or (self.secure is not None and self.aggregation.rule != "mean")
        )
        return 1 if uniform else self.weight_cap

    @property
    def server_learning_rate(self) -> float:
        """The server's, where it is not set: 1 for deltas, which are steps already; for meta-gradients the meta rate.

        With it the mean of Per-FedAvg's updates leads to the mean of the devices' weights, as in the paper.
        """
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        if self.plan.meta is not None and self.plan.update_kind is UpdateKind.GRADIENT:
            return self.plan.meta.meta_learning_rate
        return 1.0

    @property
    def capacity(self) -> int:
        """Reports that can be folded at once: a full buffer, and in virtual time those that turn out not to count."""
        return self.buffer_size + (self.concurrency or self.buffer_size)

    @property
    def withholds_loss(self) -> bool:
        """Whether devices keep their losses to themselves: a sum may be private, what each of them says is not."""
        return self.privacy.enabled or self.secure is not None

    def clipped_to(self, clip_norm: float) -> Self:
        """The same settings with another clip norm: those of a round, where it is adaptive."""
        aggregation = self.aggregation.model_copy(update={"clip_norm": clip_norm})
        return self.model_copy(update={"aggregation": aggregation})

    def policy(self) -> RoundPolicy:
        """The engine's view of the rounds.

        Raises:
            ConfigurationError: Numbers that cannot work together.
        """
        concurrency = self.concurrency or self.buffer_size
        return RoundPolicy(
            buffer_size=self.buffer_size,
            concurrency=concurrency,
            refill_at=self.refill_at or concurrency,
            max_staleness=self.staleness.tolerance(0),
            lease_s=self.lease_s,
            weight_cap=self.max_weight,
            rounds=self.rounds,
        )


class AggregatorsConfig(_Section):
    """Where the aggregators of a task with shared updates run."""

    mode: Literal["embedded", "remote"] = Field(
        "embedded", description="embedded: in this process, which gives no secrecy from its operator; remote: elsewhere"
    )
    urls: tuple[str, ...] = Field((), description="remote: addresses of the aggregators, that with index 1 first")
    peers_file: Path | None = Field(None, description="remote: their public keys, made by `pocketfed aggregator peers`")
    key_file: Path | None = Field(None, description="remote: this coordinator's key; made if there is none")
    ca_file: Path | None = Field(None, description="remote: certificates to trust instead of the system's")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        remote = self.mode == "remote"
        if remote != (bool(self.urls) and self.peers_file is not None):
            raise ValueError("remote aggregators are given by urls and peers_file, and those go with mode = remote")
        return self


class ServerConfig(BaseSettings):
    """One server process."""

    model_config = SettingsConfigDict(
        env_prefix="POCKETFED_", env_nested_delimiter="__", frozen=True, extra="forbid", validate_default=True
    )

    data_dir: Path = Field(description="database and blobs live here")
    host: str = Field("127.0.0.1", description="the embedded default listens on loopback only")
    port: int = Field(8470, ge=0, le=65535, description="0 picks a free port")
    clock: Literal["wall", "virtual"] = Field("wall", description="virtual: simulated time, for simulations only")
    max_header_bytes: int = Field(65536, ge=1024, description="largest header of an uploaded frame")
    blob_quota_bytes: int | None = Field(None, gt=0, description="refuse reports beyond this much blob storage")
    upload_bytes: int = Field(10**10, gt=0, description="room for reports that arrive in chunks, until they are whole")
    exit_with_stdin: bool = Field(
        default=False, description="stop when standard input closes: for a parent that must not leave orphans"
    )
    aggregators: AggregatorsConfig = AggregatorsConfig()
    task: TaskConfig


_PATHS = (
    "data_dir",
    "task.bundle",
    "task.validation_data",
    "aggregators.peers_file",
    "aggregators.key_file",
    "aggregators.ca_file",
)
"""Settings that are taken from the folder of the file."""


def load_config(path: Path | None = None, overrides: dict[str, Any] | None = None) -> ServerConfig:
    """Read the configuration.

    Args:
        path: TOML file; relative paths inside it are taken from its folder.
        overrides: Values from flags, nested like the file; they win over file and environment.

    Raises:
        ConfigurationError: Unreadable file, unknown key, or a value that cannot be.
    """
    values = {} if path is None else read_toml(path, _PATHS)
    try:
        config = layered(ServerConfig, values, overrides or {})
        config.task.policy()
    except ValidationError as e:
        raise ConfigurationError(explain(e, path, _FLAGS)) from e
    return config


_FLAGS = {
    "data_dir": ("data_dir", "--data-dir"),
    "task": ("task.bundle", "--bundle"),
    "task.bundle": ("task.bundle", "--bundle"),
}
