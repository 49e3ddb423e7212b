"""``results.json``: what a run measured, in a closed schema that other tools can rely on."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_sdk.atomic import write_atomically
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import Sha256
from client_sdk.protocol.profile import DeviceTier
from simulator.config import SimulationConfig
from simulator.folder import RESULTS_FILE
from simulator.view import PrivacyClaim, Secrecy

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoundResult(_Frozen):
    """One model update.

    ``accuracy`` and ``loss`` are those of the new model on the server's validation data (null where the server has
    none). ``bytes_up`` and ``bytes_down`` are the bodies that the devices assigned in this round sent and received,
    measured on the wire, late and refused reports included.
    """

    round: int = Field(ge=1, description="1 for the first update; the version of the model it made")
    accuracy: Fraction | None
    loss: Loss | None
    train_loss: Loss | None = Field(description="mean loss that the counted devices reported, weighted")
    reports: Count = Field(description="reports in the update")
    discarded: Count = Field(description="assignments that the commit made worthless: over-selection, staleness")
    bytes_up: Count
    bytes_down: Count
    seconds: NonNegative = Field(description="wall-clock time of this machine")
    opened_at_s: NonNegative = Field(description="the server's clock: virtual time unless the server was foreign")
    closed_at_s: NonNegative
    bytes_counted: Count = Field(description="bodies of the counted reports")
    bytes_dense: Count = Field(description="what their updates alone would take as float32")
    excluded: tuple[Count, ...] = Field(description="assignment numbers of counted reports that a robust rule left out")
    attackers: Count = Field(description="counted reports of devices that attack")
    excluded_attackers: Count = Field(description="those of them that the rule left out")
    num_byzantine: Count | None = Field(description="dishonest reports that the rule reckoned with; null: no rule")
    degraded: bool = Field(description="whether these are fewer than it was to stand: the buffer was too small")
    clipped: Count = Field(description="counted reports whose norm was clipped")
    norm_median: NonNegative | None = Field(description="of the counted updates before clipping; null without clipping")
    norm_max: NonNegative | None
    aggregate_norm: NonNegative | None = Field(description="L2 norm of what they became; null if that failed")
    staleness: dict[Count, Count] = Field(description="age in model versions -> counted reports")
    unchanged: str | None = Field(description="the error that made the round leave the model as it was")
    epsilon: NonNegative | None = Field(description="spent by this round and all before it; null without noise")
    noise_stddev: NonNegative | None = Field(
        description="of the aggregate's noise, per coordinate, as it is accounted for; null without noise"
    )
    shares_rejected: dict[str, Count] = Field(description="reason -> reports that aggregators left out of the sum")
    noise_from: tuple[Count, ...] = Field(description="aggregators that added noise, from 1")
    opened_by: tuple[Count, ...] = Field(description="aggregators whose answers the sum was opened from")
    tampered: tuple[Count, ...] = Field(description="those of them that answered wrongly, and were left out")
    integrity: Literal["unchecked", "checked", "corrected"] | None = Field(
        description="whether a wrong answer would have shown: not with as few as it takes; null: nothing was shared"
    )
    model_sha256: Sha256


class PrivacyResult(PrivacyClaim):
    """What the run claims, and what it spent."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SecrecyResult(Secrecy):
    """How the updates were shared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TierResult(_Frozen):
    """What became of the sessions of one device tier."""

    tier: DeviceTier
    devices: Count
    counted: Count = Field(description="reports that are part of a model")
    late: Count = Field(description="reports that came after their round had closed")
    dropped: Count = Field(description="sessions that never reported")
    refused: Count = Field(description="reports refused for what was in them, and trainings that failed")
    unfinished: Count = Field(description="sessions that were under way when the run ended")
    examples: Count | None = Field(
        description="that its counted sessions trained, in all their epochs; null: a foreign server's plan decided"
    )


PerHour = Annotated[tuple[Fraction, ...], Field(min_length=24, max_length=24)]


class DaysResult(_Frozen):
    """What the devices' days did to the run.

    Shares are of looks at devices in each hour of the first day, UTC. Sessions are all that were given out, played to
    their end also where that lies beyond the end of the run; reasons are ``PauseReason``'s and those of ``traces``.
    """

    devices: int = Field(ge=1, description="that were looked at, evenly picked")
    may_start: PerHour = Field(description="share that may start a session")
    kept_away: dict[str, PerHour] = Field(description="reason -> share that may not, the commonest first")
    paused: Count = Field(description="sessions that stood still at least once")
    resumed: Count = Field(description="those of them that were taken up again and came to their end in time")
    pauses: dict[str, Count] = Field(description="reason -> how often a session stood still, the commonest first")
    lost: dict[str, Count] = Field(description="reason -> sessions that never reported, the commonest first")


class WorstDecile(_Frozen):
    """The tenth of the devices, rounded up, that each model serves worst; not the same devices before and after."""

    devices: int = Field(ge=1)
    global_accuracy: Fraction
    personalized_accuracy: Fraction
    personalization_gain: Finite


class FairnessResult(_Frozen):
    """How unequally devices are served, before and after they adapt."""

    global_stddev: NonNegative = Field(description="of the accuracies, over devices")
    personalized_stddev: NonNegative
    global_jain: Fraction = Field(description="Jain's index of the accuracies: 1 if all are equal")
    personalized_jain: Fraction
    worst_decile_gain: Finite = Field(description="mean gain of the tenth that gains least; negative: they lose")
    losing: Fraction = Field(description="share of the devices whose own model is worse than the global one")


class AdaptationCurve(_Frozen):
    """How well devices do after each step of adaptation, from the model of one round on."""

    round: Count = Field(description="that made the model; 0: the initial one")
    accuracy: tuple[Fraction, ...] = Field(min_length=1, description="after 0, 1, ... steps: mean over devices")


class ForgettingResult(_Frozen):
    """What a new global model leaves of what devices had learned for themselves.

    Devices adapt from the last model but one. Then the last one comes, and each lays what it had learned over it, in
    part or whole: ``new global + share * (own - old global)``, without another step.
    """

    personal_share: Fraction
    gain_before: Finite = Field(description="own model's accuracy over that of the global one that it came from")
    gain_after: Finite = Field(description="the merged model's over that of the new global one")
    kept: Finite | None = Field(description="the second as a share of the first; null where nothing was gained")


class PersonalizationResult(_Frozen):
    """What adaptation to each device gives.

    Accuracies are shares from 0 to 1, means over devices each of which counts once. The first four figures and those
    made of them are on examples of the test split, read once; curves and forgetting are on the validation split.
    """

    global_accuracy: Fraction = Field(description="of the last model, on what each device will see next")
    personalized_accuracy: Fraction = Field(description="of every device's own model, adapted from it")
    personalization_gain: Finite
    per_device_accuracies: dict[str, tuple[Fraction, Fraction]] = Field(description="device -> (global, personal)")
    devices: int = Field(ge=1, description="that were adapted and judged, evenly picked")
    examples: int = Field(ge=1, description="that judge each of them")
    steps: int = Field(ge=1, description="of adaptation")
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    batch_size: int = Field(ge=1, description="the most of a device's examples in a step")
    personal_layers: tuple[str, ...] = Field(description="that never leave a device; empty: all are shared")
    worst_decile: WorstDecile
    fairness: FairnessResult
    curves: tuple[AdaptationCurve, ...] = Field(description="of some rounds' models, the last one's at the end")
    forgetting: tuple[ForgettingResult, ...] = Field(description="empty where no model was trained before the last one")


class DatasetFacts(_Frozen):
    """What was trained on."""

    name: str
    sha256: Sha256
    train: Count
    validation: Count
    test: Count


class SimulationResults(_Frozen):
    """Everything a run measured.

    ``final_accuracy`` is on the test split, which is read once, after the last round; null in an interrupted run.
    """

    format: Literal[5] = 5
    status: Literal["completed", "interrupted"]
    final_accuracy: Fraction | None
    final_loss: Loss | None
    model_sha256: Sha256 | None = Field(description="content hash of the latest model; null before the first round")
    halted: str | None = Field(description="why training ended before its last round; null if it did not")
    pipeline: dict[str, str] = Field(description="slot -> what the server does there")
    repeatable: bool = Field(description="whether the same command gives the same model_sha256 on this machine")
    privacy: PrivacyResult | None = Field(description="differential privacy; null: none is claimed")
    secrecy: SecrecyResult | None = Field(description="secret sharing; null: the server saw every update")
    rounds: tuple[RoundResult, ...]
    tiers: tuple[TierResult, ...]
    days: DaysResult | None = Field(description="availability, pauses, losses; null: profiles without a day")
    personalization: PersonalizationResult | None = Field(
        description="what adaptation to each device gives; null: not asked for, or the run was interrupted"
    )
    refusals: dict[str, Count] = Field(description="why reports are in no model: problem type -> sessions")
    jain_index: Fraction = Field(description="fairness of how often each device counted: 1 equally often, 1/n one only")
    slow_share: NonNegative | None = Field(
        description="how often a straggler (or else a low-end device) counted beside one of the others; null: none"
    )
    sessions: Count = Field(description="sessions delivered, whether their report counted or came late")
    seconds: NonNegative = Field(description="wall-clock time of all rounds; set-up is not in it")
    clients_per_second: NonNegative = Field(description="sessions delivered per second of this process' rounds")
    bytes_up: Count
    bytes_down: Count
    virtual_seconds: NonNegative | None = Field(
        description="length of the run in virtual time; null on a foreign server"
    )
    config: SimulationConfig
    server: str = Field(description="'embedded', 'none' (cohort engine), or the address of the foreign server")
    runtime: str = Field(
        description="ExecuTorch adapter that ran the programs; 'torch' where the cohort engine trained"
    )
    workers: Count
    dataset: DatasetFacts
    parameters: Count = Field(description="length of the model's weight vector")
    versions: dict[str, str]

    def write(self, folder: Path) -> Path:
        """Write ``results.json``: the old file or the new one, never a mix."""
        path = folder / RESULTS_FILE
        write_atomically(path, (self.model_dump_json(indent=2) + "\n").encode(), mode=0o644)
        return path

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read what ``write`` wrote.

        Raises:
            ConfigurationError: Not such a file.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as e:
            raise ConfigurationError(f"{path} is not a results file of this version: {e}") from e


def versions() -> dict[str, str]:
    """Releases of what produced the results."""
    packages = ("pocketfed", "torch", "executorch", "numpy")
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
