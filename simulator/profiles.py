"""What a fleet is made of: profiles of devices, from a file that anybody can write from telemetry of their own.

docs/profiles.md describes the file. Two come along: ``steady`` (the default: three tiers that are always available) and
``phones`` (the same tiers with the day of a phone: battery, network, user).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from client_sdk.power import PowerPolicy
from client_sdk.protocol.profile import DeviceTier
from simulator.errors import ProfileError, SkewError
from simulator.skew import parse_skew

BUILT_IN: Final = ("steady", "phones")
"""Profiles that come along, by name."""

HOURS: Final = 24
_MAX_FILE_BYTES: Final = 2**20
_WINDOW: Final = re.compile(r"(\d{1,2})-(\d{1,2})")


def hours(value: object) -> object:
    """One number for each hour of the day, from any of the three ways to write them.

    Example:
        >>> hours(0.5) == [0.5] * 24
        True
        >>> [h for h, weight in enumerate(hours(["22-2", "12-13"])) if weight]
        [0, 1, 12, 22, 23]
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [float(value)] * HOURS
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) for item in value):
        return value
    weights = [0.0] * HOURS
    for window in value:
        match = _WINDOW.fullmatch(window)
        begin, end = (int(match[1]), int(match[2])) if match else (HOURS, HOURS)
        if begin >= HOURS or end > HOURS or begin == end:
            raise ValueError(f"a window of hours is BEGIN-END, such as 22-7, within 0 .. 24; got {window!r}")
        for hour in range(begin, end if end > begin else end + HOURS):
            weights[hour % HOURS] = 1.0
    return weights


Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PerHour = Annotated[tuple[Unit, ...], BeforeValidator(hours), Field(min_length=HOURS, max_length=HOURS)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
OffsetHours = Annotated[float, Field(ge=-14, le=14, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BatteryTrace(_Table):
    """A battery over the local day."""

    level: PerHour = Field(description="at each full hour, in [0, 1]; straight lines between")
    spread: Unit = Field(0.1, description="standard deviation among devices of how far all of it is shifted")
    charging: PerHour = Field(
        (0.0,) * HOURS, validate_default=True, description="chance of being charged in each hour; one draw a night"
    )
    drain_per_minute: Unit = Field(0.004, description="level that a minute of training costs, unless charging")


class NetworkTrace(_Table):
    """Connections over the local day."""

    unmetered: PerHour = Field(description="chance of Wi-Fi in each hour; one draw a night")
    offline: PerHour = Field((0.0,) * HOURS, validate_default=True, description="chance of no network at all")
    loss: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.0, description="chance that a transfer breaks off and has to be taken up again"
    )


class ClockError(_Table):
    """How wrong a device's clock is."""

    offset_s: NonNegative = Field(0.0, description="standard deviation among devices, seconds")
    skew_ppm: NonNegative = Field(0.0, description="likewise of how fast it runs, parts in a million")


class Profile(_Table):
    """What the devices of one kind have in common."""

    name: str = Field(min_length=1, max_length=64)
    tier: DeviceTier
    share: Unit = Field(description="of the fleet; all shares add up to 1")
    memory_mb: int = Field(ge=1, description="that an app may count on, MiB")
    cpu_cores: int = Field(ge=1, le=1024)
    mflops: Positive = Field(description="sustained speed of training, million floating-point operations a second")
    download_mbit: Positive = Field(description="median speed of the network, Mbit/s")
    upload_mbit: Positive
    latency_s: NonNegative = Field(description="round trip of one request, seconds")
    startup_s: NonNegative = Field(description="to wake the app and load the program, seconds")
    speed_spread: Annotated[float, Field(ge=0, le=2)] = Field(
        0.3, description="standard deviation of the log of a device's own speed, fixed for good"
    )
    availability: PerHour | None = Field(None, description="chance in each local hour that the app may run at all")
    utc_offsets_h: tuple[OffsetHours, OffsetHours] = Field(
        (0.0, 0.0), description="time zones: each device's lies evenly between these two"
    )
    battery: BatteryTrace | None = Field(None, description="none: on mains")
    network: NetworkTrace | None = Field(None, description="none: always connected, unmetered")
    user_active: PerHour | None = Field(None, description="chance of being in use, in each five minutes")
    dropouts_per_minute: NonNegative = Field(0.0, description="hazard of vanishing for good, while at work")
    clock: ClockError | None = None
    skew: str | None = Field(None, description="of its data, as --skew has it; kinds named here replace the run's")

    @field_validator("skew")
    @classmethod
    def _known_skew(cls, value: str | None) -> str | None:
        try:
            return None if value is None else str(parse_skew(value))
        except SkewError as e:
            raise ValueError(str(e)) from e

    @field_validator("utc_offsets_h")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first of the two offsets is the smaller one")
        return value

    @property
    def traced(self) -> bool:
        """Whether what these devices do depends on the time of day or on how long they work."""
        return (
            self.availability is not None
            or self.battery is not None
            or self.network is not None
            or self.user_active is not None
            or self.dropouts_per_minute > 0
        )


class FleetProfiles(_Table):
    """A file of profiles: what a fleet is made of, and the policy that all its devices follow."""

    format: Literal[1] = 1
    title: str = Field("", max_length=200)
    policy: PowerPolicy = Field(PowerPolicy(), description="when devices train: the SDK's own settings")
    profile: tuple[Profile, ...] = Field(min_length=1, max_length=1000, description="one table for each kind")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = sum(p.share for p in self.profile)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of all profiles must add up to 1; they add up to {total:g}")
        names = [p.name for p in self.profile]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"each profile has a name of its own; used twice: {', '.join(sorted(twice))}")
        return self

    @property
    def traced(self) -> bool:
        """Whether any device's behaviour depends on time."""
        return any(p.traced for p in self.profile)

    @property
    def skewed(self) -> bool:
        """Whether any profile has a skew of its own."""
        return any(p.skew is not None for p in self.profile)

    @property
    def built_in(self) -> str | None:
        """The name under which it comes along; None for anybody's own."""
        return next((name for name in BUILT_IN if read_profiles(name) == self), None)


def read_profiles(source: str | Path) -> FleetProfiles:
    """Read profiles that come along, by name, or a file of one's own.

    Args:
        source: ``steady``, ``phones``, or the path of a ``.toml`` or ``.json`` file.

    Raises:
        ProfileError: No such file, or not such a file; the message says where.
    """
    if str(source) in BUILT_IN:
        return _built_in(str(source))
    path = Path(source)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ProfileError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ProfileError(
            f"{path} cannot be read ({e}); give a TOML or JSON file, or one of {', '.join(BUILT_IN)}"
        ) from e
    return parse_profiles(text, str(path), as_json=path.suffix.lower() == ".json")


@cache
def _built_in(name: str) -> FleetProfiles:
    text = resources.files("simulator").joinpath(f"profiles_{name}.toml").read_text(encoding="utf-8")
    return parse_profiles(text, name)


def parse_profiles(text: str, source: str, *, as_json: bool = False) -> FleetProfiles:
    """Read the text of a file.

    Args:
        text: TOML or JSON.
        source: What to call it in errors.
        as_json: Which of the two.

    Raises:
        ProfileError: Names the line of what is no TOML or JSON, and the keys of what does not fit.
    """
    try:
        values = json.loads(text) if as_json else tomllib.loads(text)
    except ValueError as e:  # both tell line and column
        raise ProfileError(f"{source} is not {'JSON' if as_json else 'TOML'}: {e}") from e
    try:
        return FleetProfiles.model_validate(values)
    except ValidationError as e:
        problems = [_told(problem, "" if as_json else text) for problem in e.errors()]
        raise ProfileError(f"{source}: {'; '.join(problems)}") from e


def _told(problem: Any, text: str) -> str:  # noqa: ANN401 - pydantic's own dictionary
    """One problem by its key and, where it can be found, its line."""
    location: tuple[int | str, ...] = problem["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    line = _line_of(location, text)
    words = problem["msg"].removeprefix("Value error, ")
    where = ": ".join(filter(None, (f"line {line}" if line else "", key)))
    given = problem["input"]
    shown = f" (got {given!r})" if isinstance(given, str | int | float) else ""
    return f"{where}: {words[:1].lower()}{words[1:]}{shown}" if where else words


def _line_of(location: Iterable[int | str], text: str) -> int | None:
    """The line of a key of TOML as people write it: tables under headers, a key a line. None where it is not there."""
    parts = list(location)
    at_profile = parts.pop(1) if len(parts) > 1 and isinstance(parts[1], int) else None
    names = [part for part in parts if isinstance(part, str)]
    found: int | None = None
    table: tuple[str, ...] = ()
    profile = -1
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.fullmatch(r"\s*\[+\s*([\w.\s-]+?)\s*\]+\s*(#.*)?", line):
            table = tuple(header[1].split("."))
            profile += table == ("profile",)
            here, depth = table, len(table)
        elif key := re.match(r"\s*([\w-]+)\s*=", line):
            here, depth = (*table, key[1]), len(table) + 1
        else:
            continue
        in_profile = at_profile is None or table[:1] != ("profile",) or profile == at_profile
        if in_profile and here == tuple(names[:depth]):
            found = number
    return found
