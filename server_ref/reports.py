"""From the bytes of a report to an update for the pipeline. Pure; every refusal is typed.

Two steps, so that a report that is too late is refused on its facts alone, before anything looks at its values.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from client_sdk.protocol.errors import (
    MalformedMessage,
    OversizedBody,
    ReportMismatch,
    ShapeMismatch,
)
from client_sdk.protocol.frames import Frame, FrameLimits, decode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, UNCOMPRESSED, WITHHELD, ReportFacts
from client_sdk.protocol.secure import SecureLayout, split_secure_report
from client_sdk.protocol.training import TrainingPlan, normaliser
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import EncodedUpdate


@dataclass(frozen=True)
class ReportSchema:
    """What every report of a task must look like.

    Attributes:
        update_size: Coordinates of the flat update.
        parameter_table_sha256: Hash both ends agree on.
        kind: Kind of update; kinds never mix in a round.
        plan: Local training; its algorithm says what the update is made of.
        compression: Canonical specification, or None.
        max_payload_bytes: Largest update on the wire.
        max_header_bytes: Largest frame header.
        withholds_loss: Whether reports say nothing of the device's loss.
        layout: What shares of updates hold; None where updates are not shared.
        private: Whether nothing may be told of single reports.
    """

    update_size: int
    parameter_table_sha256: str
    kind: UpdateKind
    plan: TrainingPlan
    compression: str | None
    max_payload_bytes: int
    max_header_bytes: int
    withholds_loss: bool = False
    layout: SecureLayout | None = None
    private: bool = False

    def told_bytes(self, num_bytes: int) -> int:
        """What a task says of a report's length: of private ones the most that it could be.

        What a payload is compressed to depends on the data, and carries no noise.
        """
        return self.max_bytes if self.private else num_bytes

    @property
    def max_bytes(self) -> int:
        """Largest body: the tensor, the header, and its length."""
        return self.max_payload_bytes + self.max_header_bytes + 8


@dataclass(frozen=True)
class ReportEnvelope:
    """A report whose frame and facts are well formed; its values are not looked at yet.

    ``train_loss`` is NaN where it is withheld.
    """

    facts: ReportFacts
    train_loss: float
    steps: int
    frame: Frame


def open_report(body: bytes | memoryview, schema: ReportSchema) -> ReportEnvelope:
    """Check a report's frame and facts.

    Raises:
        OversizedBody: More bytes than the task's reports can have.
        MalformedFrame: Not a canonical frame; TruncatedFrame where bytes are missing.
        MalformedMessage: Facts missing or of the wrong form.
        ReportMismatch: It tells the device's loss where the task wants none. (A device may withhold it anywhere: one
            whose update carries noise of its own does.)
    """
    if len(body) > schema.max_bytes:
        raise OversizedBody(f"the report has {len(body)} bytes; at most {schema.max_bytes} are accepted")
    tensors = 1 if schema.layout is None else schema.layout.scheme.num_shares
    limits = FrameLimits(max_bytes=schema.max_bytes, max_header_bytes=schema.max_header_bytes, max_tensors=tensors)
    frame = decode_frame(body, limits)
    try:
        facts = ReportFacts.model_validate(frame.metadata)
        train_loss = math.nan if facts.train_loss == WITHHELD else _finite(float(facts.train_loss))
    except ValidationError as e:
        fields = ", ".join(sorted({".".join(map(str, err["loc"])) for err in e.errors()}))
        raise MalformedMessage(f"the report's metadata does not fit its schema: {fields}") from e
    except ValueError as e:
        raise MalformedMessage("the report's train_loss is not a number") from e
    if schema.withholds_loss and facts.train_loss != WITHHELD:
        raise ReportMismatch("a report of this task must not say what the device's loss is")
    return ReportEnvelope(facts, train_loss, int(facts.steps), frame)


def _finite(loss: float) -> float:
    """A stated loss; one beyond float64 is the largest there is, so that it is not taken for one that is withheld."""
    return loss if math.isfinite(loss) else sys.float_info.max


def _check_facts(facts: ReportFacts, schema: ReportSchema, seed: int) -> None:
    """Whether a report repeats what its assignment says."""
    if facts.parameter_table_sha256 != schema.parameter_table_sha256:
        raise ReportMismatch("the report is for another parameter table")
    if facts.kind is not schema.kind:
        raise ReportMismatch(f"the report is a {facts.kind.value}; this task takes {schema.kind.value} updates")
    encoding = "f32" if schema.layout is None else "i64-shares"
    if facts.encoding != encoding:
        raise ReportMismatch(f"the report's encoding is {facts.encoding}; this task takes {encoding}")
    if facts.algorithm != schema.plan.algorithm:
        raise ReportMismatch(f"the report is of {facts.algorithm}; this task trains by {schema.plan.algorithm}")
    if schema.plan.meta is not None and int(facts.steps) != schema.plan.meta.inner_steps:
        raise ReportMismatch(f"the report is of {facts.steps} steps; this task takes {schema.plan.meta.inner_steps}")
    if facts.compression != (schema.compression or UNCOMPRESSED):
        raise ReportMismatch(
            f"the report's compression is {facts.compression}; this task takes {schema.compression or UNCOMPRESSED}"
        )
    if int(facts.compression_seed) != seed:
        raise ReportMismatch("the report was compressed with another seed than its assignment's")


def sealed_shares(envelope: ReportEnvelope, schema: ReportSchema, *, seed: int) -> list[memoryview]:
    """The sealed shares of a report, in order of the aggregators; nothing here can open them.

    Args:
        envelope: An open report.
        schema: What the task's reports look like; with a layout.
        seed: Of the assignment's compression.

    Raises:
        ReportMismatch: Facts that contradict the task or the assignment.
        MalformedShare: Not one share of the right length for each aggregator.
    """
    if schema.layout is None:
        raise ReportMismatch("the updates of this task are not shared")
    _check_facts(envelope.facts, schema, seed)
    return split_secure_report(envelope.frame, schema.layout)


def encoded_update(
    envelope: ReportEnvelope, schema: ReportSchema, *, number: int, weight: int, seed: int
) -> EncodedUpdate:
    """The report's update with the facts of the assignment's record; its values are not looked at yet.

    Args:
        envelope: An open report.
        schema: What the task's reports look like.
        number: Of the assignment.
        weight: Of the assignment.
        seed: Of the assignment's compression.

    Returns:
        A view of the body.

    Raises:
        ReportMismatch: Facts that contradict the task or the assignment.
        ShapeMismatch: Not one tensor of the expected name, type and size.
    """
    _check_facts(envelope.facts, schema, seed)
    tensors = envelope.frame.tensors
    if list(tensors) != [REPORT_TENSOR]:
        raise ShapeMismatch(f"the report must hold one tensor named {REPORT_TENSOR!r}")
    tensor = tensors[REPORT_TENSOR]
    payload: npt.NDArray[np.float32] | memoryview
    if schema.compression is not None:
        if tensor.dtype != np.uint8 or tensor.ndim != 1:
            raise ShapeMismatch(f"a compressed update is uint8[n], got {tensor.dtype}{list(tensor.shape)}")
        payload = tensor.data
    else:
        if tensor.dtype != np.float32 or tensor.shape != (schema.update_size,):
            raise ShapeMismatch(
                f"the update must be float32[{schema.update_size}], got {tensor.dtype}{list(tensor.shape)}"
            )
        payload = cast("npt.NDArray[np.float32]", tensor)
    return EncodedUpdate(number, payload, weight=weight, seed=seed, normaliser=normaliser(schema.plan, envelope.steps))
