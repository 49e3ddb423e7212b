"""From the bytes of a report to a vector that can be summed. Pure; every refusal is typed.

Two steps, so that a report that is too late is refused on its facts alone, before anything looks at its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from client_sdk.protocol.errors import (
    MalformedMessage,
    NonFiniteUpdate,
    OversizedBody,
    ReportMismatch,
    ShapeMismatch,
    UpdateOutOfRange,
)
from client_sdk.protocol.frames import Frame, FrameLimits, decode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, ReportFacts
from client_sdk.protocol.updates import UpdateKind


@dataclass(frozen=True)
class ReportSchema:
    """What every report of a task must look like.

    Attributes:
        num_parameters: Length d of the flat update.
        parameter_table_sha256: Hash both ends agree on.
        kind: Kind of update; kinds never mix in a round.
        max_abs: Largest value.
        max_header_bytes: Largest frame header.
    """

    num_parameters: int
    parameter_table_sha256: str
    kind: UpdateKind
    max_abs: float
    max_header_bytes: int

    @property
    def max_bytes(self) -> int:
        """Largest body: the tensor, the header, and its length."""
        return 4 * self.num_parameters + self.max_header_bytes + 8


@dataclass(frozen=True)
class ReportEnvelope:
    """A report whose frame and facts are well formed; its values are not looked at yet."""

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
    """
    if len(body) > schema.max_bytes:
        raise OversizedBody(f"the report has {len(body)} bytes; at most {schema.max_bytes} are accepted")
    limits = FrameLimits(max_bytes=schema.max_bytes, max_header_bytes=schema.max_header_bytes, max_tensors=1)
    frame = decode_frame(body, limits)
    try:
        facts = ReportFacts.model_validate(frame.metadata)
        train_loss = float(facts.train_loss)
    except ValidationError as e:
        fields = ", ".join(sorted({".".join(map(str, err["loc"])) for err in e.errors()}))
        raise MalformedMessage(f"the report's metadata does not fit its schema: {fields}") from e
    except ValueError as e:
        raise MalformedMessage("the report's train_loss is not a number") from e
    return ReportEnvelope(facts, train_loss, int(facts.steps), frame)


def check_update(envelope: ReportEnvelope, schema: ReportSchema) -> npt.NDArray[np.float32]:
    """The report's update, checked against the task; a read-only view of the body.

    Returns:
        float32[d], finite, no value beyond ``max_abs``.

    Raises:
        ReportMismatch: Facts that contradict the task.
        ShapeMismatch: Not one float32[d] tensor of the expected name.
        NonFiniteUpdate: NaN or infinities.
        UpdateOutOfRange: Values beyond ``max_abs``.
    """
    facts, tensors = envelope.facts, envelope.frame.tensors
    if facts.parameter_table_sha256 != schema.parameter_table_sha256:
        raise ReportMismatch("the report is for another parameter table")
    if facts.kind is not schema.kind:
        raise ReportMismatch(f"the report is a {facts.kind.value}; this task takes {schema.kind.value} updates")
    if list(tensors) != [REPORT_TENSOR]:
        raise ShapeMismatch(f"the report must hold one tensor named {REPORT_TENSOR!r}")
    tensor = tensors[REPORT_TENSOR]
    if tensor.dtype != np.float32 or tensor.shape != (schema.num_parameters,):
        raise ShapeMismatch(
            f"the update must be float32[{schema.num_parameters}], got {tensor.dtype}{list(tensor.shape)}"
        )
    update = cast("npt.NDArray[np.float32]", tensor)
    check_values(update, schema.max_abs)
    return update


def check_values(update: npt.NDArray[np.float32], max_abs: float) -> None:
    """Refuse NaN, infinities and values beyond the bound, in two passes without a copy.

    Raises:
        NonFiniteUpdate: NaN or infinities.
        UpdateOutOfRange: Values beyond ``max_abs``.
    """
    # NaN propagates through both, so one comparison catches it.
    largest = max(float(np.max(update)), -float(np.min(update)))
    if not np.isfinite(largest):
        raise NonFiniteUpdate(f"{int(np.count_nonzero(~np.isfinite(update)))} values are NaN or infinite")
    if largest > max_abs:
        raise UpdateOutOfRange(f"a value of magnitude {largest:.3g} lies beyond the bound of {max_abs:.3g}")
