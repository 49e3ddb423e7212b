"""From an assignment to its report: local training, what is sent, and what is remembered. No I/O of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from client_sdk.checkpoint import Checkpoint, CheckpointBinding
from client_sdk.data import Examples
from client_sdk.memory import CONTROL, NOISED_RESIDUAL, PERSONAL, RESIDUAL, DeviceMemory
from client_sdk.native.sharing import UpdateKernels
from client_sdk.planner import LocalWork
from client_sdk.privacy import LocalPrivacy
from client_sdk.program_sharing import choose_kernels
from client_sdk.programs import ReadBlob, check_program, control_vector, model_weights
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, Manifest, Program
from client_sdk.protocol.secure import SecureLayout, shared_size
from client_sdk.reports import Report, build_report, check_reportable
from client_sdk.training import Controls, TrainingState
from client_sdk.training_loop import TrainingLoop
from client_sdk.trainings import begin_training


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

    Personal layers start as this device's last accepted report left them, the first time as the model has them; they
    are trained with the others. What is sent, and what is made of it on the way, has the shared layers alone.

    Args:
        assignment: What to do.
        report_id: Id of the report.
        device_id: Who reports.
        program: The assignment's program; it is compared with it.
        work: How this device does what the assignment's plan asks for.
        read: Blob hash -> bytes that were checked against it.
        data: The device's examples.
        data_sha256: Their fingerprint; asked where checkpoints are kept.
        former: What the device remembers of the task; without it the residual and the control variate begin at 0, and
            personal layers as the model has them.
        loop: Drives the training, and keeps its checkpoints.
        local_privacy: The device's own, if it has any; its ledger is charged after training.

    Returns:
        The report, and the memory that counts once the report is accepted; None where nothing is to be remembered.

    Raises:
        BundleMismatch: The pieces do not belong together, or ask for what this device cannot do.
        Interrupted, TrainingPaused, MemoryBudgetExceeded: See ``TrainingLoop.drive``.
        ProgramError, ProtocolError, ConfigurationError: See ``begin_training`` and ``build_report``.
    """
    manifest = program.manifest
    check_program(manifest, assignment)
    layers = SharedLayers.of(manifest.parameters, assignment.plan.personal)
    check_reportable(assignment, layers.size)
    weights = model_weights(decode_frame(read(assignment.model_sha256)), manifest)
    binding = _binding(assignment, work, data_sha256()) if loop.keeps_checkpoints else None
    checkpoint = None if binding is None else loop.former(binding)
    if checkpoint is not None:
        former = checkpoint.memory  # what the training began with, whatever has become of the stored one
    controls = _controls(assignment, manifest, read, former)
    run = begin_training(
        program,
        _with_own(weights, layers, former),
        data,
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
    update = layers.gather(result.update(work.plan))
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
    if layers.personal:
        vectors[PERSONAL] = layers.personal_of(result.weights)
    return report, DeviceMemory(assignment.task_id, report_id, vectors) if vectors else None


def _with_own(weights: Float32Array, layers: SharedLayers, former: DeviceMemory | None) -> Float32Array:
    """The weights that training starts from: the server's, with this device's own personal layers."""
    own = None if former is None else former.vector(PERSONAL, layers.num_parameters - layers.size)
    return layers.with_personal(weights, own) if layers.personal and own is not None else weights


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
