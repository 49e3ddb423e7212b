"""What a task's settings make of reports: real servers, real HTTP, oracles computed here."""

from __future__ import annotations

import math

import httpx
import numpy as np
import pytest

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import PROBLEM_PREFIX
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, Finished, Wait
from client_sdk.protocol.program import Manifest
from tests.servers import RawDevice, get_json, report_facts, running_server, write_config


@pytest.fixture(scope="session")
def size(softmax_bundle) -> int:
    """Number of parameters."""
    return Manifest.from_json((softmax_bundle / "manifest.json").read_bytes()).num_parameters


def blob(server, sha256: str):
    response = httpx.get(f"{server.url}/v1/blobs/{sha256}", trust_env=False)
    response.raise_for_status()
    return decode_frame(response.content)


def model_of(server) -> np.ndarray:
    task = get_json(server.url, "/v1/task")
    return np.frombuffer(blob(server, task["model_sha256"]).payload, np.float32)


def play(server, updates, samples=10, before=None) -> list:
    """One round of fresh devices that report in order; their assignments."""
    devices = before or [RawDevice(server.url).enrol() for _ in updates]
    assigned = [d.assigned(samples) for d in devices]
    for device, assignment, update in zip(devices, assigned, updates, strict=True):
        response = device.upload(assignment, update)
        assert response.status_code == 200, response.text
    return assigned


def problem(response: httpx.Response) -> str:
    return response.json()["type"].removeprefix(PROBLEM_PREFIX)


def test_a_robust_rule_leaves_the_liars_out_and_the_record_names_them(tmp_path, softmax_bundle, size):
    config = write_config(
        tmp_path,
        softmax_bundle,
        rounds=1,
        buffer_size=7,
        aggregation={"rule": "multi-krum", "byzantine_fraction": 0.29},
    )
    rng = np.random.default_rng(2)
    honest = [(0.1 + 0.01 * rng.standard_normal(size)).astype(np.float32) for _ in range(5)]
    liars = [np.full(size, -50.0, np.float32)] * 2
    with running_server(config) as server:
        before = model_of(server)
        assigned = play(server, [honest[0], liars[0], *honest[1:], liars[1]])
        [committed] = get_json(server.url, "/v1/rounds")
        excluded = set(committed["measurements"]["excluded"])
        assert {assigned[1].assignment_number, assigned[6].assignment_number} <= excluded
        assert committed["measurements"]["num_byzantine"] == 2
        step = model_of(server).astype(np.float64) - before
        assert np.abs(step - 0.1).max() < 0.05
        assert "multi-krum against 29% dishonest updates" in get_json(server.url, "/v1/task")["pipeline"]["reduce"]


def test_a_rule_that_a_buffer_cannot_fill_is_refused_when_the_server_starts(tmp_path, softmax_bundle):
    config = write_config(
        tmp_path, softmax_bundle, buffer_size=4, aggregation={"rule": "krum", "byzantine_fraction": 0.4}
    )
    with pytest.raises(RuntimeError, match=r"krum stands .* gather 5"), running_server(config):
        pass


@pytest.mark.parametrize("spec", ["topk:0.2", "randomk:0.5", "quantize:8", "threshold:0.3"])
def test_a_compressed_report_counts_as_what_it_decodes_to(tmp_path, softmax_bundle, size, spec):
    config = write_config(tmp_path, softmax_bundle, rounds=1, buffer_size=2, compression=spec)
    codec = Codec(CompressionSpec.parse(spec), size)
    rng = np.random.default_rng(3)
    with running_server(config) as server:
        before = model_of(server).astype(np.float64)
        devices = [RawDevice(server.url).enrol() for _ in range(2)]
        assigned = [d.assigned() for d in devices]
        assert assigned[0].compression == str(codec.spec)
        assert assigned[0].compression_seed != assigned[1].compression_seed, "rounding errors must not add up"
        decoded, sent = [], 0
        for device, assignment in zip(devices, assigned, strict=True):
            data = codec.encode(rng.standard_normal(size).astype(np.float32), assignment.compression_seed)
            decoded.append(codec.decode(data, assignment.compression_seed).astype(np.float64))
            response = device.upload(assignment, np.frombuffer(data, np.uint8))
            assert response.status_code == 200, response.text
            sent += len(data)
        mean = np.array([math.fsum(column) / 2 for column in np.transpose(decoded)])
        if not codec.spec.error_feedback:
            mean *= codec.unbias_factor
        assert model_of(server).tobytes() == (before + mean).astype(np.float32).tobytes()
        [committed] = get_json(server.url, "/v1/rounds")
        assert committed["bytes_up"] > sent, "every byte of the body is counted"


def test_a_hostile_payload_costs_the_round_nothing(tmp_path, softmax_bundle, size):
    config = write_config(tmp_path, softmax_bundle, rounds=1, buffer_size=1, compression="topk:0.2")
    codec = Codec(CompressionSpec.parse("topk:0.2"), size)
    with running_server(config) as server:
        device = RawDevice(server.url).enrol()
        assignment = device.assigned()
        good = codec.encode(np.ones(size, np.float32), assignment.compression_seed)
        facts = report_facts(assignment)

        def send(payload: np.ndarray, **changes: str) -> str:
            body = encode_frame({REPORT_TENSOR: payload}, facts | changes)
            return problem(device.send("PUT", f"/v1/reports/{facts['report_id']}", body))

        as_bytes = np.frombuffer(good, np.uint8)
        assert send(as_bytes[:-1]) == "truncated-encoding"
        assert send(np.concatenate([as_bytes, [np.uint8(0)]])) == "malformed-encoding"
        assert send(np.full(codec.max_bytes, 255, np.uint8)) in {"malformed-encoding", "truncated-encoding"}
        assert send(np.zeros(codec.max_bytes + 70_000, np.uint8)) == "oversized-body"
        assert send(np.ones(size, np.float32)) == "shape-mismatch"
        assert send(as_bytes, compression="none") == "report-mismatch"
        assert send(as_bytes, compression_seed="1") == "report-mismatch"
        assert device.upload(assignment, as_bytes).status_code == 200
        assert get_json(server.url, "/v1/task")["finished"]


def test_scaffold_moves_the_model_by_the_deltas_and_the_control_by_the_population(tmp_path, softmax_bundle, size):
    config = write_config(
        tmp_path, softmax_bundle, rounds=2, buffer_size=2, population=8, plan={"algorithm": "scaffold"}
    )
    rng = np.random.default_rng(4)
    updates = rng.standard_normal((2, 2 * size)).astype(np.float32)
    with running_server(config) as server:
        before = model_of(server).astype(np.float64)
        devices = [RawDevice(server.url).enrol() for _ in range(2)]
        first = devices[0].assigned(500)
        assert first.weight == 1, "SCAFFOLD's means are plain"
        control = blob(server, first.control_sha256).tensors["control"]
        assert not control.any()
        for device, update in zip(devices, updates, strict=True):
            assert device.upload(device.assigned(), update).status_code == 200
        mean = updates.astype(np.float64).sum(axis=0) / 2
        assert model_of(server).tobytes() == (before + mean[:size]).astype(np.float32).tobytes()
        second = devices[1].assigned()
        control = blob(server, second.control_sha256).tensors["control"]
        assert control.tobytes() == (0.25 * mean[size:]).astype(np.float32).tobytes()


def test_fednova_multiplies_by_the_effective_steps_and_bounds_what_devices_claim(tmp_path, softmax_bundle, size):
    config = write_config(
        tmp_path, softmax_bundle, rounds=1, buffer_size=2, plan={"algorithm": "fednova", "max_steps": 10}
    )
    with running_server(config) as server:
        before = model_of(server).astype(np.float64)
        devices = [RawDevice(server.url).enrol() for _ in range(2)]
        assigned = [d.assigned(n) for d, n in zip(devices, (30, 10), strict=True)]
        unit = np.ones(size, np.float32)
        assert problem(devices[0].upload(assigned[0], unit, steps="11")) == "report-mismatch"
        for device, assignment, steps in zip(devices, assigned, ("8", "4"), strict=True):
            assert device.upload(assignment, unit, steps=steps).status_code == 200
        # Weighted mean of the normalised updates is 1; tau_eff = (30 * 8 + 10 * 4) / 40 = 7.
        assert model_of(server).tobytes() == (before + 7.0).astype(np.float32).tobytes()


def test_stale_reports_weigh_less_and_the_denominator_stays(tmp_path, softmax_bundle, size):
    config = write_config(
        tmp_path,
        softmax_bundle,
        rounds=9,
        buffer_size=1,
        concurrency=3,
        refill_at=1,
        staleness={"max_staleness": 1, "exponent": 1.0},
    )
    unit = np.ones(size, np.float32)
    with running_server(config) as server:
        slow, slower, fast = (RawDevice(server.url).enrol() for _ in range(3))
        late, later = slow.assigned(), slower.assigned()
        before = model_of(server).astype(np.float64)
        assert fast.upload(fast.assigned(), unit).status_code == 200
        assert slow.upload(late, unit).status_code == 200
        # One version old: floor(256 / 2) of 256 parts. The server's own weights are float64, devices get them rounded.
        assert model_of(server).tobytes() == (before + 1.0 + 0.5).astype(np.float32).tobytes()
        assert problem(slower.upload(later, unit)) == "stale-report"
        rounds = get_json(server.url, "/v1/rounds")
        assert [r["measurements"]["staleness"] for r in rounds] == [{"0": 1}, {"1": 1}]


def test_an_optimizer_goes_on_after_a_restart_as_if_nothing_had_happened(tmp_path, softmax_bundle, size):
    rng = np.random.default_rng(5)
    updates = rng.standard_normal((6, size)).astype(np.float32)
    models = []
    for restart in (False, True):
        config = write_config(
            tmp_path / str(restart),
            softmax_bundle,
            rounds=6,
            buffer_size=1,
            optimizer={"name": "yogi", "learning_rate": 0.05},
        )
        for part in [updates[:3], updates[3:]] if restart else [updates]:
            with running_server(config) as server:
                for update in part:
                    play(server, [update])
                models.append(model_of(server))
    assert models[0].tobytes() == models[-1].tobytes()
    assert models[0].tobytes() != models[1].tobytes()


def test_a_correction_for_delay_goes_on_after_a_restart(tmp_path, softmax_bundle, size):
    rng = np.random.default_rng(6)
    updates = rng.standard_normal((4, size)).astype(np.float32)
    settings = {
        "rounds": 9,
        "buffer_size": 1,
        "concurrency": 2,
        "refill_at": 1,
        "lease_s": 3600.0,
        "staleness": {"max_staleness": 3, "weighting": "constant"},
    }
    outcomes = {}
    for name, damping, restart in (("plain", None, False), ("corrected", 0.25, False), ("restarted", 0.25, True)):
        extra = {} if damping is None else {"delay_damping": damping}
        config = write_config(tmp_path / name, softmax_bundle, **settings, **extra)
        with running_server(config) as server:
            slow, fast = RawDevice(server.url).enrol(), RawDevice(server.url).enrol()
            late = slow.assigned()
            before = model_of(server).astype(np.float64)
            for update in updates[:3]:
                assert fast.upload(fast.assigned(), update).status_code == 200
            if not restart:
                assert slow.upload(late, updates[3]).status_code == 200
                outcomes[name] = model_of(server)
        if restart:
            with running_server(config) as server:
                slow.url = server.url
                assert slow.upload(late, updates[3]).status_code == 200
                outcomes[name] = model_of(server)
    assert outcomes["corrected"].tobytes() == outcomes["restarted"].tobytes()
    assert outcomes["corrected"].tobytes() != outcomes["plain"].tobytes()
    missed = updates[:3].astype(np.float64).sum(axis=0)
    expected = before + missed + (updates[3] - 0.25 * missed)
    np.testing.assert_allclose(outcomes["corrected"], expected, rtol=1e-6, atol=1e-6)


def test_a_task_that_diverges_is_halted_and_stays_so(tmp_path, softmax_bundle, size):
    config = write_config(tmp_path, softmax_bundle, rounds=50, buffer_size=1, divergence={"factor": 2.0, "patience": 2})
    with running_server(config) as server:
        device = RawDevice(server.url).enrol()
        losses = [1.0, 0.9, 0.8, 0.7, 0.6, 5.0, 9.0, 20.0, 50.0, 90.0, 200.0, 500.0]
        for loss in losses:
            reply = device.check_in()
            if isinstance(reply, Finished):
                break
            assert (
                device.upload(reply.assignment, np.full(size, 0.1, np.float32), train_loss=repr(loss)).status_code
                == 200
            )
        assert isinstance(reply, Finished)
        assert reply.halted
        assert "loss" in get_json(server.url, "/v1/task")["halted"]
        rounds = len(get_json(server.url, "/v1/rounds"))
        assert 5 < rounds < len(losses)
    with running_server(config) as server:
        reply = RawDevice(server.url).enrol().check_in()
        assert isinstance(reply, Finished)
        assert reply.halted
        assert len(get_json(server.url, "/v1/rounds")) == rounds


def test_who_took_part_often_waits_for_the_others(tmp_path, softmax_bundle, size):
    config = write_config(
        tmp_path,
        softmax_bundle,
        rounds=60,
        buffer_size=1,
        selection={"policy": "fair", "floor": 0.01},
        divergence={"enabled": False},
    )
    unit = np.full(size, 1e-3, np.float32)
    with running_server(config) as server:
        eager, other = RawDevice(server.url).enrol(), RawDevice(server.url).enrol()
        assert other.upload(other.assigned(), unit).status_code == 200
        turned_away = 0
        for _ in range(10):
            reply = eager.check_in()
            if isinstance(reply, Wait):
                assert reply.reason == "not-selected"
                turned_away += 1
            else:
                eager.upload(reply.assignment, unit)
        assert turned_away >= 6
        assert not isinstance(other.check_in(), Wait), "who is behind is taken at once"
