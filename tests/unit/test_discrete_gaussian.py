"""The discrete Gaussian sampler: its distribution is the stated one, and the tests here would notice another."""

from __future__ import annotations

import decimal
import math
import os
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from client_sdk.protocol import discrete_gaussian
from client_sdk.protocol.discrete_gaussian import _Law, _survives, _Words, sample
from client_sdk.protocol.errors import ConfigurationError

SAMPLES = 100_000
# A right sampler fails a test at this level once in 100,000 sets of random words; the words here are fixed.
LEVEL = 1e-5

Sampler = Callable[[int, Fraction], np.ndarray]


def fixed(seed: int) -> Callable[[int], bytes]:
    """Random bytes that repeat: for tests, and for nothing else."""
    return np.random.default_rng(seed).bytes


def exactly(n: int, variance: Fraction) -> np.ndarray:
    return sample(n, variance, fixed(int(variance * 10**6) % 2**32))


def pmf(variance: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """Integers within 9 sigma and their probabilities, by definition."""
    reach = math.ceil(9 * math.sqrt(variance)) + 2
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(support**2) / (2 * float(variance)))
    return support, weights / weights.sum()


def cells_of(expected: np.ndarray, n: int) -> np.ndarray:
    """Neighbouring integers together, so that each cell expects ten samples: a cell number for each."""
    cells, mass = np.zeros(expected.size, np.int64), 0.0
    for i, p in enumerate(expected):
        cells[i] = cells[i - 1] + 1 if i and mass >= 10 / n else (cells[i - 1] if i else 0)
        mass = p if cells[i] != cells[max(0, i - 1)] else mass + p
    cells[cells == cells[-1]] = cells[-1] - 1 if mass < 10 / n else cells[-1]
    return cells


def p_value(found: np.ndarray, variance: Fraction) -> float:
    """Chi-square against the exact probabilities."""
    support, expected = pmf(variance)
    cells = cells_of(expected, found.size)
    inside = np.clip(found, support[0], support[-1]) - support[0]
    observed = np.bincount(cells[inside], minlength=cells[-1] + 1)
    wanted = np.bincount(cells, weights=expected) * found.size
    return float(stats.chisquare(observed, wanted * (found.size / wanted.sum())).pvalue)


def power(variance: Fraction, other: np.ndarray) -> float:
    """Probability that the test at LEVEL notices samples with these probabilities on the support."""
    _, expected = pmf(variance)
    cells = cells_of(expected, SAMPLES)
    p, q = np.bincount(cells, weights=expected), np.bincount(cells, weights=other)
    threshold = stats.chi2.isf(LEVEL, p.size - 1)
    return float(stats.ncx2.sf(threshold, p.size - 1, SAMPLES * float(((q - p) ** 2 / p).sum())))


# One bucket a value up to sigma = 16, then buckets of 2, 5 and 12; variances with small and huge denominators.
VARIANCES = [
    Fraction(1, 10),
    Fraction(1, 2),
    Fraction(1),
    Fraction(10, 3),
    Fraction(9),
    Fraction(255),
    Fraction(256),
    Fraction(1601),
    Fraction(0.7) * 10_000,
]


@pytest.mark.parametrize("variance", VARIANCES, ids=lambda v: f"{float(v):.4g}")
def test_the_distribution_is_the_exact_one(variance):
    assert p_value(exactly(SAMPLES, variance), variance) > LEVEL


def rounded_normal(n: int, variance: Fraction) -> np.ndarray:
    return np.rint(np.random.default_rng(5).normal(0, math.sqrt(variance), n)).astype(np.int64)


def zero_twice(n: int, variance: Fraction) -> np.ndarray:
    found = exactly(2 * n, variance)
    zeros = np.count_nonzero(found == 0)
    return np.random.default_rng(6).permutation(np.concatenate([found, np.zeros(zeros, np.int64)]))[:n]


def without_rejection(n: int, variance: Fraction) -> np.ndarray:
    class AcceptsAll(_Law):
        def _accepts(self, rest, *_):
            return np.ones(rest.size, np.bool_)

    law, words = _Law.of(variance), _Words(fixed(7))
    return AcceptsAll(variance, law.width, law.thresholds).draw(2 * n, words)[:n]


def variance_too_small(n: int, variance: Fraction) -> np.ndarray:
    return exactly(n, variance * Fraction(92, 100))


@pytest.mark.parametrize(
    ("wrong", "variance"),
    [
        (rounded_normal, Fraction(1, 2)),
        (rounded_normal, Fraction(1)),
        (zero_twice, Fraction(9)),
        (without_rejection, Fraction(1601)),
        (without_rejection, Fraction(7000)),
        *((variance_too_small, v) for v in VARIANCES),
    ],
)
def test_a_wrong_sampler_is_noticed(wrong: Sampler, variance):
    assert p_value(wrong(SAMPLES, variance), variance) < LEVEL


@pytest.mark.parametrize("variance", VARIANCES, ids=lambda v: f"{float(v):.4g}")
def test_the_power_of_the_test_is_as_stated(variance):
    """A variance 8 % too small is noticed in at least 98 of 100 sets of samples, whatever the variance."""
    support, _ = pmf(variance)
    weights = np.exp(-(support**2) / (2 * 0.92 * float(variance)))
    assert power(variance, weights / weights.sum()) > 0.98


@pytest.mark.parametrize("sigma", [1000, 2**24 + 1, 37306 * 2**24, 2**40, 2**56])
def test_large_samples_are_those_of_a_normal_distribution(sigma):
    """By its shape nobody can tell a large discrete Gaussian from a normal one; by its low bits, one can."""
    found = sample(SAMPLES, sigma * sigma, fixed(sigma % 1009))
    assert stats.kstest(found / sigma, "norm", method="asymp").pvalue > LEVEL
    assert abs(found.mean()) < 5 * sigma / math.sqrt(SAMPLES)
    assert abs((found / sigma).var() - 1) < 5 * math.sqrt(2 / SAMPLES)
    for modulus in (2, 7, 256):
        observed = np.bincount(found % modulus, minlength=modulus)
        assert stats.chisquare(observed).pvalue > LEVEL


@pytest.mark.parametrize("sigma", [2**24 + 1, 2**56])
def test_normals_rounded_from_float32_would_be_noticed(sigma):
    found = np.rint(np.random.default_rng(1).standard_normal(SAMPLES, np.float32) * np.float32(sigma)).astype(np.int64)
    assert stats.chisquare(np.bincount(found % 256, minlength=256)).pvalue < LEVEL


@pytest.mark.parametrize("exponent", [Fraction(0), Fraction(1, 7), Fraction(1), Fraction(5, 2), Fraction(40)])
def test_an_event_of_probability_exp_minus_x(exponent):
    words = _Words(fixed(2))
    happened = sum(_survives(exponent, words) for _ in range(4000))
    assert stats.binomtest(happened, 4000, math.exp(-exponent)).pvalue > LEVEL


def test_proposals_beyond_eight_sigma_are_accepted_as_seldom_as_they_should():
    """They come up once in 10**15 samples, so they are given here."""
    law = _Law.of(Fraction(1600))
    reach = 2 * law.width * 70 + 3
    accepted = law._accepts(np.full(4000, 3), np.full(4000, reach), _Words(fixed(3))).sum()
    assert stats.binomtest(int(accepted), 4000, math.exp(-3 * reach / 3200)).pvalue > LEVEL


class _Scripted(_Words):
    """Words of a script, then zeros."""

    def __init__(self, *script: int) -> None:
        self._script = list(script)

    def draw(self, n: int) -> np.ndarray:
        taken = [self._script.pop(0) if self._script else 0 for _ in range(n)]
        return np.array(taken, np.uint64)


@pytest.mark.parametrize("variance", [Fraction(1, 10), Fraction(9), Fraction(1601)])
def test_words_equal_to_a_threshold_are_decided_by_further_bits(variance):
    law = _Law.of(variance)
    for bucket, threshold in enumerate(law.thresholds[:-1].tolist()):
        assert law._buckets(3, _Scripted(threshold - 1, threshold + 1, 0)).tolist() == [bucket, bucket + 1, 0]
        assert law._buckets(1, _Scripted(threshold, 0)).tolist() == [bucket]
        assert law._buckets(1, _Scripted(threshold, 2**64 - 1)).tolist() == [bucket + 1]


def test_the_last_threshold_hides_a_tail_that_goes_on():
    law = _Law.of(Fraction(1))
    last = 2**64 - 1
    assert law.thresholds[-1] == last
    buckets = [law.resolve(last, _Scripted(*[last] * k)) for k in range(6)]
    assert buckets == sorted(buckets)
    assert buckets[0] == law.thresholds.size - 1
    # Each further word of ones leaves 2**-64 of the tail: exp(-k**2 / 2) falls as fast.
    assert buckets[5] == pytest.approx(math.sqrt(2 * 6 * 64 * math.log(2)), abs=1)


@pytest.mark.parametrize("variance", [Fraction(1, 3), Fraction(200), Fraction(2**112)])
def test_the_thresholds_are_those_of_a_computation_with_200_digits(variance):
    law = _Law.of(variance)
    with decimal.localcontext(decimal.Context(prec=200)):
        weights = [
            (-decimal.Decimal((k * law.width) ** 2) / (2 * variance.numerator) * variance.denominator).exp()
            for k in range(2000 if variance > 100 else 60)
        ]
        total = sum(weights)
        expected = [int(sum(weights[: k + 1]) / total * 2**64) for k in range(law.thresholds.size)]
    assert law.thresholds.tolist() == expected


@pytest.mark.parametrize("bound", [1, 2, 3, 2**31, 2**61 - 1, 2**62 - 2**30])
def test_uniform_integers_are_uniform_and_below_their_bound(bound):
    found = _Words(fixed(9)).below(bound, 20_000)
    assert 0 <= found.min() <= found.max() < bound
    if bound > 1:
        shares = np.bincount(found * min(bound, 50) // bound if bound < 2**50 else found // (bound // 50))[:50]
        assert stats.chisquare(shares).pvalue > LEVEL


def test_words_that_would_make_an_integer_likelier_are_drawn_again():
    bound = 2**62 - 1
    beyond = 2**64 - 2**64 % bound
    assert _Scripted(beyond, 5, beyond + 1, beyond, 7).below(bound, 3).tolist() == [0, 5, 7]


@pytest.mark.parametrize("n", [0, 1, 5, 40_000])
def test_as_many_as_asked_for(n):
    found = sample(n, 1000)
    assert found.shape == (n,)
    assert found.dtype == np.int64


def test_noise_comes_from_the_operating_system_and_never_repeats(monkeypatch):
    asked = []

    def urandom(n: int) -> bytes:
        asked.append(n)
        return os.urandom(n)

    assert sample.__defaults__ == (os.urandom,)
    first, second = sample(64, 10**6, urandom), sample(64, 10**6, urandom)
    assert asked == [32, 32]
    assert not np.array_equal(first, second)
    assert not np.array_equal(sample(64, 10**6), sample(64, 10**6))


def test_the_same_random_bytes_give_the_same_samples():
    assert np.array_equal(sample(100_000, 12_345, fixed(1)), sample(100_000, 12_345, fixed(1)))


@pytest.mark.parametrize("bad", [0, -1, Fraction(-1, 2), 2**112 + 1, 1.0, True, "1", None])
def test_a_variance_is_a_positive_rational_number(bad):
    with pytest.raises(ConfigurationError, match="variance"):
        sample(1, bad)


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(ConfigurationError):
        sample(-1, 1)


def test_the_largest_variance_fits_int64():
    law = _Law.of(Fraction(discrete_gaussian.LARGEST_VARIANCE))
    assert 2 * law.width * (law.thresholds.size + 100) < 2**63
