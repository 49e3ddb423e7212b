"""Who a device is: its tier and what it can spend."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DeviceTier(StrEnum):
    """The specification's ``device_type``: a bounded label, fit for metrics."""

    HIGH_END = "high_end"
    MID_RANGE = "mid_range"
    LOW_END = "low_end"


@dataclass(frozen=True)
class DeviceProfile:
    """Capabilities of one device.

    Attributes:
        device_id: The device's own name for itself; the server never trusts it for ordering or selection.
        device_type: Tier.
        available_memory_mb: Memory of the device, in MiB; what training may take of it is the planner's to say.
        cpu_cores: Number of cores.
        has_gpu: Whether an accelerator is present (unused by training, which runs on the CPU).
    """

    device_id: str
    device_type: DeviceTier = DeviceTier.MID_RANGE
    available_memory_mb: int = 2048
    cpu_cores: int = 4
    has_gpu: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "device_type", DeviceTier(self.device_type))
        if not self.device_id:
            raise ValueError("device_id must not be empty")
        if self.available_memory_mb <= 0 or self.cpu_cores <= 0:
            raise ValueError("available_memory_mb and cpu_cores must be positive")
