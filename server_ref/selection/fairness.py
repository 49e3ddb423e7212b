"""How evenly work was shared out: three figures of the same counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from client_sdk.protocol.errors import ConfigurationError


def jain_index(counts: Iterable[float]) -> float:
    """Jain's fairness index of how often each device was selected: 1 if equally often, 1/n if it was always the same.

    1 for no devices, and where nobody was ever selected. Any other amounts of at least 0 will do as well.

    Source: R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination" (1984).
    """
    values = list(counts)
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def spread(counts: Iterable[int]) -> float:
    """Coefficient of variation of the counts, standard deviation over mean: 0 if all are equal.

    0 for no devices, and where nobody was ever selected. ``jain_index = 1 / (1 + spread**2)``.

    Example:
        >>> spread([2, 2, 2]), spread([1, 3])
        (0.0, 0.5)
    """
    values = list(counts)
    total = sum(values)
    if not total:
        return 0.0
    n = len(values)
    # Integers to the end: equal counts give exactly 0.
    return math.sqrt(n * sum(v * v for v in values) - total * total) / total


def selection_ratio(counts: Mapping[str, int], slow: Iterable[str]) -> float:
    """How often a slow device was selected, on average, beside one of the others: 1 is equally often.

    Raises:
        ConfigurationError: No slow devices, no others, or the others were never selected.
    """
    slow = set(slow)
    slow_counts = [n for device, n in counts.items() if device in slow]
    other_counts = [n for device, n in counts.items() if device not in slow]
    if not slow_counts or not sum(other_counts):
        raise ConfigurationError("a ratio needs slow devices, and others that were selected")
    return (sum(slow_counts) / len(slow_counts)) / (sum(other_counts) / len(other_counts))
