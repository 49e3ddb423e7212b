"""A personal model is served as the program's own methods would, for any number of examples, or it is said why not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk import PersonalInference
from client_sdk.errors import DeviceError, PersonalBody, StaleBody
from client_sdk.inference import Latency, Precision, batches, int8_head
from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, UnknownMethod
from client_sdk.protocol.program import Role
from client_sdk.runtime import load_program
from tests.bundles import int8_bundle, tiny_bundle

D, CLASSES, FEATURES = 131, 3, 12
HEAD = 27  # 8 x 3 weights and 3 biases, the last of the table


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return int8_bundle("mlp", tmp_path_factory.mktemp("inference") / "bundle")


@pytest.fixture(scope="module")
def program(bundle):
    opened = load_program(bundle.path, "native")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def initial(bundle):
    values = bundle.initial_weights()
    values.flags.writeable = False
    return values


@pytest.fixture
def weights(initial):
    return initial.copy()


def adapted(weights, start, stop=D):
    """Weights with other values from a coordinate on."""
    own = weights.copy()
    own[start:stop] += np.random.default_rng(1).normal(size=stop - start).astype(np.float32)
    return own


def examples(n, seed=0):
    return np.random.default_rng(seed).random((n, FEATURES), np.float32)


# --- float ----------------------------------------------------------------------------------------------------------


def test_a_model_without_any_adaptation_answers_with_the_bits_of_infer(program, weights):
    for method in (m for m in program.manifest.methods if m.role is Role.INFER):
        x = examples(method.batch_size)
        [expected] = program.run(method.name, weights, x)
        assert PersonalInference(program, weights).logits(x).tobytes() == expected.tobytes()


@given(n=st.integers(0, 23))
def test_any_number_of_examples_gets_the_logits_that_each_has_by_itself(program, initial, n):
    x = examples(n, seed=n)
    for precision in ("float", "int8"):
        served = PersonalInference(program, initial, precision=precision)
        logits = served.logits(x)
        assert (logits.shape, logits.dtype) == ((n, CLASSES), np.float32)
        alone = [served.logits(x[i : i + 1]) for i in range(n)]
        np.testing.assert_allclose(logits, np.concatenate([logits[:0], *alone]), rtol=1e-5, atol=1e-6)
        assert served.predict(x).tolist() == logits.argmax(axis=1).tolist()
        assert served.predict(x).dtype == np.int64


@given(n=st.integers(0, 500), sizes=st.sets(st.integers(1, 64), min_size=1, max_size=4))
def test_batches_cover_all_examples_and_only_the_last_is_filled_up(n, sizes):
    ascending = tuple(sorted(sizes))
    planned = list(batches(n, ascending))
    assert sum(planned) >= n
    assert sum(planned[:-1]) < n or not planned
    assert sum(planned) - n < ascending[0]
    assert planned == sorted(planned, reverse=True)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, FEATURES - 1), np.float32), r"must be float32 \['n', 12\], got \[2, 11\]"),
        (np.zeros(FEATURES, np.float32), "must be float32"),
        ([["a"] * FEATURES], "must be numbers"),
    ],
)
def test_examples_of_another_shape_are_refused(program, weights, x, message):
    with pytest.raises(ProgramInputError, match=message):
        PersonalInference(program, weights).logits(x)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w[:-1], r"float32 \[131\], not float32 \[130\]"),
        (lambda w: w.astype(np.float64), "not float64"),
        (lambda w: np.where(np.arange(D) == 5, np.nan, w).astype(np.float32), "NaN or infinite"),
        (lambda w: np.repeat(w, 2)[::2], "C-contiguous"),
    ],
)
def test_weights_that_are_no_model_are_refused(program, weights, spoil, message):
    with pytest.raises(ProgramInputError, match=message):
        PersonalInference(program, spoil(weights))
    with pytest.raises(ProgramInputError, match="the global weights"):
        PersonalInference(program, weights, global_weights=spoil(weights))


def test_an_unknown_precision_is_refused(program, weights):
    with pytest.raises(ConfigurationError, match="'float', 'int8', 'auto'"):
        PersonalInference(program, weights, precision="int4")


# --- int8 -----------------------------------------------------------------------------------------------------------


def test_a_personal_head_is_served_behind_the_int8_body(program, weights):
    own = adapted(weights, D - HEAD)
    x = examples(50)
    exact = PersonalInference(program, own).logits(x)
    quantised = PersonalInference(program, own, precision="int8")
    assert quantised.precision is Precision.INT8
    error = np.linalg.norm(quantised.logits(x) - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.1
    assert (quantised.predict(x) == exact.argmax(axis=1)).mean() >= 0.9
    # It is this device's head, not the global one.
    others = PersonalInference(program, weights, precision="int8").logits(x)
    assert np.linalg.norm(others - exact) / np.linalg.norm(exact) > 0.5


def test_the_head_is_cut_out_as_the_manifest_says_and_the_rest_can_go(program, weights):
    own = adapted(weights, D - HEAD)
    head = int8_head(program.manifest, own)
    assert head.tobytes() == own[-HEAD:].tobytes()
    served = PersonalInference(program, own, precision="int8")
    before = served.logits(examples(4))
    own[:] = np.nan
    assert served.logits(examples(4)).tobytes() == before.tobytes()


def test_a_body_that_is_personal_is_refused_by_name(program, weights):
    own = adapted(weights, 96)  # the hidden layer's biases, and the head
    with pytest.raises(PersonalBody, match=r"hidden\.0\.bias differ.*output\.weight, output\.bias only") as refusal:
        PersonalInference(program, own, precision="int8", global_weights=weights)
    assert refusal.value.parameters == ("hidden.0.bias",)
    assert isinstance(refusal.value, DeviceError)
    assert not refusal.value.retryable


def test_a_body_of_an_older_global_model_is_refused(program, weights):
    newer = adapted(weights, 0)
    with pytest.raises(StaleBody, match="not quantised from the global model:"):
        PersonalInference(program, adapted(newer, D - HEAD), precision="int8", global_weights=newer)
    with pytest.raises(StaleBody, match="these weights, or the global model"):
        PersonalInference(program, newer, precision="int8")


def test_one_bit_of_the_body_is_another_body(program, weights):
    own = weights.copy()
    own[0] = np.nextafter(own[0], np.float32(9))
    with pytest.raises(StaleBody):
        PersonalInference(program, own, precision="int8")
    own[0] = weights[0]
    PersonalInference(program, own, precision="int8")


def test_auto_serves_in_int8_where_it_can_and_says_why_where_not(program, weights, tmp_path):
    assert PersonalInference(program, weights, precision="auto").precision is Precision.INT8
    fallen = PersonalInference(program, adapted(weights, 0), precision="auto")
    assert fallen.precision is Precision.FLOAT
    assert isinstance(fallen.refusal, StaleBody)
    plain = load_program(tiny_bundle("softmax", tmp_path / "plain").path, "native")
    zeros = np.zeros(plain.manifest.num_parameters, np.float32)
    without = PersonalInference(plain, zeros, precision="auto")
    assert isinstance(without.refusal, UnknownMethod)
    with pytest.raises(UnknownMethod, match="no infer_int8"):
        PersonalInference(plain, zeros, precision="int8")
    plain.close()


# --- what it takes --------------------------------------------------------------------------------------------------


def test_latency_is_read_from_the_clock_that_is_given(program, weights):
    """Calls take 1, 2, .. 10 ms; those before, for warming up, are not timed."""
    ticks = itertools.chain.from_iterable((100.0, 100.0 + k / 1000) for k in itertools.count(1))
    served = PersonalInference(program, weights, monotonic=lambda: next(ticks))
    latency = served.latency(calls=10)
    assert (latency.calls, latency.batch_size) == (10, 1)
    assert latency.median_s == pytest.approx(0.0055)
    assert latency.p90_s == pytest.approx(0.009)
    assert str(latency) == "5.5 ms (90 % within 9 ms) for batches of 1, 10 calls"


def test_a_single_call_is_its_own_median(program, weights):
    ticks = itertools.count()
    assert PersonalInference(program, weights, monotonic=lambda: next(ticks)).latency(calls=1, batch_size=4) == Latency(
        1, 4, 1, 1
    )


def test_latency_of_what_there_is_not_is_refused(program, weights):
    served = PersonalInference(program, weights)
    with pytest.raises(UnknownMethod, match="batch size 7"):
        served.latency(batch_size=7)
    with pytest.raises(ConfigurationError, match="at least one call"):
        served.latency(calls=0)


def test_memory_is_the_manifests_item_by_item(program, weights):
    manifest = program.manifest
    planned = manifest.method(Role.INFER, 4).planned_memory_bytes
    estimate = PersonalInference(program, weights).memory(baseline_bytes=1000)
    assert {item.name: item.num_bytes for item in estimate.items} == {
        "process": 1000,
        "program": 2 * manifest.program_bytes,
        "planned memory of infer_b4": planned,
        "weights": 4 * D,
        "examples and logits": 4 * 4 * (FEATURES + CLASSES),
    }
    int8 = PersonalInference(program, weights, precision="int8").memory(batch_size=1, baseline_bytes=1000)
    items = {item.name: item.num_bytes for item in int8.items}
    assert items["head"] == 4 * HEAD
    assert items["packed int8 body"] == D - HEAD
    assert items["examples and logits"] == 4 * (FEATURES + CLASSES)
    assert estimate.total_bytes == sum(item.num_bytes for item in estimate.items)
