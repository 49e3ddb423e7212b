"""Selection in whole runs: what fast gains and fair keeps, and a real server that is killed now and then."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from client_sdk.protocol.messages import Assigned
from client_sdk.protocol.program import Manifest
from server_ref.selection import jain_index
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.run import RunOptions, run_simulation
from tests.served import rows
from tests.servers import RawDevice, running_server, write_config

# Nearly a third of the devices take sixty times as long. Who of them comes first is chance: hence two fleets.
FLEET = {
    "devices": 24, "rounds": 15, "model": "softmax", "cohort": 4, "engine": "cohort",
    "stragglers": 0.3, "slowdown": 60.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Policy -> the runs of the two fleets, equal but for the policy."""
    found = {}
    for policy in ("any", "fair", "fast"):
        found[policy] = []
        for seed in (1, 2):
            config = SimulationConfig.parse({**FLEET, "seed": seed, "selection": {"policy": policy}})
            with RunFolder.begin(tmp_path_factory.mktemp(policy) / "run", config) as folder:
                found[policy].append(run_simulation(folder, RunOptions(workers=1)))
    return found


def test_fast_needs_less_time_for_as_many_rounds_where_some_are_slow(runs):
    assert all(len(run.rounds) == FLEET["rounds"] for policy in runs.values() for run in policy)
    for i, fast in enumerate(runs["fast"]):
        for other in ("any", "fair"):
            assert fast.virtual_seconds < 0.8 * runs[other][i].virtual_seconds


def test_fair_is_fairer_than_fast_and_asks_slow_devices_as_often_as_others(runs):
    for i, fair in enumerate(runs["fair"]):
        assert fair.jain_index > max(0.95, runs["any"][i].jain_index)
        assert runs["fast"][i].jain_index < 0.8 * fair.jain_index
        assert fair.slow_share > 0.8
        assert 0 < runs["fast"][i].slow_share < 0.7, "fewer, but the floor leaves some"


def test_a_server_that_is_killed_now_and_then_stays_fair(tmp_path, softmax_bundle):
    """One device asks five times as often as the others, always first, and gets no more for it."""
    size = Manifest.from_json((softmax_bundle / "manifest.json").read_bytes()).num_parameters
    settings = {"buffer_size": 2, "concurrency": 2, "rounds": 100, "divergence": {"enabled": False}}
    config = write_config(tmp_path, softmax_bundle, selection={"policy": "fair"}, **settings)
    unit = np.full(size, 1e-3, np.float32)
    devices = [RawDevice("") for _ in range(5)]
    counted: Counter[str] = Counter()
    for _ in range(2):
        with running_server(config) as server:
            for device in devices:
                device.url = server.url
                device.enrol()
            for _ in range(5):
                for device in [devices[0]] * 5 + devices[1:]:
                    reply = device.check_in()
                    if isinstance(reply, Assigned):
                        device.upload(reply.assignment, unit).raise_for_status()
                        counted[device.device_id] += 1
    # Who joined later was taken to have had the turns of the earlier ones.
    history = rows(tmp_path / "state" / "pocketfed.db", "device_history")
    turns = [row["joined_turns"] + row["counted"] + row["open_turns"] for row in history]
    assert len(turns) == len(devices)
    assert min(turns) >= 4
    assert max(turns) - min(turns) <= 3
    assert jain_index(counted.values()) > 0.9
