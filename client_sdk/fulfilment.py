"""From an assignment to its report: local training, what is sent, and what is remembered. No I/O of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from client_sdk.checkpoint import Checkpoint, CheckpointBinding
from client_sdk.data import Examples
from client_sdk.memory import CONTROL, NOISED_RESIDUAL, RESIDUAL, DeviceMemory
from client_sdk.native.sharing import UpdateKernels
from client_sdk.planner import LocalWork
from client_sdk.privacy import LocalPrivacy
from client_sdk.program_sharing import choose_kernels
from client_sdk.programs import ReadBlob, check_program, control_vector, model_weights
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment
from client_sdk.protocol.program import Float32Array, Manifest, Program
from client_sdk.protocol.secure import SecureLayout, shared_size
from client_sdk.reports import Report, build_report, check_reportable
from client_sdk.training import Controls, LocalTrainer, TrainingState
from client_sdk.training_loop import TrainingLoop


def fulfil(
    assignment: Assignment,
    report_id: str,
    *,
    device_id: str,
    program: Program,
    work: LocalWork,
    read: ReadBlob,
    data: Examples,
    data_sha256: Callable[[], str],
    former: DeviceMemory | None,
    loop: TrainingLoop,
    local_privacy: LocalPrivacy | None = None,
) -> tuple[Report, DeviceMemory | None]:
    """Train and build the report.

    Guarantees: the same bits for the same arguments, whether training was interrupted or not, so that a process that
    was killed can do it again. But the shares of a secure report and the noise of local privacy are drawn anew each
    time: it is the stored one that is sent.

    Args:
        assignment: What to do.
        report_id: Id of the report.
        device_id: Who reports.
        program: The assignment's program; it is compared with it.
        work: How this device does what the assignment's plan asks for.
        read: Blob hash -> bytes that were checked against it.
        data: The device's examples.
        data_sha256: Their fingerprint; asked where checkpoints are kept.
        former: What the device remembers of the task; without it the residual and the control variate begin at 0.
        loop: Drives the training, and keeps its checkpoints.
        local_privacy: The device's own, if it has any; its ledger is charged after training.

    Returns:
        The report, and the memory that counts once the report is accepted; None where nothing is to be remembered.

    Raises:
        BundleMismatch: The pieces do not belong together, or ask for what this device cannot do.
        Interrupted, TrainingPaused, MemoryBudgetExceeded: See ``TrainingLoop.drive``.
        ProgramError, ProtocolError, ConfigurationError: See ``LocalTrainer.train`` and ``build_report``.
    """
    manifest = program.manifest
    check_program(manifest, assignment)
    check_reportable(assignment, manifest.num_parameters)
    weights = model_weights(decode_frame(read(assignment.model_sha256)), manifest)
    binding = _binding(assignment, work, data_sha256()) if loop.keeps_checkpoints else None
    checkpoint = None if binding is None else loop.former(binding)
    if checkpoint is not None:
        former = checkpoint.memory  # what the training began with, whatever has become of the stored one
    controls = _controls(assignment, manifest, read, former)
    run = LocalTrainer(program).begin(
        weights,
        *data,
        work.plan,
        assignment.shuffle_seed,
        controls=controls,
        slice_size=work.slice_size,
        state=None if checkpoint is None else checkpoint.state,
    )
    checkpoint = None  # its bytes need not stay for as long as training does

    def keep(state: TrainingState) -> Checkpoint | None:
        return None if binding is None else Checkpoint(binding, state, former)

    result = loop.drive(run, keep)
    update = result.update(work.plan)
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


def _binding(assignment: Assignment, work: LocalWork, data_sha256: str) -> CheckpointBinding:
    return CheckpointBinding(
        assignment_id=assignment.assignment_id,
        task_id=assignment.task_id,
        model_version=assignment.model_version,
        model_sha256=assignment.model_sha256,
        program_sha256=assignment.program_sha256,
        parameter_table_sha256=assignment.parameter_table_sha256,
        plan=work.plan,
        shuffle_seed=assignment.shuffle_seed,
        slice_size=work.slice_size,
        data_sha256=data_sha256,
        control_sha256=assignment.control_sha256,
    )


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
