"""Paying for compilation ahead of the first round."""

from __future__ import annotations


def warm_up() -> None:
    """Compile the kernels of shares, or load them from the cache; see ``server_ref.aggregation.warm``.

    About 3 s of one core the first time after an installation, 0.3 s afterwards (plus 0.3 s for importing numba). A
    second call does nothing. An aggregator calls this before it says that it is ready.
    """
    import server_ref.secure.kernels  # noqa: F401, PLC0415 - its import compiles: this is the point of the call
