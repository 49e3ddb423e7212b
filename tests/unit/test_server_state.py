"""The server's state as bytes: canonical, and nothing that no server has written gets in."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, MalformedFrame, OversizedBody, ProtocolError, ShapeMismatch
from client_sdk.protocol.frames import decode_frame, encode_frame
from server_ref.aggregation.server_state import MAX_EXPONENT, ServerState

METADATA = {"format": "pocketfed-server-state-1", "step": "7", "exponent": "-3"}
TENSORS = {
    "control": np.array([0.5, -0.5]),
    "master": np.array([1.0, -2.0]),
    "momentum": np.array([0.1, 0.2]),
    "second_moment": np.array([0.0, 4.0]),
}
STATE = ServerState(7, TENSORS, -3)


def test_bytes_are_a_frame_that_names_step_exponent_and_tensors():
    frame = decode_frame(STATE.to_bytes())
    assert frame.metadata == METADATA
    assert list(frame.tensors) == sorted(TENSORS)
    assert STATE.to_bytes() == encode_frame(TENSORS, METADATA)


def test_a_round_trip_keeps_every_bit():
    found = ServerState.from_bytes(STATE.to_bytes())
    assert (found.step, found.exponent) == (7, -3)
    assert {name: t.tobytes() for name, t in found.tensors.items()} == {n: t.tobytes() for n, t in TENSORS.items()}
    assert found.to_bytes() == STATE.to_bytes()


def test_the_order_in_which_tensors_were_given_does_not_show():
    backwards = ServerState(7, dict(reversed(TENSORS.items())), -3)
    assert backwards.to_bytes() == STATE.to_bytes()


def changed(metadata: dict[str, str] | None = None, **tensors: np.ndarray) -> bytes:
    return encode_frame(dict(sorted({**TENSORS, **tensors}.items())), {**METADATA, **(metadata or {})})


def without(*names: str) -> bytes:
    return encode_frame({n: t for n, t in TENSORS.items() if n not in names}, METADATA)


@pytest.mark.parametrize(
    "data",
    [
        without("master"),
        changed(master=np.array([1.0, np.nan])),
        changed(master=np.array([1.0, 1e39])),
        changed(momentum=np.array([1.0, np.inf])),
        changed(second_moment=np.array([1.0, -1.0])),
        changed(control=np.zeros(3)),
        changed(master=np.zeros(2, np.float32)),
        changed(master=np.zeros(2, np.int64), momentum=np.zeros(2, np.int64)),
        changed(master=np.zeros((1, 2))),
        encode_frame({"master": np.zeros(2), "other": np.zeros(2)}, METADATA),
        encode_frame(dict(reversed(TENSORS.items())), METADATA),
        encode_frame(TENSORS),
        encode_frame(TENSORS, {**METADATA, "more": "1"}),
        encode_frame(TENSORS, {k: v for k, v in METADATA.items() if k != "exponent"}),
        changed({"format": "pocketfed-server-state-2"}),
        *(changed({"step": text}) for text in ("-1", "07", "+7", "7.0", " 7", "7\n", "", "--7", "\u0667", "9" * 5000)),
        *(changed({"exponent": text}) for text in ("-0", str(MAX_EXPONENT + 1), str(-MAX_EXPONENT - 1), "1e2")),
        STATE.to_bytes() + b"\0",
        b"",
        b"\0" * 100,
    ],
)
def test_what_no_server_has_written_is_refused(data):
    with pytest.raises(MalformedFrame):
        ServerState.from_bytes(data)


def test_a_bomb_is_refused_before_it_is_allocated():
    header = {"__metadata__": METADATA, "master": {"dtype": "F64", "shape": [2**38], "data_offsets": [0, 2**41]}}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with pytest.raises(OversizedBody):
        ServerState.from_bytes(len(raw).to_bytes(8, "little") + raw)


def test_every_prefix_and_random_damage_is_refused_or_reads_as_another_state():
    data = STATE.to_bytes()
    for end in range(len(data)):
        with pytest.raises(MalformedFrame):
            ServerState.from_bytes(data[:end])
    rng = random.Random(3)
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            found = ServerState.from_bytes(damaged)
        except ProtocolError:
            continue
        assert found.to_bytes() == bytes(damaged)


def test_a_state_without_sound_tensors_cannot_be_made():
    with pytest.raises(ShapeMismatch, match="without master"):
        ServerState(0, {"momentum": np.zeros(2)})
    with pytest.raises(ShapeMismatch, match="momentum"):
        ServerState(0, {"master": np.zeros(2), "momentum": np.zeros(3)})
    with pytest.raises(ShapeMismatch, match="master"):
        ServerState(0, {"master": np.zeros(2, np.float32)})
    with pytest.raises(ConfigurationError):
        ServerState(-1, {"master": np.zeros(2)})
    with pytest.raises(ConfigurationError):
        ServerState(0, {"master": np.zeros(2)}, exponent=MAX_EXPONENT + 1)
    with pytest.raises(MalformedFrame, match="other tensors"):
        ServerState(0, {"master": np.zeros(2), "other": np.zeros(2)}).to_bytes()


def test_weights_are_the_master_rounded_once():
    master = np.random.default_rng(0).standard_normal(1000)
    state = ServerState(0, {"master": master})
    assert state.weights.tobytes() == master.astype(np.float32).tobytes()
    assert state.weights is state.weights
    with pytest.raises(ValueError, match="read-only"):
        state.weights[0] = 0


def test_tensors_cannot_be_changed_through_the_state_and_replacing_them_makes_another():
    tensors = {"master": np.zeros(2)}
    state = ServerState(0, tensors)
    with pytest.raises(ValueError, match="read-only"):
        state.master[0] = 1.0
    with pytest.raises(TypeError):
        state.tensors["master"] = np.ones(2)
    tensors["master"][0] = 1.0  # the caller's own array stays its own to change
    other = replace(state, tensors={**state.tensors, "control": np.ones(2)})
    assert set(other.tensors) == {"master", "control"}
    assert set(state.tensors) == {"master"}


def test_a_state_without_accumulated_tensors_has_nothing_to_rescale():
    state = ServerState(0, {"master": np.array([1e300])})
    assert state.rescaled(incoming=1e300) == (state, 0)
