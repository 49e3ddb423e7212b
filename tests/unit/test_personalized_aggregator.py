"""One call of ``PersonalizedFederatedAggregator``: the mean of what workers send, through all that is enabled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.errors import (
    ConfigurationError,
    DuplicateReport,
    EmptyAggregate,
    NonFiniteUpdate,
    ReportMismatch,
    ShapeMismatch,
    StaleReport,
    TooManyByzantine,
)
from client_sdk.protocol.meta_learning import META_ALGORITHMS
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref import PersonalizedFederatedAggregator, apply_update
from server_ref.aggregation.errors import BufferNotFull, PrivacyBudgetExhausted
from server_ref.aggregation.integrated_config import (
    AsyncConfig,
    CompressionConfig,
    FederatedConfig,
    PrivacyConfig,
    SecurityConfig,
)

KINDS = {"maml": "gradient", "fomaml": "gradient", "reptile": "delta", "per-fedavg": "gradient"}
MODEL = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}
SIZE = 8
MEAN = SecurityConfig(rule="mean", num_byzantine=0, buckets=None)


def plain(clip: float = 1e3, **sections: Any) -> FederatedConfig:
    given = {
        "compression": CompressionConfig(method="none"),
        "privacy": PrivacyConfig(enabled=False, max_grad_norm=clip),
        "security": MEAN,
    }
    return FederatedConfig(**given | sections)


def private(size: int, **privacy: Any) -> FederatedConfig:
    return plain(
        privacy=PrivacyConfig(**{"epsilon": 4.0, "max_grad_norm": 1.0, "rounds": 2} | privacy),
        async_config=AsyncConfig(buffer_size=size, max_staleness=0),
    )


def tensors(vector: np.ndarray) -> dict[str, np.ndarray]:
    return {"w": vector[:6].reshape(3, 2).astype(np.float32), "b": vector[6:].astype(np.float32)}


def flat(update: Any) -> np.ndarray:
    return np.concatenate([np.asarray(update["w"]).ravel(), np.asarray(update["b"])])


def worker(name: str, vector: np.ndarray, algorithm: str = "maml", **changes: Any) -> WorkerGradient:
    metadata = {"algorithm": algorithm, "inner_steps": 5, "inner_lr": 0.01} | changes.pop("metadata", {})
    facts = {"num_samples": 10, "timestamp": 0.0, "kind": UpdateKind(KINDS[algorithm])} | changes
    return WorkerGradient(name, tensors(vector), metadata=metadata, **facts)


def workers(vectors: np.ndarray, algorithm: str = "maml") -> list[WorkerGradient]:
    return [worker(f"d{i}", v, algorithm) for i, v in enumerate(vectors)]


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, SIZE)).astype(np.float32)


def clipped(vectors: np.ndarray, clip: float) -> np.ndarray:
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors * np.minimum(1.0, clip / np.maximum(norms, 1e-30))


# --- the mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
@given(
    vectors=hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(SIZE)), elements=st.floats(-50, 50, width=32)),
    clip=st.sampled_from([0.5, 10.0, 1e4]),
)
def test_an_aggregate_is_the_clipped_mean_and_of_the_algorithms_kind(algorithm: str, vectors: np.ndarray, clip: float):
    aggregator = PersonalizedFederatedAggregator(algorithm, config=plain(clip))
    update = aggregator.aggregate_with_personalization(workers(vectors, algorithm), MODEL)
    expected = clipped(vectors.astype(np.float64), clip).mean(axis=0)
    np.testing.assert_allclose(flat(update), expected, rtol=1e-5, atol=1e-6 * clip)
    assert update.kind == KINDS[algorithm]
    assert update.count == len(vectors)
    sign = 1 if KINDS[algorithm] == "delta" else -1
    after = apply_update(MODEL, update, learning_rate=0.5)
    np.testing.assert_allclose(flat(after), sign * 0.5 * flat(update), rtol=1e-6)


def test_per_fedavg_with_its_meta_rate_makes_the_mean_of_the_workers_weights():
    rng = np.random.default_rng(1)
    start, ends = rng.normal(size=SIZE), rng.normal(size=(4, SIZE))
    aggregator = PersonalizedFederatedAggregator("per-fedavg", config=plain(), meta_learning_rate=0.1)
    sent = workers((start - ends) / 0.1, "per-fedavg")
    update = aggregator.aggregate_with_personalization(sent, tensors(start))
    after = apply_update(tensors(start), update, learning_rate=aggregator.meta_learning_rate)
    np.testing.assert_allclose(flat(after), ends.mean(axis=0), atol=1e-6)


def test_calls_are_rounds_of_any_size():
    aggregator = PersonalizedFederatedAggregator(config=plain())
    for round_id, count in enumerate((3, 1, 7, 3)):
        assert aggregator.current_round == round_id
        vectors = drawn(count, round_id)
        update = aggregator.aggregate_with_personalization(workers(vectors), MODEL)
        np.testing.assert_allclose(flat(update), vectors.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    assert aggregator.pending == 0
    assert aggregator.config == plain(), "the buffer of the stream is as large as it was"


def test_a_model_of_torch_gets_tensors_back():
    torch = pytest.importorskip("torch")
    model = {name: torch.from_numpy(value) for name, value in MODEL.items()}
    update = PersonalizedFederatedAggregator(config=plain()).aggregate_with_personalization(workers(drawn(2)), model)
    assert all(isinstance(value, torch.Tensor) for value in update.values())


# --- who is refused -------------------------------------------------------------------------------------------

REFUSED = {
    "an ordinary delta": ({"kind": UpdateKind.DELTA}, ReportMismatch),
    "no kind at all": ({"kind": "weights"}, ReportMismatch),
    "another algorithm": ({"metadata": {"algorithm": "fomaml"}}, ReportMismatch),
    "no algorithm": ({"metadata": {"algorithm": None}}, ReportMismatch),
    "another K": ({"metadata": {"inner_steps": 4}}, ReportMismatch),
    "K that is no number": ({"metadata": {"inner_steps": "5"}}, ReportMismatch),
    "another rate": ({"metadata": {"inner_lr": 0.02}}, ReportMismatch),
    "a payload beside it": ({"metadata": {"meta_gradient": tensors(np.ones(SIZE))}}, ReportMismatch),
    "a model instead of an update": ({"metadata": {"fine_tuned_model": tensors(np.ones(SIZE))}}, ReportMismatch),
    "a version from the future": ({"metadata": {"model_version": 1}}, ReportMismatch),
    "a version that is none": ({"metadata": {"model_version": "0"}}, ReportMismatch),
}


@pytest.mark.parametrize(("changes", "error"), REFUSED.values(), ids=REFUSED)
def test_who_sends_something_else_is_refused_and_the_others_count(changes: dict[str, Any], error: type[Exception]):
    vectors = drawn(4)
    refusals = []
    aggregator = PersonalizedFederatedAggregator(config=plain(), on_rejected=refusals.append)
    sent = workers(vectors)
    sent[2] = worker("liar", vectors[2], **changes)
    update = aggregator.aggregate_with_personalization(sent, MODEL)
    np.testing.assert_allclose(flat(update), vectors[[0, 1, 3]].mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    assert [(r.worker_id, r.error, r.position) for r in refusals] == [("liar", error, 2)]
    assert aggregator.rejections == tuple(refusals)


def test_a_meta_rate_counts_where_it_says_what_was_sent():
    other = {"meta_lr": 0.5}
    reptile = PersonalizedFederatedAggregator("reptile", config=plain())
    assert reptile.aggregate_with_personalization([worker("d", drawn(1)[0], "reptile", metadata=other)], MODEL)
    per_fedavg = PersonalizedFederatedAggregator("per-fedavg", config=plain())
    with pytest.raises(EmptyAggregate):
        per_fedavg.aggregate_with_personalization([worker("d", drawn(1)[0], "per-fedavg", metadata=other)], MODEL)


def test_values_shapes_and_repetitions_are_refused_by_their_class():
    aggregator = PersonalizedFederatedAggregator(config=plain())
    broken = [worker("nan", np.full(SIZE, np.nan)), worker("other", drawn(1)[0])]
    broken[1].gradients = {"w": np.zeros(3, np.float32)}
    vectors = drawn(2)
    sent = [*workers(vectors), *broken, worker("d0", vectors[1])]
    update = aggregator.aggregate_with_personalization(sent, MODEL)
    np.testing.assert_allclose(flat(update), vectors.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    assert [(r.worker_id, r.error) for r in aggregator.rejections] == [
        ("nan", NonFiniteUpdate),
        ("other", ShapeMismatch),
        ("d0", DuplicateReport),
    ]


def test_nobody_left_changes_nothing():
    aggregator = PersonalizedFederatedAggregator(config=plain())
    for sent in ([], [worker("d0", drawn(1)[0], kind=UpdateKind.DELTA)]):
        with pytest.raises(EmptyAggregate):
            aggregator.aggregate_with_personalization(sent, MODEL)
    assert (aggregator.current_round, aggregator.pending, aggregator.config) == (0, 0, plain())
    with pytest.raises(ShapeMismatch):
        aggregator.aggregate_with_personalization(workers(drawn(2)), {"w": np.zeros(5, np.float32)})


def test_old_updates_weigh_less_and_too_old_ones_nothing():
    config = plain(async_config=AsyncConfig(buffer_size=2, max_staleness=1, staleness_exponent=1.0))
    aggregator = PersonalizedFederatedAggregator(config=config)
    for _ in range(2):
        aggregator.aggregate_with_personalization(workers(drawn(2)), MODEL)
    new, old, older = np.eye(3, SIZE)
    sent = [
        worker("new", new),
        worker("old", old, metadata={"model_version": 1}),
        worker("older", older, metadata={"model_version": 0}),
    ]
    update = aggregator.aggregate_with_personalization(sent, MODEL)
    assert flat(update)[:3].tolist() == [0.5, 0.25, 0.0]
    assert [(r.worker_id, r.error) for r in aggregator.rejections] == [("older", StaleReport)]


def test_the_stream_refuses_them_too_and_its_buffer_keeps_what_it_has():
    config = plain(async_config=AsyncConfig(buffer_size=2, max_staleness=0))
    aggregator = PersonalizedFederatedAggregator(config=config, model_state=MODEL)
    vectors = drawn(2)
    assert aggregator.process_worker_gradient(worker("d0", vectors[0]), 0) is None
    with pytest.raises(ReportMismatch):
        aggregator.process_worker_gradient(worker("liar", vectors[0], kind=UpdateKind.DELTA), 0)
    with pytest.raises(ConfigurationError, match="wait in the open buffer"):
        aggregator.aggregate_with_personalization(workers(vectors), MODEL)
    update = aggregator.process_worker_gradient(worker("d1", vectors[1]), 0)
    assert update is not None
    np.testing.assert_allclose(flat(update), vectors.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)


# --- with the rest of the pipeline ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["multi-krum", "trimmed-mean", "median", "geometric-median"])
@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_a_rule_stands_attackers_on_what_they_send(algorithm: str, rule: str):
    honest = 1.0 + 0.1 * drawn(9)
    attack = np.full((3, SIZE), -100.0, np.float32)
    security = SecurityConfig(rule=rule, num_byzantine=3, buckets=None)
    sent = workers(np.concatenate([honest, attack]), algorithm)
    found = PersonalizedFederatedAggregator(algorithm, config=plain(security=security))
    update = found.aggregate_with_personalization(sent, MODEL)
    assert np.abs(flat(update) - honest.mean(axis=0)).max() < 0.3
    mean = PersonalizedFederatedAggregator(algorithm, config=plain())
    assert np.abs(flat(mean.aggregate_with_personalization(sent, MODEL)) - honest.mean(axis=0)).max() > 10


def test_fewer_workers_than_a_rule_stands_are_refused_before_any_counts():
    security = SecurityConfig(rule="multi-krum", num_byzantine=3, buckets=None)
    aggregator = PersonalizedFederatedAggregator(config=plain(security=security))
    with pytest.raises(TooManyByzantine):
        aggregator.aggregate_with_personalization(workers(drawn(5)), MODEL)
    sent = [*workers(drawn(8)), worker("liar", drawn(1)[0], kind=UpdateKind.DELTA)]
    with pytest.raises(TooManyByzantine):
        aggregator.aggregate_with_personalization(sent, MODEL)
    assert aggregator.pending == 0
    assert aggregator.aggregate_with_personalization(workers(drawn(9)), MODEL).count == 9


def test_topk_payloads_are_decoded_then_clipped():
    config = plain(clip=2.0, compression=CompressionConfig(method="topk", ratio=0.25))
    aggregator = PersonalizedFederatedAggregator(config=config, model_state=MODEL)
    vectors = drawn(3) * np.array([[1.0], [1.0], [100.0]], np.float32)
    sent = []
    for i, vector in enumerate(vectors):
        sent.append(worker(f"d{i}", vector))
        sent[-1].gradients = {}
        sent[-1].metadata |= {"payload": aggregator.encode_update(tensors(vector), 0)}
    kept = np.zeros_like(vectors, np.float64)
    for row, vector in zip(kept, vectors, strict=True):
        largest = np.argsort(-np.abs(vector))[:2]
        row[largest] = vector[largest]
    update = aggregator.aggregate_with_personalization(sent, MODEL)
    np.testing.assert_allclose(flat(update), clipped(kept, 2.0).mean(axis=0), rtol=1e-5, atol=1e-7)


def test_a_private_aggregate_is_paid_for_clipped_and_of_a_declared_size():
    size = 20
    aggregator = PersonalizedFederatedAggregator(config=private(size))
    vectors = 100 * drawn(size)
    with pytest.raises(BufferNotFull):
        aggregator.aggregate_with_personalization(workers(vectors)[:-1], MODEL)
    assert aggregator.ledger is not None
    assert not aggregator.ledger.events, "nothing was released"
    assert aggregator.pending == size - 1, "and nobody is lost"
    with pytest.raises(ConfigurationError, match="2 more"):
        aggregator.aggregate_with_personalization([worker("x", vectors[0]), worker("y", vectors[1])], MODEL)
    update = aggregator.aggregate_with_personalization(workers(vectors)[-1:], MODEL)
    assert len(aggregator.ledger.events) == 1
    noise = flat(update) - clipped(vectors, 1.0).mean(axis=0)
    stddev = update.measurements["noise_stddev"]
    assert stddev == pytest.approx(aggregator.noise_multiplier / size)
    assert 0 < np.abs(noise).max() < 8 * stddev


def test_a_private_budget_ends():
    aggregator = PersonalizedFederatedAggregator(config=private(4, rounds=1))
    aggregator.aggregate_with_personalization(workers(drawn(4)), MODEL)
    with pytest.raises(PrivacyBudgetExhausted):
        aggregator.aggregate_with_personalization(workers(drawn(4)), MODEL)


# --- what both sides agree on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_the_plan_asks_for_what_the_aggregator_takes(algorithm: str):
    aggregator = PersonalizedFederatedAggregator(algorithm, 3, 0.25, plain(), meta_learning_rate=0.125)
    plan = aggregator.training_plan(batch_size=8, query_fraction=0.5)
    assert (plan.algorithm, plan.batch_size, plan.learning_rate) == (algorithm, 8, 0.25)
    assert plan.meta is not None
    assert (plan.meta.inner_steps, plan.meta.query_fraction, plan.meta.meta_learning_rate) == (3, 0.5, 0.125)
    assert plan.update_kind == aggregator.kind == KINDS[algorithm]
    said = aggregator.describe()
    assert f"{algorithm}: 3 steps of 0.25" in said
    assert ("subtracted" if aggregator.kind is UpdateKind.GRADIENT else "added") in said


@pytest.mark.parametrize(
    "settings",
    [
        {"meta_learning_algorithm": "fedavg"},
        {"personalization_steps": 0},
        {"personalization_lr": 0.0},
        {"personalization_lr": float("nan")},
        {"meta_learning_rate": -1.0},
    ],
    ids=str,
)
def test_what_no_device_could_train_is_refused_at_once(settings: dict[str, Any]):
    with pytest.raises(ConfigurationError):
        PersonalizedFederatedAggregator(config=plain(), **settings)
