"""How many rows look dishonest, where nobody says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from server_ref.aggregation.robust.rows import AnyRows

_CUTOFF = 5.0
"""Robust standard deviations above the median: see the measured rates in docs/robustness.md."""

_LEAST_SPREAD = 0.05
"""Smallest standard deviation of the logarithm of a squared distance that is believed: in high dimension the honest
distances are so alike that rounding would make outliers of some."""

_NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution, in units of its median absolute deviation."""


def estimate_num_byzantine(rows: AnyRows, *, limit: int | None = None) -> int:
    """The number of rows that are too far from the coordinatewise median.

    With s_i the squared distance of row i to the coordinatewise median and z_i = log s_i, row i counts if
    ``z_i > median(z) + 5 * max(1.4826 MAD(z), 0.05)``. Logarithms, because honest clients differ by factors (data
    sizes, learning progress). Rows that equal the median count as honest.

    It sees what is far: scaling, sign flips of large updates, noise. It does **not** see attacks that stay as close as
    honest rows do (ALIE, mimic, small perturbations), nor more outliers than honest rows. Treat it as a lower bound,
    and name f wherever it is known. It depends on the rows, so a rule that uses it has no proved sensitivity.

    Args:
        rows: n rows, as for ``apply_rule``.
        limit: Most that may be returned; default: the most that Krum stands, (n - 3) // 2.

    Returns:
        0 to ``limit``.

    Raises:
        EmptyAggregate, ShapeMismatch, NonFiniteUpdate, UpdateOutOfRange: As for ``apply_rule``.

    Example:
        >>> honest = np.random.default_rng(0).standard_normal((17, 100))
        >>> estimate_num_byzantine(np.concatenate([honest, 30 * honest[:3]]))
        3
    """
    from server_ref.aggregation.robust.centres import squared_distances_to  # noqa: PLC0415 - loads the kernels
    from server_ref.aggregation.robust.coordinatewise import coordinate_median  # noqa: PLC0415 - as above
    from server_ref.aggregation.robust.rows import Rows  # noqa: PLC0415 - as above

    given = Rows.of(rows)
    squares = squared_distances_to(given, coordinate_median(given))
    with np.errstate(divide="ignore"):
        logs = np.log(squares)
    middle = np.median(logs)
    if middle == -np.inf:
        # Half of the rows and more are equal: whatever differs stands out.
        found = int(np.count_nonzero(squares))
    else:
        spread = max(_NORMAL_MAD * float(np.median(np.abs(logs - middle))), _LEAST_SPREAD)
        found = int(np.count_nonzero(logs > middle + _CUTOFF * spread))
    most = (len(given) - 3) // 2 if limit is None else limit
    return max(0, min(found, most))
