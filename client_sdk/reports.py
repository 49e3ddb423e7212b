"""The report of an assignment: a frame with the update, as the assignment wants it, and what it repeats.

In the clear it is one tensor, compressed where asked for. Of a secure assignment it is the sealed shares of the update.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.blobs import Buffer
from client_sdk.errors import BundleMismatch
from client_sdk.native.sharing import UpdateKernels
from client_sdk.privacy import LocalPrivacy
from client_sdk.protocol.compression import Codec, CompressionSpec, ErrorFeedback
from client_sdk.protocol.errors import (
    ConfigurationError,
    MalformedFrame,
    ManifestError,
    OversizedBody,
    UpdateOutOfRange,
)
from client_sdk.protocol.field import RandomBytes
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import (
    REPORT_TENSOR,
    UNCOMPRESSED,
    WITHHELD,
    Assignment,
    F32Encoding,
    ReportFacts,
)
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, Manifest
from client_sdk.protocol.secure import SecureLayout, share_tensors, shared_size
from client_sdk.secure_reports import sealed_shares


@dataclass(frozen=True)
class Report:
    """A report that is ready to be sealed.

    Attributes:
        frame: The bytes to send.
        dense_bytes: What the update takes as plain float32; None where it is not known any more.
        residual: With error feedback float32 ``[n]``: what the frame leaves out, for the next report; else None.
    """

    frame: Buffer
    dense_bytes: int | None
    residual: Float32Array | None = None


def compression_of(assignment: Assignment) -> CompressionSpec | None:
    """How the assignment wants its update compressed; None for not at all.

    Raises:
        ConfigurationError: A compression that this device does not know.
        BundleMismatch: One that is not written in its one canonical form, which the report has to repeat.
    """
    if assignment.compression is None:
        return None
    spec = CompressionSpec.parse(assignment.compression)
    if spec.is_none or str(spec) != assignment.compression:
        raise BundleMismatch(f"the assignment writes its compression as {assignment.compression!r}, not as {spec}")
    return spec


def keeps_memory(assignment: Assignment) -> bool:
    """Whether the device remembers something of this assignment's report for the next one."""
    spec = compression_of(assignment)
    plan = assignment.plan
    return plan.algorithm == "scaffold" or bool(plan.personal) or (spec is not None and spec.error_feedback)


def check_reportable(assignment: Assignment, num_parameters: int) -> None:
    """Whether an update of this size and kind can be reported at all; asked before training, which is dear.

    Args:
        assignment: What is asked for.
        num_parameters: Of the shared layers.

    Raises:
        BundleMismatch: The assignment asks for what this device cannot send.
        ConfigurationError: A compression that this device does not know.
    """
    plan = assignment.plan
    if assignment.kind is not plan.update_kind:
        raise BundleMismatch(
            f"the assignment asks for an update of kind {assignment.kind}; with {plan.algorithm} this device sends "
            f"{plan.update_kind}s"
        )
    size = assignment.update_size(num_parameters)
    spec = compression_of(assignment)
    if assignment.secure is not None:
        needed = SecureLayout.of(assignment.secure, shared_size(assignment.compression, size)).max_frame_bytes
    else:
        needed = 4 * size if spec is None else Codec(spec, size).max_bytes
    if needed > assignment.max_report_bytes:
        raise BundleMismatch(
            f"an update of {num_parameters} parameters takes up to {needed} bytes; it does not fit into the "
            f"{assignment.max_report_bytes} that the assignment allows"
        )


def build_report(
    assignment: Assignment,
    report_id: str,
    update: Float32Array,
    *,
    device_id: str,
    steps: int,
    train_loss: float,
    residual: Float32Array | None = None,
    local_privacy: LocalPrivacy | None = None,
    kernels: UpdateKernels | None = None,
    random: RandomBytes = os.urandom,
) -> Report:
    """The report to send.

    With error feedback ``decoded + new residual == update + residual``: nothing is lost, it comes later. What would lie
    beyond the assignment's bound with the residual added stays in the residual.

    With local privacy the update is charged for, clipped and noised before anything else is done to it: the report and
    the new residual depend on the noised version alone. Noise beyond the assignment's bound is cut off there.

    Args:
        assignment: What the report answers.
        report_id: Its id.
        update: float32 ``[n]``, finite; n is the assignment's ``update_size``.
        device_id: Who reports; a secure report counts for this device only.
        steps: Local optimizer steps taken.
        train_loss: Mean loss over the last local epoch; withheld where the assignment says so, or is secure, and with
            local privacy.
        residual: float32 ``[n]``, what the last accepted report left out; needed with error feedback only. With local
            privacy, of an update that was noised.
        local_privacy: The device's own, if it has any.
        kernels: What splits a secure report's update; see ``client_sdk.secure_reports.sealed_shares``.
        random: Source of random bytes: what a secure report's secrecy and local privacy rest on.

    Raises:
        LocalBudgetSpent: The device's local privacy does not allow another report.
        StateDirUnusable: Its ledger cannot be read or written; no noise was drawn.
        UpdateOutOfRange: A value beyond the assignment's bound: the server would refuse it.
        NonFiniteUpdate: Likewise NaN or infinities.
        OversizedBody: Larger than the assignment allows.
        ConfigurationError, BundleMismatch: See ``compression_of`` and ``sealed_shares``.
    """
    left_out = None
    tensors: Mapping[str, npt.NDArray[np.generic]]
    if local_privacy is not None:
        update = local_privacy.release(update, random=random)
        if isinstance(assignment.encoding, F32Encoding):
            update = _within(update, assignment.encoding.max_abs)
    if assignment.secure is not None:
        tensors = share_tensors(
            sealed_shares(assignment, assignment.secure, update, device_id=device_id, random=random, kernels=kernels)
        )
    else:
        tensor, left_out = _clear_tensor(assignment, update, residual)
        tensors = {REPORT_TENSOR: tensor}
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
        train_loss=WITHHELD if assignment.withholds_loss or local_privacy is not None else repr(float(train_loss)),
    )
    frame = encode_frame(tensors, facts.model_dump(mode="json"))
    if len(frame) > assignment.max_report_bytes:
        raise OversizedBody(f"the report has {len(frame)} bytes; the assignment allows {assignment.max_report_bytes}")
    return Report(frame, update.nbytes, left_out)


def _clear_tensor(
    assignment: Assignment, update: Float32Array, residual: Float32Array | None
) -> tuple[npt.NDArray[np.generic], Float32Array | None]:
    """The tensor of a report in the clear, and what it leaves out."""
    if not isinstance(assignment.encoding, F32Encoding):
        raise BundleMismatch(f"the encoding {assignment.encoding.name} needs a plan of how the update is shared")
    max_abs = assignment.encoding.max_abs
    _check_reach(update, max_abs)
    spec = compression_of(assignment)
    if spec is None:
        return update, None
    payload, left_out = compress_update(
        Codec(spec, len(update)),
        update,
        residual,
        seed=assignment.compression_seed,
        rounding_seed=assignment.shuffle_seed,
        max_abs=max_abs,
    )
    return np.frombuffer(payload, np.uint8), left_out


def is_report_of(frame: Buffer, assignment: Assignment, report_id: str) -> bool:
    """Whether stored bytes are a whole report of this assignment under this id, as this version writes it."""
    try:
        facts = ReportFacts.model_validate(decode_frame(frame).metadata)
    except (MalformedFrame, OversizedBody, ValueError):
        return False
    return (
        facts.report_id == report_id
        and facts.assignment_id == assignment.assignment_id
        and facts.model_version == str(assignment.model_version)
        and facts.parameter_table_sha256 == assignment.parameter_table_sha256
        and facts.encoding == assignment.encoding.name
        and facts.algorithm == assignment.plan.algorithm
        and facts.compression == (assignment.compression or UNCOMPRESSED)
        and facts.compression_seed == str(assignment.compression_seed)
    )


def dense_bytes(frame: Buffer, assignment: Assignment, manifest: Buffer | None) -> int | None:
    """What the update of a sealed report takes as plain float32; None where the manifest does not say it."""
    if assignment.compression is None and assignment.secure is None:
        return decode_frame(frame).payload.nbytes
    try:
        return None if manifest is None else 4 * assignment.update_size(_num_shared(manifest, assignment))
    except (ManifestError, ConfigurationError):  # an app with a program of its own never had to read it
        return None


def _num_shared(manifest: Buffer, assignment: Assignment) -> int:
    return SharedLayers.of(Manifest.from_json(bytes(manifest)).parameters, assignment.plan.personal).size


def compress_update(
    codec: Codec, update: Float32Array, residual: Float32Array | None, *, seed: int, rounding_seed: int, max_abs: float
) -> tuple[bytes, Float32Array | None]:
    """The payload, and what it leaves out where the compression feeds errors back.

    Args:
        codec: The assignment's.
        update: float32 ``[n]``, finite.
        residual: float32 ``[n]``, what the last accepted report left out; None for nothing, and without error feedback.
        seed: The assignment's ``compression_seed``.
        rounding_seed: Its ``shuffle_seed``.
        max_abs: Its bound on what the server decodes.

    Raises:
        UpdateOutOfRange: The decoded payload lies beyond the bound.
    """
    if not codec.spec.error_feedback:
        payload = codec.encode(update, seed, rounding_seed=rounding_seed)
        _check_reach(codec.decode(payload, seed), max_abs)
        return payload, None
    feedback = ErrorFeedback.zeros(codec.size) if residual is None else ErrorFeedback(residual)
    compensated = feedback.compensate(update)
    # Else a residual that has grown beyond the bound could never be sent, and no report of this device either.
    payload = codec.encode(_within(compensated, max_abs), seed, rounding_seed=rounding_seed)
    sent = codec.decode(payload, seed)
    _check_reach(sent, max_abs)
    return payload, ErrorFeedback.after(compensated, sent).residual


def _within(values: Float32Array, max_abs: float) -> Float32Array:
    """The values, those beyond the bound just inside it."""
    with np.errstate(over="ignore"):
        bound = np.nextafter(np.float32(max_abs), np.float32(0))
    return np.clip(values, -bound, bound)


def _check_reach(update: Float32Array, max_abs: float) -> None:
    reach = float(np.abs(update).max())
    if not reach <= max_abs:
        raise UpdateOutOfRange(f"the update reaches {reach:.3g}; the assignment allows {max_abs:g}")
