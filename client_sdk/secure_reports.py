"""A device's secure report: its update clipped, put on a grid, split into shares, each sealed for its aggregator.

All randomness comes from the operating system and is used once: the same update gives another report each time. So a
report is made once and stored, and what is stored is sent, however often.
"""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.clipping import l2_norm
from client_sdk.protocol.discrete_gaussian import sample
from client_sdk.protocol.field import SEED_BYTES, RandomBytes
from client_sdk.protocol.messages import Assignment, SecurePlan
from client_sdk.protocol.privacy import encode_clipped
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.sealing import seal, share_info
from client_sdk.protocol.secure import SecureLayout, encode_shares, shared_codec
from client_sdk.protocol.shamir import NUMPY_KERNELS, SharingKernels, share_seeded


def sealed_shares(
    assignment: Assignment,
    plan: SecurePlan,
    update: Float32Array,
    *,
    random: RandomBytes = os.urandom,
    kernels: SharingKernels = NUMPY_KERNELS,
) -> list[bytes]:
    """The update, split and sealed: one ciphertext per aggregator, in order.

    Args:
        assignment: What the report answers.
        plan: Its plan.
        update: float32 ``[n]``, finite; n is the assignment's ``update_size``.
        random: Source of random bytes. Secrecy and privacy rest on it; sealing draws from the system in any case.
        kernels: What splits.

    Raises:
        NonFiniteUpdate: NaN or infinities.
        ConfigurationError: A compression that cannot be shared, or a key that nothing can be sealed to.
    """
    codec = shared_codec(assignment.compression, len(update))
    shared = update if codec is None else codec.project(update, assignment.compression_seed)
    layout = SecureLayout.of(plan, len(shared))
    secret = layout.secret(private_codes(plan, shared, random=random), random(SEED_BYTES))
    shares = share_seeded(secret, layout.scheme, random, kernels)
    return [
        seal(plaintext, key, _info(assignment, plan, index))
        for plaintext, key, index in zip(
            encode_shares(shares, layout), plan.public_keys, layout.scheme.indices, strict=True
        )
    ]


def private_codes(plan: SecurePlan, shared: Float32Array, *, random: RandomBytes = os.urandom) -> npt.NDArray[np.int64]:
    """What is shared of an update: codes whose norm is at most B, the indicator, and the device's part of the noise.

    The indicator is 1 where the norm of what is shared is at most ``indicator_norm`` and -1 where it is larger, in half
    units: the sum of the indicators' halves, and half their number, is how many lie within.

    Args:
        plan: The assignment's.
        shared: float32: the coordinates that the compression leaves.
        random: Source of random bytes.

    Returns:
        int64, ``SecureLayout.num_values`` of them.

    Raises:
        NonFiniteUpdate: NaN or infinities.
    """
    codes = encode_clipped(shared, plan.bounds)
    if plan.noise_variance is not None:
        codes += sample(len(codes), Fraction(plan.noise_variance), random)
    if plan.indicator_norm is None:
        return codes
    indicator = np.array([1 if l2_norm(shared) <= plan.indicator_norm else -1])
    if plan.indicator_variance is not None:
        indicator += sample(1, Fraction(plan.indicator_variance), random)
    return np.concatenate([codes, indicator])


def _info(assignment: Assignment, plan: SecurePlan, index: int) -> bytes:
    return share_info(
        task_id=assignment.task_id,
        assignment_id=assignment.assignment_id,
        aggregator_index=index,
        model_version=assignment.model_version,
        parameter_table_sha256=assignment.parameter_table_sha256,
        terms=plan.terms,
    )
