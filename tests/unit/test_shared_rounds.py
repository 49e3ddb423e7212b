"""Rounds of shared updates at the server: the same bits as in the clear, whoever is slow, away, or up to no good."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, MalformedShare, ReportMismatch
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, Wait
from client_sdk.reports import build_report
from server_ref.aggregation.errors import IndividualUpdatesNeeded
from server_ref.config import load_config
from server_ref.secure.messages import AggregateShare
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
        assert len({m["model_sha256"] for m in served.rounds}) == len(served.rounds) > 0
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


# --- who sends nonsense --------------------------------------------------------------------------------------------


def tampered(*indices: int, byte: int = -1) -> Callable[[bytes], bytes]:
    """Flip a bit of the sealed shares for these aggregators, where the frame stays well formed."""

    def amend(frame: bytes) -> bytes:
        decoded = decode_frame(frame)
        tensors = {name: np.array(tensor) for name, tensor in decoded.tensors.items()}
        for index in indices:
            tensors[f"share-{index}"][byte] ^= 1
        return bytes(encode_frame(tensors, decoded.metadata))

    return amend


@pytest.mark.parametrize("indices", [(1,), (1, 2, 3, 4, 5)], ids=str)
def test_a_round_closes_without_a_report_that_cannot_be_opened_and_says_why(tmp_path, softmax_bundle, ports, indices):
    sent = updates(1, 3, 21)
    samples = (4, 50, 9)
    settings = {"rounds": 1, "aggregation": FIXED, "concurrency": 3}
    with Served(tmp_path / "shared", softmax_bundle, buffer_size=3, secure={}, **settings) as served:
        work = [served.assigned(f"d{i}", n) for i, n in enumerate(samples)]
        for i, assignment in enumerate(work):
            amend = tampered(*indices) if i == 1 else tampered()
            served.report(f"d{i}", assignment, sent[i], amend=amend)
        shared = served.model_sha256
        [measured] = served.measurements
    assert measured["shares_rejected"] == {"unsealable": 1}
    assert measured["staleness"] == {"0": 2}, "only those that count"
    # The same grid, and the two reports that are left.
    with Served(tmp_path / "clear", softmax_bundle, buffer_size=2, **settings | {"concurrency": 4}) as served:
        served.play({"d0": sent[0], "d2": sent[2]}, (samples[0], samples[2]))
        assert served.model_sha256 == shared


def test_a_report_whose_shares_are_of_two_updates_does_not_count(tmp_path, softmax_bundle, ports):
    sent = updates(8, 3, 21)
    with Served(tmp_path, softmax_bundle, rounds=1, buffer_size=3, aggregation=FIXED, secure={}) as served:
        work = [served.assigned(f"d{i}") for i in range(3)]
        given = {"device_id": served.enrol("d1"), "steps": 1, "train_loss": 0.5}
        other = decode_frame(bytes(build_report(work[1], "0" * 32, sent[0], **given).frame))

        def mixed(frame: bytes) -> bytes:
            decoded = decode_frame(frame)
            return bytes(encode_frame(decoded.tensors | {"share-5": other.tensors["share-5"]}, decoded.metadata))

        for i, assignment in enumerate(work):
            served.report(f"d{i}", assignment, sent[i], amend=mixed if i == 1 else tampered())
        [measured] = served.measurements
        assert measured["parity"] == "checked"
        assert measured["shares_rejected"] == {"parity": 1}
        assert measured["integrity"] == "checked", "what is left is one polynomial again"
        assert "unchanged" not in measured


def test_a_round_with_too_few_reports_that_can_be_opened_leaves_the_model_and_says_so(tmp_path, softmax_bundle, ports):
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, aggregation=FIXED, secure={}) as served:
        before = served.model_sha256
        sent = updates(2, 2, served.size)
        for i, assignment in enumerate([served.assigned("a"), served.assigned("b")]):
            served.report("ab"[i], assignment, sent[i], amend=tampered(*(3,) * i))
        assert served.measurements == [{"staleness": {}, "unchanged": "CohortTooSmall"}]
        assert served.model_sha256 == before
        served.play({"a": sent[0], "b": sent[1]})
        assert "unchanged" not in served.measurements[1], "the next round is as good as any"
        assert served.model_sha256 != before


def test_reports_none_of_which_can_be_opened_end_nothing(tmp_path, softmax_bundle, ports):
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, aggregation=FIXED, secure={}) as served:
        for name, assignment in {n: served.assigned(n) for n in "ab"}.items():
            served.report(name, assignment, updates(2, 1, served.size)[0], amend=tampered(1, 2))
        assert served.measurements[0]["unchanged"] == "CohortTooSmall"
        served.play(dict(zip("ab", updates(2, 2, served.size), strict=True)))
        assert len(served.rounds) == 2


def test_what_is_no_report_of_shares_is_refused_at_the_door(tmp_path, softmax_bundle, ports):
    def without_one(frame: bytes) -> bytes:
        decoded = decode_frame(frame)
        return bytes(encode_frame(dict(list(decoded.tensors.items())[:-1]), decoded.metadata))

    def cut(frame: bytes) -> bytes:
        decoded = decode_frame(frame)
        tensors = {name: np.array(t[:-1] if name == "share-2" else t) for name, t in decoded.tensors.items()}
        return bytes(encode_frame(tensors, decoded.metadata))

    def telling(frame: bytes) -> bytes:
        decoded = decode_frame(frame)
        assert decoded.metadata["train_loss"] == "withheld"
        return bytes(encode_frame(decoded.tensors, decoded.metadata | {"train_loss": "0.5"}))

    def in_the_clear(frame: bytes) -> bytes:
        return bytes(
            encode_frame({REPORT_TENSOR: np.ones(21, np.float32)}, decode_frame(frame).metadata | {"encoding": "f32"})
        )

    with Served(tmp_path, softmax_bundle, rounds=1, buffer_size=2, aggregation=FIXED, secure={}) as served:
        assignment = served.assigned("a")
        [update] = updates(3, 1, served.size)
        for amend, refusal in (
            (without_one, MalformedShare),
            (cut, MalformedShare),
            (telling, ReportMismatch),
            (in_the_clear, ReportMismatch),
        ):
            with pytest.raises(refusal):
                served.report("a", assignment, update, amend=amend)
        served.report("a", assignment, update)


# --- aggregators that are away ---------------------------------------------------------------------------------------


def test_a_round_waits_for_aggregators_and_closes_by_itself_with_the_set_that_it_had(
    tmp_path, softmax_bundle, ports, monkeypatch
):
    monkeypatch.setattr("server_ref.postponed._FIRST_S", 0.02)
    monkeypatch.setattr("server_ref.postponed._LONGEST_S", 0.05)
    settings = {
        "rounds": 2,
        "buffer_size": 2,
        "concurrency": 4,
        "refill_at": 1,
        "aggregation": FIXED,
        "staleness": {"max_staleness": 1},
    }
    with Served(tmp_path / "clear", softmax_bundle, **settings) as served:
        sent = updates(4, 4, served.size)
        served.play({"a": sent[0], "b": sent[1]})
        [clear] = [r["model_sha256"] for r in served.rounds]
    with Served(tmp_path / "shared", softmax_bundle, secure={}, **settings) as served:
        ports[2].down = True
        ports[5].fail_at("commit")
        before = served.model_sha256
        work = {name: served.assigned(name) for name in "abc"}
        for name, update in zip("abc", sent, strict=False):
            served.report(name, work[name], update)
        assert served.model_sha256 == before, "one is away, and the other fell silent when it was to sign"
        assert served.rounds == []
        assert served.check_in("d"), "devices are still served"
        ports.recover()
        served.wait_for_rounds(1)
        served.settle()
        [committed] = served.rounds
        assert committed["model_sha256"] == clear, "the first two count, though there are three"
        assert committed["reports"] == 2
        served.report("d", served.assigned("d"), sent[3])
        assert [r["measurements"]["staleness"] for r in served.rounds] == [{"0": 2}, {"1": 2}]
        assert served.coordinator._postponed._pause_s == 0, "a success makes the next wait short again"


def test_who_asks_where_the_task_stands_does_not_wait_for_aggregators(tmp_path, softmax_bundle, ports):
    asked, answered = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        assert answered.wait(60)

    with Served(tmp_path, softmax_bundle, rounds=1, buffer_size=2, aggregation=FIXED, secure={}) as served:
        ports[3].before["commit"] = hang
        work = [served.assigned(f"d{i}") for i in range(2)]
        sent = updates(5, 2, served.size)
        served.report("d0", work[0], sent[0])
        last = threading.Thread(target=served.report, args=("d1", work[1], sent[1]))
        last.start()
        assert asked.wait(60)
        described = served.coordinator.describe()
        served.coordinator.refresh_metrics()
        assert not answered.is_set(), "the aggregator has not answered yet"
        assert described["round_id"] == 0
        answered.set()
        last.join()
        assert served.coordinator.describe()["round_id"] == 1


def notes_of_rounds(served: Served) -> list[dict[str, Any]]:
    """The journal, but for the key of selection, which stays as long as the task."""
    return [note for note in served.rows("journal") if note["name"] != "selection-key"]


def test_a_round_that_waits_survives_a_restart_and_one_that_was_signed_too(tmp_path, softmax_bundle, ports):
    settings = {"rounds": 1, "buffer_size": 2, "aggregation": FIXED}
    with Served(tmp_path / "clear", softmax_bundle, **settings) as served:
        sent = updates(5, 2, served.size)
        served.play(sent)
        clear = served.model_sha256
    with Served(tmp_path / "shared", softmax_bundle, secure={}, **settings) as served:
        for index in (1, 2, 3):
            ports[index].fail_at("answer")
        served.play(sent)
        assert served.rounds == []
        [note] = notes_of_rounds(served)
        assert '"phase":"committed"' in note["value"]
        served.restart()
        served.settle()
        assert [r["model_sha256"] for r in served.rounds] == [clear]


def another_round(answer: AggregateShare) -> AggregateShare:
    """What is said of another round."""
    return replace(answer, header=answer.header.model_copy(update={"round_id": 7}))


def test_a_lying_aggregator_is_left_out_and_named(tmp_path, softmax_bundle, ports):
    settings = {"rounds": 1, "buffer_size": 2, "aggregation": FIXED}
    with Served(tmp_path / "clear", softmax_bundle, **settings) as served:
        sent = updates(6, 2, served.size)
        served.play(sent)
        clear = served.model_sha256
    with Served(tmp_path / "shared", softmax_bundle, secure={}, **settings) as served:
        work = [served.assigned(f"d{i}") for i in range(2)]
        served.report("d0", work[0], sent[0])
        ports[4].alter["answer"] = another_round
        served.report("d1", work[1], sent[1])
        [measured] = served.measurements
        assert served.model_sha256 == clear
        assert measured["missing"] == {"4": "AnswerRejected"}


def test_what_a_finished_round_left_in_the_journal_is_deleted_with_its_commit(tmp_path, softmax_bundle, ports):
    with Served(tmp_path, softmax_bundle, rounds=5, buffer_size=2, aggregation=FIXED, secure={}) as served:
        for round_id in range(4):
            served.play(updates(round_id, 2, served.size))
            assert len(served.rounds) == round_id + 1
            assert notes_of_rounds(served) == []
            reports = served.folder / "state" / "blobs" / "reports"
            served.coordinator._background.stop()
            assert [p for p in reports.glob("**/*") if p.is_file()] == []
            served.restart()


# --- what cannot be shared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"aggregation": FIXED | {"rule": "krum"}}, IndividualUpdatesNeeded, "krum looks at single updates"),
        ({"plan": {"algorithm": "scaffold"}, "population": 9}, ConfigurationError, "scaffold.*choose fedavg"),
        ({"plan": {"algorithm": "fednova", "max_steps": 5}}, ConfigurationError, "fednova.*choose fedavg"),
        ({"aggregation": FIXED | {"clip_scope": "layer"}}, ConfigurationError, "clip_scope = global"),
        ({"compression": "topk:0.1"}, ConfigurationError, "topk.*choose randomk or sketch"),
        ({"compression": "quantize:8"}, ConfigurationError, "choose randomk or sketch"),
        ({"compression": "randomk:0.1,bits=8"}, ConfigurationError, "choose randomk or sketch"),
        (
            {"compression": "randomk:0.5", "staleness": {"max_staleness": 1}},
            ConfigurationError,
            "needs synchronous rounds",
        ),
        ({"aggregation": {}}, ConfigurationError, r"set aggregation\.clip_norm"),
        ({"privacy": {"noise": "server", "epsilon": 1.0}}, ConfigurationError, "privacy.noise = aggregators"),
        ({"buffer_size": 1}, ConfigurationError, "a buffer of 1 reports never reaches the 2"),
        ({"secure": {"minimum_cohort": 4}}, ConfigurationError, "a buffer of 3 reports never reaches the 4"),
        ({"secure": {"threshold": 6}}, ConfigurationError, "threshold 6 of 5 aggregators can never be reached"),
        ({"secure": {"threshold": 5, "packing": 2}}, ConfigurationError, "packing 2 needs 6 of 5"),
        ({"secure": {"checks": "trust"}}, ConfigurationError, "checks"),
    ],
    ids=lambda value: None if isinstance(value, str | type) else "-".join(value),
)
def test_what_cannot_be_shared_is_refused_before_the_first_device_comes(
    tmp_path, softmax_bundle, settings, error, words
):
    settings = {"rounds": 1, "buffer_size": 3, "secure": {}, "aggregation": FIXED} | settings
    with pytest.raises(error, match=words):
        load_task(load_config(write_config(tmp_path, softmax_bundle, **settings)).task)


def test_updates_that_are_not_shared_have_no_aggregators(tmp_path, softmax_bundle, ports):
    with Served(tmp_path, softmax_bundle, aggregation=FIXED) as served:
        assert served.assigned("a").secure is None
        assert not (served.folder / "state" / "aggregators").exists()


def test_embedded_aggregators_say_that_they_keep_nothing_from_their_operator(tmp_path, softmax_bundle, ports, caplog):
    with caplog.at_level(logging.WARNING), Served(tmp_path, softmax_bundle, aggregation=FIXED, secure={}):
        assert "all 5 aggregators run in this process" in caplog.text


def test_devices_that_drop_out_of_a_full_round_wait_for_the_next(tmp_path, softmax_bundle, ports):
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, aggregation=FIXED, secure={}) as served:
        served.assigned("a"), served.assigned("b")
        assert isinstance(served.check_in("c"), Wait)
