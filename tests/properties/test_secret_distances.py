"""Distances between secret updates: exact, nothing but distances, and Krum selects what it selects in the clear."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol import sealing
from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError, ShapeMismatch, TooManyByzantine
from client_sdk.protocol.field import MERSENNE_61, MERSENNE_127, Field
from client_sdk.protocol.privacy import EncodedBounds
from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.shamir import Scheme, reconstruct, reconstruct_degree, share
from server_ref.aggregation.robust import apply_rule
from server_ref.secure.canonical import encode
from server_ref.secure.distance_messages import DistanceRequest, DistanceShare, ZeroKeys
from server_ref.secure.distance_opening import open_distances
from server_ref.secure.distance_rules import DISTANCE_LEAKAGE, DistanceSettings
from server_ref.secure.distances import SecretDistances, distance_settings, squared_distances
from server_ref.secure.errors import (
    AnswerRejected,
    CohortTooSmall,
    DistancesInconsistent,
    DistancesRefused,
    NotEnoughAggregators,
    ZeroKeyRejected,
)
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.integer_krum import integer_krum
from server_ref.secure.messages import ReportRef
from server_ref.secure.parameters import CheckingMode, PinnedParameters
from server_ref.secure.zero_sharing import KEY_BYTES, key_holders, zero_shares
from tests.secure_parties import TASK, hex_id, pinned_privacy

FIELDS = (MERSENNE_61, MERSENNE_127)
SCHEMES = [(2, 3), (2, 4), (3, 5), (3, 6), (3, 7), (4, 7)]


def parameters(threshold: int = 3, n: int = 5, **changes: object) -> PinnedParameters:
    values = {"num_aggregators": n, "threshold": threshold, "min_cohort": 3, "clip_norm": 1.0, "fraction_bits": 10,
              "checking": CheckingMode.PROJECTIONS} | changes  # fmt: skip
    return PinnedParameters(**values)


@dataclass
class Cohort:
    """Reports with plain codes, shared among aggregators that compare them."""

    parameters: PinnedParameters
    codes: np.ndarray
    keys: list[AggregatorKeys]

    @property
    def settings(self) -> DistanceSettings:
        return distance_settings(self.parameters)

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.parameters.threshold, self.parameters.num_aggregators, self.settings.field)

    def config(self, index: int) -> AggregatorConfig:
        return AggregatorConfig(
            index=index, parameters=self.parameters, peers=tuple(k.public for k in self.keys), task=TASK
        )

    def aggregator(self, index: int) -> SecretDistances:
        return SecretDistances(self.config(index), self.keys[index - 1], TASK.task_id, self.codes.shape[1])

    def request(self, round_id: int = 0, count: int | None = None) -> DistanceRequest:
        reports = [
            ReportRef(report_id=hex_id(i, "report"), digest=f"{i:064x}") for i in range(count or len(self.codes))
        ]
        return DistanceRequest(task_id=TASK.task_id, round_id=round_id, reports=tuple(reports))

    def rows(self) -> list[list[np.ndarray]]:
        """For each aggregator its shares, each with one element more than is compared (the mask's)."""
        field = self.settings.field
        longer = np.concatenate([self.codes, np.full((len(self.codes), 1), 12345)], axis=1)
        shares = [share(field.from_signed(row), self.scheme) for row in longer]
        return [list(of_one) for of_one in zip(*shares, strict=True)]

    def dealt(self, request: DistanceRequest) -> list[ZeroKeys]:
        return [self.aggregator(i).deal(request) for i in self.scheme.indices]

    def answers(
        self, request: DistanceRequest, rows: list[list[np.ndarray]], dealt: Sequence[ZeroKeys] | None = None
    ) -> list[DistanceShare]:
        dealt = self.dealt(request) if dealt is None else dealt
        return [
            self.aggregator(i).answer(request, [d.for_receiver(i) for d in dealt], rows[i - 1])
            for i in self.scheme.indices
        ]

    def open(self, request: DistanceRequest, answers: Sequence[DistanceShare]) -> list[int]:
        return open_distances(request, answers, self.settings, self.config(1).signed)


@cache
def keys_of(n: int) -> tuple[AggregatorKeys, ...]:
    return tuple(AggregatorKeys.generate(SealingSuite.X25519) for _ in range(n))


def cohort(codes: np.ndarray, threshold: int = 3, n: int = 5, **changes: object) -> Cohort:
    return Cohort(parameters(threshold, n, **changes), codes, list(keys_of(n)))


def plain_distances(codes: np.ndarray) -> list[int]:
    rows = codes.tolist()
    return [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(rows, 2)]


def plain_krum(codes: np.ndarray, f: int, m: int) -> tuple[int, ...]:
    """By the definition, in Python integers."""
    rows = codes.tolist()
    n = len(rows)

    def score(i: int) -> int:
        others = sorted(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in range(n) if j != i)
        return sum(others[: max(n - f - 2, 1)])

    return tuple(sorted(sorted(range(n), key=lambda i: (score(i), i))[:m]))


# --- the selection ---------------------------------------------------------------------------------------------------


@given(st.sampled_from(SCHEMES), st.sampled_from(FIELDS), st.data())
@settings(max_examples=25, deadline=None)
def test_secret_krum_selects_what_plain_krum_selects(scheme: tuple[int, int], field: Field, data: st.DataObject):
    """Distances are the plain integers; the selection is the plain one; the selected sum is the plain one."""
    n = data.draw(st.integers(5, 9))
    f = data.draw(st.integers(0, (n - 3) // 2))
    size = data.draw(st.integers(1, 12))
    # Few values, so that ties are frequent.
    largest = data.draw(st.sampled_from([1, 3, 400]))
    codes = np.array(data.draw(st.lists(st.lists(st.integers(-largest, largest), min_size=size, max_size=size),
                                        min_size=n, max_size=n)), np.int64)  # fmt: skip
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n))
    parties = cohort(codes, *scheme, field=field.name, clip_norm=2.0)
    rows = parties.rows()
    request = parties.request()
    opened = parties.open(request, parties.answers(request, rows))
    assert opened == plain_distances(codes)

    for m in (1, max(1, n - f - 2), n - f):
        found = integer_krum(opened, n, f, m=m)
        assert found.selected == plain_krum(codes, f, m)
        if m == 1:
            # Small codes and their distances are exact in float64 too.
            assert apply_rule("krum", codes.astype(np.float64), f).selected == found.selected
        shares = {}
        for index in parties.scheme.indices:
            total = field.zeros(size + 1)
            for i in found.selected:
                total = field.add(total, field.scale(rows[index - 1][i], weights[i]))
            shares[index] = total
        chosen = list(found.selected)
        expected = (np.array(weights)[chosen, None] * codes[chosen]).sum(axis=0)
        sums = field.to_signed(reconstruct(shares, parties.scheme, size + 1))[:size]
        assert sums.tolist() == expected.tolist()


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_distances_at_the_end_of_the_budget_are_exact(field: Field):
    """C and f as large as allowed: opposite updates, 2B apart."""
    bits = 29 if field is MERSENNE_61 else 40
    bound = EncodedBounds(clip_norm=1.0, fraction_bits=bits).norm_bound
    codes = np.zeros((5, 4), np.int64)
    codes[0, 0], codes[1, 0], codes[2, 3] = bound, -bound, bound
    parties = cohort(codes, field=field.name, fraction_bits=bits)
    request = parties.request()
    assert parties.open(request, parties.answers(request, parties.rows())) == plain_distances(codes)
    if field is MERSENNE_61:
        with pytest.raises(BudgetExceeded, match=r"fraction_bits <= 29|m127"):
            _ = cohort(codes, fraction_bits=30).settings


@given(st.integers(5, 12), st.data())
@settings(max_examples=40)
def test_scores_of_any_size_are_exact(n: int, data: st.DataObject):
    """Differences in the last of a hundred bits decide, and equal scores go to the first."""
    f = data.draw(st.integers(0, (n - 3) // 2))
    pairs = n * (n - 1) // 2
    small = data.draw(st.lists(st.integers(0, 3), min_size=pairs, max_size=pairs))
    for base in (0, 2**59, 2**62 - 4, 2**100):
        distances = [base + d for d in small]
        square = [[0] * n for _ in range(n)]
        for (i, j), d in zip(itertools.combinations(range(n), 2), distances, strict=True):
            square[i][j] = square[j][i] = d
        kept = max(n - f - 2, 1)
        scores = [sum(sorted(square[i][:i] + square[i][i + 1 :])[:kept]) for i in range(n)]
        found = integer_krum(distances, n, f)
        assert list(found.scores) == scores
        assert found.selected == (min(range(n), key=lambda i: (scores[i], i)),)


def test_what_krum_cannot_stand_is_refused():
    with pytest.raises(TooManyByzantine):
        integer_krum([1] * 15, 6, 2)
    with pytest.raises(ConfigurationError):
        integer_krum([1] * 21, 7, 2, m=6)
    for distances in ([1] * 20, [*[1] * 20, -1]):
        with pytest.raises(ShapeMismatch):
            integer_krum(distances, 7, 2)


# --- the kernel ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(FIELDS), st.integers(2, 40), st.sampled_from([0, 1, 5, 255, 256, 257, 600]), st.data())
@settings(max_examples=25, deadline=None)
def test_squared_distances_are_the_fields(field: Field, n: int, size: int, data: st.DataObject):
    p = field.modulus
    # Extremes among random elements: differences of 0, 1, p - 1 and around p / 2.
    ends = [0, 1, p - 1, p // 2, p // 2 + 1]
    rows = [field.random(size + 2, os.urandom) for _ in range(n)]
    for row in data.draw(st.lists(st.integers(0, n - 1), max_size=6)):
        rows[row][:] = field.from_ints([ends[(row + i) % len(ends)] for i in range(size + 2)])
    found = field.to_ints(squared_distances(rows, size, field))
    plain = [field.to_ints(row)[:size] for row in rows]
    expected = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) % p for x, y in itertools.combinations(plain, 2)]
    assert found == expected


def test_rows_that_cannot_be_compared_are_refused():
    row = MERSENNE_61.zeros(4)
    for rows, size in (([row], 4), ([row, row], 5), ([row, MERSENNE_127.zeros(4)], 4), ([row, row[::2]], 2)):
        with pytest.raises(ShapeMismatch):
            squared_distances(rows, size, MERSENNE_61)


# --- nothing but distances -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "n"), SCHEMES)
@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_shares_of_zero_are_zero_and_as_random_as_can_be(threshold: int, n: int, field: Field):
    scheme = Scheme(threshold, n, field)
    subsets = key_holders(scheme)
    keys = {s: os.urandom(KEY_BYTES) for s in subsets}

    def shares(changed: tuple[int, ...] | None = None) -> dict[int, list[int]]:
        mine = keys if changed is None else {**keys, changed: os.urandom(KEY_BYTES)}
        return {
            i: field.to_ints(zero_shares({s: k for s, k in mine.items() if i in s}, i, scheme, 3))
            for i in scheme.indices
        }

    before = shares()
    vectors = {i: field.from_ints(v) for i, v in before.items()}
    for chosen in list(itertools.combinations(scheme.indices, 2 * threshold - 1))[::3]:
        opened = reconstruct_degree({i: vectors[i] for i in chosen}, 2 * threshold - 2, scheme, 3)
        assert field.to_ints(opened) == [0, 0, 0]
    # For any t - 1 aggregators the key that they lack moves the others' shares, and none of theirs.
    for corrupt in list(itertools.combinations(scheme.indices, threshold - 1))[::4]:
        lacked = tuple(i for i in scheme.indices if i not in corrupt)
        after = shares(lacked)
        assert all(after[i] == before[i] for i in corrupt)
        assert all(after[i] != before[i] for i in lacked)


@pytest.mark.parametrize(("threshold", "n"), SCHEMES)
def test_what_colluders_lack_is_uniform(threshold: int, n: int):
    """The t - 1 coefficients of the lacked key move the others' shares in t - 1 independent directions: full rank.

    A polynomial of degree 2(t - 1) that is 0 at 0 and known at t - 1 points has t - 1 degrees of freedom left: all.
    """
    scheme = Scheme(threshold, n, MERSENNE_61)
    p = scheme.field.modulus
    for subset in key_holders(scheme):
        outside = [i for i in scheme.indices if i not in subset]
        matrix = []
        for at in subset:
            vanishing = 1
            for o in outside:
                vanishing = vanishing * (o - at) * pow(o, -1, p) % p
            matrix.append([vanishing * pow(at, power, p) % p for power in range(1, threshold)])
        assert rank(matrix, p) == threshold - 1


def rank(matrix: list[list[int]], p: int) -> int:
    rows, found = [list(r) for r in matrix], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        inverse = pow(rows[found][column], -1, p)
        for i in range(found + 1, len(rows)):
            factor = rows[i][column] * inverse % p
            rows[i] = [(a - factor * b) % p for a, b in zip(rows[i], rows[found], strict=True)]
        found += 1
    return found


def test_without_shares_of_zero_colluders_would_learn_more_than_the_distance():
    """Two colluders and the coordinator try both signs of a difference of which only the magnitude is opened.

    Each sign makes them predict the other aggregators' answers. Without masks one prediction comes true. With them none
    does, in ten comparisons.
    """
    field = MERSENNE_61
    p = field.modulus
    codes = np.array([[300], [-200], [77], [5], [6]])
    parties = cohort(codes)
    scheme = parties.scheme

    def signs_told(answers: dict[int, int], known: dict[int, int], distance: int) -> list[int]:
        """Which signs of x_0 - x_1 fit: the difference's polynomial through its constant and the colluders' points."""
        root = round(distance**0.5)
        fitting = []
        for sign in (1, -1):
            points = {0: sign * root % p, **known}
            predicted = sum(y * lagrange(list(points), x, 3, p) for x, y in points.items()) % p
            if predicted * predicted % p == answers[3]:
                fitting.append(sign)
        return fitting

    told = 0
    for round_id in range(10):
        rows = parties.rows()
        request = parties.request(round_id)
        known = {i: int(field.to_ints(field.subtract(rows[i - 1][0], rows[i - 1][1]))[0]) for i in (1, 2)}
        bare = {i: field.to_ints(squared_distances(rows[i - 1], 1, field))[0] for i in scheme.indices}
        assert signs_told(bare, known, 500**2) == [1]
        masked = {a.header.index: field.to_ints(field.from_bytes(a.payload))[0] for a in parties.answers(request, rows)}
        told += len(signs_told(masked, known, 500**2))
    assert told == 0


def lagrange(points: list[int], of: int, at: int, p: int) -> int:
    value = 1
    for other in points:
        if other != of:
            value = value * (at - other) * pow(of - other, -1, p) % p
    return value


def test_masks_are_fresh_for_every_comparison_and_the_same_for_the_same_one():
    codes = np.arange(15).reshape(5, 3)
    parties = cohort(codes)
    rows = parties.rows()
    first = parties.answers(parties.request(1), rows)
    again = parties.answers(parties.request(1), rows)
    other = parties.answers(parties.request(2), rows)
    assert [a.payload for a in first] == [a.payload for a in again]
    assert [a.header for a in first] == [a.header for a in again]
    for one, two in zip(first, other, strict=True):
        a, b = MERSENNE_61.from_bytes(one.payload), MERSENNE_61.from_bytes(two.payload)
        assert (a != b).all()
    assert parties.open(parties.request(1), first) == parties.open(parties.request(2), other)


# --- what is refused -------------------------------------------------------------------------------------------------


def settings_of(**changes: object) -> DistanceSettings:
    values = {"num_aggregators": 5, "threshold": 3, "field": MERSENNE_61, "range_checked": True,
              "bounds": EncodedBounds(clip_norm=16.0, fraction_bits=24)} | changes  # fmt: skip
    return DistanceSettings(**values)


def test_the_budget_is_the_formula():
    """2(f + log2 C + 1) < 61: 58 bits at C = 16 and f = 24."""
    assert settings_of().largest == 2**58
    assert settings_of().needed == 5
    with pytest.raises(BudgetExceeded, match="fraction_bits <= 25"):
        settings_of(bounds=EncodedBounds(clip_norm=16.0, fraction_bits=26))
    assert settings_of(bounds=EncodedBounds(clip_norm=16.0, fraction_bits=40), field=MERSENNE_127).largest == 2**90


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"private": True}, "buckets"),
        ({"packing": 2}, "7 aggregators"),
        ({"packing": 2, "num_aggregators": 7}, "packing"),
        ({"num_aggregators": 4}, "need 5"),
        ({"threshold": 4, "num_aggregators": 6}, "need 7"),
        ({"range_checked": False}, "projections"),
    ],
)
def test_settings_that_would_not_do_are_refused_with_what_to_change(changes: dict[str, object], words: str):
    with pytest.raises(ConfigurationError, match=words):
        settings_of(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": pinned_privacy()},
        {"packing": 2},
        {"num_aggregators": 4},
        {"checking": CheckingMode.TRUST_DEVICES},
        {"indicator": True},
    ],
)
def test_an_aggregator_is_not_set_up_for_what_would_not_do(changes: dict[str, object]):
    with pytest.raises(ConfigurationError):
        distance_settings(parameters().model_copy(update=changes))


def test_an_unchecked_update_could_wrap_around_and_be_near_to_everybody():
    """What the refusal without a range check prevents, carried out: a square root of a small number modulo p.

    At a coordinate where all honest updates are 0, an element K with a small K^2 mod p adds that little to every
    distance, and K itself, more than 2^50, to the sum.
    """
    p = MERSENNE_61.modulus
    roots = [pow(square, (p + 1) // 4, p) for square in range(2, 30) if pow(square, (p - 1) // 2, p) == 1]
    centred = max(min(root, p - root) for root in roots)
    assert centred > 2**50
    honest = np.random.default_rng(0).integers(-20, 21, (6, 8))
    honest[:, 0] = 0
    codes = np.concatenate([honest, [np.round(honest.mean(axis=0)).astype(np.int64)]])
    codes[6, 0] = centred
    rows = [MERSENNE_61.from_signed(row) for row in codes]
    wrapped = MERSENNE_61.to_ints(squared_distances(rows, 8, MERSENNE_61))
    assert integer_krum(wrapped, 7, 2).selected == (6,)
    assert integer_krum(plain_distances(codes), 7, 2).selected != (6,)


def test_requests_that_are_not_served():
    parties = cohort(np.arange(15).reshape(5, 3))
    one = parties.aggregator(1)
    with pytest.raises(DistancesRefused):
        one.deal(parties.request().model_copy(update={"task_id": "00" * 16}))
    small = Cohort(parameters(min_cohort=6), parties.codes, parties.keys)
    with pytest.raises(CohortTooSmall):
        small.aggregator(1).deal(parties.request())
    request = parties.request()
    with pytest.raises(ShapeMismatch):
        one.answer(request, [d.for_receiver(1) for d in parties.dealt(request)], parties.rows()[0][:4])
    with pytest.raises(ValueError, match="itself"):
        DistanceRequest(task_id=TASK.task_id, round_id=0, reports=(*request.reports[:2], request.reports[0]))


def test_a_relay_cannot_replace_drop_or_replay_a_key():
    """HPKE does not say who sealed: without the signature the coordinator could deal the keys itself, and unmask."""
    parties = cohort(np.arange(15).reshape(5, 3))
    request, other = parties.request(0), parties.request(1)
    dealt, rows = parties.dealt(request), parties.rows()[3]
    four = parties.aggregator(4)
    mine = [d.for_receiver(4) for d in dealt]
    four.answer(request, mine, rows)

    forged = sealing.seal(
        b"\0" * KEY_BYTES * 3,
        parties.config(1).sealing_key(4),
        encode("zero-key-info", [TASK.task_id, request.sha256(), 1, 4]),
    )
    assert len(forged) == len(mine[0].sealed)
    attempts = [
        [replace(mine[0], sealed=forged), *mine[1:]],
        mine[1:],
        [dealt[0].for_receiver(5), *mine[1:]],
        [parties.aggregator(1).deal(other).for_receiver(4), *mine[1:]],
        [replace(mine[0], header=mine[0].header.model_copy(update={"request_sha256": other.sha256()})), *mine[1:]],
        [replace(mine[1], header=mine[1].header.model_copy(update={"sender": 1})), *mine[1:]],
    ]
    for attempt in attempts:
        with pytest.raises(ZeroKeyRejected):
            four.answer(request, attempt, rows)
    # Signed anew by the coordinator's own key: not the pinned one.
    stranger = AggregatorKeys.generate(SealingSuite.X25519)
    header = dealt[0].header
    sealed = list(dealt[0].sealed)
    sealed[3] = forged
    with pytest.raises(ZeroKeyRejected, match="pinned"):
        four.answer(request, [replace(mine[0], header=stranger.sign(header), sealed=forged), *mine[1:]], rows)


def test_answers_that_are_not_distances_are_not_opened():
    codes = np.arange(15).reshape(5, 3)
    parties = cohort(codes)
    request = parties.request()
    rows = parties.rows()
    answers = parties.answers(request, rows)
    assert parties.open(request, answers) == plain_distances(codes)
    with pytest.raises(NotEnoughAggregators) as too_few:
        parties.open(request, answers[:4])
    assert (too_few.value.needed, too_few.value.live) == (5, (1, 2, 3, 4))
    flipped = bytes([answers[0].payload[0] ^ 1]) + answers[0].payload[1:]
    rejected = [
        [*answers[:4], answers[0]],
        [replace(answers[0], payload=flipped), *answers[1:]],
        [parties.answers(parties.request(1), rows)[0], *answers[1:]],
        [replace(answers[0], header=answers[0].header.model_copy(update={"index": 9})), *answers[1:]],
    ]
    for attempt in rejected:
        with pytest.raises(AnswerRejected):
            parties.open(request, attempt)


def test_an_aggregator_that_answers_or_deals_wrongly_is_noticed():
    codes = np.arange(15).reshape(5, 3)
    parties = cohort(codes)
    request = parties.request()
    rows = parties.rows()
    answers = parties.answers(request, rows)
    # Garbage, signed: the opened values are not within what updates can have.
    garbage = [MERSENNE_61.random(4, os.urandom) for _ in codes]
    dealt = parties.dealt(request)
    wrong = parties.aggregator(3).answer(request, [d.for_receiver(3) for d in dealt], garbage)
    with pytest.raises(DistancesInconsistent, match="larger"):
        parties.open(request, [*answers[:2], wrong, *answers[3:]])
    # A dealer that gives one aggregator other keys than the others: its own of another comparison, sealed for this one.
    liar = parties.aggregator(1)
    subsets = [s for s in key_holders(parties.scheme) if s[0] == 1 and 4 in s]
    info = encode("zero-key-info", [TASK.task_id, request.sha256(), 1, 4])
    sealed = list(dealt[0].sealed)
    sealed[3] = sealing.seal(os.urandom(KEY_BYTES * len(subsets)), parties.config(1).sealing_key(4), info)
    hashes = list(dealt[0].header.sealed_sha256)
    hashes[3] = hashlib.sha256(sealed[3]).hexdigest()
    header = parties.keys[0].sign(dealt[0].header.model_copy(update={"sealed_sha256": tuple(hashes)}))
    lied = [ZeroKeys(header, tuple(sealed)), *dealt[1:]]
    with pytest.raises(DistancesInconsistent, match="different keys"):
        parties.open(request, parties.answers(request, rows, lied))
    assert "aggregator 1" in repr(liar)
    assert parties.keys[0].signing.private_bytes().hex() not in repr(vars(liar)["_keys"])


def test_more_answers_than_needed_must_agree():
    codes = np.arange(15).reshape(5, 3)
    parties = cohort(codes, n=6)
    request = parties.request()
    rows = parties.rows()
    answers = parties.answers(request, rows)
    assert parties.open(request, answers) == parties.open(request, answers[1:]) == plain_distances(codes)
    shifted = [MERSENNE_61.add(row, MERSENNE_61.from_ints([1, 0, 0, 0])) for row in rows[5]]
    shifted[0] = rows[5][0]
    wrong = parties.aggregator(6).answer(request, [d.for_receiver(6) for d in parties.dealt(request)], shifted)
    with pytest.raises(DistancesInconsistent, match="polynomial"):
        parties.open(request, [*answers[:5], wrong])


def test_too_many_aggregators_for_common_keys_are_refused():
    with pytest.raises(ConfigurationError, match="keys"):
        key_holders(Scheme(8, 15, MERSENNE_61))
    with pytest.raises(ConfigurationError, match="its 6 sets"):
        zero_shares({}, 1, Scheme(3, 5, MERSENNE_61), 1)


def test_the_declared_leakage_says_what_is_opened():
    for words in ("every pair", "rotation", "selected", "No differential privacy"):
        assert words in DISTANCE_LEAKAGE
