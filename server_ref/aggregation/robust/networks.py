"""Sorting networks that bring some order statistics of n values into place, for the kernels to run over columns."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

MAX_ROWS = 2048
"""Beyond, the table of comparators is slower to make and to read than sorting column by column."""


def _batcher(n: int) -> Iterator[tuple[int, int]]:
    """Comparators of the odd-even merge sort of n values, in an order in which they can run."""
    p = 1
    while p < n:
        k = p
        while k:
            for j in range(k % p, n - k, 2 * k):
                for i in range(j, min(j + k, n - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        yield i, i + k
            k //= 2
        p *= 2


@functools.lru_cache(maxsize=16)
def network(n: int, low: int, high: int) -> npt.NDArray[np.int32]:
    """Comparators (i, j), i < j: the smaller value to i, the larger to j.

    The odd-even merge sort without the comparators that no order statistic in ``low <= i < high`` depends on.

    Args:
        n: Number of values.
        low: First order statistic that is wanted.
        high: One past the last.

    Returns:
        int32[comparators, 2], not to be written to.

    Source: K. E. Batcher, "Sorting Networks and Their Applications", AFIPS 1968; D. Knuth, The Art of Computer
    Programming vol. 3, 5.2.2 algorithm M.
    """
    wanted = [low <= i < high for i in range(n)]
    kept = []
    for i, j in reversed(list(_batcher(n))):
        if wanted[i] or wanted[j]:
            wanted[i] = wanted[j] = True
            kept.append((i, j))
    return np.array(kept[::-1], np.int32).reshape(-1, 2)
