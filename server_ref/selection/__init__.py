"""Who gets work: fair, fast or diverse, by keyed orders that every replica agrees on."""

from server_ref.selection.fairness import jain_index, selection_ratio, spread
from server_ref.selection.latency import LATENCIES_KEPT, LatencyTracker, selection_probabilities
from server_ref.selection.selector import SelectionPolicy, Selector

__all__ = [
    "LATENCIES_KEPT",
    "LatencyTracker",
    "SelectionPolicy",
    "Selector",
    "jain_index",
    "selection_probabilities",
    "selection_ratio",
    "spread",
]
