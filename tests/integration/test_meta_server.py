"""Meta-learning from end to end: SDK devices that adapt, a real server process, real HTTP, shares and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.datasets import load_digits

from client_sdk import DeviceProfile, MobileClient
from client_sdk.meta_training import MetaTrainer
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import CheckInRequest, Finished
from client_sdk.protocol.program import MANIFEST_FILE, Manifest, Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from client_sdk.store import MemoryDeviceStore
from client_sdk.transport import HttpTransport
from server_ref.config import TaskConfig
from server_ref.task import load_task
from tests.bundles import META_INNER_STEPS, meta_bundle
from tests.servers import ServerProcess, get_json, running_server, write_config

DEVICES, ROUNDS, BATCH = 3, 2, 8
FIXED = {"clip_norm": 0.5, "arithmetic": "fixed"}
SHARED = {"threshold": 3, "num_aggregators": 5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return meta_bundle(tmp_path_factory.mktemp("meta") / "bundle").path


@pytest.fixture(scope="module")
def program(bundle: Path) -> Program:
    return load_program(bundle, "native")


def plan_of(algorithm: str, **changes: Any) -> dict[str, Any]:
    meta = {"inner_steps": META_INNER_STEPS, "meta_learning_rate": 0.5}
    return {"algorithm": algorithm, "batch_size": BATCH, "learning_rate": 0.1, "meta": meta} | changes


def data_of(device: int) -> tuple[np.ndarray, np.ndarray]:
    """Twenty digits, of three classes that are the device's own."""
    x, y = load_digits(return_X_y=True)
    mine = np.flatnonzero(np.isin(y, [(3 * device + i) % 10 for i in range(3)]))[:20]
    return (x[mine] / 16.0).astype(np.float32).reshape(-1, 8, 8), y[mine].astype(np.int64)


def weights_of(server: ServerProcess, sha256: str) -> np.ndarray:
    blob = httpx.get(f"{server.url}/v1/blobs/{sha256}", trust_env=False).raise_for_status().content
    return np.frombuffer(decode_frame(blob).payload, np.float32)


class Fleet:
    """Devices that take part in turns, so that each has the same assignments in every run."""

    def __init__(self, url: str, program: Program) -> None:
        self.transports, self.clients = [], []
        for device in range(DEVICES):
            store = MemoryDeviceStore()
            self.transports.append(HttpTransport(url, store.identity, server_keys=store))
            client = MobileClient(
                program,
                DeviceProfile(f"device-{device}"),
                data=data_of(device),
                transport=self.transports[-1],
                store=store,
            )
            self.clients.append(client)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for transport in self.transports:
            transport.close()

    def play(self) -> None:
        """All rounds."""
        for _ in range(ROUNDS):
            for client in self.clients:
                summary = client.run(max_reports=1)
                assert summary.reports == 1, summary


def trained(folder: Path, bundle: Path, program: Program, plan: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A whole run: its rounds and its last model."""
    task = {"rounds": ROUNDS, "buffer_size": DEVICES, "plan": plan}
    with running_server(write_config(folder, bundle, **task | settings)) as server:
        with Fleet(server.url, program) as fleet:
            fleet.play()
            told = fleet.transports[0].check_in(CheckInRequest(num_samples=20))
            assert isinstance(told, Finished)
            latest = fleet.transports[0].latest_model()
        rounds = get_json(server.url, "/v1/rounds")
        assert [r["reports"] for r in rounds] == [DEVICES] * ROUNDS
        assert all("unchanged" not in r["measurements"] for r in rounds), rounds
        assert (latest.model_version, latest.model_sha256) == (ROUNDS, rounds[-1]["model_sha256"])
        assert latest.plan == TrainingPlan.model_validate(plan)
        return {
            "models": [r["model_sha256"] for r in rounds],
            "weights": [weights_of(server, r["model_sha256"]) for r in rounds],
            "task": get_json(server.url, "/v1/task"),
            "bytes_up": sum(r["bytes_up"] for r in rounds),
        }


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory, bundle: Path, program: Program) -> dict[str, Any]:
    """MAML in the clear, on the grid that shares have."""
    return trained(tmp_path_factory.mktemp("clear"), bundle, program, plan_of("maml"), aggregation=FIXED)


def test_the_first_model_is_the_given_one_less_the_clipped_mean_of_the_devices_meta_gradients(
    clear: dict[str, Any], bundle: Path, program: Program
):
    plan = TrainingPlan.model_validate(plan_of("maml"))
    task = load_task(TaskConfig(bundle=bundle, plan=plan, buffer_size=DEVICES, rounds=ROUNDS))
    found, weights = [], task.initial_weights
    for device in range(DEVICES):
        result = MetaTrainer(program).train(weights, *data_of(device), plan, task.shuffle_seed(device))
        assert result.gradient is not None
        gradient = result.gradient.astype(np.float64)
        found.append(gradient * min(1.0, 0.5 / np.linalg.norm(gradient)))
    # All have as many examples.
    expected = weights - 0.5 * np.mean(found, axis=0)
    np.testing.assert_allclose(clear["weights"][0], expected, atol=1e-6)
    assert np.abs(clear["weights"][0] - weights).max() > 1e-3


def test_maml_under_secret_sharing_learns_the_same_models_to_the_bit(
    tmp_path: Path, bundle: Path, program: Program, clear: dict[str, Any]
):
    shared = trained(tmp_path, bundle, program, plan_of("maml"), aggregation=FIXED, secure=SHARED)
    assert shared["models"] == clear["models"]
    assert len(set(shared["models"])) == ROUNDS
    assert "from shares" in shared["task"]["pipeline"]["reduce"]
    assert shared["bytes_up"] > 3 * clear["bytes_up"], "shares are what was sent"


def test_private_maml_under_secret_sharing_differs_by_its_noise_and_is_paid_for(
    tmp_path: Path, bundle: Path, program: Program, clear: dict[str, Any]
):
    multiplier = 0.02
    private = trained(
        tmp_path,
        bundle,
        program,
        plan_of("maml"),
        aggregation={"clip_norm": 0.5},
        secure=SHARED,
        privacy={"noise": "aggregators", "noise_multiplier": multiplier},
    )
    assert private["task"]["privacy"]["spent"] > 0
    # The mean of three, each at most 0.5 long, in a step of 0.5. (In the clear devices weigh alike too.)
    stddev = 0.5 * multiplier * 0.5 / DEVICES
    noise = private["weights"][0] - clear["weights"][0]
    assert 0.5 * stddev < noise.std() < 2 * stddev


def test_what_is_personal_never_reaches_the_server(
    tmp_path: Path, bundle: Path, program: Program, clear: dict[str, Any]
):
    manifest = Manifest.from_json((bundle / MANIFEST_FILE).read_bytes())
    own = np.concatenate([np.full(p.num_elements, p.name.startswith("output.")) for p in manifest.parameters])
    plan = plan_of("reptile", personal=["output"])
    part = trained(tmp_path, bundle, program, plan)
    saved = 4 * int(own.sum()) * DEVICES * ROUNDS
    # A header's length follows the digits of the loss that it tells.
    assert abs(clear["bytes_up"] - part["bytes_up"] - saved) <= 16 * DEVICES * ROUNDS < saved
    initial = load_task(TaskConfig(bundle=bundle, plan=TrainingPlan.model_validate(plan))).initial_weights
    for weights in part["weights"]:
        assert weights[own].tobytes() == initial[own].tobytes()
        assert (weights[~own] != initial[~own]).any()
    assert (clear["weights"][0][own] != initial[own]).any()
