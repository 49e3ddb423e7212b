"""Detectors: false alarms on honest updates of several models are as rare as stated; planted attacks are found."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client_sdk.protocol.errors import ConfigurationError, MalformedEncoding, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.updates import WorkerGradient
from server_ref import CompressedGradientAggregator
from server_ref.aggregation.detectors import IntegratedAttackDetector
from server_ref.aggregation.evidence import DriftEvidence, direction_p_value, norm_p_value, rank_p_value
from tests import digits

Sparse = tuple[WorkerGradient, dict]

# --- honest updates --------------------------------------------------------------------------------------------------


def mlp(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Dead units, a last layer and biases with gradients many times larger: top-k lands there."""
    dead = random.random(32) < 0.4
    first = random.standard_normal((64, 32)) * ~dead
    return {"w1": first * 0.1, "b1": random.standard_normal(32) * ~dead, "w2": random.standard_normal((32, 10)),
            "b2": 3 * random.standard_normal(10)}  # fmt: skip


def convolution(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Filters that are large or small as a whole."""
    filters = random.lognormal(sigma=1.5, size=(16, 1, 1, 1))
    return {"conv": filters * random.standard_normal((16, 8, 3, 3)), "fc": 0.5 * random.standard_normal((10, 144)),
            "bias": random.standard_normal(10)}  # fmt: skip


def embedding(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Only the rows of words that occurred, the frequent ones nearly always: coordinates in dense blocks."""
    rows = np.unique(np.minimum(random.zipf(1.5, size=40), 200) - 1)
    table = np.zeros((200, 8))
    table[rows] = random.standard_normal((len(rows), 8)) + 0.5
    return {"table": table, "out": random.standard_normal((8, 20))}


@cache
def real_gradients() -> tuple[dict[str, np.ndarray], ...]:
    """Of softmax regression, at its start, on nine images each."""
    return tuple(digits.gradient(digits.start(), shard) for shard in digits.shards(199))


MODELS = {"mlp": mlp, "convolution": convolution, "embedding": embedding}


def sparse(update: dict[str, np.ndarray], ratio: float = 0.05) -> Sparse:
    """As the specification's class compresses it."""
    float32 = {name: v.astype(np.float32) for name, v in update.items()}
    values, metadata = CompressedGradientAggregator(ratio, error_feedback=False).compress_gradient(float32, "w")
    return WorkerGradient("w", values, 1, 0.0), metadata


# --- one compressed update -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_false_alarms_on_honest_updates_are_as_rare_as_stated(model: str):
    """References of 99 among 240 honest updates, all others judged; alpha = 2 %: at most what chance allows."""
    random = np.random.default_rng(5)
    updates = [sparse(MODELS[model](random)) for _ in range(240)]
    alarms = 0
    for _ in range(5):
        order = random.permutation(len(updates))
        detector = IntegratedAttackDetector(0.02)
        for i in order[:99]:
            detector.learn(*updates[i])
        alarms += sum(detector.detect_compression_exploitation(*updates[i]) for i in order[99:])
    # 705 judgements; those that share a reference or an update share its luck, which is worth three deviations more.
    assert alarms <= 705 * 0.02 + 6 * math.sqrt(705 * 0.02)


def test_false_alarms_on_real_gradients_are_as_rare_as_stated():
    updates = [sparse(g) for g in real_gradients()]
    alarms = 0
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(updates))
        detector = IntegratedAttackDetector(0.02)
        for i in order[:99]:
            detector.learn(*updates[i])
        alarms += sum(detector.detect_compression_exploitation(*updates[i]) for i in order[99:])
    assert alarms <= 500 * 0.02 + 6 * math.sqrt(500 * 0.02)


@pytest.mark.parametrize("model", [*MODELS, "real"])
def test_an_update_of_large_positive_values_in_one_place_is_found(model: str):
    random = np.random.default_rng(6)
    honest = list(real_gradients()) if model == "real" else [MODELS[model](random) for _ in range(99)]
    detector = IntegratedAttackDetector(0.02)
    for update in honest[:99]:
        detector.learn(*sparse(update))
    found = 0
    for _ in range(20):
        attack = {name: 1e-3 * random.standard_normal(v.shape) for name, v in honest[0].items()}
        name = max(attack, key=lambda n: attack[n].size)
        size = sum(v.size for v in attack.values())
        start = int(random.integers(attack[name].size // 2))
        attack[name].reshape(-1)[start : start + size // 20] = 5 + random.random(size // 20)
        found += detector.detect_compression_exploitation(*sparse(attack))
    assert found == 20


def test_one_sided_values_alone_are_found():
    """At the honest places, with honest magnitudes: only the signs are the attacker's."""
    random = np.random.default_rng(7)
    detector = IntegratedAttackDetector(0.02)
    for _ in range(99):
        detector.learn(*sparse(mlp(random)))
    attacks = [sparse({n: np.abs(v) for n, v in mlp(random).items()}) for _ in range(20)]
    assert all(detector.detect_compression_exploitation(*a) for a in attacks)


def test_clustering_alone_is_no_evidence():
    """The specification's rule would call every honest update of an embedding an attack."""
    random = np.random.default_rng(8)
    detector = IntegratedAttackDetector(0.02)
    for _ in range(99):
        detector.learn(*sparse(embedding(random)))
    honest = [detector.compression_evidence(*sparse(embedding(random))) for _ in range(20)]
    assert sum(e.alarm for e in honest) <= 3


def test_too_small_a_reference_cannot_raise_an_alarm_and_says_so():
    random = np.random.default_rng(9)
    detector = IntegratedAttackDetector(0.01)
    for _ in range(20):
        detector.learn(*sparse(mlp(random)))
    attack = sparse({n: 1e3 * np.abs(v) for n, v in mlp(random).items()})
    evidence = detector.compression_evidence(*attack)
    assert not evidence.conclusive
    assert not evidence.alarm
    assert evidence.p_value == pytest.approx(1 / 21)


@given(st.integers(1, 60), st.integers(0, 2**32))
@settings(max_examples=40)
def test_ranks_of_exchangeable_scores_are_valid_p_values(count: int, seed: int):
    """Over all places that the last one could have had, p <= a for a part of at most a of them; ties included."""
    scores = np.random.default_rng(seed).integers(0, max(2, count // 2), count).astype(np.float64)
    ps = np.array([rank_p_value(np.append(np.delete(scores, i), scores[i])) for i in range(count)])
    for level in ps:
        assert np.mean(ps <= level) <= level + 1e-12


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({}, MalformedEncoding),
        ({"indices": {"w": np.array([0, 1])}, "shapes": {}}, MalformedEncoding),
        ({"indices": {"w": np.array([1, 0])}, "shapes": {"w": (4,)}}, MalformedEncoding),
        ({"indices": {"w": np.array([0, 4])}, "shapes": {"w": (4,)}}, MalformedEncoding),
        ({"indices": {"w": np.array([-1, 2])}, "shapes": {"w": (4,)}}, MalformedEncoding),
        ({"indices": {"w": np.array([0, 1, 2])}, "shapes": {"w": (4,)}}, ShapeMismatch),
        ({"indices": {"v": np.array([0])}, "shapes": {"v": (4,)}}, ShapeMismatch),
    ],
)
def test_malformed_updates_are_refused(metadata: dict, error: type[Exception]):
    update = WorkerGradient("w", {"w": np.ones(2, np.float32)}, 1, 0.0)
    with pytest.raises(error):
        IntegratedAttackDetector().detect_compression_exploitation(update, metadata)


def test_values_that_are_not_finite_and_other_models_are_refused():
    bad = WorkerGradient("w", {"w": np.array([1, np.nan], np.float32)}, 1, 0.0)
    with pytest.raises(NonFiniteUpdate):
        IntegratedAttackDetector().learn(bad, {"indices": {"w": np.array([0, 1])}, "shapes": {"w": (4,)}})
    detector = IntegratedAttackDetector()
    detector.learn(*sparse(mlp(np.random.default_rng(0))))
    with pytest.raises(ShapeMismatch):
        detector.detect_compression_exploitation(*sparse(embedding(np.random.default_rng(0))))


# --- a noised aggregate ----------------------------------------------------------------------------------------------


@given(st.floats(0, 50), st.integers(1, 2000), st.floats(0.01, 10), st.floats(0, 3))
@settings(max_examples=60)
def test_the_length_test_is_never_more_eager_than_the_exact_law(signal: float, size: int, noise: float, excess: float):
    squared = (noise**2) * (size + (signal / noise) ** 2) * (1 + excess)
    exact = float(stats.ncx2.sf(squared / noise**2, size, max((signal / noise) ** 2, 1e-12)))
    bound = norm_p_value(squared, size, signal, noise)
    if not math.isnan(exact):  # scipy's series gives up far in the tail
        assert bound >= exact - 1e-9


def test_the_direction_test_is_the_z_test():
    for along in (-5.0, -1.0, -0.1):
        assert direction_p_value(along, 2.0) == pytest.approx(float(stats.norm.cdf(along / 2.0)))
    assert direction_p_value(0.5, 2.0) == 1.0


LAYERS = {"conv": (8, 3, 3), "fc": (20, 10), "bias": (10,)}
SIZE = sum(math.prod(s) for s in LAYERS.values())


def named(vector: np.ndarray) -> dict[str, np.ndarray]:
    parts, at = {}, 0
    for name, shape in LAYERS.items():
        parts[name] = vector[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    return parts


def released(random: np.random.Generator, signal: np.ndarray, noise: float) -> dict[str, np.ndarray]:
    return named(signal + noise * random.standard_normal(SIZE))


def test_false_alarms_on_noised_aggregates_are_as_rare_as_stated():
    """Honest signals of the largest length that is declared, in the direction's half-space, on its very edge."""
    random = np.random.default_rng(10)
    direction = np.zeros(SIZE)
    direction[0] = 1.0
    detector = IntegratedAttackDetector(0.05, noise_stddev=0.1, signal_norm=1.0, direction=named(direction))
    alarms = 0
    for _ in range(1000):
        signal = random.standard_normal(SIZE)
        signal[0] = 0.0
        alarms += detector.detect_dp_masking_attack([], released(random, signal / np.linalg.norm(signal), 0.1))
    assert alarms <= 1000 * 0.05 + 4 * math.sqrt(1000 * 0.05)
    # Not by never raising one: the direction test is exact and has half of alpha.
    assert alarms >= 1000 * 0.025 - 4 * math.sqrt(1000 * 0.025)


def test_a_strong_honest_signal_is_no_attack():
    """The specification's rule calls it one: a deviation of more than three times the noise's."""
    random = np.random.default_rng(11)
    signal = random.standard_normal(SIZE)
    signal *= 0.9 / np.linalg.norm(signal)
    found = released(random, signal, 1e-3)
    assert all(float(np.std(part)) > 3 * 1e-3 for part in found.values())
    detector = IntegratedAttackDetector(noise_stddev=1e-3, signal_norm=1.0, direction=named(signal))
    assert not detector.detect_dp_masking_attack([], found)


def test_attacks_on_the_aggregate_are_found():
    random = np.random.default_rng(12)
    direction = np.ones(SIZE)
    toward = direction / np.linalg.norm(direction)
    detector = IntegratedAttackDetector(0.01, noise_stddev=0.05, signal_norm=0.5, direction=named(direction))
    against = sum(detector.detect_dp_masking_attack([], released(random, -0.4 * toward, 0.05)) for _ in range(50))
    too_long = sum(detector.detect_dp_masking_attack([], released(random, 2.0 * toward, 0.05)) for _ in range(50))
    assert (against, too_long) == (50, 50)


def test_a_drift_below_each_rounds_noise_is_found_in_time_and_honest_runs_are_left_alone():
    random = np.random.default_rng(13)
    direction = named(np.eye(SIZE)[0])

    def first_alarm(shift: float, rounds: int) -> int | None:
        detector = IntegratedAttackDetector(0.01, noise_stddev=1.0, direction=direction)
        for i in range(rounds):
            if detector.watch(released(random, shift * np.eye(SIZE)[0], 1.0)).alarm:
                return i + 1
        return None

    # On the edge of the null hypothesis: at most 1 % of the *runs* ever raise an alarm.
    false_alarms = sum(first_alarm(0.0, 200) is not None for _ in range(100))
    assert false_alarms <= 100 * 0.01 + 4
    # Half a standard deviation a round: no single round shows it at this rate (2.33 would be needed).
    times = [first_alarm(-0.5, 200) for _ in range(20)]
    assert all(t is not None and t <= 150 for t in times)
    assert np.median([t for t in times if t is not None]) <= 70


@given(st.lists(st.floats(-5, 5), max_size=30))
@settings(max_examples=40)
def test_the_bet_is_fair(observations: list[float]):
    """Given the past, one more observation of N(0, 1) does not change the value's expectation (Gauss-Hermite)."""
    before = DriftEvidence()
    for x in observations:
        before = before.after(x)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    after = sum(w * before.after(float(x)).value for x, w in zip(nodes, weights, strict=True)) / math.sqrt(2 * math.pi)
    assert after == pytest.approx(before.value, rel=1e-6)
    assert before.peak >= max(1.0, before.value) - 1e-12


def test_what_was_not_declared_is_asked_for():
    aggregate = named(np.ones(SIZE))
    for detector in (
        IntegratedAttackDetector(),
        IntegratedAttackDetector(noise_stddev=1.0),
        IntegratedAttackDetector(signal_norm=1.0),
    ):
        with pytest.raises(ConfigurationError, match="noise_stddev"):
            detector.detect_dp_masking_attack([], aggregate)
    with pytest.raises(ConfigurationError, match="direction"):
        IntegratedAttackDetector(noise_stddev=1.0, signal_norm=1.0).watch(aggregate)
    pointed = IntegratedAttackDetector(noise_stddev=1.0, direction={"other": np.ones(SIZE)})
    with pytest.raises(ShapeMismatch):
        pointed.watch(aggregate)
    pointed.point(named(np.ones(SIZE)))
    assert not pointed.watch(aggregate).alarm
    with pytest.raises(NonFiniteUpdate):
        pointed.watch(named(np.full(SIZE, np.nan)))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, math.nan])
def test_a_rate_is_a_rate(alpha: float):
    with pytest.raises(ConfigurationError):
        IntegratedAttackDetector(alpha)


def test_updates_do_not_count_for_the_noised_aggregate():
    """An alarm that depended on single updates would be a release without noise."""
    detector = IntegratedAttackDetector(noise_stddev=1.0, signal_norm=1.0)
    wild = WorkerGradient("w", {"w": np.full(10, 1e9, np.float32)}, 1, 0.0)
    aggregate = named(np.zeros(SIZE))
    assert detector.detect_dp_masking_attack([wild] * 9, aggregate) == detector.detect_dp_masking_attack([], aggregate)
