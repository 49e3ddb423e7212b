"""All aggregators in one process: the same rules, and the same keys after a restart."""

from __future__ import annotations

import pytest

from client_sdk.protocol.errors import ConfigurationError
from server_ref.secure.embedded import EmbeddedAggregators
from server_ref.secure.errors import TaskMismatch
from server_ref.secure.port import AggregatorPort
from tests.secure_parties import TASK, pinned


def test_keys_and_state_are_there_again_after_a_restart(tmp_path):
    with EmbeddedAggregators.open(tmp_path, pinned()) as embedded:
        ports: tuple[AggregatorPort, ...] = embedded.ports
        infos = [port.bind(TASK) for port in ports]
        assert [info.index for info in infos] == [1, 2, 3, 4, 5]
        assert [info.signing_key for info in infos] == [peer.signing_key for peer in embedded.peers.peers]
    with EmbeddedAggregators.open(tmp_path, pinned(), task=TASK) as again:
        assert [port.describe() for port in again.ports] == infos
        with pytest.raises(TaskMismatch):
            again.ports[0].bind(TASK.model_copy(update={"size": 9}))


def test_a_folder_serves_one_task_with_one_set_of_parameters(tmp_path):
    with EmbeddedAggregators.open(tmp_path, pinned(), task=TASK):
        pass
    with pytest.raises(ConfigurationError, match="other parameters"):
        EmbeddedAggregators.open(tmp_path, pinned(min_cohort=7))
    with pytest.raises(ConfigurationError, match="serves task"):
        EmbeddedAggregators.open(tmp_path, pinned(), task=TASK.model_copy(update={"task_id": "00" * 16}))
