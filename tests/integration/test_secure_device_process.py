"""Real processes of a device with a secure assignment: killed between any two steps, and told whom to trust."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client_sdk.identity import DeviceIdentity
from client_sdk.participations import Participations
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import I64SharesEncoding
from client_sdk.protocol.privacy import encode_clipped
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE
from client_sdk.runtime import load_program
from client_sdk.training import LocalTrainer
from tests.aggregators import opened_codes, plan_of
from tests.device_process import DeviceProcess
from tests.devices import ToyServer, make_assignment
from tests.vectors.generate import PLAN, SEALING_KEYS
from tests.web import Server, toy_coordinator

SIZE = 21
ONCE = PLAN.model_copy(update={"max_participations": 1})


@pytest.fixture
def toy(softmax_bundle: Path) -> ToyServer:
    toy = ToyServer(work=1)
    toy.hand_out(*((softmax_bundle / name).read_bytes() for name in (MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE)))
    toy.amend |= {"encoding": I64SharesEncoding(), "secure": ONCE}
    return toy


@pytest.fixture
def url(toy: ToyServer) -> Iterator[str]:
    with Server() as front:
        front.answer = toy_coordinator(toy, front.identity.public_key)
        yield front.url


def test_a_device_killed_at_any_point_sends_what_it_sealed_first_and_takes_part_once(
    toy: ToyServer, url: str, softmax_bundle: Path, tmp_path: Path
):
    origin = DeviceProcess(url, tmp_path / "origin")
    program = load_program(softmax_bundle, "native")
    for point in ("counted", "sealed", "half-uploaded", "uploaded"):
        toy.reports.clear()
        toy.outstanding.clear()
        toy.given = 0
        shutil.copytree(origin.folder, tmp_path / point)
        killed = DeviceProcess(url, tmp_path / point)
        killed.run_killed_at(point, 1)
        sealed = [path.read_bytes() for path in (killed.state / "reports").glob("*.frame")]
        assert len(sealed) == (0 if point == "counted" else 1)
        done = killed.run()
        assert done.returncode == 0, done.stderr
        ((_, frame),) = toy.reports.values()
        assert sealed in ([], [frame])
        assignment = make_assignment(1, **toy.hashes | toy.amend)
        weights = np.frombuffer(decode_frame(toy.model).payload, np.float32)
        delta = LocalTrainer(program).train(weights, *killed.data, assignment.plan, assignment.shuffle_seed).delta
        expected = encode_clipped(delta, plan_of(assignment).bounds)
        opened = opened_codes(frame, assignment, SIZE, SEALING_KEYS, device_id=killed.identity.device_id)
        assert opened.tolist() == expected.tolist()
        counts = Participations.model_validate_json((killed.state / "participations.json").read_bytes())
        assert counts.without(assignment.task_id, "") == 1
    program.close()


def test_a_device_that_is_told_whom_to_trust_delivers_to_them_and_to_nobody_else(
    toy: ToyServer, url: str, tmp_path: Path
):
    device = DeviceProcess(url, tmp_path / "device")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(PLAN.aggregator_keys[::-1]))
    refused = device.run("--aggregator-keys", str(keys))
    assert refused.returncode == 2
    assert "this device trusts the aggregators it was given" in refused.stderr
    assert (toy.reports, [reason for _, reason in toy.abandoned]) == ({}, ["privacy"])
    toy.work = 4
    keys.write_text(json.dumps(PLAN.aggregator_keys))
    few = device.run("--aggregator-keys", str(keys), "--min-threshold", "4")
    assert few.returncode == 2
    assert "any 3 aggregators can read, fewer than 4" in few.stderr
    assert toy.reports == {}
    spent = device.run("--aggregator-keys", str(keys))
    assert len(toy.reports) == 1
    assert spent.returncode == 2
    assert "this one has sealed 1" in spent.stderr
    identity = DeviceIdentity.from_private_bytes(bytes.fromhex((device.state / "identity.key").read_text()))
    assert {device_id for device_id, _ in toy.reports.values()} == {identity.device_id}
