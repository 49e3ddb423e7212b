"""A device with a model of its own against a real server: with layers that stay, without work, and without network."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk import DeviceProfile, PersonalizationConfig, PersonalizedMobileClient, PersonalModelStore, events
from client_sdk.memory import PERSONAL
from client_sdk.personal_model import PersonalModel
from client_sdk.programs import DownloadedPrograms
from client_sdk.session_state import RetryPolicy
from client_sdk.store import FileDeviceStore
from client_sdk.transport import HttpTransport
from tests.servers import running_server, write_config

CONFIG = PersonalizationConfig(inner_steps=5, inner_lr=0.2)


def examples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(30, 6)).astype(np.float32)
    return x, (x[:, :3] + seed * np.eye(3)[seed % 3]).argmax(axis=1)


class Phone:
    """A device whose state is on the disk; each is a process's life."""

    def __init__(self, url: str, folder: Path, seed: int) -> None:
        self.store = FileDeviceStore(folder)
        self.programs = DownloadedPrograms(folder / "programs", "native")
        self.transport = HttpTransport(url, self.store.identity, server_keys=self.store)
        self.events: list[events.Event] = []
        self.client = PersonalizedMobileClient(
            None,
            DeviceProfile(self.store.identity.device_id),
            data=examples(seed),
            transport=self.transport,
            store=self.store,
            programs=self.programs,
            personalization_config=CONFIG,
            personal_models=PersonalModelStore(folder / "personal"),
            on_event=self.events.append,
            policy=RetryPolicy(max_attempts=3),
            wait=lambda _seconds, _stop: None,
        )

    def personal_model(self) -> PersonalModel:
        found = self.client.personal_model
        assert found is not None
        return found

    def seen(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def close(self) -> None:
        self.programs.close()
        self.transport.close()
        self.store.close()


@pytest.mark.parametrize("personal", [(), ("output.bias",)], ids=["all shared", "a layer that stays"])
def test_a_device_adapts_what_the_server_has_and_serves_it_when_nobody_answers(
    softmax_bundle: Path, tmp_path: Path, personal: tuple[str, ...]
):
    plan = {"batch_size": 8, "learning_rate": 0.2} | ({"personal": list(personal)} if personal else {})
    with running_server(
        write_config(tmp_path / "server", softmax_bundle, rounds=2, buffer_size=1, plan=plan)
    ) as server:
        with closing(Phone(server.url, tmp_path / "worker", 1)) as worker:
            assert worker.client.run().reports == 2
            of_worker = worker.personal_model()
            memory = worker.store.memory(worker.client.fetch_global_model().reply.task_id)
        with closing(Phone(server.url, tmp_path / "idle", 2)) as idle:
            assert idle.client.run().reports == 0, "the task is finished: it gets no work"
            of_idle = idle.personal_model()
            url = server.url
    assert of_worker.record.model_version == of_idle.record.model_version == 2
    assert of_worker.record.of_personal is not None
    own = slice(-3, None)
    if personal:
        assert memory is not None
        assert of_worker.global_weights[own].tolist() == memory.vectors[PERSONAL].tolist()
        assert not np.array_equal(of_worker.global_weights[own], of_idle.global_weights[own]), "nobody else has it"
    shared = slice(None, -3)
    assert np.array_equal(of_worker.global_weights[shared], of_idle.global_weights[shared])
    with closing(Phone(url, tmp_path / "idle", 2)) as later:  # the server is gone
        x, y = examples(2)
        assert later.client.evaluate(x, y).accuracy > 0.5
        assert later.personal_model().weights.tobytes() == of_idle.weights.tobytes()
        assert later.client.run().cause == "gave-up"
        assert not later.seen(events.Personalized)
        assert later.personal_model().weights.tobytes() == of_idle.weights.tobytes()
