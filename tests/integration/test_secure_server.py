"""Shared and private rounds from end to end: SDK devices that train, real server processes, real HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from client_sdk.protocol.errors import PROBLEM_PREFIX, ConfigurationError
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.messages import REPORT_TENSOR
from client_sdk.reports import build_report
from server_ref.config import AggregationConfig
from server_ref.protection import PrivacyConfig, SecureConfig
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.results import SimulationResults
from simulator.run import RunOptions, run_simulation
from tests.servers import RawDevice, get_json, report_facts, running_server, write_config

# Everybody takes part in every round: how long an upload takes does not change who counts.
FLEET = SimulationConfig.parse({"devices": 4, "cohort": 4, "rounds": 2, "model": "softmax", "epochs": 1, "seed": 5})
FIXED = AggregationConfig(clip_norm=0.5, arithmetic="fixed")


def simulate(out, **changes: Any) -> SimulationResults:
    config = FLEET.model_copy(update={"aggregation": FIXED} | changes)
    config.check()
    with RunFolder.begin(out, config) as folder:
        return run_simulation(folder, RunOptions(workers=2))


@pytest.fixture(scope="module")
def clear(tmp_path_factory) -> SimulationResults:
    return simulate(tmp_path_factory.mktemp("clear") / "run")


def test_a_fleet_that_shares_its_updates_trains_the_same_models(tmp_path, clear):
    shared = simulate(tmp_path / "run", secure=SecureConfig())
    assert shared.status == "completed"
    assert [r.model_sha256 for r in shared.rounds] == [r.model_sha256 for r in clear.rounds]
    assert shared.bytes_up > 3 * clear.bytes_up, "shares are what was sent"


def test_a_private_fleet_ends_within_its_budget(tmp_path, clear):
    privacy = PrivacyConfig(noise="aggregators", epsilon=50.0, max_participations=2)
    results = simulate(tmp_path / "run", secure=SecureConfig(threshold=2, num_aggregators=3), privacy=privacy)
    assert results.status == "completed"
    assert not results.repeatable
    assert results.model_sha256 != clear.model_sha256
    assert len(results.rounds) == 2


def test_a_fleet_whose_devices_may_not_come_often_enough_is_refused_before_it_begins():
    privacy = PrivacyConfig(noise="server", epsilon=1.0, max_participations=2)
    config = FLEET.model_copy(update={"privacy": privacy, "aggregation": FIXED, "rounds": 3})
    with pytest.raises(ConfigurationError, match=r"fill 2 rounds of 4 reports, not 3: raise --max-participations"):
        config.check()
    config.model_copy(update={"rounds": 2}).check()


def problem(response: httpx.Response) -> str:
    return str(response.json()["type"].removeprefix(PROBLEM_PREFIX))


def test_over_http_shares_are_taken_and_nothing_else_is(tmp_path, softmax_bundle):
    config = write_config(
        tmp_path, softmax_bundle, rounds=1, buffer_size=2, aggregation={"clip_norm": 1.0}, secure={"minimum_cohort": 2}
    )
    with running_server(config) as server:
        devices = [RawDevice(server.url).enrol() for _ in range(2)]
        work = [device.assigned() for device in devices]
        size = devices[0].weights(work[0]).size
        assert len({tuple(w.secure.aggregator_keys) for w in work if w.secure}) == 1
        update = np.ones(size, np.float32)

        def send(device: RawDevice, body: bytes, report_id: str) -> httpx.Response:
            response = device.send("PUT", f"/v1/reports/{report_id}", body)
            device.enrol()
            return response

        facts = report_facts(work[0], "a" * 32)
        told = encode_frame({REPORT_TENSOR: update}, facts)
        assert problem(send(devices[0], bytes(told), "a" * 32)) == "report-mismatch", "it says its loss"
        plain = encode_frame({REPORT_TENSOR: update}, facts | {"train_loss": "withheld"})
        assert problem(send(devices[0], bytes(plain), "a" * 32)) == "malformed-share"
        for i, (device, assignment) in enumerate(zip(devices, work, strict=True)):
            given = {"device_id": device.device_id, "steps": 1, "train_loss": 0.5}
            report = build_report(assignment, f"{i:032x}", update, **given)
            assert send(device, bytes(report.frame), f"{i:032x}").status_code == 200
            assert send(device, bytes(report.frame), f"{i:032x}").status_code == 200, "again is harmless"
        [committed] = get_json(server.url, "/v1/rounds")
        assert committed["reports"] == 2
        assert committed["measurements"]["shares_rejected"] == {}
        assert committed["train_loss"] is None
        assert committed["bytes_up"] > 2 * 8 * 3 * size
        assert "from shares" in get_json(server.url, "/v1/task")["pipeline"]["reduce"]
