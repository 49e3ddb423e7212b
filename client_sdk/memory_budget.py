"""A budget that a process is held to: before training by what it will take, and during it by what it does take."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from client_sdk.footprint import MIB, MemoryEstimate, mib
from client_sdk.protocol.errors import ConfigurationError, MemoryBudgetExceeded

_STATUS: Final = Path("/proc/self/status")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


def device_memory_mib(cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Memory of this machine in MiB, or of the container that the process runs in where that has less.

    All of it, not what happens to be free: that changes by the second, and a device is to plan alike each time.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = cgroup_limit.read_text("ascii").strip()
    except (OSError, ValueError):
        limit = "max"
    allowed = int(limit) if limit.isdecimal() and 0 < len(limit) < 20 else physical
    return max(1, min(physical, allowed) // MIB)


def peak_resident_bytes(status: Path = _STATUS) -> int:
    """The most memory that this process has held resident so far.

    Linux and Android say it in ``/proc/self/status``, elsewhere ``getrusage`` does. A child of a large process starts
    with that one's peak in ``getrusage``; not so in the file.
    """
    found = _field(status, "VmHWM")
    return _rusage_peak() if found is None else found


def resident_bytes(status: Path = _STATUS) -> int:
    """The memory that this process holds resident now; where the system does not say, its peak."""
    found = _field(status, "VmRSS")
    return peak_resident_bytes(status) if found is None else found


class PeakSince:
    """The most memory that this process has held since this was made; what it held, and gave back, before is not its.

    A peak that was reached before hides lower ones: until it is exceeded, what is held at the moment counts. Where the
    system does not say that (``resident_bytes``), it is the peak of the whole process.
    """

    def __init__(
        self, *, peak: Callable[[], int] = peak_resident_bytes, resident: Callable[[], int] = resident_bytes
    ) -> None:
        """Begin now.

        Args:
            peak: The most that the process has held.
            resident: What it holds.
        """
        self._peak = peak
        self._resident = resident
        self._before = peak()

    def __call__(self) -> int:
        """Bytes."""
        peak = self._peak()
        return peak if peak > self._before else self._resident()


class MemoryBudget:
    """A limit on a process's memory. Held by looking, not by the kernel: what one call takes is seen after it."""

    def __init__(self, limit_bytes: int, *, measure: Callable[[], int] | None = None) -> None:
        """Set a limit.

        Args:
            limit_bytes: What the process may hold resident.
            measure: What it holds; by default its peak from now on (``PeakSince``), so that a budget that was exceeded
                stays so, and an app may have been larger before it trained.

        Raises:
            ConfigurationError: No positive limit.
        """
        if limit_bytes < 1:
            raise ConfigurationError(f"a memory budget is positive, not {limit_bytes} bytes")
        self.limit_bytes = limit_bytes
        self._measure = PeakSince() if measure is None else measure

    def require(self, estimate: MemoryEstimate) -> None:
        """Refuse what will not fit, before any of it is allocated.

        Raises:
            MemoryBudgetExceeded: With the items of the estimate.
        """
        if estimate.total_bytes > self.limit_bytes:
            raise MemoryBudgetExceeded(
                f"the device may use {mib(self.limit_bytes)} MiB, and training takes up to {estimate}"
            )

    def check(self) -> None:
        """Look at the process; between two calls of a training.

        Raises:
            MemoryBudgetExceeded: It holds, or held, more than the limit.
        """
        held = self._measure()
        if held > self.limit_bytes:
            raise MemoryBudgetExceeded(
                f"the process has taken {mib(held)} MiB; its budget is {mib(self.limit_bytes)} MiB"
            )


def _field(status: Path, name: str) -> int | None:
    """A line such as ``VmHWM:     12345 kB``, in bytes."""
    try:
        text = status.read_text("ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        amount = value.split()
        if key == name and len(amount) == 2 and amount[0].isdecimal() and amount[1] == "kB":
            return int(amount[0]) * 1024
    return None


def _rusage_peak() -> int:
    import resource  # noqa: PLC0415 - not on every system, and needed only where /proc is not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
