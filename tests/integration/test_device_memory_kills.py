"""Real processes of a device that remembers (error feedback, SCAFFOLD), killed between any two steps of a report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client_sdk.memory import CONTROL, RESIDUAL, DeviceMemory
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE
from tests.device_process import DeviceProcess
from tests.devices import ToyServer, make_assignment
from tests.servers import get_json, running_server, write_config
from tests.web import Server, toy_coordinator

SIZE = 21
MODES: dict[str, Callable[[ToyServer], ToyServer]] = {
    "compressed": lambda toy: toy.compress("topk:0.2"),
    "scaffold": lambda toy: toy.scaffold(np.linspace(-0.1, 0.1, SIZE, dtype=np.float32)),
}
KILLS = ["staged", "sealed", "half-uploaded", "uploaded", "settled", "discarded"]
CASES = [("compressed", KILLS), ("scaffold", ["staged", "uploaded"])]


@pytest.mark.parametrize(("mode", "kills"), CASES, ids=[mode for mode, _ in CASES])
def test_a_device_killed_at_any_point_sends_and_remembers_what_an_undisturbed_one_does(
    mode: str, kills: list[str], softmax_bundle: Path, tmp_path: Path
):
    toy = ToyServer(work=1)
    toy.hand_out(*((softmax_bundle / name).read_bytes() for name in (MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE)))
    MODES[mode](toy)
    with Server() as front:
        front.answer = toy_coordinator(toy, front.identity.public_key)
        origin = DeviceProcess(front.url, tmp_path / "origin")
        assert origin.run().returncode == 0
        first, reports = remembered(origin), dict(toy.reports)

        def device(name: str) -> DeviceProcess:
            """The same device before its second report."""
            shutil.copytree(origin.folder, tmp_path / name)
            toy.reports, toy.given, toy.work = dict(reports), 1, 2
            toy.outstanding.clear()
            return DeviceProcess(front.url, tmp_path / name)

        undisturbed = device("undisturbed")
        assert "1 report accepted" in undisturbed.run().stderr
        expected, second = dict(toy.reports), remembered(undisturbed)
        assert (len(expected), second.report_id != first.report_id) == (2, True)
        for point in kills:
            killed = device(point)
            killed.run_killed_at(point, 1)
            assert len(toy.reports) == (2 if point in {"uploaded", "settled", "discarded"} else 1)
            counts = second if point in {"settled", "discarded"} else first
            assert remembered(killed).to_bytes() == counts.to_bytes()
            done = killed.run()
            assert done.returncode == 0, done.stderr
            assert toy.reports == expected
            assert remembered(killed).to_bytes() == second.to_bytes()
            assert [path.name for path in (killed.state / "memory").iterdir()] == ["current"]
    assert list(second.vectors) == [RESIDUAL if mode == "compressed" else CONTROL]
    assert second.task_id == make_assignment().task_id


TASKS = {
    "compressed": {"compression": "topk:0.2"},
    "scaffold": {"population": 1, "plan": {"algorithm": "scaffold", "batch_size": 8, "learning_rate": 0.25}},
}


@pytest.mark.parametrize("mode", TASKS)
def test_a_real_server_gets_the_same_models_from_a_device_that_dies_at_every_turn(
    mode: str, softmax_bundle: Path, tmp_path: Path
):
    """Three rounds of one device; a report that counted twice, or a memory that did, would change the last model."""
    models, memories = [], []
    for name, kills in (("calm", []), ("killed", ["sealed", "uploaded", "settled"])):
        config = write_config(tmp_path / f"{name}-server", softmax_bundle, rounds=3, buffer_size=1, **TASKS[mode])
        with running_server(config) as server:
            device = DeviceProcess(server.url, tmp_path / name)
            for point in kills:
                device.run_killed_at(point, 1)
                assert device.run("--once").returncode == 0
            done = device.run()
            assert done.returncode == 0, done.stderr
            rounds = get_json(server.url, "/v1/rounds")
        models.append([r["model_sha256"] for r in rounds])
        memories.append({n: v.tobytes() for n, v in remembered(device).vectors.items()})
    assert models[0] == models[1]
    assert len(set(models[0])) == 3
    assert memories[0] == memories[1]


def remembered(device: DeviceProcess) -> DeviceMemory:
    return DeviceMemory.from_bytes((device.state / "memory" / "current").read_bytes())
