"""Sealing: only the right key under the right context opens, and nothing that was touched opens at all."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol import sealing
from client_sdk.protocol.errors import InvalidSealingKey, SealingFailed
from client_sdk.protocol.sealing import (
    SealingKey,
    SealingPublicKey,
    SealingSuite,
    SharingTerms,
    noise_info,
    seal,
    share_info,
)
from tests.vectors.generate import PLAN

KEYS = {suite: SealingKey.generate(suite) for suite in SealingSuite}
SUITES = st.sampled_from(list(SealingSuite))
INFO = b"what it is about"
REQUIRED = {"field", "threshold", "num_aggregators", "packing", "fraction_bits", "clip_norm"}

TERMS = SharingTerms(
    field="m61",
    threshold=3,
    num_aggregators=5,
    packing=1,
    fraction_bits=24,
    clip_norm=1.5,
    indicator_norm=0.5,
    noise_variance="9/2",
    indicator_variance="3",
    max_participations=2,
)
SHARE = {
    "task_id": "1" * 32,
    "assignment_id": "2" * 32,
    "device_id": "6" * 32,
    "aggregator_index": 3,
    "model_version": 4,
    "parameter_table_sha256": "5" * 64,
    "terms": TERMS,
}
NOISE = {
    "task_id": "1" * 32,
    "round_id": 2,
    "run": 3,
    "contributors": (1, 2, 4),
    "set_sha256": "5" * 64,
    "sender": 6,
    "receiver": 7,
}


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, SharingTerms):
        return replace(value, threshold=value.threshold + 1)
    if isinstance(value, int | float):
        return value + 1
    return (*value, 9) if isinstance(value, tuple) else "f" + value[1:]


@given(SUITES, st.binary(max_size=100), st.binary(max_size=100))
def test_what_is_sealed_opens_to_the_same_bytes_with_the_promised_length(suite, plaintext, info):
    ciphertext = seal(plaintext, KEYS[suite].public, info)
    assert len(ciphertext) == len(plaintext) + suite.overhead
    assert sealing.open(ciphertext, KEYS[suite], info) == plaintext
    assert seal(plaintext, KEYS[suite].public, info) != ciphertext


@given(SUITES, st.binary(max_size=40), st.data())
def test_no_flipped_bit_opens(suite, plaintext, data):
    ciphertext = bytearray(seal(plaintext, KEYS[suite].public, INFO))
    bit = data.draw(st.integers(0, 8 * len(ciphertext) - 1))
    ciphertext[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealingFailed):
        sealing.open(ciphertext, KEYS[suite], INFO)


def test_no_flipped_bit_of_a_short_ciphertext_opens():
    key = KEYS[SealingSuite.X25519]
    whole = seal(b"s", key.public, INFO)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealingFailed):
            sealing.open(flipped, key, INFO)


@given(SUITES, st.binary(max_size=40), st.data())
def test_nothing_cut_or_continued_opens(suite, plaintext, data):
    ciphertext = seal(plaintext, KEYS[suite].public, INFO)
    cut = data.draw(st.integers(0, len(ciphertext) - 1))
    for wrong in (ciphertext[:cut], ciphertext[cut + 1 :], ciphertext + b"\0"):
        with pytest.raises(SealingFailed):
            sealing.open(wrong, KEYS[suite], INFO)


@pytest.mark.parametrize("suite", SealingSuite)
def test_another_key_does_not_open(suite: SealingSuite):
    ciphertext = seal(b"secret", KEYS[suite].public, INFO)
    with pytest.raises(SealingFailed):
        sealing.open(ciphertext, SealingKey.generate(suite), INFO)


@pytest.mark.parametrize(("sealed", "opened"), list(itertools.permutations(SealingSuite, 2)))
def test_another_suite_does_not_open(sealed: SealingSuite, opened: SealingSuite):
    with pytest.raises(SealingFailed):
        sealing.open(seal(b"secret", KEYS[sealed].public, INFO), KEYS[opened], INFO)


def test_the_hybrid_needs_both_halves_of_the_key():
    suite = SealingSuite.MLKEM768_X25519
    ciphertext = seal(b"secret", KEYS[suite].public, INFO)
    raw, foreign = KEYS[suite].private_bytes(), SealingKey.generate(suite).private_bytes()
    for mixed in (raw[:64] + foreign[64:], foreign[:64] + raw[64:]):
        with pytest.raises(SealingFailed):
            sealing.open(ciphertext, SealingKey(suite, mixed), INFO)


def test_a_failure_says_nothing_of_its_cause():
    key = KEYS[SealingSuite.X25519]
    ciphertext = seal(b"secret", key.public, INFO)
    errors = []
    for wrong, info in ((ciphertext[:-1], INFO), (b"", INFO), (ciphertext, b"other"), (bytes(60), INFO)):
        with pytest.raises(SealingFailed) as failure:
            sealing.open(wrong, key, info)
        assert failure.value.__cause__ is None
        assert failure.value.__suppress_context__
        errors.append(str(failure.value))
    assert set(errors) == {SealingFailed.title}


# --- contexts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", SHARE)
def test_a_share_is_bound_to_every_field_of_its_context(field: str):
    key = KEYS[SealingSuite.X25519]
    ciphertext = seal(b"share", key.public, share_info(**SHARE))
    assert sealing.open(ciphertext, key, share_info(**SHARE)) == b"share"
    with pytest.raises(SealingFailed):
        sealing.open(ciphertext, key, share_info(**SHARE | {field: other(SHARE[field])}))


@pytest.mark.parametrize("field", [field.name for field in fields(SharingTerms)])
def test_a_share_is_bound_to_everything_that_the_device_was_told(field: str):
    value = getattr(TERMS, field)
    changes = [other(value)] if field in REQUIRED else [other(value), None]
    for changed in changes:
        assert share_info(**SHARE | {"terms": replace(TERMS, **{field: changed})}) != share_info(**SHARE)


def test_a_plan_states_its_terms():
    """Every fact of the plan but those that concern neither what is shared nor its privacy."""
    told = {field.name: getattr(PLAN.terms, field.name) for field in fields(SharingTerms)}
    assert told == {"num_aggregators": 5} | {k: v for k, v in PLAN.model_dump().items() if k in told}
    left_out = {"noise", "suite", "aggregator_keys"}
    assert set(type(PLAN).model_fields) - set(told) == left_out


@pytest.mark.parametrize("field", NOISE)
def test_noise_is_bound_to_every_field_of_its_context(field: str):
    key = KEYS[SealingSuite.X25519]
    ciphertext = seal(b"noise", key.public, noise_info(**NOISE))
    assert sealing.open(ciphertext, key, noise_info(**NOISE)) == b"noise"
    with pytest.raises(SealingFailed):
        sealing.open(ciphertext, key, noise_info(**NOISE | {field: other(NOISE[field])}))


def test_contributors_are_a_set():
    assert noise_info(**NOISE) == noise_info(**NOISE | {"contributors": (4, 2, 1, 2)})


NUMBERS = st.integers(0, 2**63)
TEXTS = st.text(max_size=4)
REALS = st.floats(0.5, 100, width=16)
TERMS_CONTEXTS = st.builds(
    SharingTerms,
    field=TEXTS,
    threshold=NUMBERS,
    num_aggregators=NUMBERS,
    packing=NUMBERS,
    fraction_bits=NUMBERS,
    clip_norm=REALS,
    indicator_norm=st.none() | REALS,
    noise_variance=st.none() | st.sampled_from(["1", "1/2", "12"]),
    indicator_variance=st.none() | st.sampled_from(["1", "1/2", "12"]),
    max_participations=st.none() | NUMBERS,
)
SHARE_CONTEXTS = st.fixed_dictionaries(
    {name: NUMBERS if isinstance(v, int) else TEXTS for name, v in SHARE.items()} | {"terms": TERMS_CONTEXTS}
)
NOISE_CONTEXTS = st.fixed_dictionaries(
    {name: NUMBERS if isinstance(v, int) else TEXTS for name, v in NOISE.items()}
    | {"contributors": st.frozensets(st.integers(1, 16), max_size=4)}
)


@given(SHARE_CONTEXTS, SHARE_CONTEXTS, NOISE_CONTEXTS, NOISE_CONTEXTS)
def test_different_contexts_have_different_encodings(a, b, c, d):
    """Even where fields of free length lie side by side."""
    assert (share_info(**a) == share_info(**b)) == (a == b)
    assert (noise_info(**c) == noise_info(**d)) == (c == d)
    assert share_info(**a) != noise_info(**c)


def test_a_character_cannot_move_from_one_field_to_the_next():
    moved = SHARE | {"task_id": "1" * 31, "assignment_id": "1" + "2" * 32}
    assert share_info(**SHARE) != share_info(**moved)


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SealingSuite)
def test_keys_survive_being_written_and_read(suite: SealingSuite):
    key = KEYS[suite]
    assert len(key.private_bytes()) == suite.private_key_bytes
    assert len(key.public.raw) == suite.public_key_bytes
    again = SealingKey(suite, key.private_bytes())
    assert again.public == key.public == SealingPublicKey.from_hex(suite, key.public.hex)
    assert sealing.open(seal(b"x", key.public, INFO), again, INFO) == b"x"


@pytest.mark.parametrize("suite", SealingSuite)
def test_a_private_key_does_not_print_itself(suite: SealingSuite):
    key = KEYS[suite]
    secret = key.private_bytes().hex()
    for text in (repr(key), str(key), f"{key}", repr([key])):
        assert not any(secret[i : i + 16] in text for i in range(len(secret) - 16))
    assert not hasattr(key, "__dict__")


@pytest.mark.parametrize("suite", SealingSuite)
def test_keys_of_another_length_are_refused(suite: SealingSuite):
    for wrong in (b"", bytes(31), bytes(suite.public_key_bytes - 1), bytes(suite.public_key_bytes + 1)):
        with pytest.raises(InvalidSealingKey, match="bytes, not"):
            SealingPublicKey(suite, wrong)
        with pytest.raises(InvalidSealingKey):
            SealingKey(suite, wrong + bytes(2))
    with pytest.raises(InvalidSealingKey, match="hex"):
        SealingPublicKey.from_hex(suite, "zz")


def test_a_lattice_key_that_is_not_reduced_is_refused():
    suite = SealingSuite.MLKEM768_X25519
    with pytest.raises(InvalidSealingKey):
        SealingPublicKey(suite, b"\xff" * suite.public_key_bytes)


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_nothing_is_sealed_to_a_point_of_low_order(point: bytes):
    with pytest.raises(InvalidSealingKey, match="nothing can be sealed"):
        seal(b"x", SealingPublicKey(SealingSuite.X25519, point), INFO)
