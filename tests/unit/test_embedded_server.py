"""The server's configuration says what was meant, whatever the folder is called; one that cannot start says why."""

import tomllib

import pytest

from client_sdk.protocol.training import TrainingPlan
from server_ref.config import load_config
from simulator.embedded import EmbeddedServer, write_server_config
from simulator.errors import ServerUnavailable

PLAN = TrainingPlan(local_epochs=3, batch_size=8, learning_rate=0.25, prox_mu=0.01)


def task(**changes):
    return {
        "bundle": "../bundle",
        "validation_data": "v.npz",
        "rounds": 7,
        "buffer_size": 4,
        "lease_s": 61.5,
        **changes,
    }


def test_the_server_reads_what_was_written(tmp_path):
    config = load_config(write_server_config(tmp_path, task(refill_at=None, plan=PLAN.model_dump())))
    assert config.clock == "virtual"
    assert config.host == "127.0.0.1"
    assert config.exit_with_stdin
    assert (config.task.rounds, config.task.buffer_size, config.task.lease_s) == (7, 4, 61.5)
    assert config.task.refill_at is None
    assert config.task.plan == PLAN
    assert config.task.bundle == tmp_path / "../bundle"


@pytest.mark.parametrize("name", ['a "quoted" one', "back\\slash", "Füße 🙂", "new\nline"])
def test_any_name_survives(tmp_path, name):
    path = write_server_config(tmp_path, task(bundle=name))
    assert tomllib.loads(path.read_text("utf-8"))["task"]["bundle"] == name


def test_a_server_that_cannot_start_is_quoted(tmp_path):
    with pytest.raises(ServerUnavailable, match=r"did not start: .*bundle.*server\.log"):
        EmbeddedServer(write_server_config(tmp_path, task())).start()


def test_a_server_that_was_never_started_can_be_stopped(tmp_path):
    EmbeddedServer(tmp_path / "config.toml").stop()
