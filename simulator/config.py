"""What a run is: everything that decides its outcome, and nothing else.

How a run is carried out (threads, runtime adapter, output folder, progress) is in ``run.RunOptions``: it changes the
time a run takes, not its result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from client_sdk.protocol.compression import CompressionSpec
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from client_sdk.protocol.training import Algorithm, TrainingPlan
from server_ref.aggregation.server_optim import OptimizerConfig
from server_ref.aggregation.staleness import StalenessPolicy
from server_ref.config import AggregationConfig, DivergenceConfig, SelectionConfig
from server_ref.flags import merged
from server_ref.protection import PrivacyConfig, SecureConfig
from simulator.adversaries.registry import parse_attack
from simulator.errors import ResumeMismatch
from simulator.partition import parse_partition
from simulator.personalization.settings import DEFAULT_STEPS, Adaptation
from simulator.profiles import FleetProfiles, read_profiles
from simulator.recipes import recipe_of
from simulator.skew import parse_skew


def default_cohort(devices: int) -> int:
    """Reports per round unless told: a fifth of the fleet, at least ten, at most all."""
    return min(devices, max(10, devices // 5))


class SimulationConfig(BaseModel):
    """One simulation. Equal configurations give equal models, bit for bit, on one machine (see ``repeatable``).

    Attributes:
        dataset: Name of a data set.
        devices: Size of the fleet.
        rounds: Model updates until the run is over.
        model: Reference model.
        partition: How the training examples are dealt out; see ``partition.parse_partition``.
        seed: Drives partition, shuffles, selection, speeds and drop-outs. The model's initial weights are the same
            for all seeds, so that one exported program serves them all.
        cohort: Reports per model update; None takes ``default_cohort``.
        overselect: Devices invited per report needed: ``concurrency = ceil(cohort * overselect)``.
        refill_at: Free slots before new devices are invited; None (all of them) makes rounds synchronous.
        epochs: Local passes over a device's examples; of meta-learning, whose steps are counted, without effect.
        batch_size: Examples per local step.
        learning_rate: Of the local steps.
        prox_mu: FedProx's coefficient; 0 is FedAvg.
        algorithm: What devices train and send.
        meta: Of meta-learning; None takes its defaults.
        personal: Layers that each device keeps for itself.
        adapt_steps: Steps by which devices adapt what comes of it, for the figures on personalisation; None: those of
            meta-learning, or 5 with personal layers, and else none. 0: none.
        adapt_learning_rate: Of these steps; None takes that of the local steps.
        max_steps: Local steps after which training ends.
        compression: Of the updates, canonical.
        aggregation: How a buffer's updates become one.
        optimizer: What applies that to the model.
        staleness: How old updates may be, and what that costs them.
        delay_damping: Corrects stale updates by the steps they missed.
        selection: Who gets a free slot.
        divergence: When training is halted by itself.
        privacy: Differential privacy of what the run releases.
        secure: Secret sharing of the updates among aggregators; None: the server sees them.
        aggregators: Where those run: in the server's process, or each in one of its own.
        local_work: ``adaptive``: epochs and batch size are the most, and each device trains what its tier and memory
            allow.
        lease: Seconds that the server waits for a report; None takes what the slowest device needs, and an hour at
            least where devices pause.
        work_scale: What an example costs, in times of what it costs with the model at hand: a small model then stands
            for a large one.
        profiles: What the fleet is made of, as ``profiles.read_profiles`` has it; None: three tiers, always available.
        skew: Of the devices' features, as ``skew.parse_skew`` reads it; None: none but the profiles' own.
        dropout: Probability that an invited device never reports.
        stragglers: Fraction of the fleet whose sessions take ``slowdown`` times longer.
        slowdown: See ``stragglers``.
        attack: What dishonest devices do, as ``adversaries.parse_attack`` reads it; None: all are honest.
        byzantine: Fraction of the fleet that attacks, and that a robust rule reckons with.
        engine: What plays the fleet: ``devices`` runs the SDK in each of them against a server, ``cohort`` trains them
            in batches, without HTTP.
        server: Address of a foreign server, which brings its own clock, rounds, model and plan; None for our own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    dataset: str = "digits"
    devices: int = Field(100, ge=1, le=1_000_000)
    rounds: int = Field(60, ge=1, le=1_000_000)
    model: Literal["softmax", "mlp", "cnn", "byte-mlp", "byte-gru"] = "mlp"
    partition: str = "dirichlet:0.5"
    seed: int = Field(1, ge=0, lt=2**31)
    cohort: int | None = Field(None, ge=1)
    overselect: float = Field(1.0, ge=1.0, le=100.0)
    refill_at: int | None = Field(None, ge=1)
    epochs: int = Field(5, ge=1, le=1000)
    batch_size: int = Field(8, ge=1, le=4096)
    learning_rate: float = Field(0.5, gt=0, le=1e3, allow_inf_nan=False)
    prox_mu: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)
    algorithm: Algorithm = "fedavg"
    meta: MetaPlan | None = None
    personal: tuple[str, ...] = ()
    adapt_steps: int | None = Field(None, ge=0, le=100)
    adapt_learning_rate: float | None = Field(None, gt=0, le=1e3, allow_inf_nan=False)
    max_steps: int | None = Field(None, ge=1)
    compression: str | None = None
    aggregation: AggregationConfig = AggregationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    staleness: StalenessPolicy = StalenessPolicy(max_staleness=0)
    delay_damping: float | None = Field(None, gt=0, le=1)
    selection: SelectionConfig = SelectionConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secure: SecureConfig | None = None
    aggregators: Literal["embedded", "processes"] = "embedded"
    local_work: Literal["planned", "adaptive"] = "planned"
    lease: float | None = Field(None, gt=0, le=7 * 86400, allow_inf_nan=False)
    work_scale: float = Field(1.0, gt=0, le=1e9, allow_inf_nan=False)
    profiles: FleetProfiles | None = None
    skew: str | None = None
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    stragglers: float = Field(0.0, ge=0.0, lt=1.0)
    slowdown: float = Field(10.0, ge=1.0, le=1000.0)
    attack: str | None = None
    byzantine: float = Field(0.0, ge=0.0, lt=1.0)
    engine: Literal["devices", "cohort"] = "devices"
    server: str | None = None

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, value: str) -> str:
        return str(parse_partition(value))

    @field_validator("skew")
    @classmethod
    def _known_skew(cls, value: str | None) -> str | None:
        return None if value is None else str(parse_skew(value))

    @field_validator("compression")
    @classmethod
    def _canonical_compression(cls, value: str | None) -> str | None:
        return None if value is None else str(CompressionSpec.parse(value))

    @field_validator("attack")
    @classmethod
    def _known_attack(cls, value: str | None) -> str | None:
        return None if value is None else str(parse_attack(value))

    @property
    def cohort_size(self) -> int:
        """Reports per model update."""
        return default_cohort(self.devices) if self.cohort is None else self.cohort

    @property
    def concurrency(self) -> int:
        """Devices at work at once."""
        return math.ceil(round(self.cohort_size * self.overselect, 9))

    @property
    def max_staleness(self) -> int:
        """Model versions an update may lag behind, at most."""
        return self.staleness.max_staleness

    @property
    def repeatable(self) -> bool:
        """Whether equal configurations give equal models.

        Not where a foreign server's clock decides, and not with differential privacy: whoever could repeat its noise
        could take it away.
        """
        return self.server is None and not self.privacy.enabled

    @property
    def plan(self) -> TrainingPlan:
        """The devices' local training."""
        adapts = self.algorithm in META_ALGORITHMS
        return TrainingPlan(
            local_epochs=1 if adapts else self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            prox_mu=self.prox_mu,
            algorithm=self.algorithm,
            max_steps=self.max_steps,
            adaptive=self.local_work == "adaptive",
            meta=MetaPlan() if adapts and self.meta is None else self.meta,
            personal=self.personal,
        )

    @property
    def adaptation(self) -> Adaptation | None:
        """How devices adapt the run's models, to see what that gives; None: they do not."""
        steps, meta = self.adapt_steps, self.plan.meta
        if steps is None:
            steps = DEFAULT_STEPS if self.personal and meta is None else 0 if meta is None else meta.inner_steps
        rate = self.learning_rate if self.adapt_learning_rate is None else self.adapt_learning_rate
        return Adaptation(steps, rate, self.batch_size, self.personal) if steps else None

    @property
    def fleet_profiles(self) -> FleetProfiles:
        """What the fleet is made of."""
        return self.profiles or read_profiles("steady")

    def check(self) -> None:
        """Refuse combinations that no fleet can fulfil.

        Raises:
            ConfigurationError: The message says which numbers to change.
        """
        if self.cohort_size > self.devices:
            raise ConfigurationError(
                f"a cohort of {self.cohort_size} reports a round needs at least as many devices, there are "
                f"{self.devices}; lower --cohort or raise --devices"
            )
        if self.concurrency > self.devices:
            raise ConfigurationError(
                f"--cohort {self.cohort_size} x --overselect {self.overselect:g} invites {self.concurrency} devices "
                f"at once, there are {self.devices}; lower one of the two or raise --devices"
            )
        if self.refill_at is not None and self.refill_at > self.concurrency:
            raise ConfigurationError(
                f"--refill-at {self.refill_at} slots can never be free: at most {self.concurrency} devices work at once"
            )
        if self.engine == "cohort" and self.server is not None:
            raise ConfigurationError("--engine cohort plays without HTTP; leave it or --server out")
        if self.engine == "cohort" and self.secure is not None:
            raise ConfigurationError(
                "--engine cohort shares no secrets: sums on the int64 grid have the same bits without --secure; leave "
                "one of the two out"
            )
        if self.server is not None and (self.profiles is not None or self.local_work != "planned"):
            raise ConfigurationError(
                "--profiles play on virtual time, and what devices train is the server's plan: leave --profiles and "
                "--local-work out with --server"
            )
        self._check_protection()
        self._check_meta_learning()
        try:
            _ = self.plan
        except ValidationError as e:
            raise ConfigurationError(told(e)) from e
        self._check_adaptation()
        self._check_attack()
        self._check_participations()

    def _check_adaptation(self) -> None:
        if self.adaptation is None:
            if self.adapt_learning_rate is not None:
                raise ConfigurationError(
                    "--adapt-lr is the rate of a device's own steps: say how many, --adapt-steps 5"
                )
        elif self.server is not None:
            raise ConfigurationError(
                "what devices train and adapt is the other server's plan: leave --personalize, --personal-layers and "
                "--adapt-steps out with --server"
            )

    def _check_meta_learning(self) -> None:
        """What the plan would refuse too, told by flags."""
        if self.algorithm not in META_ALGORITHMS:
            if self.meta is not None:
                given = [flag_of(("meta", name)) for name in sorted(self.meta.model_fields_set)]
                raise ConfigurationError(
                    f"{', '.join(given) or 'meta'}: {self.algorithm} does not adapt; add --personalize maml, or "
                    "another of " + ", ".join(META_ALGORITHMS)
                )
            return
        asked = {
            "--prox-mu": self.prox_mu > 0,
            "--local-work adaptive": self.local_work == "adaptive",
            "--max-steps": self.max_steps is not None,
        }
        idle = [flag for flag, given in asked.items() if given]
        if idle:
            raise ConfigurationError(
                f"--personalize {self.algorithm} takes --inner-steps steps on every device: leave "
                f"{' and '.join(idle)} out"
            )

    def _check_protection(self) -> None:
        """Of a server of our own: what its settings would refuse too, told by flags."""
        privacy, secure = self.privacy, self.secure
        if self.aggregators == "processes" and secure is None:
            raise ConfigurationError("--aggregators processes needs updates to share: add --secure 3of5")
        if self.server is not None:
            if privacy.enabled or secure is not None:
                raise ConfigurationError(
                    "noise and shares are the server's to decide: leave --epsilon, --noise-multiplier and --secure out "
                    "with --server"
                )
            return
        if (privacy.enabled or secure is not None) and self.aggregation.clip_norm is None:
            asked = "--secure" if secure is not None else "--epsilon" if privacy.epsilon else "--noise-multiplier"
            raise ConfigurationError(
                f"{asked} needs a bound on what one device can add to a sum: give --clip-norm, such as --clip-norm 1 "
                "(without a bound no noise hides anybody, and a share holds numbers up to a bound only)"
            )
        if privacy.noise in {"aggregators", "devices"} and secure is None:
            raise ConfigurationError(
                f"--noise {privacy.noise} goes into shares: add --secure 3of5, or let the server add it "
                "(--noise server)"
            )
        if privacy.noise == "server" and secure is not None:
            raise ConfigurationError(
                "with --secure the server sees no sum without noise, and cannot be who adds it: use "
                "--noise aggregators, or leave --noise out"
            )

    def _check_participations(self) -> None:
        most = self.privacy.max_participations
        if most is not None and most * self.devices < self.rounds * self.cohort_size:
            raise ConfigurationError(
                f"{self.devices} devices that take part at most {most} times fill "
                f"{most * self.devices // self.cohort_size} rounds of {self.cohort_size} reports, not {self.rounds}: "
                "raise --max-participations or --devices, or lower --rounds or --cohort"
            )

    def _check_attack(self) -> None:
        if self.attack is None:
            return
        if self.byzantine == 0:
            raise ConfigurationError(
                f"--attack {self.attack} needs attackers: say how large a part of the fleet they are, e.g. "
                "--byzantine 0.2"
            )
        if self.server is not None:
            raise ConfigurationError("--attack is for the simulation's own server; leave it or --server out")

    @classmethod
    def parse(cls, values: dict[str, object]) -> Self:
        """Validate values from the command line; missing or None ones take the data set's recipe, then the defaults.

        Raises:
            ConfigurationError: A value out of range; the message names the flag.
            PartitionError: An unknown partition.
            AttackError: An unknown attack.
        """
        try:
            given = {k: v for k, v in values.items() if v is not None}
            recipe = recipe_of(str(given.get("dataset", "digits")), str(given.get("algorithm", "fedavg")))
            config = cls.model_validate(merged(recipe, given))
        except ValidationError as e:
            raise ConfigurationError(told(e)) from e
        config.check()
        return config

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``write`` wrote.

        Raises:
            ResumeMismatch: Missing, or written by another version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as e:
            raise ResumeMismatch(f"{path.parent} holds no run to resume ({path.name} is missing)") from e
        except ValidationError as e:
            raise ResumeMismatch(f"{path} was written by another version of pocketfed; start a new run") from e

    def differences(self, other: SimulationConfig) -> list[str]:
        """``flag: mine, other's`` of every field in which the two differ."""
        mine, theirs = (flat(c.model_dump(mode="json", exclude={"profiles"})) for c in (self, other))
        told = [f"{flag_of(k)} {mine[k]} (the run has {theirs.get(k)})" for k in mine if mine[k] != theirs.get(k)]
        if self.profiles != other.profiles:
            told.append("--profiles are others than the run has")
        return told


def flat(values: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Nested settings by their paths.

    Example:
        >>> flat({"rounds": 3, "optimizer": {"name": "sgd"}})
        {('rounds',): 3, ('optimizer', 'name'): 'sgd'}
    """
    found: dict[tuple[str, ...], Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update({(name, *path): inner for path, inner in flat(value).items()})
        else:
            found[(name,)] = value
    return found


_FLAGS = {
    "learning_rate": "--lr",
    "meta.inner_steps": "--inner-steps",
    "meta.query_fraction": "--query-fraction",
    "meta.meta_learning_rate": "--meta-lr",
    "personal": "--personal-layers",
    "adapt_learning_rate": "--adapt-lr",
    "aggregation.rule": "--rule",
    "aggregation.num_byzantine": "--num-byzantine",
    "aggregation.degraded": "--degraded",
    "aggregation.mixing": "--mixing",
    "aggregation.distances": "--distances",
    "aggregation.clip_norm": "--clip-norm",
    "aggregation.clip_scope": "--clip-scope",
    "aggregation.weighting": "--weighting",
    "privacy.epsilon": "--epsilon",
    "privacy.delta": "--delta",
    "privacy.noise": "--noise",
    "privacy.noise_multiplier": "--noise-multiplier",
    "privacy.honest_devices": "--honest-devices",
    "privacy.noise_schedule": "--noise-schedule",
    "privacy.final_noise": "--final-noise",
    "privacy.adjacency": "--adjacency",
    "privacy.max_participations": "--max-participations",
    "privacy.buckets": "--buckets",
    "privacy.adaptive_clipping": "--adaptive-clipping",
    "privacy.target_quantile": "--target-quantile",
    "secure.threshold": "--secure",
    "secure.num_aggregators": "--secure",
    "secure.field": "--field",
    "secure.packing": "--packing",
    "secure.checks": "--checks",
    "secure.minimum_cohort": "--minimum-cohort",
    "optimizer.name": "--optimizer",
    "optimizer.learning_rate": "--server-lr",
    "optimizer.momentum": "--server-momentum",
    "selection.policy": "--selection",
    "selection.floor": "--selection-floor",
    "staleness.max_staleness": "--max-staleness",
    "staleness.tighten_rounds": "--tighten",
    "staleness.exponent": "--staleness",
    "staleness.final_exponent": "--staleness",
    "staleness.weighting": "--staleness",
    "staleness.scale_learning_rate": "--stale-lr",
}


def flag_of(location: tuple[int | str, ...]) -> str:
    """The flag that sets a field: nested sections are flat on the command line. The field's own name if none does."""
    name = ".".join(map(str, location)) if location else "configuration"
    return _FLAGS.get(name, name if "." in name else "--" + name.replace("_", "-"))


def told(error: ValidationError) -> str:
    """What is wrong, by flags; a combination of settings speaks for itself."""
    problems = []
    for problem in error.errors():
        words = problem["msg"].removeprefix("Value error, ")
        if isinstance(problem["input"], Mapping):
            problems.append(words)
        else:
            plain = words[:1].lower() + words[1:]
            problems.append(f"{flag_of(problem['loc'])}: {plain} (got {problem['input']!r})")
    return "; ".join(problems)
