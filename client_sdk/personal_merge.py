"""What an old personal model and a new global one make together. Pure functions of vectors; no program runs here."""

from __future__ import annotations

import numpy as np

from client_sdk.personal_model import PersonalModel
from client_sdk.personalization import MergePolicy, PersonalizationConfig
from client_sdk.protocol.program import Float32Array


def merged(old: PersonalModel, new_global: Float32Array, config: PersonalizationConfig) -> Float32Array:
    """The weights that adaptation goes on from, or that serve as they are.

    Args:
        old: The personal model, of the same program.
        new_global: float32 ``[d]``.
        config: Its policy.

    Returns:
        float32 ``[d]``, for the caller to read only: with ``replace`` and ``readapt`` the new global weights
        themselves.
    """
    if config.merge is not MergePolicy.INTERPOLATE:
        return new_global
    return interpolated(new_global, old.weights, old.global_weights, config.personal_share)


def steps_after(config: PersonalizationConfig) -> int:
    """Steps of adaptation that follow a merge."""
    match config.merge:
        case MergePolicy.REPLACE:
            return 0
        case MergePolicy.READAPT:
            return config.inner_steps
        case MergePolicy.INTERPOLATE:
            return config.merge_steps


def interpolated(
    new_global: Float32Array, old_personal: Float32Array, old_global: Float32Array, share: float
) -> Float32Array:
    """``new_global + share * (old_personal - old_global)``, computed in float64.

    Guarantees: exactly the new global weights for a share of 0, and exactly the old personal ones for a share of 1
    where the global ones are the same.

    Args:
        new_global: float32 ``[d]``.
        old_personal: float32 ``[d]``.
        old_global: float32 ``[d]``, what the personal ones were adapted from.
        share: In [0, 1].
    """
    # Not as the formula stands: with a share of 1 and equal global weights the bracket below is 0, and what is left of
    # the sum is the personal weights, whatever their size beside the global ones.
    rest = new_global.astype(np.float64) - share * old_global.astype(np.float64)
    found: Float32Array = (share * old_personal.astype(np.float64) + rest).astype(np.float32)
    return found
