"""What compression does to the sensitivity of a sum: nothing, unless clipping enforces it."""

from __future__ import annotations

import math
from typing import Literal

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.errors import UnknownSensitivity

Compression = Literal["none", "topk", "threshold", "randomk", "sketch"]


class SensitivityCalibrator:
    """L2 sensitivity of a sum of clipped, compressed updates, for noise to be calibrated to.

    Keeping k of d coordinates never makes an update's norm larger, and never makes the largest one smaller: an update
    of norm C that has only k coordinates passes top-k unchanged. So the sensitivity is C. ``C sqrt(k / d)`` is what a
    *typical* random-k update has, and privacy is not about typical updates: noise at that scale is too small by a
    factor of ``sqrt(d / k)`` (ten at 1 %). It becomes right only where devices clip to it after they subsampled, and
    then it is the clip norm: say so with ``enforced_clip_norm``.

    Args:
        adjacency: What neighbours are; replacing one update by another counts twice.

    Example:
        >>> SensitivityCalibrator().compute_sensitivity(compression_ratio=0.01, clip_norm=1.0)
        1.0
    """

    def __init__(self, adjacency: Adjacency = Adjacency.ZERO_OUT) -> None:
        self._adjacency = adjacency

    def compute_sensitivity(
        self,
        compression_ratio: float,
        clip_norm: float,
        *,
        method: Compression = "topk",
        clipped: Literal["after", "before"] = "after",
        error_feedback: bool = False,
        enforced_clip_norm: float | None = None,
        unbiased_before_noise: bool = False,
    ) -> float:
        """Sensitivity of the sum of the updates as they are added up.

        Args:
            compression_ratio: k / d, in (0, 1].
            clip_norm: C: bound of an update's norm where it is clipped.
            method: How coordinates are chosen; ``sketch`` is a count-sketch, ``none`` leaves all.
            clipped: Whether clipping follows the compression or precedes it.
            error_feedback: Whether what was left out is added to the next update.
            enforced_clip_norm: C': a bound to which the updates are clipped after compression, such as
                ``C sqrt(k / d)`` for random-k. Replaces C.
            unbiased_before_noise: Whether random-k's factor d / k is applied before the noise; it multiplies the
                sensitivity then. Applied to the released sum it costs nothing.

        Returns:
            A bound on how far one client can move the sum.

        Raises:
            ConfigurationError: A ratio or a norm out of range, or a factor that the method does not have.
            UnknownSensitivity: Nothing bounds what is added up: error feedback or a sketch after clipping.
        """
        if not 0 < compression_ratio <= 1:
            raise ConfigurationError(f"a compression ratio lies in (0, 1], got {compression_ratio}")
        for norm in (clip_norm, clip_norm if enforced_clip_norm is None else enforced_clip_norm):
            if not 0 < norm < math.inf:
                raise ConfigurationError(f"a clip norm is positive and finite, got {norm}")
        if unbiased_before_noise and method != "randomk":
            raise ConfigurationError(f"only random-k has a factor d / k, {method} has none; drop unbiased_before_noise")
        if enforced_clip_norm is None and clipped == "before":
            if error_feedback:
                raise UnknownSensitivity(
                    "error feedback adds what earlier rounds left out to an update that was clipped already, and "
                    "nothing bounds their sum; clip after compression"
                )
            if method == "sketch":
                raise UnknownSensitivity(
                    "a count-sketch can be longer than what it was made of (coordinates collide); clip the sketch"
                )
        bound = clip_norm if enforced_clip_norm is None else enforced_clip_norm
        if unbiased_before_noise:
            bound /= compression_ratio
        return 2 * bound if self._adjacency is Adjacency.REPLACE_ONE else bound
