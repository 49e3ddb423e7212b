"""The dispatcher: what it loads, what it says, and the exit status it gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import time
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

import pytest

from client_sdk import cli
from client_sdk.power import PowerPolicy, QuietHours

COMMAND_MODULE = """
from client_sdk.protocol.errors import ConfigurationError

def greet(parser):
    parser.description = "Say hello to somebody.\\n\\nMore words."
    parser.add_argument("--name", required=True)
    def run(args):
        print(f"hello {args.name}")
        return 7
    return run

def refuse(parser):
    def run(args):
        raise ConfigurationError("cohort_size must be at least 1; set --cohort-size")
    return run

def interrupt(parser):
    def run(args):
        raise KeyboardInterrupt
    return run

def lacks_a_package(parser):
    def run(args):
        import a_package_that_nobody_has
    return run

def is_broken(parser):
    def run(args):
        from client_sdk import no_such_module_of_ours
    return run
"""


@pytest.fixture(autouse=True)
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that registers commands, as any package can."""
    info = tmp_path / "greeter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greeter\nVersion: 1.0\n")
    names = ("greet", "refuse", "interrupt", "lacks-a-package", "is-broken")
    lines = "\n".join(f"{name} = greeter:{name.replace('-', '_')}" for name in names)
    (info / "entry_points.txt").write_text(f"[{cli.GROUP}]\n{lines}\n")
    (tmp_path / "greeter.py").write_text(COMMAND_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "greeter", raising=False)
    monkeypatch.setitem(cli.EXTRA_OF_PACKAGE, "greeter", "greeting")
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)


def test_a_command_gets_its_arguments_and_gives_the_exit_status(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["greet", "--name", "Ada"]) == 7
    assert capsys.readouterr().out == "hello Ada\n"


def test_help_lists_every_command_with_one_line_and_worked_examples(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for entry in entry_points(group=cli.GROUP):
        assert f"\n  {entry.name} " in out
    assert "Say hello to somebody.\n" in out
    assert "More words" not in out
    assert out.partition("examples:")[2].count("\n    pocketfed ") == 2


def test_no_command_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_a_command_s_own_help_and_usage_errors_are_argparse_s(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["greet", "--help"]) == 0
    assert "usage: pocketfed greet" in capsys.readouterr().out
    assert cli.main(["greet"]) == 2
    assert "--name" in capsys.readouterr().err


def test_the_version_is_the_distribution_s(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pocketfed {version('pocketfed')}\n"


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["grete"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'grete'; did you mean `pocketfed greet`?\n"
    assert cli.main(["zzz"]) == 2
    assert "commands: " in capsys.readouterr().err


def test_an_option_before_the_command_is_explained(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--name", "greet"]) == 2
    assert "the command comes first" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["refuse"]) == 2
    assert capsys.readouterr().err == "error: cohort_size must be at least 1; set --cohort-size\n"


def test_the_debug_variable_brings_the_traceback_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(cli.ConfigurationError):
        cli.main(["refuse"])


def test_ctrl_c_ends_with_a_short_word(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["interrupt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_missing_third_party_names_the_extra(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["lacks-a-package"]) == 2
    err = capsys.readouterr().err
    assert "a_package_that_nobody_has" in err
    assert "pip install 'pocketfed[greeting]'" in err


def test_an_import_error_of_our_own_is_not_blamed_on_the_installation():
    with pytest.raises(ImportError, match="no_such_module_of_ours"):
        cli.main(["is-broken"])


def test_a_command_that_cannot_be_loaded_does_not_spoil_the_help(capsys: pytest.CaptureFixture[str]):
    entry = EntryPoint("simulate", "a_package_that_nobody_has:command", cli.GROUP)
    assert "a_package_that_nobody_has" in cli._summary(entry)


@pytest.mark.parametrize("package", ["server_ref", "mobile_export", "simulator"])
def test_every_package_with_commands_has_an_extra(package: str):
    assert package in cli.EXTRA_OF_PACKAGE
    owners = {
        e.module.partition(".")[0] for e in entry_points(group=cli.GROUP) if e.dist and e.dist.name == "pocketfed"
    }
    assert owners - {"client_sdk"} == {"server_ref", "mobile_export", "simulator"}


def test_running_a_device_command_loads_no_other_package():
    code = (
        "import sys, json; from client_sdk.cli import main; main(['device', '--help']);"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded & {"server_ref", "mobile_export", "simulator", "torch", "numpy", "fastapi"} == set()


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from client_sdk.cli import main; sys.exit(main(['--help']))"
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run([sys.executable, "-c", code], stdout=gone, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


DEVICE = ["device", "--server", "http://127.0.0.1:1", "--state-dir", "unused"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--data", "/no/such/file.npz"], "no such file"),
        (["--data", "x.npz", "--max-reports", "0"], "at least 1"),
        (["--data", "x.npz", "--max-reports", "2", "--once"], "not allowed with"),
        (["--data", "x.npz", "--tier", "laptop"], "invalid choice"),
        (["--data", "x.npz", "--runtime", "gpu"], "invalid choice"),
    ],
)
def test_a_device_s_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main([*DEVICE, *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_device_s_flags_make_its_power_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data.npz").touch()
    asked: dict[str, object] = {}
    monkeypatch.setattr("client_sdk.device.run_device", lambda **settings: asked.update(settings) or 0)
    command = [*DEVICE, "--data", str(tmp_path / "data.npz")]
    assert cli.main(command) == 0
    usual = asked["power_policy"]
    assert isinstance(usual, PowerPolicy)
    assert (usual.start_battery, usual.continue_battery) == (0.20, 0.15)
    assert (usual.require_charging, usual.require_unmetered, usual.require_idle) == (False, False, False)
    flags = [
        "--require",
        "charging",
        "idle",
        "--quiet-hours",
        "08:00-22:30",
        "--memory-limit",
        "120",
        "--run-for",
        "90",
    ]
    assert cli.main([*command, *flags]) == 0
    strict = asked["power_policy"]
    assert isinstance(strict, PowerPolicy)
    assert (strict.require_charging, strict.require_unmetered, strict.require_idle) == (True, False, True)
    assert strict.quiet_hours == (QuietHours(begin=time(8), end=time(22, 30)),)
    assert (asked["memory_limit_mib"], asked["run_for_s"]) == (120, 90.0)
    assert cli.main([*command, "--power", "ignore"]) == 0
    assert asked["power_policy"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--power", "ignore", "--require", "idle"], "mean nothing with --power ignore"),
        (["--quiet-hours", "8-22"], "08:00-22:30"),
        (["--quiet-hours", "08:00-08:00"], "08:00-22:30"),
        (["--run-for", "0"], "positive number of seconds"),
        (["--run-for", "inf"], "positive number of seconds"),
    ],
)
def test_flags_that_make_no_policy_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "data.npz").touch()
    assert cli.main([*DEVICE, "--data", str(tmp_path / "data.npz"), *flags]) == 2
    assert message in capsys.readouterr().err
