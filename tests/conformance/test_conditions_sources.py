"""What every ``ConditionsSource`` promises, held against the real reader on several machines, and against scripts.

The machines are trees of files in the form that the kernel gives them; one of them is full of garbage.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.conditions import Conditions, ConditionsSource, Network, ScriptedSource, ThermalStatus, TimelineSource
from client_sdk.power import PowerMonitor
from client_sdk.sysfs import SysfsSource

Files = Mapping[str, str | bytes]

ROUTE_HEAD = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def default_route(interface: str, metric: int = 0, flags: str = "0003") -> str:
    return f"{interface}\t00000000\t0101A8C0\t{flags}\t0\t0\t{metric}\t00000000\t0\t0\t0\n"


def ipv6_default(interface: str, flags: str = "00000003") -> str:
    zero = "0" * 32
    return f"{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 {flags} {interface}\n"


PHONE_ON_BATTERY: Files = {
    "sys/class/power_supply/battery/type": "Battery\n",
    "sys/class/power_supply/battery/capacity": "37\n",
    "sys/class/power_supply/battery/status": "Discharging\n",
    "sys/class/power_supply/battery/temp": "312\n",
    "sys/class/power_supply/usb/type": "USB\n",
    "sys/class/power_supply/usb/online": "0\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-1-0-usr\n",
    "sys/class/thermal/thermal_zone0/temp": "61000\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "95000\n",
    "sys/class/thermal/thermal_zone1/type": "xo-skin\n",
    "sys/class/thermal/thermal_zone1/temp": "34500\n",
    "sys/class/net/rmnet_data0/uevent": "INTERFACE=rmnet_data0\nIFINDEX=9\n",
    "proc/net/route": ROUTE_HEAD + default_route("rmnet_data0"),
    "proc/loadavg": "3.20 2.80 2.75 2/1640 12345\n",
}
CHARGING_PHONE: Files = PHONE_ON_BATTERY | {
    "sys/class/power_supply/battery/capacity": "93\n",
    "sys/class/power_supply/battery/status": "Charging\n",
    "sys/class/power_supply/usb/online": "1\n",
    "sys/class/thermal/thermal_zone0/temp": "96500\n",
    "sys/class/net/wlan0/uevent": "DEVTYPE=wlan\nINTERFACE=wlan0\n",
    "proc/net/route": ROUTE_HEAD + default_route("rmnet_data0", 600) + default_route("wlan0", 300),
}
LAPTOP: Files = {
    # Two batteries, a wireless mouse that is nearly empty, and mains; charging is held at 80 %.
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "1\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/capacity": "80\n",
    "sys/class/power_supply/BAT0/status": "Not charging\n",
    "sys/class/power_supply/BAT1/type": "Battery\n",
    "sys/class/power_supply/BAT1/capacity": "60\n",
    "sys/class/power_supply/BAT1/status": "Unknown\n",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery\n",
    "sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
    "sys/class/power_supply/hidpp_battery_0/capacity": "4\n",
    "sys/class/power_supply/hidpp_battery_0/status": "Discharging\n",
    "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone0/temp": "88000\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "0\n",
    "sys/class/thermal/thermal_zone1/type": "acpitz\n",
    "sys/class/thermal/thermal_zone1/temp": "55000\n",
    "sys/class/thermal/thermal_zone1/trip_point_0_type": "critical\n",
    "sys/class/thermal/thermal_zone1/trip_point_0_temp": "105000\n",
    "sys/class/net/wlp2s0/uevent": "DEVTYPE=wlan\n",
    "proc/net/route": ROUTE_HEAD + default_route("wlp2s0", 600),
    "proc/loadavg": "0.50 0.40 0.30 1/900 4242\n",
}
LAPTOP_WITH_A_MODEM: Files = LAPTOP | {
    "sys/class/net/wwp0s20f0u6/uevent": "DEVTYPE=wwan\n",
    "proc/net/route": ROUTE_HEAD,
    "proc/net/ipv6_route": ipv6_default("lo", "00200200") + ipv6_default("wwp0s20f0u6"),
}
SERVER: Files = {
    "sys/class/net/eth0/uevent": "INTERFACE=eth0\n",
    "proc/net/route": ROUTE_HEAD + default_route("eth0"),
    "proc/loadavg": "16.00 12.00 10.00 17/2000 1\n",
}
OFFLINE: Files = {"proc/net/route": ROUTE_HEAD + default_route("eth0", flags="0203"), "sys/class/net/eth0/uevent": ""}
GARBAGE: Files = {
    "sys/class/power_supply/a/type": b"Battery\xff\n",
    "sys/class/power_supply/b/type": "Battery\n",
    "sys/class/power_supply/b/capacity": "9" * 70_000,
    "sys/class/power_supply/b/status": b"\x00\x01",
    "sys/class/power_supply/b/temp": "-2730\n",
    "sys/class/power_supply/c/type": "Battery",
    "sys/class/power_supply/c/capacity": "101",
    "sys/class/power_supply/c/status": "Unknown",
    "sys/class/power_supply/file": "not a folder",
    "sys/class/thermal/thermal_zone0/type": "skin\n",
    "sys/class/thermal/thermal_zone0/temp": "1e400\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "hot\n",
    "sys/class/thermal/thermal_zone1/temp": "40000\n",
    "sys/class/thermal/thermal_zone1/trip_point_x_type": "passive\n",
    "sys/class/thermal/thermal_zone1/trip_point_x_temp": "\n",
    "proc/net/route": ROUTE_HEAD + default_route("../../../etc") + "short line\n" + "x y z q w e r t u\n",
    "proc/loadavg": "nan 1 2\n",
}

FINE = Conditions(0.8, charging=True, network=Network.UNMETERED)
EXPECTED: dict[str, tuple[Files, Conditions]] = {
    "a phone on battery": (
        PHONE_ON_BATTERY,
        Conditions(0.37, False, 31.2, ThermalStatus.NONE, 0.8, None, Network.METERED),
    ),
    "a charging phone": (
        CHARGING_PHONE,
        Conditions(0.93, True, 31.2, ThermalStatus.MODERATE, 0.8, None, Network.UNMETERED),
    ),
    "a laptop": (LAPTOP, Conditions(0.7, True, None, ThermalStatus.NONE, 0.125, None, Network.UNMETERED)),
    "a laptop with a modem": (
        LAPTOP_WITH_A_MODEM,
        Conditions(0.7, True, None, ThermalStatus.NONE, 0.125, None, Network.METERED),
    ),
    "a server": (SERVER, Conditions(load=4.0, network=Network.UNMETERED)),
    "offline": (OFFLINE, Conditions(network=Network.NONE)),
    "garbage": (GARBAGE, Conditions()),
    "no files at all": ({}, Conditions()),
}


def machine(folder: Path, files: Files) -> SysfsSource:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return SysfsSource(folder / "sys", folder / "proc", cores=4)


SOURCES: dict[str, Callable[[Path], ConditionsSource]] = {
    **{name: (lambda folder, files=files: machine(folder, files)) for name, (files, _) in EXPECTED.items()},
    "this machine": lambda _: SysfsSource(),
    "a script": lambda _: ScriptedSource(FINE, Conditions()),
    "a timeline": lambda _: TimelineSource([(0, FINE), (10, Conditions())], lambda: 5.0),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ConditionsSource:
    return SOURCES[request.param](tmp_path)


def check(reading: Conditions) -> None:
    """What a reading of any source looks like."""
    assert reading.battery_level is None or 0 <= reading.battery_level <= 1
    assert reading.charging in {None, True, False}
    assert reading.temperature_c is None or -40 <= reading.temperature_c <= 150
    assert reading.thermal is None or isinstance(reading.thermal, ThermalStatus)
    assert reading.load is None or 0 <= reading.load < math.inf
    assert reading.user_active in {None, True, False}
    assert isinstance(reading.network, Network)


def test_it_is_a_source(source: ConditionsSource):
    assert isinstance(source, ConditionsSource)


def test_its_readings_are_within_their_ranges_time_after_time(source: ConditionsSource):
    for _ in range(3):
        check(source.read())


def test_a_monitor_can_judge_by_it(source: ConditionsSource):
    monitor = PowerMonitor(source, clock=lambda: 0.0)
    for verdict in (monitor.start_verdict(), monitor.continue_verdict()):
        assert verdict.allowed == (verdict.reason is None)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_files_are_read_as_what_they_say(name: str, tmp_path: Path):
    files, expected = EXPECTED[name]
    found = machine(tmp_path, files).read()
    assert found.battery_level == pytest.approx(expected.battery_level)
    assert found == Conditions(**(vars(expected) | {"battery_level": found.battery_level}))


@pytest.mark.parametrize(
    ("interface", "uevent", "network"),
    [
        ("wlan0", "DEVTYPE=wlan", Network.UNMETERED),
        ("enx0a1b2c", "DEVTYPE=wwan", Network.METERED),  # a modem on USB that calls itself Ethernet
        ("rmnet0", "", Network.METERED),
        ("ccmni1", "", Network.METERED),
        ("gone0", None, Network.UNKNOWN),
        ("..", None, Network.UNKNOWN),
    ],
)
def test_what_a_route_costs(interface: str, uevent: str | None, network: Network, tmp_path: Path):
    files = {"proc/net/route": ROUTE_HEAD + default_route(interface), "sys/class/net/lo/uevent": ""}
    files |= {} if uevent is None else {f"sys/class/net/{interface}/uevent": uevent}
    assert machine(tmp_path, files).read().network is network


@pytest.mark.parametrize(
    ("degrees", "status"),
    [
        (59.9, ThermalStatus.NONE),
        (60, ThermalStatus.MODERATE),
        (80, ThermalStatus.SEVERE),
        (100, ThermalStatus.CRITICAL),
    ],
)
def test_the_worst_trip_point_that_is_reached_counts(degrees: float, status: ThermalStatus, tmp_path: Path):
    zone = "sys/class/thermal/thermal_zone0"
    files = {f"{zone}/temp": str(int(degrees * 1000))}
    for n, (kind, at) in enumerate([("critical", 100), ("passive", 60), ("hot", 80), ("active", 40)]):
        files |= {f"{zone}/trip_point_{n}_type": kind, f"{zone}/trip_point_{n}_temp": str(at * 1000)}
    assert machine(tmp_path, files).read().thermal is status


def test_the_worst_zone_counts(tmp_path: Path):
    files = {}
    for n, degrees in enumerate([50, 70, 50]):
        zone = f"sys/class/thermal/thermal_zone{n}"
        files |= {f"{zone}/temp": f"{degrees}000", f"{zone}/trip_point_0_type": "passive"}
        files |= {f"{zone}/trip_point_0_temp": "60000"}
    assert machine(tmp_path, files).read().thermal is ThermalStatus.MODERATE


def test_what_powers_a_gadget_does_not_charge_the_machine(tmp_path: Path):
    files = {
        "sys/class/power_supply/BAT0/type": "Battery",
        "sys/class/power_supply/BAT0/status": "Not charging",
        "sys/class/power_supply/pen/type": "USB",
        "sys/class/power_supply/pen/scope": "Device",
        "sys/class/power_supply/pen/online": "1",
    }
    assert machine(tmp_path, files).read().charging is None


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_a_number_too_large_for_any_sensor_is_unknown(digits: int, tmp_path: Path):
    battery = "sys/class/power_supply/b"
    files = {f"{battery}/type": "Battery", f"{battery}/temp": "9" * digits, f"{battery}/capacity": "9" * digits}
    assert machine(tmp_path, files).read() == Conditions()


def test_changes_are_seen(tmp_path: Path):
    source = machine(tmp_path, PHONE_ON_BATTERY)
    assert source.read().battery_level == 0.37
    machine(tmp_path, CHARGING_PHONE)
    assert source.read().battery_level == 0.93
    (tmp_path / "sys/class/power_supply/battery/capacity").unlink()
    assert source.read().battery_level is None


@pytest.mark.parametrize(
    ("status", "online", "charging"),
    [
        ("Charging", None, True),
        ("Full", None, True),
        ("Discharging", "1", False),  # a supply too weak to help
        ("Not charging", "1", True),
        ("Not charging", "0", False),
        ("Not charging", None, None),
        ("Unknown", "1", None),
        (None, "1", None),
    ],
)
def test_whether_a_battery_is_charged(status: str | None, online: str | None, charging: bool | None, tmp_path: Path):
    files = {"sys/class/power_supply/BAT0/type": "Battery", "sys/class/power_supply/AC/type": "Mains"}
    files |= {} if status is None else {"sys/class/power_supply/BAT0/status": status}
    files |= {} if online is None else {"sys/class/power_supply/AC/online": online}
    assert machine(tmp_path, files).read().charging is charging


def test_a_pipe_and_a_folder_in_place_of_files_do_not_stop_it(tmp_path: Path):
    """Opening a pipe for reading waits for a writer, who never comes."""
    source = machine(tmp_path, PHONE_ON_BATTERY)
    battery = tmp_path / "sys/class/power_supply/battery"
    (battery / "capacity").unlink()
    os.mkfifo(battery / "capacity")
    (battery / "temp").unlink()
    (battery / "temp").mkdir()
    (tmp_path / "proc/loadavg").unlink()
    (tmp_path / "proc/loadavg").symlink_to("loadavg")
    found = source.read()
    assert (found.battery_level, found.temperature_c, found.load) == (None, 34.5, None)


def test_only_so_much_of_a_folder_or_a_file_is_read(tmp_path: Path):
    source = machine(tmp_path, PHONE_ON_BATTERY)
    for n in range(2000):
        (tmp_path / f"sys/class/power_supply/usb{n:04}").mkdir()
    (tmp_path / "proc/loadavg").write_bytes(b"1.00 " + b" " * 10_000_000)
    check(source.read())


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*PHONE_ON_BATTERY, *LAPTOP, *LAPTOP_WITH_A_MODEM})),
        st.binary(max_size=40)
        | st.sampled_from(["Battery", "Discharging", "passive", "-1", "0", "1" * 30, "٣", "99999999", "1_000", "+5"]),
        max_size=12,
    )
)
def test_whatever_the_files_hold_it_does_not_raise(spoilt: Files):
    with tempfile.TemporaryDirectory() as folder:
        check(machine(Path(folder), PHONE_ON_BATTERY | LAPTOP | spoilt).read())
