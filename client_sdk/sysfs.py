"""Conditions as Linux and Android tell them: files under ``/sys`` and ``/proc``. Reads only, and never raises.

What is there depends on the machine, its drivers and its permissions: on recent Android an app may read hardly any of
it and brings its own ``ConditionsSource``. Files are read as hostile: bounded, and anything unexpected is "unknown".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from client_sdk.conditions import MAX_TEMPERATURE_C, MIN_TEMPERATURE_C, Conditions, Network, ThermalStatus

_MAX_BYTES: Final = 64 * 1024
_MAX_ENTRIES: Final = 256

# The kernel's names of the trip points of a thermal zone (Documentation/driver-api/thermal).
_TRIPS: Final = {"passive": ThermalStatus.MODERATE, "hot": ThermalStatus.SEVERE, "critical": ThermalStatus.CRITICAL}
_FELT_ZONES: Final = ("skin", "battery", "batt", "case", "shell")
_CELLULAR: Final = ("wwan", "rmnet", "ccmni", "pdp", "ppp", "wwp", "v4-rmnet")
_ROUTE_UP: Final = 0x1
_ROUTE_REJECT: Final = 0x200


class SysfsSource:
    """Reads the files of a Linux machine.

    - Battery: the system's battery (``type`` Battery, ``scope`` not Device, so a mouse's does not count); where there
      are several, their levels' mean.
    - Charging: the battery says so, or is full or held on external power that is online.
    - Temperature: the battery's, else that of a thermal zone named after what the user feels.
    - Thermal status: the worst trip point (passive, hot, critical) that a thermal zone has reached.
    - Load: of the last minute, per core.
    - Network: the interface of the default route with the least metric; cellular is metered, everything else counts
      as unmetered. Whether a Wi-Fi is a phone's hotspot cannot be told here.
    - Whether somebody uses the device cannot be told here either: always None.
    """

    def __init__(self, sys: Path = Path("/sys"), proc: Path = Path("/proc"), *, cores: int | None = None) -> None:
        """Read below these folders.

        Args:
            sys: Where sysfs is mounted.
            proc: Where procfs is mounted.
            cores: Cores that share the load; by default those of this machine.
        """
        self._power = sys / "class" / "power_supply"
        self._thermal = sys / "class" / "thermal"
        self._net = sys / "class" / "net"
        self._loadavg = proc / "loadavg"
        self._routes = (proc / "net" / "route", proc / "net" / "ipv6_route")
        self._cores = cores or os.cpu_count() or 1

    def read(self) -> Conditions:
        """What the files say now; what they do not say is None."""
        batteries = [folder for folder in _entries(self._power) if _is_system_battery(folder)]
        levels = [level for level in map(_level, batteries) if level is not None]
        return Conditions(
            battery_level=sum(levels) / len(levels) if levels else None,
            charging=self._charging(batteries),
            temperature_c=self._felt_temperature(batteries),
            thermal=self._thermal_status(),
            load=self._load(),
            network=self._network(),
        )

    def _charging(self, batteries: list[Path]) -> bool | None:
        statuses = {_text(folder / "status") for folder in batteries} - {None, "Unknown"}
        if not statuses:
            return None
        if "Discharging" in statuses:
            return False
        if "Charging" in statuses or "Full" in statuses:
            return True
        # "Not charging": held below full to spare it, or a supply too weak; the supply tells which.
        online = [
            _integer(folder / "online")
            for folder in _entries(self._power)
            if _text(folder / "type") not in {None, "Battery"} and _text(folder / "scope") != "Device"
        ]
        known = [value for value in online if value is not None]
        return any(known) if known else None

    def _felt_temperature(self, batteries: list[Path]) -> float | None:
        # power_supply counts in tenths of a degree, thermal in thousandths.
        found = [_degrees(folder / "temp", 10) for folder in batteries]
        known = [value for value in found if value is not None]
        if known:
            return max(known)
        for zone in self._zones():
            kind = (_text(zone / "type") or "").lower()
            if any(word in kind for word in _FELT_ZONES):
                degrees = _degrees(zone / "temp", 1000)
                if degrees is not None:
                    known.append(degrees)
        return max(known, default=None)

    def _thermal_status(self) -> ThermalStatus | None:
        worst: ThermalStatus | None = None
        for zone in self._zones():
            degrees = _degrees(zone / "temp", 1000)
            trips = list(_trip_points(zone))
            if degrees is None or not trips:
                continue
            reached = max((status for status, at in trips if degrees >= at), default=ThermalStatus.NONE)
            worst = reached if worst is None else max(worst, reached)
        return worst

    def _zones(self) -> Iterator[Path]:
        return (folder for folder in _entries(self._thermal) if folder.name.startswith("thermal_zone"))

    def _load(self) -> float | None:
        words = (_text(self._loadavg) or "").split()
        try:
            load = float(words[0])
        except (IndexError, ValueError):
            return None
        return load / self._cores if 0 <= load < 1e6 else None

    def _network(self) -> Network:
        tables = [
            (_text(path), parse) for path, parse in zip(self._routes, (_ipv4_default, _ipv6_default), strict=True)
        ]
        if all(text is None for text, _ in tables):
            return Network.UNKNOWN
        for text, parse in tables:
            default = min(parse(text or ""), default=None)
            if default is not None:
                return self._cost(default[1])
        return Network.NONE

    def _cost(self, interface: str) -> Network:
        folder = self._net / interface
        # An interface called "../x" is no interface.
        if "/" in interface or interface in {".", ".."} or not _exists(folder):
            return Network.UNKNOWN
        devtype = (_text(folder / "uevent") or "").splitlines()
        cellular = "DEVTYPE=wwan" in devtype or interface.startswith(_CELLULAR)
        return Network.METERED if cellular else Network.UNMETERED


def _is_system_battery(folder: Path) -> bool:
    return _text(folder / "type") == "Battery" and _text(folder / "scope") != "Device"


def _level(battery: Path) -> float | None:
    percent = _integer(battery / "capacity")
    return percent / 100 if percent is not None and 0 <= percent <= 100 else None


def _trip_points(zone: Path) -> Iterator[tuple[ThermalStatus, float]]:
    for path in _entries(zone):
        name = path.name
        if name.startswith("trip_point_") and name.endswith("_type"):
            status = _TRIPS.get(_text(path) or "")
            degrees = _degrees(zone / name.replace("_type", "_temp"), 1000)
            # Drivers write 0 for a trip point that is not set.
            if status is not None and degrees is not None and degrees > 0:
                yield status, degrees


def _ipv4_default(table: str) -> Iterator[tuple[int, str]]:
    """``(metric, interface)`` of each default route in ``/proc/net/route``."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        try:
            interface, destination, flags, metric, mask = (fields[i] for i in (0, 1, 3, 6, 7))
            usable = int(flags, 16) & (_ROUTE_UP | _ROUTE_REJECT) == _ROUTE_UP
            if usable and int(destination, 16) == int(mask, 16) == 0:
                yield int(metric), interface
        except (IndexError, ValueError):
            continue


def _ipv6_default(table: str) -> Iterator[tuple[int, str]]:
    """``(metric, interface)`` of each default route in ``/proc/net/ipv6_route``."""
    for line in table.splitlines():
        fields = line.split()
        try:
            destination, length, metric, flags, interface = (fields[i] for i in (0, 1, 5, 8, 9))
            usable = int(flags, 16) & (_ROUTE_UP | _ROUTE_REJECT) == _ROUTE_UP
            if usable and interface != "lo" and int(destination, 16) == int(length, 16) == 0:
                yield int(metric, 16), interface
        except (IndexError, ValueError):
            continue


def _entries(folder: Path) -> list[Path]:
    """A folder's entries in order of their names; none where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            names = [entry.name for entry, _ in zip(found, range(_MAX_ENTRIES), strict=False)]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _text(path: Path) -> str | None:
    """A small file's text without its line end; None where it cannot be read or is not text."""
    try:
        # A pipe in place of the file must not make us wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = b""
            # procfs hands out a page at a time.
            while len(data) < _MAX_BYTES and (more := os.read(descriptor, _MAX_BYTES - len(data))):
                data += more
        finally:
            os.close(descriptor)
        return data.decode("ascii").strip()
    except (OSError, ValueError):
        return None


def _integer(path: Path) -> int | None:
    text = _text(path)
    # More digits than that are no measurement, and very many of them no float.
    if text is None or len(text) > 20:
        return None
    try:
        return int(text)
    except ValueError:
        return None


def _degrees(path: Path, divisor: int) -> float | None:
    raw = _integer(path)
    if raw is None:
        return None
    degrees = raw / divisor
    return degrees if MIN_TEMPERATURE_C <= degrees <= MAX_TEMPERATURE_C else None
