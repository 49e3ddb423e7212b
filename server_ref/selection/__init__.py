"""Who gets work: fair, fast or diverse, by keyed orders that every replica agrees on."""

from server_ref.selection.device_selector import DeviceRecord, ServerDeviceSelector
from server_ref.selection.errors import UnknownStrategy
from server_ref.selection.fairness import jain_index, selection_ratio, spread
from server_ref.selection.latency import LATENCIES_KEPT, LatencyTracker, selection_probabilities
from server_ref.selection.policy import SelectionPolicy
from server_ref.selection.strata import DeviceFacts

__all__ = [
    "LATENCIES_KEPT",
    "DeviceFacts",
    "DeviceRecord",
    "LatencyTracker",
    "SelectionPolicy",
    "ServerDeviceSelector",
    "UnknownStrategy",
    "jain_index",
    "selection_probabilities",
    "selection_ratio",
    "spread",
]
