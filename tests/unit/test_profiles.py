"""Files of profiles: every way to write them, and errors that name the line and the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulator.errors import ProfileError
from simulator.profiles import BUILT_IN, FleetProfiles, hours, parse_profiles, read_profiles

# The line on which each key stands matters to what follows.
GOOD = """format = 1

[policy]
start_battery = 0.3

[[profile]]
name = "phone"
tier = "mid_range"
share = 1.0
memory_mb = 2048
cpu_cores = 8
mflops = 600.0
download_mbit = 30.0
upload_mbit = 10.0
latency_s = 0.06
startup_s = 2.0

[profile.battery]
level = 0.5
"""


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_comes_along_survives_a_file_of_json(name: str, tmp_path: Path):
    file = tmp_path / "fleet.json"
    file.write_text(read_profiles(name).model_dump_json())
    assert read_profiles(file) == read_profiles(name)
    assert read_profiles(file).built_in == name


def test_a_file_of_ones_own(tmp_path: Path):
    file = tmp_path / "fleet.toml"
    file.write_text(GOOD)
    found = read_profiles(file)
    (phone,) = found.profile
    assert phone.battery is not None
    assert (found.policy.start_battery, phone.memory_mb, phone.battery.level) == (0.3, 2048, (0.5,) * 24)
    assert (found.built_in, found.traced, found.skewed) == (None, True, False)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("share = 1.0", "share = 0.9", r"^fleet: the shares of all profiles must add up to 1; they add up to 0\.9$"),
        ("share = 1.0", "share = 1.5", r"line 9: profile\[0\]\.share: .*less than or equal to 1 \(got 1\.5\)"),
        ("mflops = 600.0", "mflops = 0", r"line 12: profile\[0\]\.mflops: .*greater than 0"),
        ("mflops = 600.0", "mflops = inf", r"line 12: profile\[0\]\.mflops"),
        ('"mid_range"', '"middling"', r"line 8: profile\[0\]\.tier: .*'high_end'.*got 'middling'"),
        (
            "memory_mb = 2048",
            "memory = 2048",
            r"profile\[0\]\.memory_mb: field required.*line 10: profile\[0\]\.memory:",
        ),
        ("level = 0.5", "level = [0.5, 0.6]", r"line 19: profile\[0\]\.battery\.level: .*at least 24"),
        ("level = 0.5", 'level = ["22-25"]', r"line 19: .*22-7, within 0 \.\. 24; got '22-25'"),
        ("start_battery = 0.3", "start_battery = 30", r"line 4: policy\.start_battery: .*\(got 30\)"),
        ("startup_s = 2.0", "startup_s = 2.0\nutc_offsets_h = [3, -3]", "the first of the two offsets is the smaller"),
        ("startup_s = 2.0", 'startup_s = 2.0\nskew = "tilt:3"', "line 17: .*unknown skew 'tilt:3'"),
        ("format = 1", "format = 2", "line 1: format:"),
        ("share = 1.0", "share 1.0", r"fleet is not TOML: .*line 9"),
    ],
)
def test_errors_name_the_line_and_the_key(before: str, after: str, message: str):
    assert before in GOOD
    with pytest.raises(ProfileError, match=message):
        parse_profiles(GOOD.replace(before, after, 1), "fleet")


def test_names_are_used_once():
    kind = read_profiles("steady").model_dump(mode="json")["profile"][0]
    text = json.dumps({"profile": [{**kind, "share": 0.5}, {**kind, "share": 0.5}]})
    with pytest.raises(ProfileError, match="a name of its own; used twice: high end"):
        parse_profiles(text, "fleet", as_json=True)
    with pytest.raises(ProfileError, match=r"not JSON: .*line 1"):
        parse_profiles("{", "fleet", as_json=True)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"#" * (2**20 + 1)], ids=["missing", "no text", "too large"])
def test_what_is_no_file_of_profiles(content: bytes | None, tmp_path: Path):
    file = tmp_path / "fleet.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ProfileError, match=r"fleet\.toml (cannot be read|is larger than 1 MiB)"):
        read_profiles(file)


@pytest.mark.parametrize(
    ("written", "inside"),
    [(["0-24"], range(24)), (["22-2"], [22, 23, 0, 1]), (["12-13", "12-14"], [12, 13]), (0.25, []), (True, None)],
)
def test_hours_of_a_day(written: object, inside: list[int] | None):
    if inside is None:
        assert hours(written) is written, "left to the model to refuse"
    else:
        rest = written if isinstance(written, float) else 0.0
        assert hours(written) == [1.0 if hour in inside else rest for hour in range(24)]


def test_profiles_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        FleetProfiles.model_validate(read_profiles("steady").model_dump()).format = 1
