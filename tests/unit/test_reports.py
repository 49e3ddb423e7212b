"""What goes into a report: the update as it is or compressed, and what is kept back for the next one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client_sdk.errors import BundleMismatch
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError, OversizedBody, UpdateOutOfRange
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, Assignment, F32Encoding, ReportFacts
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from client_sdk.reports import (
    Report,
    build_report,
    check_reportable,
    compression_of,
    dense_bytes,
    is_report_of,
    keeps_memory,
)
from tests.aggregators import DEVICE_ID
from tests.devices import NUM_PARAMETERS, PARAMETERS, make_assignment, make_manifest

REPORT = "2" * 32
D = 40
NUM_SHARED = PARAMETERS[0].num_elements
"""Parameters of the toy program but for its bias."""
LOSSLESS = ["topk:0.1", "threshold:0.5", "randomk:0.25,feedback=on"]
MAML = TrainingPlan(algorithm="maml", meta=MetaPlan())
values = st.floats(-1000, 1000, width=32)
vectors = arrays(np.float32, D, elements=values)


def build(assignment: Assignment, update: np.ndarray, residual: np.ndarray | None = None) -> Report:
    return build_report(assignment, REPORT, update, device_id=DEVICE_ID, steps=3, train_loss=0.5, residual=residual)


def sent(report: Report, assignment: Assignment) -> np.ndarray:
    """What the server decodes."""
    tensor = decode_frame(report.frame).tensors[REPORT_TENSOR]
    if assignment.compression is None:
        return tensor
    assert tensor.dtype == np.uint8
    codec = Codec(CompressionSpec.parse(assignment.compression), D)
    return codec.decode(tensor.tobytes(), assignment.compression_seed)


def test_without_compression_the_update_travels_as_it_is():
    assignment = make_assignment(1)
    update = np.arange(D, dtype=np.float32)
    report = build(assignment, update)
    frame = decode_frame(report.frame)
    assert list(frame.tensors) == [REPORT_TENSOR]
    assert frame.tensors[REPORT_TENSOR].dtype == np.float32
    assert sent(report, assignment).tobytes() == update.tobytes()
    assert (report.residual, report.dense_bytes) == (None, 4 * D)
    facts = ReportFacts.model_validate(frame.metadata)
    assert (facts.algorithm, facts.compression, facts.compression_seed) == ("fedavg", "none", "0")
    assert (facts.steps, facts.train_loss) == ("3", "0.5")


@pytest.mark.parametrize("line", LOSSLESS)
@given(update=vectors, residual=vectors, seed=st.integers(0, 2**53 - 1))
def test_what_is_sent_and_what_is_kept_are_the_update_and_what_was_kept_bit_for_bit(
    line: str, update: np.ndarray, residual: np.ndarray, seed: int
):
    assignment = make_assignment(1, compression=line, compression_seed=seed)
    report = build(assignment, update, residual)
    decoded = sent(report, assignment)
    assert report.residual is not None
    assert np.array_equal(decoded + report.residual, update + residual)
    assert np.all((decoded == 0) | (report.residual == 0)), "each value is sent or kept, whole"


@given(update=vectors, seed=st.integers(0, 2**53 - 1))
def test_nothing_was_kept_before_the_first_report(update: np.ndarray, seed: int):
    assignment = make_assignment(1, compression="topk:0.1", compression_seed=seed)
    first, explicit = build(assignment, update), build(assignment, update, np.zeros(D, np.float32))
    assert first.frame == explicit.frame
    assert first.residual is not None
    assert explicit.residual is not None
    assert first.residual.tobytes() == explicit.residual.tobytes()


@pytest.mark.parametrize("line", ["topk:0.2,bits=4", "quantize:1,feedback=on", "randomk:0.5,bits=8,rotate,feedback=on"])
@given(update=vectors, residual=vectors)
def test_rounded_values_leave_their_error_in_the_residual(line: str, update: np.ndarray, residual: np.ndarray):
    assignment = make_assignment(1, compression=line, compression_seed=9)
    report = build(assignment, update, residual)
    assert report.residual is not None
    wanted = update.astype(np.float64) + residual
    found = sent(report, assignment).astype(np.float64) + report.residual
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7 * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize("line", ["quantize:8", "randomk:0.25", "randomk:0.5,bits=4,rotate", "sketch:0.5,rows=5"])
def test_without_error_feedback_nothing_is_kept(line: str):
    assignment = make_assignment(1, compression=line, compression_seed=5)
    update = np.random.default_rng(0).normal(size=D).astype(np.float32)
    report = build(assignment, update, np.ones(D, np.float32))
    assert report.residual is None
    assert report.frame == build(assignment, update).frame, "and nothing of earlier reports is added"
    assert not keeps_memory(assignment)


def test_devices_with_the_same_values_round_them_independently():
    """Stochastic rounding depends on the assignment, so that errors cancel in the mean of many devices."""
    update = np.linspace(-1, 1, D, dtype=np.float32)
    frames = {
        sent(build(a, update), a).tobytes()
        for a in (make_assignment(1, compression="quantize:4", shuffle_seed=seed) for seed in range(5))
    }
    assert len(frames) == 5


def test_a_payload_that_decodes_beyond_the_bound_is_not_sent():
    """A sketch adds up values of random signs: its estimates may exceed them all."""
    line, update = "sketch:0.05,rows=1", np.full(D, 1.0, np.float32)
    codec = Codec(CompressionSpec.parse(line), D)
    seed = next(s for s in range(100) if np.abs(codec.decode(codec.encode(update, s), s)).max() > 1)
    bounded = {"compression": line, "compression_seed": seed, "encoding": F32Encoding(max_abs=1.0)}
    with pytest.raises(UpdateOutOfRange, match="allows 1"):
        build(make_assignment(1, **bounded), update)


def test_an_update_beyond_the_bound_is_not_sent_compressed_either():
    assignment = make_assignment(1, compression="topk:0.5", encoding=F32Encoding(max_abs=1.0))
    with pytest.raises(UpdateOutOfRange, match="reaches 3"):
        build(assignment, np.full(D, 3.0, np.float32))


@pytest.mark.parametrize("bound", [1.0, 0.1, 1e300])
def test_a_residual_beyond_the_bound_is_sent_bit_by_bit(bound: float):
    """Else one coordinate that grew too large would keep a device from reporting for ever."""
    assignment = make_assignment(1, compression="topk:0.1", encoding=F32Encoding(max_abs=bound))
    kept = np.zeros(D, np.float32)
    kept[7] = 1.75 * min(bound, 1.0)
    zero = np.zeros(D, np.float32)
    total = np.zeros(D)
    for _ in range(3):
        report = build(assignment, zero, kept)
        assert float(np.abs(sent(report, assignment)).max()) <= bound
        total += sent(report, assignment)
        assert report.residual is not None
        kept = report.residual
    assert not kept.any()
    assert total[7] == pytest.approx(1.75 * min(bound, 1.0))


def test_a_report_larger_than_allowed_is_not_made():
    with pytest.raises(OversizedBody):
        build(make_assignment(1, max_report_bytes=4 * D + 8), np.zeros(D, np.float32))


# --- before training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compression": "zip"}, ConfigurationError, "there is no method 'zip'"),
        ({"compression": "none"}, BundleMismatch, "writes its compression as 'none'"),
        ({"compression": "topk:1e-2"}, BundleMismatch, "not as topk:0.01"),
        ({"compression": "topk:0.5,feedback=on"}, BundleMismatch, "not as topk:0.5"),
        ({"max_report_bytes": 4 * D - 1}, BundleMismatch, f"takes up to {4 * D} bytes"),
        (
            {"plan": TrainingPlan(algorithm="scaffold"), "control_sha256": "a" * 64, "max_report_bytes": 8 * D - 1},
            BundleMismatch,
            f"takes up to {8 * D} bytes",
        ),
        ({"compression": "topk:0.5", "max_report_bytes": 40}, BundleMismatch, "takes up to"),
        ({"kind": UpdateKind.GRADIENT}, BundleMismatch, "with fedavg this device sends deltas"),
        ({"plan": MAML}, BundleMismatch, "kind delta; with maml this device sends gradients"),
    ],
)
def test_what_cannot_be_reported_is_found_out_before_training(
    changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        check_reportable(make_assignment(1, **changes), D)


@given(update=vectors, line=st.sampled_from(["topk:0.1", "threshold:5", "quantize:8", "sketch:0.3,rows=5"]))
def test_what_is_reportable_fits(update: np.ndarray, line: str):
    spec = CompressionSpec.parse(line)
    header = 2048
    assignment = make_assignment(1, compression=line, max_report_bytes=Codec(spec, D).max_bytes + header)
    check_reportable(assignment, D)
    assert len(build(assignment, update).frame) <= assignment.max_report_bytes


def test_who_remembers():
    scaffold = make_assignment(1, plan=TrainingPlan(algorithm="scaffold"), control_sha256="a" * 64)
    assert keeps_memory(scaffold)
    assert keeps_memory(make_assignment(1, plan=TrainingPlan(personal=("bias",))))
    assert not keeps_memory(make_assignment(1))
    assert compression_of(make_assignment(1)) is None
    for line, remembers in [("topk:0.1", True), ("topk:0.1,feedback=off", False), ("quantize:8,feedback=on", True)]:
        assert keeps_memory(make_assignment(1, compression=line)) is remembers


# --- ours or not ---------------------------------------------------------------------------------------------


def test_a_report_of_another_assignment_or_version_is_not_ours():
    assignment = make_assignment(1, compression="topk:0.1", compression_seed=3)
    frame = build(assignment, np.ones(D, np.float32)).frame
    assert is_report_of(frame, assignment, REPORT)
    assert not is_report_of(frame, assignment, "3" * 32)
    for changes in (
        {"number": 2},
        {"model_version": 1},
        {"parameter_table_sha256": "e" * 64},
        {"compression": "topk:0.2"},
        {"compression": None},
        {"compression_seed": 4},
        {"plan": assignment.plan.model_copy(update={"algorithm": "fednova"})},
    ):
        facts: dict[str, Any] = {"number": 1, "compression": "topk:0.1", "compression_seed": 3} | changes
        assert not is_report_of(frame, make_assignment(**facts), REPORT), changes


def test_a_report_of_before_an_upgrade_is_not_ours():
    assignment = make_assignment(1)
    decoded = decode_frame(build(assignment, np.ones(D, np.float32)).frame)
    new = {"algorithm", "compression", "compression_seed"}
    older = encode_frame(decoded.tensors, {k: v for k, v in decoded.metadata.items() if k not in new})
    assert not is_report_of(older, assignment, REPORT)
    assert not is_report_of(b"garbage", assignment, REPORT)


def test_the_dense_size_of_a_stored_report_comes_from_the_manifest():
    manifest = make_manifest().to_json().encode()
    plain, compressed = make_assignment(1), make_assignment(1, compression="topk:0.1")
    update = np.ones(NUM_PARAMETERS, np.float32)
    assert dense_bytes(build(plain, update).frame, plain, None) == 4 * NUM_PARAMETERS
    frame = build_report(compressed, REPORT, update, device_id=DEVICE_ID, steps=1, train_loss=1.0).frame
    assert dense_bytes(frame, compressed, manifest) == 4 * NUM_PARAMETERS
    assert dense_bytes(frame, compressed, None) is None
    assert dense_bytes(frame, compressed, b"garbage") is None
    for names, size in (("bias",), 4 * NUM_SHARED), (("head",), None):
        personal = make_assignment(1, compression="topk:0.1", plan=TrainingPlan(personal=names))
        assert dense_bytes(frame, personal, manifest) == size
