"""How far one client can move a rule's outcome: the L2 sensitivities that are proved, and None for the others."""

from __future__ import annotations

import math

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.robust.limits import check_options, rows_to_average, tolerated
from server_ref.aggregation.robust.options import Mixing, RuleOptions


def sensitivity_replace_one(
    rule: str,
    num_rows: int,
    num_byzantine: int,
    clip_norm: float,
    options: RuleOptions | None = None,
    *,
    public_centre: bool = False,
) -> float | None:
    """Largest L2 distance between the outcomes of two cohorts that differ in one row, all rows of norm <= C.

    Let C = ``clip_norm``, n = ``num_rows``, f = ``num_byzantine``; n and f must not depend on the rows (an estimated f
    has no sensitivity). How distances are computed does not matter to the bounds.

    - Any rule that averages m of the n rows, however it selects them: at most n - m rows of each selection are not in
      the other, and the replaced row may be in both, so ``2C (n - m + 1) / m``, and never more than 2C. Krum (m = 1):
      2C, attained. Multi-Krum: ``2C (f + 3) / (n - f - 2)`` for the default m, ``2C (f + 1) / (n - f)`` for m = n - f.
    - Trimmed mean, b > 0 rows off each side: in coordinate j the sum of the others moves by at most ``u - l``, where b
      of them are >= u and b are <= l, so their squares sum to at least ``b (u - l)^2 / 2``; all squares sum to at most
      ``(n - 1) C^2``. Hence ``C sqrt(2 (n - 1) / b) / (n - 2b)``. b = 0 is the mean: ``2C / n``.
    - Median: the trimmed mean with all rows off but one or two; 2C for odd n.
    - Centred clipping to a declared radius, one pass from a centre that is public: ``2 radius / n``.
    - Everything else, and every rule after mixing: not proved.

    Args:
        rule: Name of a rule.
        num_rows: Rows in either cohort.
        num_byzantine: Dishonest rows that the rule assumes.
        clip_norm: Bound of every row's L2 norm.
        options: As for ``apply_rule``.
        public_centre: Centred clipping starts from a centre that does not depend on these rows.

    Returns:
        The bound, or None where none is proved.

    Raises:
        ConfigurationError: No such rule, options that do not fit it, or a norm that is not positive.
        TooManyByzantine: As for ``apply_rule``.

    Example:
        >>> sensitivity_replace_one("krum", 10, 3, 1.0)
        2.0
        >>> sensitivity_replace_one("multi-krum", 100, 5, 1.0, RuleOptions(m=95)) == 2 * 6 / 95
        True
    """
    options = options or RuleOptions()
    found = check_options(rule, options)
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ConfigurationError(f"a clip norm of {clip_norm}")
    n, f = num_rows, tolerated(found, num_rows, num_byzantine, options)
    if options.mixing is not Mixing.NONE:
        return None
    if rule in {"krum", "multi-krum"}:
        return _of_selection(n, 1 if rule == "krum" else rows_to_average(n, f, options), clip_norm)
    if rule in {"trimmed-mean", "median"}:
        return _of_trimming(n, f if rule == "trimmed-mean" else (n - 1) // 2, clip_norm)
    if rule == "centered-clipping" and public_centre and options.radius is not None and options.iterations == 1:
        return 2 * options.radius / n
    return None


def _of_selection(n: int, m: int, clip_norm: float) -> float:
    return min(2.0, 2 * (n - m + 1) / m) * clip_norm


def _of_trimming(n: int, b: int, clip_norm: float) -> float:
    return clip_norm * (math.sqrt(2 * (n - 1) / b) / (n - 2 * b) if b else 2 / n)
