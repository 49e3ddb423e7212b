"""A device's secure report: its update clipped, put on a grid, split into shares, each sealed for its aggregator.

All randomness comes from the operating system and is used once: the same update gives another report each time. So a
report is made once and stored, and what is stored is sent, however often.
"""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from client_sdk.native.sharing import UpdateKernels, load_kernels, share_update
from client_sdk.protocol.clipping import l2_norm
from client_sdk.protocol.discrete_gaussian import sample
from client_sdk.protocol.field import SEED_BYTES, RandomBytes
from client_sdk.protocol.messages import Assignment, SecurePlan
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.sealing import seal, share_info
from client_sdk.protocol.secure import SecureLayout, encode_shares, shared_codec
from client_sdk.protocol.shamir import SeededShares, share_seeded


def sealed_shares(
    assignment: Assignment,
    plan: SecurePlan,
    update: Float32Array,
    *,
    device_id: str,
    random: RandomBytes = os.urandom,
    kernels: UpdateKernels | None = None,
) -> list[bytes]:
    """The update, split and sealed: one ciphertext per aggregator, in order.

    Args:
        assignment: What the report answers.
        plan: Its plan.
        update: float32 ``[n]``, finite; n is the assignment's ``update_size``.
        device_id: The device's own.
        random: Source of random bytes. Secrecy and privacy rest on it; sealing draws from the system in any case.
        kernels: What computes; by default native code where there is any, else numpy. All make the same shares.

    Raises:
        NonFiniteUpdate: NaN or infinities.
        ConfigurationError: A compression that cannot be shared, or a key that nothing can be sealed to.
    """
    codec = shared_codec(assignment.compression, len(update))
    shared = update if codec is None else codec.project(update, assignment.compression_seed)
    layout = SecureLayout.of(plan, len(shared))
    plaintexts = encode_shares(
        private_shares(plan, layout, shared, random=random, kernels=kernels or load_kernels()), layout
    )
    return [
        seal(plaintext, key, _info(assignment, plan, device_id, index))
        for plaintext, key, index in zip(plaintexts, plan.public_keys, layout.scheme.indices, strict=True)
    ]


def private_shares(
    plan: SecurePlan,
    layout: SecureLayout,
    shared: Float32Array,
    *,
    random: RandomBytes,
    kernels: UpdateKernels,
) -> SeededShares:
    """Shares of what is left of an update: codes whose norm is at most B, its indicator, the device's noise, the mask.

    The indicator is 1 where the norm of what is shared is at most ``indicator_norm`` and -1 where it is larger: in half
    units, so that the sum of the halves, and half their number, is how many lie within.

    Args:
        plan: The assignment's.
        layout: Of the plan, for the length of ``shared``.
        shared: float32: the coordinates that the compression leaves.
        random: Source of random bytes.
        kernels: What computes.

    Raises:
        NonFiniteUpdate: NaN or infinities.
    """
    scheme, field = layout.scheme, layout.scheme.field
    tail = layout.tail(_indicator(plan, shared, random), random(SEED_BYTES))
    if plan.noise_variance is None:
        return share_update(shared, plan.bounds, tail, scheme, random=random, kernels=kernels)
    codes = kernels.encode_clipped(shared, plan.bounds)
    codes += sample(len(codes), Fraction(plan.noise_variance), random)
    return share_seeded(np.concatenate([kernels.encode_signed(codes, field), tail]), scheme, random, kernels)


def _indicator(plan: SecurePlan, shared: Float32Array, random: RandomBytes) -> npt.NDArray[np.int64]:
    if plan.indicator_norm is None:
        return np.zeros(0, np.int64)
    indicator = np.array([1 if l2_norm(shared) <= plan.indicator_norm else -1])
    if plan.indicator_variance is not None:
        indicator += sample(1, Fraction(plan.indicator_variance), random)
    return indicator


def _info(assignment: Assignment, plan: SecurePlan, device_id: str, index: int) -> bytes:
    return share_info(
        task_id=assignment.task_id,
        assignment_id=assignment.assignment_id,
        device_id=device_id,
        aggregator_index=index,
        model_version=assignment.model_version,
        parameter_table_sha256=assignment.parameter_table_sha256,
        terms=plan.terms,
    )
