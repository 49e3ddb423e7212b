"""What the documentation lists is what the code has: commands and their flags, fields, defaults, errors."""

from __future__ import annotations

import argparse
import random
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree as ET

import pytest

from client_sdk import cli, events
from client_sdk.personalization import PersonalizationConfig
from client_sdk.protocol.errors import PROBLEM_PREFIX, ProtocolError, from_problem
from client_sdk.protocol.program import Manifest
from client_sdk.session import DeviceSession
from client_sdk.session_state import Abandon, Discard, Enrol, Phase, RetryPolicy, SessionState, Sleep, Stop
from mobile_export.meta_methods import META_INPUT_NAMES, META_OUTPUT_NAMES
from mobile_export.methods import INPUT_NAMES, OUTPUT_NAMES
from simulator.cli import given_settings
from simulator.config import SimulationConfig
from simulator.profiles import read_profiles
from simulator.results import DaysResult, PrivacyResult, RoundResult, SecrecyResult, SimulationResults, TierResult
from tests.devices import make_assignment

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy/README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {entry.name: entry for entry in entry_points(group=cli.GROUP)}


def parser_of(command: str) -> argparse.ArgumentParser:
    """The command's real parser, filled."""
    parser = cli._parser(COMMANDS[command])
    COMMANDS[command].load()(parser)
    return parser


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str, header: str) -> list[list[str]]:
    """Cells of the table that starts with this header, without the code marks."""
    lines = text.splitlines()
    body = lines[lines.index(header) + 2 :]
    table = body[: next(i for i, line in enumerate([*body, ""]) if not line.startswith("|"))]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]


def names(text: str, header: str) -> list[str]:
    """First cells of a table; one cell may hold several names."""
    return [name for row in rows(text, header) for name in row[0].split(", ")]


# --- commands ------------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every pocketfed command in a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in {"&&", "|", ";", "&", ">"}), len(words))
            call, words = words[:end], words[end + 1 :]
            if call and call[0].rpartition("/")[2] == "pocketfed":
                yield call[1:]


def in_fences(text: str) -> list[list[str]]:
    fences = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [call for fence in fences for call in command_lines(fence)]


def in_examples(text: str) -> list[list[str]]:
    """Commands in the examples of a help text, which stand in lines of their own."""
    lines = re.sub(r"\s\(.*\)$", "", text.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
    return [call for line in lines if line.startswith("  ") for call in command_lines(line.replace("'", "\\'"))]


DOCUMENTED = [(p.name, call) for p in PAGES for call in in_fences(p.read_text())]
DOCUMENTED += [(f"{name} --help", call) for name in COMMANDS for call in in_examples(parser_of(name).epilog or "")]
DOCUMENTED += [("--help", call) for call in in_examples(cli.EXAMPLES)]


@pytest.mark.parametrize(("where", "call"), DOCUMENTED, ids=[f"{w}: {' '.join(c)}" for w, c in DOCUMENTED])
def test_every_documented_command_parses(where: str, call: list[str]):
    if call == ["--help"]:
        return
    command, *arguments = call
    if arguments == ["--help"]:
        assert command in COMMANDS
        return
    parsed = parser_of(command).parse_args(arguments)
    if command == "simulate" and not parsed.resume:
        SimulationConfig.parse(given_settings(parsed))


def test_commands_are_found_where_they_stand():
    assert in_fences("```sh\n.venv/bin/pocketfed serve --port 1  # now\n```\n```text\npocketfed no\n```\n") == [
        ["serve", "--port", "1"]
    ]
    assert list(command_lines("cd x && pocketfed a \\\n  --b 'c d' | head\necho pocketfed")) == [["a", "--b", "c d"]]
    documented = {call[0] for _, call in DOCUMENTED}
    assert set(COMMANDS) <= documented


def test_a_flag_that_does_not_exist_is_found(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parser_of("simulate").parse_args(["--out", "x", "--cohorts", "3"])
    assert "--cohorts" in capsys.readouterr().err


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Those of a command and of its actions."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    inner = [flags_of(each) for action in actions for each in action.choices.values()]
    return set(parser._option_string_actions).union(*inner)


FLAGS = {flag for name in COMMANDS for flag in flags_of(parser_of(name))} | {"--version"}
OTHERS = {"--index-url", "--errors", "--check", "--verification"}  # pip's, the benchmarks', the fuzzer's


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_flag_named_in_the_text_exists(path: Path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith(("-", "pocketfed "))]
    assert {flag for span in spans for flag in re.findall(r"--[a-z][a-z-]*", span)} <= FLAGS | OTHERS


# --- fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "model"),
    [
        ("| field | holds |", SimulationResults),
        ("| field of a round | holds |", RoundResult),
        ("| field of a tier | holds |", TierResult),
        ("| field of `days` | holds |", DaysResult),
        ("| field of `privacy` | holds |", PrivacyResult),
        ("| field of `secrecy` | holds |", SecrecyResult),
    ],
)
def test_the_fields_of_the_results_are_listed(header: str, model: Any):
    assert sorted(names(page("simulator.md"), header)) == sorted(model.model_fields)


def test_the_fields_of_the_manifest_are_listed():
    assert names(page("export.md"), "| field | holds |") == list(Manifest.model_fields)


@pytest.mark.parametrize(
    ("header", "inputs", "outputs"),
    [
        ("| role | inputs | outputs | used for |", INPUT_NAMES, OUTPUT_NAMES),
        ("| role of several batches | inputs | outputs | used for |", META_INPUT_NAMES, META_OUTPUT_NAMES),
    ],
)
def test_the_methods_are_listed_with_their_signatures(header: str, inputs: Any, outputs: Any):
    table = rows(page("export.md"), header)
    assert {role: (tuple(ins.split(", ")), tuple(outs.split(", "))) for role, ins, outs, _ in table} == {
        role.value: (inputs[role], outputs[role]) for role in inputs
    }


def test_the_simulated_tiers_are_listed():
    table = rows(page("simulator.md"), "| tier | share | MFLOP/s | Mbit/s | round trip, s | start-up, s |")
    assert {row[0]: [float(cell) for cell in row[1:]] for row in table} == {
        p.tier.value: [p.share, p.mflops, p.download_mbit, p.latency_s, p.startup_s]
        for p in read_profiles("steady").profile
    }


def test_every_event_of_a_device_is_listed():
    assert {f"`{event.__name__}`" for event in get_args(events.Event)} <= set(re.findall(r"`\w+`", page("device.md")))


def test_the_retry_policy_is_listed_with_its_defaults():
    table = rows(page("protocol.md"), "| setting of `RetryPolicy` | default | meaning |")
    assert {name: float(default) for name, default, _ in table} == vars(RetryPolicy())


def test_the_choices_of_personalisation_are_listed_with_their_defaults():
    table = rows(page("personalization.md"), "| field of `PersonalizationConfig` | default | meaning |")
    defaults = PersonalizationConfig().model_dump(mode="json")
    assert {name: default for name, default, _ in table} == {
        name: "none" if value is None else str(value).lower() for name, value in defaults.items()
    }


# --- problems ------------------------------------------------------------------------------------------------


def subclasses(cls: type[ProtocolError]) -> Iterator[type[ProtocolError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from subclasses(sub)


def reaction(error: ProtocolError) -> str:
    """What a device's session makes of a refused upload (of a download, where the problem is about one)."""
    common: dict[str, Any] = {"device_id": "1" * 32, "enrolled": True, "assignment": make_assignment()}
    if error.slug in {"unknown-blob", "range-not-satisfiable"}:
        state = SessionState(phase=Phase.DOWNLOADING, report_id="2" * 32, **common)
    else:
        state = SessionState(phase=Phase.UPLOADING, report_id="2" * 32, report_sha256="3" * 64, **common)
    session = DeviceSession(state, report_id_of=lambda _: "2" * 32, rng=random.Random(0))
    session.on_failure(error)
    match session.next_action():
        case Enrol():
            return "enrols and repeats the request"
        case Sleep():
            return "tries again later"
        case Stop():
            return "stops; its state stays"
        case Abandon():
            session.on_abandoned()
            session.on_discarded()
            stops = isinstance(session.next_action(), Stop)
            return "gives the assignment back and stops" if stops else "gives the assignment back"
        case Discard():
            session.on_discarded()
            assert not isinstance(session.next_action(), Stop)
            return "drops the report, asks for work"
        case action:
            raise AssertionError(action)


def test_the_problems_are_listed_with_what_a_device_does_about_them():
    ours = [cls for cls in subclasses(ProtocolError) if cls.__module__ == ProtocolError.__module__]
    assert rows(page("protocol.md"), "| type | status | title | the device |") == [
        [cls.slug, str(cls.http_status), cls.title, reaction(cls())] for cls in ours
    ]


@pytest.mark.parametrize(("status", "expected"), [(500, "tries again later"), (404, "stops; its state stays")])
def test_an_unknown_problem_counts_by_its_status(status: int, expected: str):
    assert reaction(from_problem(PROBLEM_PREFIX + "from-the-future", http_status=status)) == expected


# --- the picture ---------------------------------------------------------------------------------------------


def test_the_picture_is_small_well_formed_and_names_the_commands_that_make_it():
    picture = ROOT / "docs/img/accuracy.svg"
    assert picture.stat().st_size < 150_000
    svg = ET.fromstring(picture.read_text())  # noqa: S314 - our own file
    described = svg.findtext("{*}desc") or ""
    calls = list(command_lines(described))
    assert len(calls) == len(svg.findall("{*}polyline")) == 3
    for command, *arguments in calls:
        parser_of(command).parse_args(arguments)
