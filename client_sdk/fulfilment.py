"""From an assignment to its report: local training, what is sent, and what is remembered. No I/O of its own."""

from __future__ import annotations

import numpy as np

from client_sdk.data import Examples
from client_sdk.memory import CONTROL, NOISED_RESIDUAL, RESIDUAL, DeviceMemory
from client_sdk.native.sharing import UpdateKernels
from client_sdk.privacy import LocalPrivacy
from client_sdk.program_sharing import choose_kernels
from client_sdk.programs import ReadBlob, check_program, control_vector, model_weights
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment
from client_sdk.protocol.program import Float32Array, Manifest, Program
from client_sdk.protocol.secure import SecureLayout, shared_size
from client_sdk.reports import Report, build_report, check_reportable
from client_sdk.training import Controls, LocalTrainer


def fulfil(
    assignment: Assignment,
    report_id: str,
    *,
    device_id: str,
    program: Program,
    read: ReadBlob,
    data: Examples,
    former: DeviceMemory | None,
    local_privacy: LocalPrivacy | None = None,
) -> tuple[Report, DeviceMemory | None]:
    """Train and build the report.

    Guarantees: the same bits for the same arguments, so that a process that was killed can do it again. But the shares
    of a secure report and the noise of local privacy are drawn anew each time: it is the stored one that is sent.

    Args:
        assignment: What to do.
        report_id: Id of the report.
        device_id: Who reports.
        program: The assignment's program; it is compared with it.
        read: Blob hash -> bytes that were checked against it.
        data: The device's examples.
        former: What the device remembers of the task; without it the residual and the control variate begin at 0.
        local_privacy: The device's own, if it has any; its ledger is charged after training.

    Returns:
        The report, and the memory that counts once the report is accepted; None where nothing is to be remembered.

    Raises:
        BundleMismatch: The pieces do not belong together, or ask for what this device cannot do.
        ProgramError, ProtocolError, ConfigurationError: See ``LocalTrainer.train`` and ``build_report``.
    """
    manifest = program.manifest
    check_program(manifest, assignment)
    check_reportable(assignment, manifest.num_parameters)
    weights = model_weights(decode_frame(read(assignment.model_sha256)), manifest)
    controls = _controls(assignment, manifest, read, former)
    trainer = LocalTrainer(program)
    result = trainer.train(weights, *data, assignment.plan, assignment.shuffle_seed, controls=controls)
    update = result.update(assignment.plan)
    left_out = RESIDUAL if local_privacy is None else NOISED_RESIDUAL
    report = build_report(
        assignment,
        report_id,
        update,
        device_id=device_id,
        steps=result.steps,
        train_loss=result.last_epoch_loss,
        residual=None if former is None else former.vector(left_out, len(update)),
        local_privacy=local_privacy,
        kernels=_kernels(assignment, program, len(update)),
    )
    vectors: dict[str, Float32Array] = {}
    if report.residual is not None:
        vectors[left_out] = report.residual
    if controls is not None and result.control_delta is not None:
        vectors[CONTROL] = controls.device + result.control_delta
    return report, DeviceMemory(assignment.task_id, report_id, vectors) if vectors else None


def _kernels(assignment: Assignment, program: Program, size: int) -> UpdateKernels | None:
    """What splits the update of a secure assignment."""
    if assignment.secure is None:
        return None
    layout = SecureLayout.of(assignment.secure, shared_size(assignment.compression, size))
    return choose_kernels(program, layout.scheme, layout.size)


def _controls(
    assignment: Assignment, manifest: Manifest, read: ReadBlob, former: DeviceMemory | None
) -> Controls | None:
    """SCAFFOLD's two control variates."""
    if assignment.control_sha256 is None:
        return None
    server = control_vector(decode_frame(read(assignment.control_sha256)), manifest)
    own = None if former is None else former.vector(CONTROL, len(server))
    return Controls(server, np.zeros_like(server) if own is None else own)
