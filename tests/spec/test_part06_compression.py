"""Part 6 of the specification: sparse updates, error feedback, and what really crosses the network."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.updates import WorkerGradient
from server_ref import CompressedGradientAggregator, GradientAggregator, apply_update
from tests import digits

MILLION = 1_000_000


def drawn(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def test_compression_ratio():
    """Test: Compress 10M parameter gradient with ratio=0.01.

    Expected: Only 100k values transmitted, 100x reduction. Holds, of the values by construction, and of the bytes for
    these (normal) ones: 3.87 bytes for each value and its place, because both are entropy-coded.
    """
    gradient = {
        "conv": torch.from_numpy(drawn(4 * MILLION)).reshape(1000, 4000),
        "fc": torch.from_numpy(drawn(6 * MILLION, 1)),
    }
    aggregator = CompressedGradientAggregator(compression_ratio=0.01)
    compressed, metadata = aggregator.compress_gradient(gradient, "worker")
    assert metadata["num_values"] == sum(values.numel() for values in compressed.values()) == 100_000
    assert metadata["num_bytes"] == len(metadata["payload"])
    dense_bytes = 4 * 10 * MILLION
    assert dense_bytes / 110 < metadata["num_bytes"] < dense_bytes / 100
    restored = aggregator.decompress_gradient(compressed, metadata)
    for name, tensor in gradient.items():
        sent = restored[name] != 0
        assert torch.equal(restored[name][sent], tensor[sent])
    smallest_sent = min(float(values.abs().min()) for values in compressed.values())
    largest_kept = max(float(t[restored[name] == 0].abs().max()) for name, t in gradient.items())
    assert largest_kept <= smallest_sent


def train(aggregator, rounds: int, workers: int = 10) -> tuple[list[float], float]:
    """Losses and final accuracy of softmax regression on the digits, each worker's update compressed if it can be."""
    parts, state, losses = digits.shards(workers), digits.start(), []
    for _ in range(rounds):
        updates = []
        for i, shard in enumerate(parts):
            update = digits.worker(f"worker-{i}", state, shard)
            if isinstance(aggregator, CompressedGradientAggregator):
                compressed, metadata = aggregator.compress_gradient(update.gradients, update.worker_id)
                update = WorkerGradient(update.worker_id, compressed, update.num_samples, 0.0, metadata)
            updates.append(update)
        state = apply_update(state, aggregator.aggregate(updates, state), learning_rate=0.5)
        losses.append(digits.loss(state, parts))
    return losses, digits.accuracy(state, parts)


def test_error_feedback_convergence():
    """Test: Train with compression (1%) + error feedback vs. without error feedback.

    Expected: With error feedback, convergence only 5% slower than dense. Holds, with 6 of 650 values a worker and
    round: after a slower start (1.15 times the rounds to a loss of 0.6) it takes 0.94 times the dense run's rounds to
    0.4, and its accuracy is within 1 %. Without error feedback neither is reached at all.
    """
    rounds = 180
    dense, dense_accuracy = train(GradientAggregator(), rounds)
    feedback, accuracy = train(CompressedGradientAggregator(0.01, "topk", error_feedback=True), rounds)
    without, poor_accuracy = train(CompressedGradientAggregator(0.01, "topk", error_feedback=False), rounds)
    slower = {t: digits.rounds_to(feedback, t) / digits.rounds_to(dense, t) for t in (0.6, 0.4, 0.3)}
    assert slower[0.6] <= 1.2
    assert slower[0.4] <= 1.05
    assert slower[0.3] <= 1.05
    assert accuracy >= dense_accuracy - 0.01
    assert min(without) > 0.6
    assert poor_accuracy < dense_accuracy - 0.05


STABLE = """
import hashlib, json, torch
from server_ref import CompressedGradientAggregator
torch.manual_seed(6)
tensor = torch.round(torch.randn(100_000) * 4) / 4
_, metadata = CompressedGradientAggregator(0.01).compress_gradient({"w": tensor}, "worker")
print(json.dumps(hashlib.sha256(metadata["payload"]).hexdigest()))
"""


def test_topk_stability():
    """Test: Top-k indices should be deterministic for same input.

    Expected: Bit-exact reproducibility across runs. Holds across processes too, and where magnitudes tie (they do,
    here: the values are quarters) the lowest index is sent.
    """
    torch.manual_seed(6)
    tensor = torch.round(torch.randn(100_000) * 4) / 4
    runs = [CompressedGradientAggregator(0.01).compress_gradient({"w": tensor.clone()}, "worker") for _ in range(3)]
    assert len({metadata["payload"] for _, metadata in runs}) == 1
    expected = np.sort(np.argsort(-np.abs(tensor.numpy()), kind="stable")[:1000])
    magnitudes = np.abs(tensor.numpy())
    assert np.count_nonzero(magnitudes == magnitudes[expected].min()) > np.count_nonzero(
        magnitudes[expected] == magnitudes[expected].min()
    ), "there is a tie at the edge"
    assert runs[0][1]["indices"]["w"].tolist() == expected.tolist()
    there = subprocess.run([sys.executable, "-c", STABLE], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == hashlib.sha256(runs[0][1]["payload"]).hexdigest()


def received_over_a_socket(payload: bytes) -> bytes:
    """What arrives at the other end of a connection, to the last byte."""
    sender, receiver = socket.socketpair()
    with sender, receiver:

        def send() -> None:
            sender.sendall(payload)
            sender.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        received = b"".join(iter(lambda: receiver.recv(65536), b""))
        thread.join()
    return received


NORMAL = drawn(MILLION)
HEAVY = np.random.default_rng(3).standard_cauchy(MILLION).astype(np.float32)


@pytest.mark.parametrize(
    ("flat", "options", "line", "share"),
    [
        (NORMAL, {}, "topk:0.01", 0.967),
        (HEAVY, {}, "topk:0.01", 1.066),
        (NORMAL, {"value_bits": 8}, "topk:0.01,bits=8", 0.454),
        (HEAVY, {"value_bits": 8}, "topk:0.01,bits=8", 0.334),
        (NORMAL, {"compression_method": "randomk"}, "randomk:0.01,feedback=on", 0.842),
        (HEAVY, {"compression_method": "randomk"}, "randomk:0.01,feedback=on", 0.906),
    ],
)
def test_communication_cost(flat: np.ndarray, options: dict, line: str, share: float):
    """Test: Measure actual bytes sent over network.

    Expected: Compressed = dense_size x compression_ratio. No equality can hold: that formula forgets the coordinates,
    and does not know that both they and the values have patterns. Of a million values at 1 % it says 40,000 bytes.
    Measured are 0.97 times that for normal values and 1.07 times for heavy tails (at most 1.27 times, for whatever
    there is), less than half with 8-bit values, and 0.84 to 0.91 for random-k, which sends no coordinates: a public
    seed says which.
    """
    aggregator = CompressedGradientAggregator(0.01, **options)
    compressed, metadata = aggregator.compress_gradient({"w": flat}, "worker")
    received = received_over_a_socket(metadata["payload"])
    formula = 4 * MILLION * 0.01
    assert len(received) == metadata["num_bytes"] == aggregator.stats.sent_bytes
    assert len(received) / formula == pytest.approx(share, abs=0.01)
    codec = Codec(CompressionSpec.parse(line), MILLION)
    assert len(received) <= codec.max_bytes <= 1.27 * formula
    decoded = codec.decode(received, metadata["seed"])
    assert decoded.tobytes() == aggregator.decompress_gradient(compressed, metadata)["w"].tobytes()
    assert np.count_nonzero(decoded) <= 10_000
