"""The container files keep their promises: pinned, unprivileged, health-checked, nothing fetched by address.

There may be no container engine where the tests run, so the files are read, not built.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server_ref.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
INSTRUCTIONS = frozenset(
    "FROM RUN CMD EXPOSE ENV COPY ENTRYPOINT VOLUME USER WORKDIR HEALTHCHECK STOPSIGNAL".split()  # noqa: SIM905 - a table
)


def parse(text: str) -> list[tuple[str, str]]:
    """Instruction and arguments, continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    steps = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name, arguments.strip()) for name, _, arguments in steps]


def findings(text: str) -> list[str]:
    """What is wrong with a Containerfile."""
    steps = parse(text)
    last_stage = steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]
    found = [f"{name} is not permitted" for name, _ in steps if name not in INSTRUCTIONS]
    for name, arguments in steps:
        if name == "FROM" and not re.search(r":\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?( AS \w+)?$", arguments):
            found.append(f"the base image {arguments} is not pinned to a version")
        if name in {"COPY", "RUN"} and "://" in arguments:
            found.append(f"{name} fetches an address: {arguments}")
        if name == "RUN" and "apt-get install" in arguments and "rm -rf /var/lib/apt/lists" not in arguments:
            found.append("the package lists stay in the layer")
        if name in {"CMD", "ENTRYPOINT"} and not arguments.startswith("["):
            found.append(f"{name} runs through a shell, which does not pass signals on")
    users = [arguments for name, arguments in last_stage if name == "USER"]
    if not users or users[-1].split(":")[0] in {"0", "root"}:
        found.append("the process runs as root")
    if not any(name == "HEALTHCHECK" for name, _ in last_stage):
        found.append("there is no health check")
    return found


def environment() -> dict[str, str]:
    pairs = [pair for name, text in parse(CONTAINERFILE) if name == "ENV" for pair in shlex.split(text)]
    return dict(pair.split("=", 1) for pair in pairs)


CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
SERVICE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]


def test_the_containerfile_has_no_finding():
    assert findings(CONTAINERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("python:3.11.14-slim-bookworm\n", "python:latest\n", "not pinned"),
        ("python:3.11.14-slim-bookworm AS", "python AS", "not pinned"),
        ("USER 10001:10001\n", "", "as root"),
        ("USER 10001:10001", "USER 0", "as root"),
        ("HEALTHCHECK", "LABEL", "no health check"),
        ("COPY simulator simulator", "ADD simulator simulator", "ADD is not permitted"),
        ("COPY simulator simulator", "RUN curl -O http://host.example/file", "fetches an address"),
        ("rm -rf /var/lib/apt/lists/*", "true", "package lists"),
        ('ENTRYPOINT ["pocketfed"]', "ENTRYPOINT pocketfed", "through a shell"),
    ],
)
def test_the_lint_finds_a_planted_fault(old: str, new: str, finding: str):
    assert old in CONTAINERFILE
    assert any(finding in line for line in findings(CONTAINERFILE.replace(old, new)))


def test_what_is_copied_exists_and_is_let_through_to_the_build():
    ignore = (DEPLOY / "Containerfile.dockerignore").read_text().split()
    sources = [a.split()[:-1] for name, a in parse(CONTAINERFILE) if name == "COPY" and "--from" not in a]
    for source in (s for group in sources for s in group):
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore


def test_the_python_of_the_image_is_one_that_the_project_supports():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    lowest = tuple(map(int, requires.removeprefix(">=").split(".")))
    for major, minor in re.findall(r"FROM python:(\d+)\.(\d+)", CONTAINERFILE):
        assert (int(major), int(minor)) >= lowest


def test_one_port_throughout():
    port = environment()["POCKETFED_PORT"]
    exposed = next(arguments for name, arguments in parse(CONTAINERFILE) if name == "EXPOSE")
    health = next(arguments for name, arguments in parse(CONTAINERFILE) if name == "HEALTHCHECK")
    assert exposed == port
    assert f"127.0.0.1:{port}/ready" in health
    assert SERVICE["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_the_service_is_confined():
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in SERVICE["security_opt"]
    assert not SERVICE.get("privileged", False)


def test_what_is_written_at_run_time_lies_where_it_may_be_written():
    writable = (*SERVICE["tmpfs"], environment()["POCKETFED_DATA_DIR"])
    assert environment()["NUMBA_CACHE_DIR"].startswith(writable)


def test_the_service_s_data_outlives_it():
    volumes = dict(volume.split(":")[:2] for volume in SERVICE["volumes"])
    assert volumes["data"] == environment()["POCKETFED_DATA_DIR"]
    assert "data" in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["volumes"]


def test_the_service_builds_this_containerfile_and_mounts_files_that_the_command_reads():
    assert (DEPLOY / SERVICE["build"]["context"] / SERVICE["build"]["dockerfile"]).resolve() == DEPLOY / "Containerfile"
    command = json.loads(next(arguments for name, arguments in parse(CONTAINERFILE) if name == "CMD"))
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICE["volumes"]}
    assert (DEPLOY / mounts[command[-1]]).is_file()


def test_the_server_accepts_the_mounted_configuration(monkeypatch: pytest.MonkeyPatch):
    for name, value in environment().items():
        if name.startswith("POCKETFED_"):
            monkeypatch.setenv(name, value)
    config = load_config(DEPLOY / "server.toml")
    assert str(config.data_dir) == environment()["POCKETFED_DATA_DIR"]
    assert config.host == "0.0.0.0"  # noqa: S104 - inside its container; the port is published on loopback
    assert str(config.task.bundle) in {volume.split(":")[1] for volume in SERVICE["volumes"]}
