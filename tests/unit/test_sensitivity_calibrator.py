"""The sensitivity of compressed updates: C, attained, and never less unless something enforces less."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.clipping import clip_global
from client_sdk.protocol.compression.selection import top_k
from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.errors import UnknownSensitivity
from server_ref.aggregation.sensitivity_calibrator import SensitivityCalibrator


def compressed(update: np.ndarray, count: int, clip_norm: float) -> np.ndarray:
    """What a device adds to the sum: its k largest values, clipped."""
    kept = np.zeros_like(update)
    chosen = top_k(update, count)
    kept[chosen] = update[chosen]
    return clip_global(kept, clip_norm).vector.astype(np.float64)


@given(st.integers(1, 200), st.floats(0.01, 1.0), st.floats(1e-3, 1e3), st.integers(0, 2**32))
@settings(max_examples=50)
def test_no_update_moves_the_sum_further(size: int, ratio: float, clip_norm: float, seed: int):
    random = np.random.default_rng(seed)
    count = max(1, round(ratio * size))
    one, other = (compressed(random.standard_cauchy(size).astype(np.float32), count, clip_norm) for _ in range(2))
    zero_out = SensitivityCalibrator().compute_sensitivity(ratio, clip_norm)
    replace = SensitivityCalibrator(Adjacency.REPLACE_ONE).compute_sensitivity(ratio, clip_norm)
    assert np.linalg.norm(one) <= zero_out * (1 + 1e-12)
    assert np.linalg.norm(one - other) <= replace * (1 + 1e-12)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 1.0])
def test_a_sparse_update_attains_it_so_that_sqrt_ratio_is_wrong(ratio: float):
    size, clip_norm = 1000, 2.0
    count = round(ratio * size)
    update = np.zeros(size, np.float32)
    update[:count] = 5.0
    moved = float(np.linalg.norm(compressed(update, count, clip_norm)))
    claimed = SensitivityCalibrator().compute_sensitivity(ratio, clip_norm)
    assert moved == pytest.approx(claimed, rel=1e-6)
    if ratio < 1:
        assert moved > 1.5 * clip_norm * math.sqrt(ratio)


def test_what_clipping_enforces_may_be_used():
    enforced = math.sqrt(0.01)
    calibrator = SensitivityCalibrator()
    assert calibrator.compute_sensitivity(0.01, 1.0, method="randomk", enforced_clip_norm=enforced) == enforced
    # The factor that makes random-k unbiased is free after the noise only.
    assert calibrator.compute_sensitivity(0.01, 1.0, method="randomk", unbiased_before_noise=True) == 100.0


def test_replacing_counts_twice():
    assert SensitivityCalibrator(Adjacency.REPLACE_ONE).compute_sensitivity(0.01, 3.0) == 6.0


@pytest.mark.parametrize(
    ("method", "error_feedback"), [("topk", True), ("randomk", True), ("sketch", False), ("sketch", True)]
)
def test_no_sensitivity_where_nothing_bounds_the_sum(method: str, error_feedback: bool):
    with pytest.raises(UnknownSensitivity):
        SensitivityCalibrator().compute_sensitivity(
            0.1, 1.0, method=method, error_feedback=error_feedback, clipped="before"
        )
    clipped_after = SensitivityCalibrator().compute_sensitivity(0.1, 1.0, method=method, error_feedback=error_feedback)
    assert clipped_after == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"compression_ratio": 0.0, "clip_norm": 1.0},
        {"compression_ratio": 1.5, "clip_norm": 1.0},
        {"compression_ratio": math.nan, "clip_norm": 1.0},
        {"compression_ratio": 0.5, "clip_norm": 0.0},
        {"compression_ratio": 0.5, "clip_norm": math.inf},
        {"compression_ratio": 0.5, "clip_norm": 1.0, "enforced_clip_norm": -1.0},
        {"compression_ratio": 0.5, "clip_norm": 1.0, "unbiased_before_noise": True},
    ],
)
def test_nonsense_is_refused(arguments: dict[str, float]):
    with pytest.raises(ConfigurationError):
        SensitivityCalibrator().compute_sensitivity(**arguments)
