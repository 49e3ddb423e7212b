"""Paying for compilation ahead of the first report."""

from __future__ import annotations


def warm_up() -> None:
    """Compile the accumulators' kernels, or load them from the cache.

    About 6 s of one core the first time after an installation, 0.4 s afterwards (plus 0.3 s for importing numba). A
    second call does nothing. A server calls this before it says that it is ready. The cache lies beside the package;
    set ``NUMBA_CACHE_DIR`` where that is read-only and the user has no cache directory.
    """
    import server_ref.aggregation.kernels  # noqa: F401, PLC0415 - its import compiles: this is the point of the call
