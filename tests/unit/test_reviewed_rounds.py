"""What single devices, or an operator's later thoughts, must not be able to do to private and shared rounds."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, DuplicateReport
from client_sdk.reports import build_report
from server_ref.config import load_config
from server_ref.secure.aggregator import Aggregator
from server_ref.task import load_task
from tests.served import Ports, Served, updates
from tests.servers import write_config

NOISED = {"noise": "server", "epsilon": 8.0}
CLIPPED = {"clip_norm": 1.0}


def test_the_length_of_a_private_report_is_not_told(tmp_path, softmax_bundle):
    """What a payload is compressed to depends on the data, and no noise covers it."""
    told = {}
    for name, busy in (("idle", 0.0), ("busy", 0.01)):
        settings = {"rounds": 1, "buffer_size": 2, "aggregation": CLIPPED, "compression": "threshold:0.001"}
        with Served(tmp_path / name, softmax_bundle, privacy=NOISED, **settings) as served:
            served.play([np.full(served.size, busy, np.float32)] * 2)
            told[name] = served.rounds[0]["bytes_up"]
    assert told["idle"] == told["busy"] > 0


def test_a_report_id_that_was_used_before_is_refused_to_its_sender_alone(tmp_path, softmax_bundle):
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=1) as served:
        served.play(updates(1, 1, served.size))
        again = served.assigned("other")
        used = served.rows("assignments")[0]["report_id"]
        frame = build_report(
            again, used, np.zeros(served.size, np.float32), device_id=served.enrol("other"), steps=1, train_loss=0.5
        ).frame
        with pytest.raises(DuplicateReport):
            served.coordinator.report(served.enrol("other"), used, bytes(frame)).result(60)
        served.report("other", again, np.zeros(served.size, np.float32))
        assert len(served.rounds) == 2


def test_one_malformed_share_costs_a_bucketed_round_one_report(tmp_path, softmax_bundle, monkeypatch):
    Ports(monkeypatch)

    def spoil(frame: bytes) -> bytes:
        return frame[:-1] + bytes([frame[-1] ^ 1])

    settings = {
        "rounds": 1,
        "buffer_size": 15,
        "secure": {},
        "aggregation": {"clip_norm": 1.0, "rule": "krum", "num_byzantine": 1},
        "privacy": {"noise": "aggregators", "epsilon": 8.0, "buckets": 5},
    }
    with Served(tmp_path, softmax_bundle, **settings) as served:
        sent = updates(1, 15, served.size)
        work = [served.assigned(f"d{i}") for i in range(15)]
        for i, assignment in enumerate(work):
            served.report(f"d{i}", assignment, sent[i], amend=spoil if i == 3 else lambda frame: frame)
        [measured] = served.measurements
    assert measured["shares_rejected"] == {"unsealable": 1}
    assert "unchanged" not in measured


def test_so_many_buckets_that_one_lost_report_would_empty_one_are_refused(tmp_path, softmax_bundle):
    settings = {
        "buffer_size": 14,
        "secure": {},
        "aggregation": {"clip_norm": 1.0, "rule": "krum", "num_byzantine": 1},
        "privacy": {"noise": "aggregators", "epsilon": 8.0, "buckets": 5},
    }
    with pytest.raises(ConfigurationError, match="buffers of 15"):
        load_task(load_config(write_config(tmp_path, softmax_bundle, **settings)).task)


def test_a_longer_task_with_given_noise_is_another_task(tmp_path, softmax_bundle):
    """More rounds cost more epsilon: nobody can add them to a task under the claim that it began with."""

    def task_id(rounds: int, **privacy: object) -> str:
        settings = {
            "rounds": rounds,
            "buffer_size": 2,
            "aggregation": CLIPPED,
            "privacy": {"noise": "server", **privacy},
        }
        folder = tmp_path / hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
        return load_task(load_config(write_config(folder, softmax_bundle, **settings)).task).task_id

    assert task_id(2, noise_multiplier=1.0) != task_id(6, noise_multiplier=1.0)
    limited = {"noise_multiplier": 1.0, "max_participations": 2}
    assert task_id(2, **limited) == task_id(6, **limited)


def test_aggregators_that_pin_something_else_are_refused_at_the_start(tmp_path, softmax_bundle, monkeypatch):
    real = Aggregator.describe

    def other(self: Aggregator) -> object:
        info = real(self)
        return info.model_copy(update={"parameters": info.parameters.model_copy(update={"min_cohort": 7})})

    monkeypatch.setattr(Aggregator, "describe", other)
    with pytest.raises(ConfigurationError, match=r"pins other parameters.*min_cohort"):
        Served(tmp_path, softmax_bundle, rounds=1, buffer_size=3, secure={}, aggregation=CLIPPED)
