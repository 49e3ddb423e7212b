"""One entry to all rules, and the rules as functions of their own. Loads no compiler before a rule is applied."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.robust.limits import check_options, tolerated
from server_ref.aggregation.robust.options import Mixing, RuleOptions
from server_ref.aggregation.robust.reduction import Reduction

if TYPE_CHECKING:
    from server_ref.aggregation.robust.mixing import Mixed
    from server_ref.aggregation.robust.rows import AnyRows

Float64Array = npt.NDArray[np.float64]
_PACKAGE = "server_ref.aggregation.robust"


def apply_rule(
    name: str,
    rows: AnyRows,
    num_byzantine: int,
    options: RuleOptions | None = None,
    *,
    centre: Float64Array | None = None,
) -> Reduction:
    """Reduce rows to one vector by a rule that stands some dishonest ones.

    Shapes and dtypes: rows (n, d) or n vectors of d, float32 or float64, copied only where they are not C-contiguous;
    ``values`` float64[d].
    Guarantees: the outcome does not depend on the order of the rows, to the last bit, but for ties (the first row
    wins) and for modes that draw (the seed goes with positions). It moves with the rows: adding a vector to each adds
    it to the outcome, exactly where the additions are, or else within their rounding. The same rows in the same order
    give the same bits with any number of threads.
    Edge cases: equal rows, d = 0; n = 1 and 2 in degraded mode.

    Args:
        name: A name of ``RULES``.
        rows: In the order of their assignment numbers, which decides ties.
        num_byzantine: Dishonest rows that are assumed; 0 means none (see ``estimate_num_byzantine`` for an unknown
            number).
        options: What the rule can be told besides.
        centre: Centred clipping only: where it starts, float64[d], such as the previous outcome; default: the median.

    Returns:
        The outcome, and what the rule made of each row.

    Raises:
        ConfigurationError: No such rule, options that do not fit it, or a negative number of dishonest rows.
        TooManyByzantine: More than the rule stands, and not in degraded mode.
        EmptyAggregate: No rows.
        ShapeMismatch: Rows (or a centre) of other shapes or dtypes.
        NonFiniteUpdate: NaN or infinities.
        UpdateOutOfRange: float64 values beyond 1e140.

    Example:
        >>> rows = np.array([[0.0], [1.0], [2.0], [3.0], [1e9]], np.float32)
        >>> found = apply_rule("krum", rows, 1)
        >>> found.values, found.selected
        (array([1.]), (1,))
    """
    options = options or RuleOptions()
    rule = check_options(name, options)
    if centre is not None and name != "centered-clipping":
        raise ConfigurationError(f"{name} has no use for a centre; leave it out")
    from server_ref.aggregation.robust.rows import Rows  # noqa: PLC0415 - compiles or loads the kernels

    given = Rows.of(rows)
    assumed = tolerated(rule, len(given), num_byzantine, options)
    reduce = getattr(importlib.import_module(f"{_PACKAGE}.{rule.module}"), rule.function)
    extra: dict[str, Any] = {} if centre is None else {"centre": centre}
    if options.mixing is Mixing.NONE:
        found: Reduction = reduce(given, assumed, options, **extra)
    else:
        from server_ref.aggregation.robust.mixing import mix_into_buckets, mix_with_nearest  # noqa: PLC0415 - as above

        if options.mixing is Mixing.BUCKETING:
            mixed = mix_into_buckets(given, options.bucket_size, options.seed)
        else:
            mixed = mix_with_nearest(given, assumed, options)
        found = _of_rows(reduce(Rows.of(mixed.rows), assumed, options, **extra), mixed)
    return replace(found, degraded=assumed < num_byzantine)


def _of_rows(found: Reduction, mixed: Mixed) -> Reduction:
    """The same outcome, told in terms of the rows that were mixed."""
    weights = None if found.weights is None else mixed.spread(found.weights)
    selected = None
    if found.selected is not None:
        selected = tuple(sorted({i for k in found.selected for i in mixed.members[k]}))
    scores = None if found.scores is None else found.scores[mixed.own]
    return replace(found, weights=weights, selected=selected, scores=scores)


def krum(rows: AnyRows, num_byzantine: int, options: RuleOptions | None = None) -> Reduction:
    """The row whose n - f - 2 nearest others are nearest, by the sum of squared distances; ``apply_rule`` for the rest.

    Needs n >= 2f + 3. O(n^2 d).
    """
    return apply_rule("krum", rows, num_byzantine, options)


def multi_krum(rows: AnyRows, num_byzantine: int, options: RuleOptions | None = None) -> Reduction:
    """The mean of the m rows with the best Krum scores, m = n - f - 2 by default; ``apply_rule`` for the rest.

    Needs n >= 2f + 3. O(n^2 d).
    """
    return apply_rule("multi-krum", rows, num_byzantine, options)


def trimmed_mean(rows: AnyRows, num_byzantine: int, options: RuleOptions | None = None) -> Reduction:
    """Per coordinate, the mean without the f smallest and the f largest values; ``apply_rule`` for the rest.

    Needs n >= 2f + 1. O(n log^2(n) d) by a sorting network. Equal to ``np.sort(rows, 0)[f : n - f]`` averaged in
    float64, bit for bit.
    """
    return apply_rule("trimmed-mean", rows, num_byzantine, options)


def median(rows: AnyRows, num_byzantine: int, options: RuleOptions | None = None) -> Reduction:
    """Per coordinate, the median; ``apply_rule`` for the rest.

    Needs n >= 2f + 1; f is of no other use to it. O(n log^2(n) d) by a selection network. Equal to ``np.median`` of
    the rows as float64, bit for bit.
    """
    return apply_rule("median", rows, num_byzantine, options)


def geometric_median(rows: AnyRows, num_byzantine: int, options: RuleOptions | None = None) -> Reduction:
    """The point with the smallest sum of distances (not squared); ``apply_rule`` for the rest.

    Needs n >= 2f + 1; f is of no other use to it. O(n d) an iteration (smoothed Weiszfeld). Starts from the
    coordinatewise median, so that rows however far away cost no iterations. Stops at a step shorter than the
    tolerance times the median distance to the start.
    """
    return apply_rule("geometric-median", rows, num_byzantine, options)


def centered_clipping(
    rows: AnyRows,
    num_byzantine: int,
    options: RuleOptions | None = None,
    *,
    centre: Float64Array | None = None,
) -> Reduction:
    """``v + mean(clip(x_i - v, radius))``, repeated; starts from ``centre`` or the median; ``apply_rule`` for the rest.

    Needs n >= 2f + 1; f is of no other use to it. O(n d) an iteration. One row moves the outcome of a pass by at most
    ``radius / n``.
    """
    return apply_rule("centered-clipping", rows, num_byzantine, options, centre=centre)


def bulyan(rows: AnyRows, num_byzantine: int, options: RuleOptions | None = None) -> Reduction:
    """Choose n - 2f rows by Krum one by one; per coordinate, average the n - 4f nearest to their median.

    Needs n >= 4f + 3. O(n^2 d + n^3). ``apply_rule`` for the rest.
    """
    return apply_rule("bulyan", rows, num_byzantine, options)
