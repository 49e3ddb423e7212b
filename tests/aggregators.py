"""The other end of a secure report: what each of its aggregators opens, and what their shares open together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client_sdk.protocol import sealing
from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment, SecurePlan
from client_sdk.protocol.sealing import SealingKey, share_info
from client_sdk.protocol.secure import SecureLayout, decode_share, shared_size, split_secure_report
from client_sdk.protocol.shamir import reconstruct

DEVICE_ID = "d" * 32
"""Of a device that has no keys."""


def plan_of(assignment: Assignment) -> SecurePlan:
    assert assignment.secure is not None
    return assignment.secure


def info_for(assignment: Assignment, index: int, device_id: str = DEVICE_ID) -> bytes:
    """What a device's share of this assignment for this aggregator must be bound to."""
    return share_info(
        task_id=assignment.task_id,
        assignment_id=assignment.assignment_id,
        device_id=device_id,
        aggregator_index=index,
        model_version=assignment.model_version,
        parameter_table_sha256=assignment.parameter_table_sha256,
        terms=plan_of(assignment).terms,
    )


def layout_of(assignment: Assignment, num_parameters: int) -> SecureLayout:
    size = shared_size(assignment.compression, assignment.update_size(num_parameters))
    return SecureLayout.of(plan_of(assignment), size)


def opened_share(
    ciphertext: bytes | memoryview,
    assignment: Assignment,
    layout: SecureLayout,
    key: SealingKey,
    index: int,
    device_id: str = DEVICE_ID,
) -> FieldVector:
    """What aggregator ``index`` gets of a report."""
    return decode_share(sealing.open(ciphertext, key, info_for(assignment, index, device_id)), layout, index)


def opened_shares(
    frame: bytes | bytearray | memoryview,
    assignment: Assignment,
    num_parameters: int,
    keys: Sequence[SealingKey],
    device_id: str = DEVICE_ID,
) -> dict[int, FieldVector]:
    """All shares of a report, by aggregator."""
    layout = layout_of(assignment, num_parameters)
    ciphertexts = split_secure_report(decode_frame(frame), layout)
    return {
        index: opened_share(ciphertext, assignment, layout, key, index, device_id)
        for index, (ciphertext, key) in enumerate(zip(ciphertexts, keys, strict=True), 1)
    }


def opened_codes(
    frame: bytes | bytearray | memoryview,
    assignment: Assignment,
    num_parameters: int,
    keys: Sequence[SealingKey],
    some: Sequence[int] | None = None,
    device_id: str = DEVICE_ID,
) -> np.ndarray:
    """The codes that the shares of ``some`` aggregators (all by default) open to."""
    layout = layout_of(assignment, num_parameters)
    shares = opened_shares(frame, assignment, num_parameters, keys, device_id)
    secret = reconstruct({i: shares[i] for i in some or shares}, layout.scheme, layout.length)
    return layout.scheme.field.to_signed(layout.values(secret))
