"""Error feedback: nothing is lost, nothing is invented, and the residual stays bounded."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.compression import Codec, CompressionSpec, ErrorFeedback
from client_sdk.protocol.errors import (
    MalformedFrame,
    NonFiniteUpdate,
    OversizedBody,
    ProtocolError,
    ShapeMismatch,
    TruncatedFrame,
)
from client_sdk.protocol.frames import encode_frame

relaxed = settings(deadline=None)

LOSSLESS = ["topk:0.01", "topk:0.4", "topk:1", "threshold:0.5", "randomk:0.3,feedback=on"]
LOSSY = [
    "topk:0.3,bits=8",
    "topk:0.3,bits=4,block=4",
    "topk:0.3,bits=1",
    "threshold:0.5,bits=1",
    "quantize:8,feedback=on",
    "quantize:4,feedback=on",
    "quantize:1,feedback=on,block=8",
    "randomk:0.3,rotate,feedback=on",
    "randomk:0.3,bits=1,rotate,feedback=on",
    "quantize:1,rotate,feedback=on",
]

finite = st.floats(-(2.0**126), 2.0**126, width=32)
updates = hnp.arrays(np.float32, st.integers(0, 40), elements=finite | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]))


def codec_of(line: str, size: int) -> Codec:
    return Codec(CompressionSpec.parse(line), size)


def pairs() -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    return updates.flatmap(lambda x: st.tuples(st.just(x), hnp.arrays(np.float32, len(x), elements=finite)))


@relaxed
@given(pairs(), st.sampled_from(LOSSLESS), st.integers(0, 99))
def test_what_is_sent_and_what_is_kept_add_up_bit_for_bit(pair, line, seed):
    update, residual = pair
    codec = codec_of(line, len(update))
    before = ErrorFeedback(residual)
    compensated = before.compensate(update)
    payload, after = before.encode(codec, update, seed)
    sent = codec.decode(payload, seed)
    assert (sent + after.residual).tobytes() == compensated.tobytes()
    for s, r, c in zip(sent.tolist(), after.residual.tolist(), compensated.tolist(), strict=True):
        assert Fraction(s) + Fraction(r) == Fraction(c), "and without any rounding"


@relaxed
@given(pairs())
def test_the_compensated_update_is_the_float32_sum(pair):
    update, residual = pair
    compensated = ErrorFeedback(residual).compensate(update)
    for c, u, r in zip(compensated.tolist(), update.tolist(), residual.tolist(), strict=True):
        assert c == np.float32(u + r)  # a double holds the sum to more than twice float32's digits
        assert math.copysign(1, c) == 1 or c != 0


@relaxed
@given(
    st.lists(hnp.arrays(np.int64, 12, elements=st.integers(-99, 99)), min_size=1, max_size=12),
    st.sampled_from(LOSSLESS),
)
def test_over_many_rounds_all_that_was_to_be_sent_is_sent_or_kept(rounds, line):
    """Whole numbers, so that every sum is exact."""
    codec, feedback = codec_of(line, 12), ErrorFeedback.zeros(12)
    sent = np.zeros(12, np.float32)
    for seed, update in enumerate(rounds):
        payload, feedback = feedback.encode(codec, update.astype(np.float32), seed)
        sent += codec.decode(payload, seed)
    assert np.array_equal(sent + feedback.residual, np.sum(rounds, 0))


@relaxed
@given(
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    st.sampled_from(LOSSLESS + LOSSY),
    st.integers(0, 9),
)
def test_compression_with_feedback_never_adds_to_a_norm(x, line, seed):
    """||x - decoded|| <= ||x||, the condition under which residuals stay bounded; see also the rates below."""
    codec = codec_of(line, len(x))
    left = x.astype(np.float64) - codec.decode(codec.encode(x, seed), seed)
    norm = np.linalg.norm(x.astype(np.float64))
    assert np.linalg.norm(left) <= norm * (1 + 1e-6) + 1e-37


def rate(codec: Codec) -> float:
    """Share of a squared norm that a payload holds at least."""
    n, k = codec.size, codec.num_values or 0
    blocks = 1.0 if codec.spec.value_bits == 32 else 1 / min(codec.spec.block, k)
    return k / n * blocks


@pytest.mark.parametrize(
    "line", ["topk:0.1", "topk:0.5", "topk:0.3,bits=8", "topk:0.3,bits=1", "quantize:1,feedback=on"]
)
@pytest.mark.parametrize("kind", ["normal", "equal", "spikes", "alternating", "growing"])
def test_the_residual_stays_below_its_bound_for_any_sequence_of_updates(line: str, kind: str):
    size, rounds = 40, 300
    rng = np.random.default_rng(1)
    codec, feedback = codec_of(line, size), ErrorFeedback.zeros(size)
    c = rate(codec)
    bound = 2 * math.sqrt(1 - c) / c
    largest = 0.0
    for t in range(rounds):
        match kind:
            case "normal":
                update = rng.standard_normal(size)
            case "equal":
                update = np.ones(size)
            case "spikes":
                update = np.eye(size)[t % size]
            case "alternating":
                update = np.where(np.arange(size) % 2 == t % 2, 1.0, -0.3)
            case _:
                update = np.arange(size) + 1.0
        update = (update / np.linalg.norm(update)).astype(np.float32)
        _, feedback = feedback.encode(codec, update, t)
        largest = max(largest, feedback.norm)
    assert largest <= bound * (1 + 1e-5) + 1e-6
    assert largest > 0 or kind != "normal"


@pytest.mark.parametrize("line", LOSSLESS + LOSSY)
def test_a_constant_update_is_delivered_in_the_mean(line: str):
    """After T rounds what arrived differs from T updates by one residual, which does not grow with T."""
    size = 30
    update = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    codec, feedback = codec_of(line, size), ErrorFeedback.zeros(size)
    received = np.zeros(size)
    norms = []
    for t in range(400):
        payload, feedback = feedback.encode(codec, update, t)
        received += codec.decode(payload, t)
        norms.append(feedback.norm)
    assert np.linalg.norm(400 * update.astype(float) - received) <= feedback.norm * (1 + 1e-3) + 1e-2
    assert max(norms[200:]) <= 2 * max(norms[:200]) + 1e-6


def descend(line: str, *, feedback_on: bool, rounds: int = 200, rate: float = 0.04) -> float:
    """Three workers minimise the sum of their ``<a, x>^2 + ||x||^2 / 4`` [Beznosikov et al. 2020, example 1].

    Returns the distance from the optimum, 0.
    """
    directions = np.array([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], np.float32)
    codec = codec_of(line, 3)
    states = [ErrorFeedback.zeros(3) for _ in directions]
    x = np.ones(3, np.float32)
    for t in range(rounds):
        total = np.zeros(3, np.float32)
        for i, a in enumerate(directions):
            step = np.float32(rate) * (2 * a * (a @ x) + x / 2).astype(np.float32)
            if feedback_on:
                payload, states[i] = states[i].encode(codec, step, t)
            else:
                payload = codec.encode(step, t)
            total += codec.decode(payload, t)
        x -= total / np.float32(3)
    return float(np.linalg.norm(x))


def test_top_1_without_feedback_diverges_where_with_it_it_converges():
    assert descend("topk:0.34", feedback_on=False) > 1e3
    assert descend("topk:0.34", feedback_on=True) < 1e-3


# --- the state -----------------------------------------------------------------------------------------------------


@relaxed
@given(updates)
def test_a_state_is_read_back_from_its_bytes(residual):
    state = ErrorFeedback(residual)
    again = ErrorFeedback.from_bytes(state.to_bytes(), len(residual))
    assert again.residual.tobytes() == state.residual.tobytes()
    assert again.to_bytes() == state.to_bytes()


def test_a_state_is_a_value():
    own = np.ones(3, np.float32)
    state = ErrorFeedback(own)
    own[:] = 7
    assert state.residual.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        state.residual[0] = 2
    update = np.ones(3, np.float32)
    state.encode(codec_of("topk:0.5", 3), update, 1)
    assert (state.residual.tolist(), update.tolist()) == ([1, 1, 1], [1, 1, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_changes_nothing(value: float):
    state = ErrorFeedback(np.ones(3, np.float32))
    with pytest.raises(NonFiniteUpdate):
        state.encode(codec_of("topk:0.5", 3), np.array([0, value, 0], np.float32), 1)
    with pytest.raises(NonFiniteUpdate):
        ErrorFeedback(np.array([value], np.float32))
    with pytest.raises(NonFiniteUpdate):
        ErrorFeedback.from_bytes(encode_frame({"residual": np.array([value], np.float32)}), 1)


def test_sums_that_overflow_are_refused():
    large = np.full(2, 3e38, np.float32)
    with pytest.raises(NonFiniteUpdate):
        ErrorFeedback(large).compensate(large)
    with pytest.raises(NonFiniteUpdate):
        ErrorFeedback.after(large, -large)


@pytest.mark.parametrize("update", [np.zeros(4, np.float32), np.zeros(3), np.zeros((3, 1), np.float32)])
def test_updates_of_another_shape_are_refused(update: np.ndarray):
    with pytest.raises(ShapeMismatch):
        ErrorFeedback.zeros(3).compensate(update)


@pytest.mark.parametrize("residual", [np.zeros(3), np.zeros((3, 1), np.float32)])
def test_residuals_of_another_kind_are_refused(residual: np.ndarray):
    with pytest.raises(ShapeMismatch):
        ErrorFeedback(residual)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", TruncatedFrame),
        (ErrorFeedback.zeros(3).to_bytes()[:-1], TruncatedFrame),
        (ErrorFeedback.zeros(3).to_bytes() + b"\x00", MalformedFrame),
        (ErrorFeedback.zeros(2).to_bytes(), ShapeMismatch),
        (ErrorFeedback.zeros(1000).to_bytes(), OversizedBody),
        (encode_frame({"residual": np.zeros(3)}), ShapeMismatch),
        (encode_frame({"other": np.zeros(3, np.float32)}), MalformedFrame),
        (encode_frame({}), MalformedFrame),
    ],
)
def test_bytes_that_are_no_state_of_this_model_are_refused(data: bytes, error: type[ProtocolError]):
    with pytest.raises(error):
        ErrorFeedback.from_bytes(data, 3)
