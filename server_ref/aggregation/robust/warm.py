"""Paying for the robust kernels' compilation ahead of the first round."""

from __future__ import annotations


def warm_robust() -> None:
    """Compile the kernels of the robust rules, or load them from the cache, as ``warm_up`` does for the sums.

    A second call does nothing. Only a server whose rule is not the mean needs it.
    """
    import server_ref.aggregation.robust.tiles  # noqa: F401, PLC0415 - its import compiles, and imports the others
