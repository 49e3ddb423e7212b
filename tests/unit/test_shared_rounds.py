"""Rounds of shared updates at the server: the same bits as in the clear, whoever is slow, away, or up to no good."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, MalformedShare, ReportMismatch
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import Wait
from server_ref.aggregation.errors import IndividualUpdatesNeeded
from server_ref.config import load_config
from server_ref.task import Task, load_task
from tests.served import Ports, Served, updates
from tests.servers import write_config

FIXED = {"clip_norm": 1.0, "arithmetic": "fixed"}


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Ports:
    return Ports(monkeypatch)


def models(folder, bundle, play: Callable[[Served], None], **settings: Any) -> list[str]:
    """Hashes of the models of all rounds."""
    with Served(folder, bundle, **({"aggregation": FIXED} | settings)) as served:
        play(served)
        assert len(set(m["model_sha256"] for m in served.rounds)) == len(served.rounds) > 0
        assert all("unchanged" not in m for m in served.measurements), served.measurements
        return [m["model_sha256"] for m in served.rounds]


SYNCHRONOUS: dict[str, dict[str, Any]] = {
    "two devices": {"cohort": 2, "samples": (1, 1), "order": (0, 1)},
    "weights, late first": {"cohort": 4, "samples": (1, 5000, 33, 7), "order": (3, 1, 0, 2)},
    "drop-outs": {"cohort": 3, "invited": 5, "samples": (9, 2, 100, 4, 1), "order": (4, 0, 2)},
    "most drop out": {"cohort": 2, "invited": 6, "samples": (3, 1, 4, 1, 5, 9), "order": (5, 2)},
    "uniform": {"cohort": 3, "samples": (9, 2, 100), "order": (1, 2, 0), "weighting": "uniform"},
    "one packed element": {"cohort": 3, "samples": (9, 2, 100), "order": (2, 0, 1), "secure": {"packing": 2}},
    "the large field": {"cohort": 2, "samples": (9, 2), "order": (1, 0), "secure": {"field": "m127"}},
    "two of three": {
        "cohort": 3,
        "samples": (1, 2, 3),
        "order": (1, 0, 2),
        "secure": {"threshold": 2, "num_aggregators": 3},
    },
    "after the quantum": {"cohort": 2, "samples": (9, 2), "order": (0, 1), "secure": {"suite": "mlkem768-x25519"}},
}


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_shared_updates_make_the_same_model_as_updates_in_the_clear(tmp_path, softmax_bundle, ports, name):
    case = SYNCHRONOUS[name]
    cohort, samples, order = case["cohort"], case["samples"], case["order"]

    def play(served: Served) -> None:
        for round_id in range(2):
            # Some are longer than the clip norm, some are not.
            sent = [
                u * s for u, s in zip(updates(round_id, len(samples), served.size), (0.1, 1.0, 30.0) * 2, strict=False)
            ]
            work = [served.assigned(f"d{round_id}-{i}", n) for i, n in enumerate(samples)]
            for i in order:
                served.report(f"d{round_id}-{i}", work[i], sent[i])

    settings = {
        "rounds": 2,
        "buffer_size": cohort,
        "concurrency": case.get("invited", cohort),
        "aggregation": FIXED | {"weighting": case.get("weighting", "samples")},
    }
    clear = models(tmp_path / "clear", softmax_bundle, play, **settings)
    shared = models(tmp_path / "shared", softmax_bundle, play, **settings, secure=case.get("secure", {}))
    assert clear == shared
    assert len(shared) == 2


@pytest.mark.parametrize("weighting", ["polynomial", "constant"])
def test_stale_shares_weigh_what_stale_updates_in_the_clear_weigh(tmp_path, softmax_bundle, ports, weighting):
    def play(served: Served) -> None:
        sent = iter(updates(7, 20, served.size))
        slow = {name: served.assigned(name, 10 + i) for i, name in enumerate(("s0", "s1"))}
        for round_id in range(4):
            late = {1: ("s0",), 2: ("s1",)}.get(round_id, ())
            for name in late:
                served.report(name, slow[name], next(sent))
            for i in range(2 - len(late)):
                name = f"f{round_id}-{i}"
                served.report(name, served.assigned(name, 3 + i), next(sent))
        assert [m["staleness"] for m in served.measurements] == [{"0": 2}, {"0": 1, "1": 1}, {"0": 1, "2": 1}, {"0": 2}]

    settings = {
        "rounds": 4,
        "buffer_size": 2,
        "concurrency": 4,
        "refill_at": 1,
        "staleness": {"max_staleness": 2, "weighting": weighting},
    }
    clear = models(tmp_path / "clear", softmax_bundle, play, **settings)
    assert clear == models(tmp_path / "shared", softmax_bundle, play, **settings, secure={})


@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["unclipped", "clipped"])
def test_shares_of_a_round_s_coordinates_make_the_model_that_those_coordinates_make_in_the_clear(
    tmp_path, softmax_bundle, ports, monkeypatch, scale
):
    # In the clear each assignment has coordinates of its own; here they take those of the round, as shares have to.
    monkeypatch.setattr(Task, "compression_seed", lambda self, record: self.round_seed(record.round_id))

    def play(served: Served) -> None:
        for round_id in range(2):
            served.play(updates(round_id, 3, served.size, scale), (5, 1, 50))

    settings = {"rounds": 2, "buffer_size": 3, "compression": "randomk:0.3"}
    clear = models(tmp_path / "clear", softmax_bundle, play, **settings)
    assert clear == models(tmp_path / "shared", softmax_bundle, play, **settings, secure={})
