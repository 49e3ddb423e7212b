"""Bodies of the aggregator's API: what is packed comes out again, and nothing else does."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import MalformedFrame, MalformedMessage, ProtocolError
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure import wire
from server_ref.secure.layout import secure_layout
from server_ref.secure.messages import (
    AcceptedSet,
    CommitSignature,
    DeliveredShare,
    NoiseContribution,
    NoiseHeader,
    NoiseShare,
    RoundStatement,
    SetEntry,
    ShareHeader,
    TaskBinding,
)
from tests.secure_parties import TASK, pinned

HASH = "ab" * 32
BUFFERS = st.lists(st.binary(max_size=40), max_size=5)


def header(number: int) -> ShareHeader:
    return ShareHeader(
        report_id=f"{number:032x}",
        assignment_id="01" * 16,
        device_id="02" * 16,
        model_version=number,
        clip_norm=0.5,
        ciphertext_ids=(HASH,) * 5,
    )


def noise_header(count: int) -> NoiseHeader:
    return NoiseHeader(statement_sha256=HASH, sender=2, sealed_sha256=(HASH,) * count, signature="0" * 128)


@given(buffers=BUFFERS.filter(len), round_id=st.integers(0, 2**62 - 1))
def test_deliveries_come_out_as_they_were(buffers, round_id):
    reports = [DeliveredShare(header(i), data) for i, data in enumerate(buffers)]
    assert wire.unpack_delivery(wire.pack_delivery(round_id, reports)) == (round_id, reports)


@given(buffers=BUFFERS.filter(len))
def test_contributions_and_commits_come_out_as_they_were(buffers):
    contribution = NoiseContribution(noise_header(len(buffers)), tuple(buffers))
    assert wire.unpack_contribution(wire.pack_contribution(contribution)) == contribution
    entry = SetEntry(report_id="01" * 16, device_id="02" * 16, digest=HASH, weight=3)
    statement = RoundStatement(
        task_id=TASK.task_id,
        round_id=4,
        run=0,
        contributors=(1, 2),
        accepted=AcceptedSet(parts=((entry,), (entry,))),
        parameters=pinned().round_parameters(),
    )
    noise = [NoiseShare(noise_header(3), data) for data in buffers]
    assert wire.unpack_commit(wire.pack_commit(statement, noise)) == (statement, noise)


@settings(max_examples=60)
@given(buffers=BUFFERS.filter(len), data=st.data())
def test_a_changed_body_is_another_body_or_an_error(buffers, data):
    reports = [DeliveredShare(header(i), each) for i, each in enumerate(buffers)]
    body = bytearray(wire.pack_delivery(1, reports))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        assert wire.unpack_delivery(bytes(body)) != (1, reports)


@given(cut=st.integers(1, 400))
def test_a_cut_body_is_an_error(cut):
    body = wire.pack_delivery(1, [DeliveredShare(header(1), b"share")])
    with pytest.raises(ProtocolError):
        wire.unpack_delivery(body[: max(0, len(body) - cut)])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"0": np.zeros(1, np.uint8)},
        {"0": np.zeros(1, np.uint8), "control": np.zeros(1, np.uint8)},
        {"control": np.zeros(1, np.uint8), "1": np.zeros(1, np.uint8)},
        {"control": np.zeros(1, np.int64)},
        {"control": np.zeros((1, 1), np.uint8)},
    ],
    ids=["nothing", "no control", "order", "number", "dtype", "shape"],
)
def test_other_frames_are_refused(tensors):
    with pytest.raises(MalformedFrame):
        wire.unpack(wire.AnswerRequest, encode_frame(tensors))


def test_as_many_buffers_as_the_control_speaks_of():
    request = wire.DeliverRequest(round_id=0, reports=(header(1), header(2)))
    with pytest.raises(MalformedFrame, match="speaks of 2 buffers; 1 are there"):
        wire.unpack_delivery(wire.pack(request, [b"one"]))
    with pytest.raises(MalformedMessage):
        wire.unpack(wire.AnswerRequest, wire.pack(request, []))


@pytest.mark.parametrize("changes", [{}, {"packing": 2}, {"field": "m127"}, {"num_aggregators": 9}], ids=str)
@pytest.mark.parametrize("suite", list(SealingSuite))
def test_the_limits_leave_room_for_what_honest_parties_send(changes, suite):
    parameters = pinned(**changes)
    task = TaskBinding(task_id=TASK.task_id, parameter_table_sha256=HASH, size=5_000_000)
    layout = secure_layout(parameters, task, suite)
    limits = wire.Limits.of(parameters, task)
    n = parameters.num_aggregators
    assert limits.delivery > layout.ciphertext_bytes(n) + 1000
    assert limits.noise > n * layout.ciphertext_bytes(n) + 10_000
    assert limits.answer > layout.share_length * layout.scheme.field.element_bytes + 10_000
    # And not for much more.
    assert limits.answer < 1.2 * layout.share_length * layout.scheme.field.element_bytes + 2**21
    unbound = wire.Limits.of(parameters, None)
    assert max(unbound.delivery, unbound.noise, unbound.answer) <= 2**20


def test_the_largest_set_fits_the_largest_control_message():
    entry = SetEntry(report_id="01" * 16, device_id="02" * 16, digest=HASH, weight=2**39)
    size = len(entry.model_dump_json()) + 1
    assert 100_000 * size < wire.CONTROL_LIMIT
    signature = CommitSignature(index=64, round_id=2**61, statement_sha256=HASH, signature="0" * 128)
    assert 64 * len(signature.model_dump_json()) < wire.CONTROL_LIMIT
