"""The JSON control messages. Frozen, closed (unknown fields are refused), versioned.

Tensors never travel in them: see ``frames``. Sizes, times and ranges are bounded here, once, for both ends.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.profile import DeviceTier
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

WaitReason = Literal["round-full", "already-reported", "not-selected"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Id128 = Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="128 bits, hex")]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Message(BaseModel):
    """Base of all messages. Strict: ``true`` is no number, ``"3"`` is no 3; each value has one JSON form."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EnrolRequest(Message):
    """A device introduces its public key. Repeating it is harmless: the id follows from the key."""

    protocol_version: Literal[1] = PROTOCOL_VERSION
    public_key: str = Field(pattern="^[0-9a-f]{64}$", description="Ed25519 public key, hex")
    tier: DeviceTier = DeviceTier.MID_RANGE


class EnrolReply(Message):
    """The id under which the device signs its requests from now on."""

    device_id: Id128


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
    encoding: F32Encoding
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

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        scaffold = self.plan.algorithm == "scaffold"
        if scaffold != (self.control_sha256 is not None):
            raise ValueError("control_sha256 goes with the algorithm scaffold, and scaffold with it")
        if scaffold and self.compression is not None:
            raise ValueError("scaffold's update is not compressed")
        return self

    def update_size(self, num_parameters: int) -> int:
        """Length of the flat update before compression."""
        return update_size(self.plan, num_parameters)


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


class ReportReply(Message):
    """The report is durable. The same answer comes for every repetition of the same report id."""

    status: Literal["accepted"] = "accepted"
    report_id: Id128
    assignment_id: Id128


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
    encoding: Literal["f32"]
    algorithm: Algorithm
    compression: str = Field(pattern="^[ -~]{1,128}$", description="canonical specification, or ``none``")
    compression_seed: str = Field(pattern="^(0|[1-9][0-9]{0,15})$")
    steps: str = Field(pattern="^[1-9][0-9]{0,11}$", description="local optimizer steps taken")
    train_loss: str = Field(pattern=r"^[0-9.eE+\-]{1,32}$", description="mean loss over the last local epoch")


class AbandonRequest(Message):
    """A device gives its assignment back, so that the slot is free before the lease ends."""

    reason: Literal["interrupted", "no-memory", "training-failed", "user"] = "interrupted"


class Problem(Message):
    """RFC 9457 problem details; ``type`` is stable and names the error class of ``errors``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str = ""
    retry: RetryWindow | None = None
