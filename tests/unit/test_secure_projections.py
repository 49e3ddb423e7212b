"""The mode ``projections``: an update that is longer than it claims is found, whatever it does to the field."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError
from client_sdk.protocol.field import FIELDS, MERSENNE_61, MERSENNE_127, Field
from client_sdk.protocol.privacy import EncodedBounds
from client_sdk.protocol.secure import encode_shares
from client_sdk.protocol.shamir import SeededShares, share_seeded
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.errors import (
    AnswerRejected,
    ChallengeMismatch,
    CheckRefused,
    NotEnoughAggregators,
    ProjectionsInconsistent,
    TaskMismatch,
    ZeroKeyRejected,
)
from server_ref.secure.messages import ChallengeRequest, CheckRequest, RevealRequest
from server_ref.secure.parameters import CheckingMode
from server_ref.secure.projection_messages import ProjectionShare
from server_ref.secure.projection_opening import judge_projections
from server_ref.secure.projections import ROWS, ProjectionSettings, project
from server_ref.secure.store import AggregatorStore
from tests.secure_parties import SIZE, Parties, Upload, pinned

BOUND = 2**16


def parameters(**changes: object):
    return pinned(**({"checking": CheckingMode.PROJECTIONS, "privacy": None} | changes))


@pytest.fixture(params=["m61", "m127"])
def parties(tmp_path, request) -> Iterator[Parties]:
    made = Parties(tmp_path, parameters(field=request.param))
    yield made
    made.close()


def settings_of(parties: Parties) -> ProjectionSettings:
    return parties.parameters.projection_settings(parties.task.size)


def revealed(parties: Parties, uploads: Sequence[Upload]) -> CheckRequest:
    request = ChallengeRequest(round_id=0, reports=tuple(upload.ref for upload in uploads))
    commitments = tuple(parties[i].challenge_commit(request) for i in parties.indices)
    reveal = RevealRequest(challenge_sha256=request.sha256(), commitments=commitments)
    nonces = tuple(parties[i].challenge_reveal(reveal) for i in parties.indices)
    return CheckRequest(transcript_sha256=reveal.transcript(), nonces=nonces)


def opened(parties: Parties, request: CheckRequest) -> list[ProjectionShare]:
    keys = [parties[i].deal_zero_keys(request.transcript_sha256) for i in parties.indices]
    return [parties[i].open_projections(request, [one.for_receiver(i) for one in keys]) for i in parties.indices]


def judged(parties: Parties, uploads: Sequence[Upload]) -> list[bool]:
    parties.deliver(uploads)
    request = revealed(parties, uploads)
    return list(verdicts(parties, request, opened(parties, request), len(uploads)))


def verdicts(
    parties: Parties, request: CheckRequest, answers: Sequence[ProjectionShare], count: int
) -> tuple[bool, ...]:
    return judge_projections(request.transcript_sha256, count, answers, settings_of(parties), parties.configs[0].signed)


def elements(parties: Parties, number: int, values: Sequence[int]) -> Upload:
    """A report of any field elements, as a dishonest device would share them."""
    field = parties.layout.scheme.field
    secret = np.concatenate([field.from_ints(values), field.random(1, os.urandom)])
    plaintexts = encode_shares(share_seeded(secret, parties.layout.scheme), parties.layout)
    return parties.seal(parties.upload(number).header.model_dump(exclude={"ciphertext_ids"}), plaintexts, np.zeros(1))


# --- what passes and what does not -------------------------------------------------------------------------------


def test_honest_updates_pass_and_longer_ones_do_not(parties):
    root = BOUND // 2  # four such coordinates have the norm B
    uploads = [
        parties.upload(0),
        parties.upload(1, [0] * SIZE),
        parties.upload(2, [BOUND, 0, 0, 0, 0, 0]),
        parties.upload(3, [root, -root, root, -root, 0, 0]),
        parties.upload(4, [BOUND + 1, 0, 0, 0, 0, 0]),
        parties.upload(5, [root, -root, root, -root, 1, 0]),
        parties.upload(6, [2**40, 0, 0, 0, 0, 0]),
    ]
    assert judged(parties, uploads) == [True] * 4 + [False] * 3


def squares_that_add_up_to(total: int, near: int) -> list[int]:
    """Integers whose squares add up to a number: each the largest that fits, from the largest on."""
    found = []
    while total and len(found) < near:
        root = int(np.sqrt(np.longdouble(total)))
        while root * root > total:
            root -= 1
        found.append(root)
        total -= root * root
    assert total == 0
    return found


def test_an_update_whose_norm_wraps_around_to_nothing_is_found(tmp_path):
    """``||q||^2`` is p exactly, so modulo p it is 0: without the projections the largest update of all would pass."""
    parties = Parties(tmp_path, parameters())
    p = MERSENNE_61.modulus
    values = squares_that_add_up_to(p, SIZE)
    assert max(values) > 2**30
    assert sum(v * v for v in values) % p == 0, "the norm alone says that it is the zero vector"
    attack = elements(parties, 1, values + [0] * (SIZE - len(values)))
    tiny = elements(parties, 2, [pow(2**20, -1, p)] + [0] * (SIZE - 1))  # small multiples of it are small again
    half = elements(parties, 3, [(p + 1) // 2] * SIZE)  # twice it is 1
    assert judged(parties, [attack, tiny, half, parties.upload(4)]) == [False, False, False, True]
    parties.close()


def test_shares_that_do_not_belong_together_are_refused(parties):
    shares = share_seeded(parties.layout.secret(np.arange(SIZE), os.urandom(32)), parties.layout.scheme)
    field = parties.layout.scheme.field
    off = field.add(shares.vectors[1], field.from_ints([1, *[0] * SIZE]))
    plaintexts = encode_shares(SeededShares(shares.seeds, (shares.vectors[0], off, shares.vectors[2])), parties.layout)
    crooked = parties.seal(parties.upload(1).header.model_dump(exclude={"ciphertext_ids"}), plaintexts, np.zeros(1))
    assert judged(parties, [crooked, parties.upload(2)]) == [False, True]


def test_the_norm_that_is_opened_says_nothing_else(parties):
    """Two openings of one update have the same norm, on polynomials that have nothing else in common."""
    uploads = [parties.upload(number, [3, -4, 0, 0, 0, 0]) for number in (0, 1)]
    parties.deliver(uploads)
    request = revealed(parties, uploads)
    answers = opened(parties, request)
    field = parties.layout.scheme.field
    norms = [field.from_bytes(answer.payload)[2 * ROWS :] for answer in answers]
    weights = (5, -10, 10, -5, 1)  # Lagrange at 0 of the points 1 to 5
    for report in range(2):
        values = [field.to_ints(norm)[report] for norm in norms]
        assert sum(w * v for w, v in zip(weights, values, strict=True)) % field.modulus == 25
    assert all(field.to_ints(norm)[0] != field.to_ints(norm)[1] for norm in norms)


# --- the operations ----------------------------------------------------------------------------------------------


def test_the_answer_is_the_same_again_whatever_keys_come_with_the_second_request(parties):
    uploads = parties.uploads(range(2))
    request = revealed(parties, uploads)
    answers = opened(parties, request)
    assert opened(parties, request) == answers
    parties.restart(1)
    assert parties[1].open_projections(request, []) == answers[0]


def test_only_a_transcript_that_was_revealed_for_is_opened(parties):
    uploads = parties.uploads(range(2))
    request = revealed(parties, uploads)
    with pytest.raises(ChallengeMismatch):
        parties[1].deal_zero_keys("00" * 32)
    other = CheckRequest(transcript_sha256="00" * 32, nonces=request.nonces)
    with pytest.raises(ChallengeMismatch):
        parties[1].open_projections(other, [])
    keys = [parties[i].deal_zero_keys(request.transcript_sha256).for_receiver(2) for i in parties.indices]
    swapped = CheckRequest(transcript_sha256=request.transcript_sha256, nonces=request.nonces[::-1])
    with pytest.raises(ChallengeMismatch):
        parties[2].open_projections(swapped, keys)
    with pytest.raises(ZeroKeyRejected):
        parties[2].open_projections(request, [])
    assert parties[2].open_projections(request, keys)


def test_an_opening_needs_all_that_the_norm_s_degree_asks_for_and_authentic(parties):
    uploads = parties.uploads(range(2))
    request = revealed(parties, uploads)
    answers = opened(parties, request)
    assert verdicts(parties, request, answers, 2) == (True, True)
    with pytest.raises(NotEnoughAggregators):
        verdicts(parties, request, answers[:4], 2)
    with pytest.raises(AnswerRejected, match="twice"):
        verdicts(parties, request, [*answers, answers[0]], 2)
    with pytest.raises(AnswerRejected, match="those that it signed"):
        verdicts(parties, request, [*answers[:4], ProjectionShare(answers[4].header, answers[3].payload)], 2)
    with pytest.raises(AnswerRejected, match="field elements"):
        verdicts(parties, request, answers, 3)
    forged = answers[4].header.model_copy(update={"index": 3})
    with pytest.raises(AnswerRejected, match="signed"):
        verdicts(parties, request, [*answers[:2], ProjectionShare(forged, answers[4].payload)], 2)
    strange = parties.keys[4].sign(answers[4].header.model_copy(update={"transcript_sha256": "00" * 32}))
    with pytest.raises(AnswerRejected, match="another challenge"):
        verdicts(parties, request, [*answers[:4], ProjectionShare(strange, answers[4].payload)], 2)
    other_key = ("00" * 32, *answers[4].header.key_fingerprints[1:])
    dealt = parties.keys[4].sign(answers[4].header.model_copy(update={"key_fingerprints": other_key}))
    with pytest.raises(ProjectionsInconsistent):
        verdicts(parties, request, [*answers[:4], ProjectionShare(dealt, answers[4].payload)], 2)
    fewer = parties.keys[4].sign(answers[4].header.model_copy(update={"key_fingerprints": other_key[1:]}))
    with pytest.raises(AnswerRejected, match="number of keys"):
        verdicts(parties, request, [*answers[:4], ProjectionShare(fewer, answers[4].payload)], 2)


def test_nothing_is_opened_in_the_other_modes(tmp_path):
    parties = Parties(tmp_path, pinned(privacy=None))
    request = revealed(parties, parties.uploads(range(2)))
    with pytest.raises(CheckRefused):
        parties[1].deal_zero_keys(request.transcript_sha256)
    with pytest.raises(CheckRefused):
        parties[1].open_projections(request, [])
    parties.close()


# --- the bit budget ----------------------------------------------------------------------------------------------


def test_the_mode_is_refused_where_the_sharing_cannot_open_norms():
    for wrong in ({"packing": 2}, {"num_aggregators": 4}, {"indicator": True}):
        with pytest.raises(ValidationError):
            parameters(**wrong)


def within(field: Field, bits: int, clip_norm: float, size: int) -> ProjectionSettings:
    return ProjectionSettings(5, 3, field, EncodedBounds(clip_norm=clip_norm, fraction_bits=bits), size)


def test_the_mode_is_refused_where_the_budget_does_not_hold(tmp_path):
    """In 2^61 - 1: C below 2 at 24 fraction bits, whatever the size, and some 2^32 coordinates at C = 1."""
    assert within(MERSENNE_61, 24, 1.99, 1000)
    with pytest.raises(BudgetExceeded, match="m127"):
        within(MERSENNE_61, 24, 2.01, 1000)
    assert within(MERSENNE_127, 40, 1000.0, 10**9)
    largest = (MERSENNE_61.modulus - 1) // 2 // (19 * 2**24)
    assert within(MERSENNE_61, 24, 1.0, largest)
    with pytest.raises(BudgetExceeded):
        within(MERSENNE_61, 24, 1.0, largest + 1)
    with pytest.raises(ConfigurationError):
        ProjectionSettings(4, 3, MERSENNE_61, EncodedBounds(clip_norm=1.0, fraction_bits=16), 10)
    with pytest.raises(ConfigurationError, match="could wrap around"):
        Parties(tmp_path, parameters(fraction_bits=26))


@pytest.mark.parametrize("bits", [24, 10])
def test_the_budget_is_that_of_its_formula(bits):
    """2(f + log2 C + 5) <= 60 and f + log2 C + log2 d + log2 19 <= 60, on integers."""
    bound = Fraction(2**bits)
    for size in (1, 10**6, 2**30):
        fits = (32 * bound) ** 2 <= 2**60 - 1 and 19 * bound * size <= 2**60 - 1
        try:
            within(MERSENNE_61, bits, 1.0, size)
        except BudgetExceeded:
            assert not fits
        else:
            assert fits


def test_bind_refuses_a_task_that_is_too_large_for_the_budget(tmp_path):
    parties = Parties(tmp_path, parameters(fraction_bits=24), live=[1])
    config = parties.configs[0].model_copy(update={"task": None})
    store = AggregatorStore(tmp_path / "unbound")
    with pytest.raises(TaskMismatch, match="could wrap around"):
        Aggregator(config, parties.keys[0], store).bind(parties.task.model_copy(update={"size": 2**34}))
    store.close()
    parties.close()


# --- the rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
@given(size=st.sampled_from([1, 2, 40, 2048, 2049, 5000]), count=st.integers(1, 3))
@settings(max_examples=8)
def test_projections_are_those_of_plain_integers(field, size, count):
    seed = os.urandom(32)
    vectors = [field.random(size, os.urandom) for _ in range(count)]
    vectors[0][:1] = field.from_ints([field.modulus - 1])
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(bytes(32 * size))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8).reshape(size, 32), axis=1).astype(int)
    rows = bits[:, :ROWS] * (1 - 2 * bits[:, ROWS:])
    for vector, projected in zip(vectors, project(vectors, seed, field), strict=True):
        values, found = field.to_ints(vector), field.to_ints(projected)
        for k in (0, 1, 63, ROWS - 1):
            assert found[k] == sum(int(r) * v for r, v in zip(rows[:, k], values, strict=True) if r) % field.modulus


def test_an_entry_is_0_half_of_the_time_and_otherwise_either_sign():
    """Over 128 rows and 4000 coordinates, within five deviations."""
    size = 4000
    ones = MERSENNE_61.from_ints([1] * size)
    signed = [MERSENNE_61.centred(v) for v in MERSENNE_61.to_ints(project([ones], os.urandom(32), MERSENNE_61)[0])]
    mean_square = np.mean(np.array(signed, float) ** 2) / size
    assert abs(mean_square - 0.5) < 5 * 0.5 * np.sqrt(2 / ROWS)
    assert abs(np.mean(signed)) < 5 * np.sqrt(size / 2 / ROWS)
