"""Momentum correction for stale updates: take back what the model has moved since they were computed.

A buffer's mean is of gradients at older models. To first order, a gradient at the present model is

    g(w_t) = g(w_{t - tau}) + H (w_t - w_{t - tau})

and the displacement ``w_t - w_{t - tau}`` is the sum of the last tau steps: asynchrony acts as momentum, and a term
*against* the recent steps takes it out again. With a single number for H, the correction needs the aggregates only,
which the server has anyway: no single update, no old model, and (being a function of released aggregates) no privacy
budget. In units of the aggregate, for gradients and deltas alike,

    corrected_t = mean_t - damping * unseen_t,    unseen_t = sum_i (s_i / K) * (last tau_i corrected aggregates)

where ``damping`` stands for ``eta * H``. Why it works: with curvature lambda and a = eta * lambda the model obeys

    w_{t+1} = (1 - c) w_t - sum_i (s_i / K) (a - damping) w_{t - tau_i},    c = damping * sum_i s_i / K,

a contraction in the largest of the recent |w| as soon as ``c <= 1`` and ``|a - damping| < damping``, that is for
``0 < a < 2 damping``: **stable at every staleness**, fixed or not, where plain descent needs a < pi / (2 tau + 1).
The price is paid in flat directions (a much smaller than damping), which advance like a / (1 + damping * tau).

Source: the Taylor term is that of S. Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay Compensation"
(2017), with a declared scalar curvature in place of g*g (which vanishes at the optimum, and needs every update's
model); asynchrony as momentum is I. Mitliagkas et al., "Asynchrony begets Momentum" (2016).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch
from server_ref.aggregation.batch import Float64Array


class DelayCorrection:
    """Corrects means by the steps that their updates had not seen, and remembers those steps.

    Shapes and dtypes: aggregates are float64[size]. Memory: ``max_staleness`` of them.
    Guarantees: a buffer whose updates are all fresh is returned as it is; the result depends on the multiset of
    (staleness, scale) pairs only. Holds for plain gradient steps with a constant learning rate; an adaptive server
    optimizer rescales steps in a way that this knows nothing of.

    Args:
        damping: ``eta * H``: the step size times the largest curvature, at most 1. Anything above half of the true
            product is stable.
        max_staleness: Oldest update that will come.

    Raises:
        ConfigurationError: A damping outside (0, 1], or a negative staleness.
    """

    def __init__(self, *, damping: float, max_staleness: int) -> None:
        if not 0 < damping <= 1:
            raise ConfigurationError(f"damping={damping:g} must lie in (0, 1]: it stands for eta * curvature")
        if max_staleness < 0:
            raise ConfigurationError(f"a staleness of {max_staleness}")
        self._damping = damping
        self._steps: deque[Float64Array] = deque(maxlen=max_staleness)

    def correct(
        self, mean: Float64Array, staleness: Sequence[int], scales: Sequence[int], denominator: int
    ) -> Float64Array:
        """The mean as if its updates had been computed on the present model, to first order.

        Args:
            mean: float64[size], the buffer's aggregate; not changed.
            staleness: Age of each update in it.
            scales: Integer factor of each in the sum (weight times staleness scale).
            denominator: What the sum was divided by.

        Returns:
            float64[size]; ``mean`` itself where nothing is stale.

        Raises:
            ShapeMismatch: Another size than before, or not one scale for each age.
        """
        if len(staleness) != len(scales):
            raise ShapeMismatch(f"{len(staleness)} ages with {len(scales)} scales")
        if self._steps and self._steps[0].shape != mean.shape:
            raise ShapeMismatch(f"an aggregate of shape {list(mean.shape)} after ones of {list(self._steps[0].shape)}")
        corrected = None
        # A step j rounds back was missed by every update that is older than that. Integers, so in any order.
        for back, step in enumerate(reversed(self._steps), start=1):
            missed_by = sum(scale for age, scale in zip(staleness, scales, strict=True) if age >= back)
            if not missed_by:
                break
            if corrected is None:
                corrected = mean.copy()
            corrected -= (self._damping * (missed_by / denominator)) * step
        return mean if corrected is None else corrected

    def record(self, applied: Float64Array) -> None:
        """Remember an aggregate that was applied: as corrected, and times any scale of the learning rate."""
        self._steps.append(np.array(applied, np.float64))
