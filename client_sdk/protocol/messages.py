"""The JSON control messages. Frozen, closed (unknown fields are refused), versioned.

Tensors never travel in them: see ``frames``. Sizes, times and ranges are bounded here, once, for both ends.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.fixed_point import MAX_FRACTION_BITS
from client_sdk.protocol.privacy import EncodedBounds
from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.sealing import SealingPublicKey, SealingSuite, SharingTerms
from client_sdk.protocol.training import Algorithm, TrainingPlan, update_size
from client_sdk.protocol.updates import UpdateKind

PROTOCOL_VERSION: Final = 1
MAX_JSON_BYTES = 64 * 1024
REPORT_TENSOR = "update"
"""Name of the one tensor in a report's frame: the flat update in parameter-table order, or its compressed bytes."""
CONTROL_TENSOR = "control"
"""Name of the one tensor in the frame of SCAFFOLD's server control: float32[d] in parameter-table order."""
UNCOMPRESSED: Final = "none"
"""What a report says of its compression where there is none."""
WITHHELD: Final = "withheld"
"""What a report says of its loss where the assignment is a private one."""
MAX_AGGREGATORS: Final = 64
MAX_KEY_CHARS: Final = 40_000
"""Of all aggregators' keys together: 16 of the larger suite, so that an assignment stays a small message."""

WaitReason = Literal["round-full", "already-reported", "not-selected"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Id128 = Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="128 bits, hex")]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
SealingKeyHex = Annotated[str, Field(pattern="^[0-9a-f]{64,2432}$")]
SigningKeyHex = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Ed25519 public key, hex")]
Variance = Annotated[
    str,
    Field(
        pattern="^[1-9][0-9]{0,99}(/[1-9][0-9]{0,99})?$",
        description="a positive rational number in lowest terms, in squared steps of the grid: a double would round it",
    ),
]


class Message(BaseModel):
    """Base of all messages. Strict: ``true`` is no number, ``"3"`` is no 3; each value has one JSON form."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EnrolRequest(Message):
    """A device introduces its public key. Repeating it is harmless: the id follows from the key."""

    protocol_version: Literal[1] = PROTOCOL_VERSION
    public_key: SigningKeyHex
    tier: DeviceTier = DeviceTier.MID_RANGE


class EnrolReply(Message):
    """The id under which the device signs its requests from now on, and the key that signs the replies."""

    device_id: Id128
    server_key: SigningKeyHex


class VirtualTiming(Message):
    """Simulated time, accepted only by a server that was built with the virtual clock.

    ``duration_s`` is how long this device will take from assignment to report; ``None`` says that it drops out.
    Declaring it up front lets the server know that no earlier report can still arrive when it closes a buffer.
    """

    now_s: Seconds
    duration_s: Seconds | None


class CheckInRequest(Message):
    """A device offers itself for work."""

    protocol_version: Literal[1] = PROTOCOL_VERSION
    num_samples: int = Field(ge=1, le=10**9, description="examples it would train on; the server caps it")
    virtual: VirtualTiming | None = None


class F32Encoding(Message):
    """The update travels as float32; values beyond ``max_abs`` are refused (the exact sum's declared bound)."""

    name: Literal["f32"] = "f32"
    max_abs: float = Field(gt=0, allow_inf_nan=False)


class I64SharesEncoding(Message):
    """The update is clipped, put on an integer grid, split into shares and sealed, as the assignment's plan says."""

    name: Literal["i64-shares"] = "i64-shares"


class SecurePlan(Message):
    """How an update is made private and split, and for whom. Fixed for a task, but for what follows earlier releases.

    The device shares ``[codes of the update | indicator | mask]`` (``secure.SecureLayout``). With device noise it adds
    its part of the noise to the codes, and to the indicator, before it shares them.
    """

    field: Literal["m61", "m127"] = Field("m61", description="prime field of the shares: 2^61 - 1 or 2^127 - 1")
    threshold: int = Field(3, ge=2, le=MAX_AGGREGATORS, description="t: t - 1 shares say nothing")
    packing: Literal[1, 2] = Field(1, description="coordinates in one share")
    fraction_bits: int = Field(ge=0, le=MAX_FRACTION_BITS, description="f; the grid's step is 2^-f")
    clip_norm: float = Field(gt=0, allow_inf_nan=False, description="C; the codes' norm is at most floor(C 2^f)")
    noise: Literal["none", "aggregators", "devices"] = Field("none", description="who adds the noise of the sum")
    noise_variance: Variance | None = Field(None, description="of each code's noise; with device noise only")
    indicator_norm: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="adaptive clipping: the norm that the update's is compared with"
    )
    indicator_variance: Variance | None = Field(None, description="of the indicator's noise, in half units squared")
    max_participations: int | None = Field(
        None, ge=1, lt=2**31, description="k: the device takes part so often in the task"
    )
    suite: SealingSuite = SealingSuite.X25519
    aggregator_keys: tuple[SealingKeyHex, ...] = Field(
        min_length=2, max_length=MAX_AGGREGATORS, description="public sealing keys, hex; that of aggregator 1 first"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        needed = self.threshold + self.packing - 1
        if needed > self.num_aggregators:
            raise ValueError(f"{needed} shares are needed to open a sum of {self.num_aggregators}")
        if sum(map(len, self.aggregator_keys)) > MAX_KEY_CHARS:
            raise ValueError(f"{self.num_aggregators} keys of {self.suite} do not fit into a message")
        if len(set(self.aggregator_keys)) < self.num_aggregators:
            raise ValueError("two aggregators have one key, so that one party would hold two shares")
        noisy = self.noise == "devices"
        if noisy != (self.noise_variance is not None):
            raise ValueError("noise_variance goes with noise by devices, and that with it")
        if (noisy and self.indicator_norm is not None) != (self.indicator_variance is not None):
            raise ValueError("indicator_variance goes with an indicator and noise by devices, and they with it")
        for variance in (self.noise_variance, self.indicator_variance):
            if variance is not None and str(Fraction(variance)) != variance:
                raise ValueError("a variance is not in lowest terms")
        try:
            _ = self.bounds, self.public_keys
        except ConfigurationError as e:
            raise ValueError(str(e)) from e
        return self

    @property
    def num_aggregators(self) -> int:
        """n, the number of shares."""
        return len(self.aggregator_keys)

    @property
    def bounds(self) -> EncodedBounds:
        """The grid and the norm of the update's codes."""
        return EncodedBounds(clip_norm=self.clip_norm, fraction_bits=self.fraction_bits)

    @property
    def terms(self) -> SharingTerms:
        """What each share is bound to."""
        return SharingTerms(
            field=self.field,
            threshold=self.threshold,
            num_aggregators=self.num_aggregators,
            packing=self.packing,
            fraction_bits=self.fraction_bits,
            clip_norm=self.clip_norm,
            indicator_norm=self.indicator_norm,
            noise_variance=self.noise_variance,
            indicator_variance=self.indicator_variance,
            max_participations=self.max_participations,
        )

    @property
    def public_keys(self) -> tuple[SealingPublicKey, ...]:
        """Whom the shares are sealed to, in the order of the shares."""
        return tuple(SealingPublicKey.from_hex(self.suite, key) for key in self.aggregator_keys)


class Assignment(Message):
    """Work for one device: what to train on, how, and until when. The report repeats the facts it names."""

    assignment_id: Id128
    assignment_number: int = Field(ge=0, description="position in the task's order of assignments; breaks ties")
    task_id: Id128
    round_id: int = Field(ge=0)
    model_version: int = Field(ge=0)
    model_sha256: Sha256
    program_sha256: Sha256
    manifest_sha256: Sha256
    parameter_table_sha256: Sha256
    kind: UpdateKind
    encoding: Annotated[F32Encoding | I64SharesEncoding, Field(discriminator="name")]
    weight: int = Field(ge=1, description="public integer weight: the declared sample count, capped")
    plan: TrainingPlan
    shuffle_seed: int = Field(ge=0, lt=2**53)
    lease_s: Seconds = Field(description="time left until the report is refused as late")
    max_report_bytes: int = Field(gt=0)
    compression: str | None = Field(
        None, min_length=1, max_length=128, description="how the update is compressed, in canonical form; null: not"
    )
    compression_seed: int = Field(0, ge=0, lt=2**53, description="public randomness of the compression")
    control_sha256: Sha256 | None = Field(None, description="blob of the server's control variate; with scaffold only")
    secure: SecurePlan | None = Field(None, description="how the update is split; with the encoding i64-shares only")
    withhold_metrics: bool = Field(default=False, description="the report says nothing of the device's loss")

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        scaffold = self.plan.algorithm == "scaffold"
        if scaffold != (self.control_sha256 is not None):
            raise ValueError("control_sha256 goes with the algorithm scaffold, and scaffold with it")
        if scaffold and self.compression is not None:
            raise ValueError("scaffold's update is not compressed")
        if (self.secure is not None) != isinstance(self.encoding, I64SharesEncoding):
            raise ValueError("a secure plan goes with the encoding i64-shares, and that with it")
        if scaffold and self.secure is not None:
            raise ValueError("scaffold sends two vectors, which are not clipped jointly: it is not shared")
        return self

    def update_size(self, num_parameters: int) -> int:
        """Length of the flat update before compression."""
        return update_size(self.plan, num_parameters)

    @property
    def withholds_loss(self) -> bool:
        """Whether the report keeps the device's loss to itself: a sum may be private, single losses are not."""
        return self.withhold_metrics or self.secure is not None


class Assigned(Message):
    """Check-in answer: there is work."""

    status: Literal["assigned"] = "assigned"
    assignment: Assignment


class RetryWindow(Message):
    """Seconds to wait: the client draws uniformly between the two."""

    min_s: Seconds
    max_s: Seconds

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_s < self.min_s:
            raise ValueError("max_s lies below min_s")
        return self


class Wait(Message):
    """Check-in answer: no work now."""

    status: Literal["wait"] = "wait"
    reason: WaitReason
    retry: RetryWindow


class Finished(Message):
    """Check-in answer: the task has reached its last round, or was halted before it."""

    status: Literal["finished"] = "finished"
    model_version: int = Field(ge=0)
    halted: bool = Field(default=False, description="training diverged; the operator has to look")


class CheckInReply(Message):
    """Envelope of the check-in's three answers."""

    reply: Annotated[Assigned | Wait | Finished, Field(discriminator="status")]


class ModelReply(Message):
    """The task's newest model, for a device that adapts or serves it: with or without work, during the task and after.

    ``plan`` is the task's: ``plan.meta`` says how the model is meant to be adapted, ``plan.personal`` which of its
    layers are the device's own. The blobs are those that an assignment of this version would name.
    """

    task_id: Id128
    model_version: int = Field(ge=0)
    model_sha256: Sha256
    program_sha256: Sha256
    manifest_sha256: Sha256
    parameter_table_sha256: Sha256
    plan: TrainingPlan


class ReportReply(Message):
    """The report is durable. The same answer comes for every repetition of the same report id."""

    status: Literal["accepted"] = "accepted"
    report_id: Id128
    assignment_id: Id128


class UploadRequest(Message):
    """A device announces a report that it sends in chunks, asks where that stands, or says that it is complete."""

    assignment_id: Id128
    num_bytes: int = Field(ge=1, le=10**12)
    sha256: Sha256


class UploadReply(Message):
    """So many bytes of the report are on the server's disk: the next chunk begins there."""

    offset: int = Field(ge=0)
    max_chunk_bytes: int = Field(ge=1)


class ReportFacts(Message):
    """What a report repeats of its assignment, carried as the frame's metadata (all values as strings)."""

    # Read from a dict of strings, where the strict mode would want an enum's member.
    model_config = ConfigDict(strict=False)

    protocol_version: Literal["1"] = "1"
    report_id: Id128
    assignment_id: Id128
    model_version: str = Field(pattern="^[0-9]{1,18}$")
    parameter_table_sha256: Sha256
    kind: UpdateKind
    encoding: Literal["f32", "i64-shares"]
    algorithm: Algorithm
    compression: str = Field(pattern="^[ -~]{1,128}$", description="canonical specification, or ``none``")
    compression_seed: str = Field(pattern="^(0|[1-9][0-9]{0,15})$")
    steps: str = Field(pattern="^[1-9][0-9]{0,11}$", description="local optimizer steps taken")
    train_loss: str = Field(
        pattern=r"^(withheld|[0-9.eE+\-]{1,32})$", description="mean loss over the last local epoch, or ``withheld``"
    )


class AbandonRequest(Message):
    """A device gives its assignment back, so that the slot is free before the lease ends."""

    reason: Literal["interrupted", "no-memory", "training-failed", "privacy", "user"] = "interrupted"


class Problem(Message):
    """RFC 9457 problem details; ``type`` is stable and names the error class of ``errors``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str = ""
    retry: RetryWindow | None = None
    offset: int | None = Field(None, ge=0, description="with upload-offset: where the next chunk has to begin")
