"""What ``pocketfed device`` does around the client: data, state, signals, lines. The network is the toy server."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from client_sdk import cli, device, events
from client_sdk.device import ProgressLines, run_device
from client_sdk.errors import CheckpointKeyError, InvalidDataFile, StateDirLocked
from client_sdk.personal_store import PersonalModelStore
from client_sdk.personalization import chosen_config
from client_sdk.protocol.errors import ConfigurationError, PocketfedError, UnsupportedVersion
from client_sdk.protocol.profile import DeviceTier
from client_sdk.store import FileDeviceStore
from tests.devices import PROGRAM_BYTES, WAIT, ToyProgram, ToyServer, make_assignment, make_data, make_model
from tests.personal import ServingProgram, make_personal, serving_manifest


class ToyPrograms:
    """Provides the toy program whatever the bundle holds."""

    def __init__(self, *_: object) -> None:
        self.program = ToyProgram()

    def open(self, *_: object) -> ToyProgram:
        return self.program

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def server(monkeypatch) -> ToyServer:
    server = ToyServer(work=2)
    monkeypatch.setattr(device, "HttpTransport", lambda _url, identity, **_: server.device(identity.device_id))
    monkeypatch.setattr(device, "DownloadedPrograms", ToyPrograms)
    return server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    x, y = make_data()
    np.savez(tmp_path / "shard.npz", x=x, y=y)
    return tmp_path / "shard.npz"


def run(data: Path, tmp_path: Path, **changes: object) -> int:
    return run_device(server_url="http://127.0.0.1:1", data=data, state_dir=tmp_path / "state", **changes)


def test_a_device_runs_to_the_end_of_the_task_and_says_what_it_does(server, data, tmp_path, capsys):
    assert run(data, tmp_path, tier=DeviceTier.HIGH_END, name="kitchen") == 0
    assert len(server.reports) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("device kitchen: ") for line in lines)
    assert "enrolled as" in lines[0]
    assert any("trained on 20 examples; loss" in line for line in lines)
    assert any("report accepted" in line for line in lines)
    assert lines[-1].endswith("2 reports accepted")


def test_a_run_that_is_out_of_time_says_so_and_the_next_one_goes_on(server, data, tmp_path, capsys):
    assert run(data, tmp_path, run_for_s=1e-9) == 0
    assert "time is up; the state is kept" in capsys.readouterr().err
    assert run(data, tmp_path, run_for_s=1e6) == 0
    assert len(server.reports) == 2


def test_training_that_does_not_fit_into_the_memory_is_refused_before_anything_is_opened(
    server, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(ToyPrograms, "open", lambda *_: pytest.fail("nothing may be opened"))
    server.work = 100
    with pytest.raises(PocketfedError, match=r"does not fit into 1\.0 MiB"):
        run(data, tmp_path, memory_limit_mib=1)
    assert server.abandoned
    assert {reason for _, reason in server.abandoned} == {"no-memory"}
    assert server.reports == {}


@pytest.mark.parametrize("content", ["", "ab", "g" * 64, "0" * 63, "0" * 66])
def test_a_checkpoint_key_that_is_none_is_refused_without_repeating_it(tmp_path, content):
    (tmp_path / "key").write_text(content)
    with pytest.raises(ConfigurationError, match="64 hex digits") as refused:
        device.load_checkpoint_key(tmp_path / "key")
    assert not content or content not in str(refused.value)


def test_a_checkpoint_key_is_read_and_a_missing_file_named(tmp_path):
    (tmp_path / "key").write_text("0f" * 32 + "\n")
    assert device.load_checkpoint_key(tmp_path / "key") == bytes([15]) * 32
    with pytest.raises(ConfigurationError, match="No such file"):
        device.load_checkpoint_key(tmp_path / "none")


def test_the_next_run_goes_on_as_the_same_device(server, data, tmp_path):
    assert run(data, tmp_path, max_reports=1) == 0
    assert run(data, tmp_path, max_reports=1) == 0
    assert len({device_id for device_id, _ in server.reports.values()}) == 1
    assert server.requests.count("enrol") == 1
    assert server.requests.count("fetch") == 3, "the second run has everything cached"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_cleanly_and_the_handlers_are_restored(server, data, tmp_path, number, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server.before = lambda name: os.kill(os.getpid(), number) if name == "upload" else None
    assert run(data, tmp_path) == 0
    assert "state is kept; 1 report accepted" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    server.before = lambda _: None
    assert run(data, tmp_path) == 0
    assert len(server.reports) == 2


def test_a_second_signal_ends_at_once_and_loses_nothing(server, data, tmp_path):
    def twice(name: str) -> None:
        if name == "upload":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    server.before = twice
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)
    server.before = lambda _: None
    assert run(data, tmp_path) == 0
    assert len(server.reports) == 2


def test_outside_the_main_thread_no_handler_is_touched(server, data, tmp_path):
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(data, tmp_path)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_what_made_the_device_give_up_is_raised(server, data, tmp_path):
    def refuse(_: str) -> None:
        raise UnsupportedVersion("this server speaks version 2")

    server.before = refuse
    with pytest.raises(UnsupportedVersion, match="version 2"):
        run(data, tmp_path)
    FileDeviceStore(tmp_path / "state").close()


def test_bad_input_is_refused_before_anything_is_sent(server, data, tmp_path):
    with pytest.raises(InvalidDataFile):
        run(tmp_path / "missing.npz", tmp_path)
    store = FileDeviceStore(tmp_path / "state")
    with pytest.raises(StateDirLocked):
        run(data, tmp_path)
    store.close()
    assert server.requests == []


def test_a_bad_address_releases_the_state_directory(data, tmp_path):
    with pytest.raises(ConfigurationError, match="server's address"):
        run_device(server_url="ftp://x", data=data, state_dir=tmp_path / "state")
    FileDeviceStore(tmp_path / "state").close()


ASSIGNMENT = make_assignment(1)
PERSONAL = "personal model: 3 steps from version 3 on 8 examples"
FIGURES = "accuracy on 2 own held-out examples: global 50.0% (loss 0.700), personal 100.0% (loss 0.100)"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (events.Enrolled("ab" * 16), "enrolled as " + "ab" * 16),
        (events.CheckedIn(ASSIGNMENT), "round 0: got model version 0; 600 s to report"),
        (events.Downloaded("c" * 64, 1234567), "downloaded cccccccccccc (1,234,567 bytes)"),
        (events.Downloaded("c" * 64, 0), None),
        (events.TrainingProgress(10, 20, 0.5), None),
        (events.TrainingProgress(20, 20, 0.5), "trained on 20 examples; loss 0.5000"),
        (events.Uploaded("1" * 32, ASSIGNMENT, 40, 36), "round 0: report accepted (40 bytes)"),
        (events.Uploaded("1" * 32, ASSIGNMENT, 40, None), "round 0: report accepted (40 bytes)"),
        (
            events.Uploaded("1" * 32, ASSIGNMENT, 1234, 400000),
            "round 0: report accepted (1,234 bytes instead of 400,000)",
        ),
        (events.Waiting(1.25, WAIT.reason), "waiting 1.2 s: round-full"),
        (events.Dropped(ASSIGNMENT, "too late"), "round 0: dropped: too late"),
        (events.Finished("finished", "the task is finished", 1), "the task is finished; 1 report accepted"),
        (
            events.Personalized(make_personal(3).record),
            f"{PERSONAL}; {FIGURES}",
        ),
        (
            events.Personalized(make_personal(3, adapted=False).record),
            f"{PERSONAL}; {FIGURES}; the global model serves",
        ),
        (
            events.Personalized(make_personal(3, of_global=None, of_personal=None).record),
            f"{PERSONAL}; no example is left to judge it",
        ),
        (events.NotPersonalized("why"), "no new personal model: why"),
        (
            events.PersonalModelSetAside(3, "a" * 64),
            "the personal model of version 3 is set aside: it is one of program aaaaaaaaaaaa",
        ),
    ],
)
def test_each_event_has_its_line(event: events.Event, line: str | None):
    stream = io.StringIO()
    ProgressLines("d" * 32, stream)(event)
    assert stream.getvalue() == ("" if line is None else f"device {'d' * 12}: {line}\n")


def test_a_device_that_personalises_keeps_its_model_and_says_how_it_does(server, data, tmp_path, monkeypatch, capsys):
    class ServingPrograms(ToyPrograms):
        def __init__(self, *_: object) -> None:
            self.program = ServingProgram()

    monkeypatch.setattr(device, "DownloadedPrograms", ServingPrograms)
    server.hand_out(serving_manifest().to_json().encode(), PROGRAM_BYTES, make_model())
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    choices = chosen_config("readapt", steps=3, rate=0.2)
    assert run(data, tmp_path, personalization=choices, checkpoint_key=key) == 0
    assert "personal model: 3 steps from version 0 on 8 examples; accuracy on 2 own held-out" in capsys.readouterr().err
    store = PersonalModelStore(tmp_path / "state" / "personal", key=bytes.fromhex("ab" * 32))
    assert store.load(serving_manifest()) is not None
    assert run(data, tmp_path, personalization=choices) == 0, "without the key its rounds go on"
    assert "no new personal model: the personal models in" in (said := capsys.readouterr().err)
    assert "give that key, or clear the folder on purpose" in said
    assert len(list((tmp_path / "state" / "personal").iterdir())) == 1, "nothing lies beside it in the clear"
    with pytest.raises(CheckpointKeyError):
        PersonalModelStore(tmp_path / "state" / "personal").newest()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--personal-steps", "3"], "mean nothing without --personalize"),
        (["--personalize", "forget"], "merge: Input should be 'replace', 'readapt' or 'interpolate'"),
        (["--personalize", "interpolate:2"], "personal_share: Input should be less than or equal to 1"),
        (["--personalize", "--personal-lr", "0"], "inner_lr: Input should be greater than 0"),
        (["--personalize", "--personal-layers", ""], "personal_layers"),
    ],
)
def test_choices_for_a_personal_model_that_mean_nothing_are_refused(data, tmp_path, capsys, flags, message):
    command = ["device", "--server", "http://127.0.0.1:1", "--data", str(data), "--state-dir", str(tmp_path / "state")]
    assert cli.main([*command, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_closed_terminal_does_not_lose_the_state(server, data, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Closed())
        with pytest.raises(BrokenPipeError):
            run(data, tmp_path)
    assert run(data, tmp_path) == 0
    assert len(server.reports) == 2


def test_keys_that_cannot_be_read_end_the_device_before_anything_is_sent(server, data, tmp_path):
    keys = tmp_path / "keys.json"
    keys.write_text("[]")
    with pytest.raises(ConfigurationError, match="at least two sealing keys"):
        run(data, tmp_path, aggregator_keys=keys)
    assert server.requests == []
    assert not (tmp_path / "state").exists()
