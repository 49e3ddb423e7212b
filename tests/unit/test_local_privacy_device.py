"""Local privacy in a device's life: what leaves it, what it remembers, what a death at any step costs, and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk import MobileClient
from client_sdk import device as device_module
from client_sdk.cli import main
from client_sdk.errors import LocalBudgetSpent, LocalPrivacyUnavailable
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.memory import NOISED_RESIDUAL, RESIDUAL, DeviceMemory
from client_sdk.privacy import LocalPrivacy, LocalPrivacyPolicy, noised
from client_sdk.privacy_ledger import LEDGER_FILE, LocalPrivacyLedger
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, Assignment, CheckInRequest, F32Encoding
from client_sdk.protocol.privacy import encode_clipped
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.reports import Report, build_report
from client_sdk.store import FileDeviceStore
from tests.aggregators import DEVICE_ID
from tests.devices import NUM_PARAMETERS, ToyProgram, ToyServer, make_assignment, make_data
from tests.faults import FaultyFiles, Killed
from tests.unit.test_local_privacy import policy, stream
from tests.unit.test_run_device import ToyPrograms

D = 40


def build(assignment: Assignment, update: np.ndarray, ledger: Path, seed: int = 0, **more: Any) -> Report:
    private = LocalPrivacy(more.pop("policy", policy(fraction_bits=8)), LocalPrivacyLedger(ledger))
    facts = {"device_id": DEVICE_ID, "steps": 3, "train_loss": 0.5, "random": stream(seed)} | more
    return build_report(assignment, "2" * 32, update, local_privacy=private, **facts)


# --- a report ---------------------------------------------------------------------------------------------------


def test_what_is_sent_is_the_noised_update_and_no_loss(tmp_path: Path):
    update = np.arange(D, dtype=np.float32)
    decoded = decode_frame(build(make_assignment(1), update, tmp_path / "ledger").frame)
    assert np.array_equal(decoded.tensors[REPORT_TENSOR], noised(update, policy(fraction_bits=8), random=stream(0)))
    assert decoded.metadata["train_loss"] == "withheld"


@pytest.mark.parametrize("line", ["topk:0.1", "threshold:0.5", "randomk:0.25,feedback=on", "randomk:0.5"])
def test_nothing_but_the_noised_update_reaches_the_report_or_the_residual(tmp_path: Path, line: str):
    """Two updates and losses that become the same noised version leave the same bytes, and the same residual."""
    update = (5 * np.random.default_rng(1).standard_normal(D)).astype(np.float32)
    exact = policy(fraction_bits=8)
    assert np.array_equal(encode_clipped(update, exact.bounds), encode_clipped(2 * update, exact.bounds))
    assignment = make_assignment(1, compression=line, compression_seed=5)
    former = np.ones(D, np.float32) if CompressionSpec.parse(line).error_feedback else None
    one = build(assignment, update, tmp_path / "one", residual=former)
    other = build(assignment, 2 * update, tmp_path / "other", residual=former, train_loss=77.0)
    assert bytes(one.frame) == bytes(other.frame)
    if former is None:
        return
    assert one.residual is not None
    assert other.residual is not None
    assert one.residual.tobytes() == other.residual.tobytes()
    payload = decode_frame(one.frame).tensors[REPORT_TENSOR].tobytes()
    sent = Codec(CompressionSpec.parse(line), D).decode(payload, 5)
    assert np.allclose(sent + one.residual, noised(update, exact, random=stream(0)) + former, atol=1e-5)


def test_noise_beyond_the_bound_is_cut_off_there_and_the_assignment_chooses_nothing_else(tmp_path: Path):
    assignment = make_assignment(1, encoding=F32Encoding(max_abs=0.5))
    frame = build(assignment, np.ones(D, np.float32), tmp_path / "ledger").frame
    sent = decode_frame(frame).tensors[REPORT_TENSOR]
    free = noised(np.ones(D, np.float32), policy(fraction_bits=8), random=stream(0))
    bound = np.nextafter(np.float32(0.5), np.float32(0))
    assert np.array_equal(sent, np.clip(free, -bound, bound))
    assert np.abs(free).max() > 0.5


# --- a device ---------------------------------------------------------------------------------------------------


class Device:
    """One device with files of its own; each ``client`` is a new process on them."""

    def __init__(self, folder: Path, work: int = 1, **changes: Any) -> None:
        self.folder = folder
        self.server = ToyServer(work=work)
        self.policy: LocalPrivacyPolicy | None = policy(**changes)
        self.told: list[int] = []

    @property
    def ledger(self) -> LocalPrivacyLedger:
        return LocalPrivacyLedger(self.folder / LEDGER_FILE)

    def run(self, files: FileLayer = OS_FILES) -> Any:
        store = FileDeviceStore(self.folder, files=files)
        try:
            transport = self.server.device(store.identity.device_id)
            check_in = transport.check_in

            def noting(request: CheckInRequest) -> Any:
                self.told.append(request.num_samples)
                return check_in(request)

            transport.check_in = noting  # type: ignore[method-assign]
            private = None
            if self.policy is not None:
                ledger = LocalPrivacyLedger(self.folder / LEDGER_FILE, files=files)
                private = LocalPrivacy(self.policy, ledger)
            client = MobileClient(
                ToyProgram(self.server.manifest),
                DeviceProfile("phone", DeviceTier.LOW_END),
                data=make_data(),
                transport=transport,
                store=store,
                wait=lambda *_: None,
                local_privacy=private,
            )
            return client.run()
        finally:
            store.close()


def test_a_device_reports_noise_and_one_example_until_its_budget_is_spent(tmp_path: Path):
    device = Device(tmp_path / "state", work=5, max_reports=2)
    summary = device.run()
    assert (summary.cause, summary.reports) == ("refused", 2)
    assert isinstance(summary.error, LocalBudgetSpent)
    assert device.server.abandoned == [(f"{3:032x}", "privacy")], "the assignment is given back"
    assert set(device.told) == {1}
    assert device.ledger.charges().reports == 2
    updates = list(device.server.updates().values())
    assert all(np.linalg.norm(u) > 2 for u in updates), "noise of deviation 2 on nine coordinates, clipped to 1 before"
    assert device.run().cause == "refused", "a restart pays nothing back"


def test_scaffold_s_assignments_are_given_back(tmp_path: Path):
    device = Device(tmp_path / "state")
    device.server.scaffold(np.zeros(NUM_PARAMETERS, np.float32))
    summary = device.run()
    assert isinstance(summary.error, LocalPrivacyUnavailable)
    assert [reason for _, reason in device.server.abandoned] == ["privacy"]
    assert device.ledger.charges().reports == 0


def test_what_was_left_out_before_there_was_noise_is_never_sent(tmp_path: Path):
    device = Device(tmp_path / "state", max_reports=9)
    device.server.compress("topk:0.2")
    store = FileDeviceStore(device.folder)
    raw = np.full(NUM_PARAMETERS, 1e5, np.float32)
    store.stage_memory(DeviceMemory("f" * 32, "1" * 32, {RESIDUAL: raw}))
    store.settle_memory("1" * 32, accepted=True)
    store.close()
    assert device.run().reports == 1
    (payload,) = device.server.updates().values()
    sent = Codec(CompressionSpec.parse("topk:0.2"), NUM_PARAMETERS).decode(payload.tobytes(), 7)
    assert np.abs(sent).max() < 1e3
    store = FileDeviceStore(device.folder)
    memory = store.memory("f" * 32)
    store.close()
    assert memory is not None
    assert set(memory.vectors) == {NOISED_RESIDUAL}
    assert np.abs(memory.vectors[NOISED_RESIDUAL]).max() < 1e3


def test_a_report_from_before_there_was_noise_is_made_again(tmp_path: Path):
    device = Device(tmp_path / "state")
    device.policy = None

    def no_upload(name: str) -> None:
        if name == "upload":
            raise Killed

    device.server.before = no_upload
    with pytest.raises(Killed):
        device.run()
    device.server.before, device.policy = (lambda _: None), policy(max_reports=5)
    assert device.run().reports == 1
    ((_, frame),) = device.server.reports.values()
    assert decode_frame(frame).metadata["train_loss"] == "withheld"
    assert device.ledger.charges().reports == 1


def test_a_death_at_any_step_never_leaves_a_noised_version_that_was_not_charged(tmp_path: Path):
    """Every version that was ever stored has a charge of its own; at most one charge is wasted."""
    wasted = 0
    counting = Device(tmp_path / "whole")
    files = FaultyFiles(OS_FILES, chunk=4096, flushes=False)
    counting.run(files)
    steps = files.steps
    assert steps > 20
    for survives in range(steps):
        device = Device(tmp_path / f"at{survives}", max_reports=3)
        versions: set[bytes] = set()
        with pytest.raises(Killed):
            device.run(FaultyFiles(OS_FILES, survives, chunk=4096, flushes=False))
        versions |= {p.read_bytes() for p in device.folder.glob("reports/*.frame")}
        assert len(versions) <= device.ledger.charges().reports
        device.run(FaultyFiles(OS_FILES, chunk=4096, flushes=False))
        versions |= {frame for _, frame in device.server.reports.values()}
        charges = device.ledger.charges().reports
        assert len(device.server.reports) == 1
        assert len(versions) <= charges <= 2
        wasted += charges - 1
    assert 0 < wasted < steps / 2, "only a death between charge and seal costs a second one"


def test_the_command_says_at_each_start_what_is_promised_and_what_is_left(tmp_path: Path, monkeypatch, capsys):
    server = ToyServer(work=1)
    monkeypatch.setattr(device_module, "HttpTransport", lambda _url, identity, **_: server.device(identity.device_id))
    monkeypatch.setattr(device_module, "DownloadedPrograms", ToyPrograms)
    x, y = make_data()
    np.savez(tmp_path / "shard.npz", x=x, y=y)
    command = ["device", "--server", "http://127.0.0.1:1", "--data", str(tmp_path / "shard.npz")]
    command += ["--state-dir", str(tmp_path / "state"), "--local-clip", "1", "--local-budget", "4"]
    assert main(command) == 2
    assert "give all three" in capsys.readouterr().err
    for spent in ("0 after 0 reports", "3 after 1 report,"):
        assert main([*command, "--local-epsilon", "3"]) == 0
        assert f"epsilon = 3 per report, {spent}" in capsys.readouterr().err
    ((_, frame),) = server.reports.values()
    assert decode_frame(frame).metadata["train_loss"] == "withheld"
