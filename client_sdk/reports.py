"""The report of an assignment: a frame with the update, and what it repeats of the assignment."""

from __future__ import annotations

import numpy as np

from client_sdk.errors import BundleMismatch
from client_sdk.protocol.errors import MalformedFrame, OversizedBody, UpdateOutOfRange
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, UNCOMPRESSED, Assignment, ReportFacts
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.updates import UpdateKind

Buffer = bytes | bytearray | memoryview


def check_reportable(assignment: Assignment, num_parameters: int) -> None:
    """Whether an update of this size and kind can be reported at all; asked before training, which is dear.

    Raises:
        BundleMismatch: The assignment asks for what this device cannot send.
    """
    if assignment.kind is not UpdateKind.DELTA:
        raise BundleMismatch(f"the assignment asks for an update of kind {assignment.kind}; this device sends deltas")
    if 4 * num_parameters > assignment.max_report_bytes:
        raise BundleMismatch(
            f"an update of {num_parameters} parameters does not fit into the {assignment.max_report_bytes} bytes "
            "that the assignment allows"
        )


def build_report(
    assignment: Assignment, report_id: str, delta: Float32Array, *, steps: int, train_loss: float
) -> bytes:
    """The frame to send.

    Args:
        assignment: What the report answers.
        report_id: Its id.
        delta: float32 ``[d]``, finite.
        steps: Local optimizer steps taken.
        train_loss: Mean loss over the last local epoch.

    Raises:
        UpdateOutOfRange: A value beyond the assignment's bound: the server would refuse it.
        OversizedBody: Larger than the assignment allows.
    """
    reach = float(np.abs(delta).max())
    if not reach <= assignment.encoding.max_abs:
        raise UpdateOutOfRange(f"the update reaches {reach:.3g}; the assignment allows {assignment.encoding.max_abs:g}")
    facts = ReportFacts(
        report_id=report_id,
        assignment_id=assignment.assignment_id,
        model_version=str(assignment.model_version),
        parameter_table_sha256=assignment.parameter_table_sha256,
        kind=assignment.kind,
        encoding=assignment.encoding.name,
        algorithm=assignment.plan.algorithm,
        compression=assignment.compression or UNCOMPRESSED,
        compression_seed=str(assignment.compression_seed),
        steps=str(steps),
        train_loss=repr(float(train_loss)),
    )
    frame = encode_frame({REPORT_TENSOR: delta}, facts.model_dump(mode="json"))
    if len(frame) > assignment.max_report_bytes:
        raise OversizedBody(f"the report has {len(frame)} bytes; the assignment allows {assignment.max_report_bytes}")
    return frame


def is_report_of(frame: Buffer, assignment: Assignment, report_id: str) -> bool:
    """Whether stored bytes are a whole report of this assignment under this id."""
    try:
        facts = ReportFacts.model_validate(decode_frame(frame).metadata)
    except (MalformedFrame, OversizedBody, ValueError):
        return False
    return (
        facts.report_id == report_id
        and facts.assignment_id == assignment.assignment_id
        and facts.model_version == str(assignment.model_version)
        and facts.parameter_table_sha256 == assignment.parameter_table_sha256
    )
