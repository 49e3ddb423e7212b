"""The native sharing kernels: the bits of numpy and of plain integers, in every variant; wrong calls; no compiler."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client_sdk.native.sharing as native
import client_sdk.protocol.field
from client_sdk.native.build import SHARING
from client_sdk.native.sharing_library import address_of, addresses_of, load_library
from client_sdk.protocol.clipping import integer_norm_squared
from client_sdk.protocol.errors import (
    ConfigurationError,
    MalformedShare,
    NonFiniteUpdate,
    RuntimeUnavailable,
    ShapeMismatch,
    UpdateOutOfRange,
)
from client_sdk.protocol.field import FIELDS, MERSENNE_61, MERSENNE_127, Field, with_room
from client_sdk.protocol.mersenne import BLOCK
from client_sdk.protocol.privacy import EncodedBounds, encode_clipped
from client_sdk.protocol.secure import SecureLayout, encode_shares
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, SeededShares, lagrange_weights, reconstruct, share_seeded
from tests import sharing_oracle as oracle

OK, INVALID_ARGUMENT, NOT_CANONICAL, REJECTED, OUT_OF_RANGE = 0, 1, 2, 3, 4

PLAIN = native.PlainKernels()
SCHEMES = [
    Scheme(threshold, num_shares, field, packing)
    for field in FIELDS
    for threshold, num_shares, packing in ((3, 5, 1), (3, 5, 2), (2, 2, 1), (2, 9, 2), (5, 12, 1), (40, 60, 1))
]

relaxed = settings(deadline=None, max_examples=30)
every_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.field.name}-{s.threshold}of{s.num_shares}-packed{s.packing}"
)


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return load_library(SHARING.ensure_built())


@pytest.fixture(scope="module", params=["avx512", "avx2", "portable"])
def kernels(lib: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[native.NativeKernels]:
    """Kernels of a variant, or of the best one where this processor does not run it."""
    chosen = lib.pfs_variant()
    lib.pfs_use_variant(request.param.encode())
    yield native.NativeKernels(lib)
    assert lib.pfs_use_variant(chosen) == OK


def edges(field: Field) -> list[int]:
    p = field.modulus
    return [0, 1, p - 1, p // 2, p // 2 + 1, 2**29, 2**31, 2**32 - 1, 2**43, 2**60, p - 2**32, p - 2**43]


def vector(field: Field, size: int) -> np.ndarray:
    """Random elements, and all edges where they fit."""
    drawn = field.random(size, os.urandom)
    special = field.from_ints(edges(field)[:size])
    drawn[: len(special)] = special
    return drawn


def seeds_of(scheme: Scheme) -> list[bytes]:
    return [bytes([i]) * 32 for i in range(1, scheme.threshold)]


def vectors_of(secret: np.ndarray, scheme: Scheme) -> list[np.ndarray]:
    return NUMPY_KERNELS.split_seeded(secret, seeds_of(scheme), scheme)


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


# --- the same bits -----------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("size", [0, 1, 2, 37, 513, BLOCK + 3])
def test_shares_are_those_of_numpy(kernels: native.NativeKernels, scheme: Scheme, size: int):
    secret = vector(scheme.field, size)
    ours = kernels.split_seeded(secret, seeds_of(scheme), scheme)
    assert same(ours, NUMPY_KERNELS.split_seeded(secret, seeds_of(scheme), scheme))


@pytest.mark.parametrize("scheme", SCHEMES[:5] + SCHEMES[6:11], ids=str)
def test_shares_are_those_of_plain_integers(kernels: native.NativeKernels, scheme: Scheme):
    field, size = scheme.field, 14
    secret = vector(field, size)
    length = scheme.share_length(size)
    drawn = [oracle.expand(field.name, seed, length) for seed in seeds_of(scheme)]
    expected = oracle.split(field.name, field.to_ints(secret), drawn, scheme.num_shares, scheme.packing)
    ours = kernels.split_seeded(secret, seeds_of(scheme), scheme)
    assert [field.to_ints(share) for share in ours] == expected[scheme.threshold - 1 :]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_vectors_are_those_of_numpy(kernels: native.NativeKernels, field: Field):
    size = BLOCK + 5
    expanded = field.empty(size)
    kernels.expand_into(b"s" * 32, expanded, field)
    assert np.array_equal(expanded, field.expand(b"s" * 32, size))
    shares = [vector(field, size)[::step].copy() for step in (1, 1, 1)]
    for points in ((1, 2, 3), (1, 3, 5), (2, 5, 9)):
        weights = lagrange_weights(points, 0)
        assert np.array_equal(
            kernels.interpolate(shares, weights, field), NUMPY_KERNELS.interpolate(shares, weights, field)
        )
    for weight in (1, 2, 256_000, 2**40 - 1, -3, field.modulus + 4):
        ours, theirs = shares[0].copy(), shares[0].copy()
        kernels.weighted_accumulate(ours, shares[1], weight, field)
        NUMPY_KERNELS.weighted_accumulate(theirs, shares[1], weight, field)
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_integers_go_in_and_out_as_with_numpy(kernels: native.NativeKernels, field: Field):
    limit = field.signed_limit
    codes = np.array([0, 1, -1, limit, -limit, *np.random.default_rng(0).integers(-limit, limit, 700)])
    elements = kernels.encode_signed(codes, field)
    assert np.array_equal(elements, field.from_signed(codes))
    assert np.array_equal(kernels.decode_signed(elements, field), codes)
    for beyond in (limit + 1, -limit - 1, np.iinfo(np.int64).min, np.iinfo(np.int64).max):
        with pytest.raises(UpdateOutOfRange):
            kernels.encode_signed(np.array([0, beyond]), field)
    with pytest.raises(ShapeMismatch):
        kernels.encode_signed(codes.astype(np.float64), field)


@pytest.mark.parametrize("element", [2**62 + 1, -(2**62) - 1, 2**63, 2**64, 2**126, -(2**126)])
def test_an_element_that_is_no_small_integer_does_not_come_out(kernels: native.NativeKernels, element: int):
    with pytest.raises(UpdateOutOfRange):
        kernels.decode_signed(MERSENNE_127.from_ints([5, element]), MERSENNE_127)


# --- clip, encode, split -----------------------------------------------------------------------------------------


@st.composite
def updates(draw: st.DrawFn) -> tuple[np.ndarray, EncodedBounds]:
    """Vectors around the clip norm, on fine grids and on some so coarse that rounding pushes norms beyond B."""
    size = draw(st.sampled_from([0, 1, 2, 3, 200, 600, 1025]))
    clip_norm = draw(st.sampled_from([1e-3, 0.7, 1.0, 2.0, 100.0]))
    fraction_bits = draw(st.sampled_from([1, 3, 8, 24, 40]))
    norm = clip_norm * draw(st.sampled_from([0.0, 0.01, 1.0, 1.0000001, 3.0, 1e20]))
    values = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal(size)
    values *= norm / max(float(np.linalg.norm(values)), 1e-30)
    if clip_norm * 2**fraction_bits < 1:
        fraction_bits = 24
    return values.astype(np.float32), EncodedBounds(clip_norm=clip_norm, fraction_bits=fraction_bits)


@relaxed
@given(updates(), st.sampled_from(SCHEMES[:4] + SCHEMES[6:10]), st.integers(0, 3))
def test_one_pass_makes_the_shares_of_the_steps(kernels: native.NativeKernels, case, scheme: Scheme, extra: int):
    update, bounds = case
    assert np.array_equal(kernels.encode_clipped(update, bounds), encode_clipped(update, bounds))
    tail = vector(scheme.field, extra)
    ours = kernels.split_update(update, bounds, tail, seeds_of(scheme), scheme)
    assert same(ours, PLAIN.split_update(update, bounds, tail, seeds_of(scheme), scheme))


def test_a_norm_that_rounding_pushes_beyond_its_bound_is_corrected(kernels: native.NativeKernels):
    # Rounded to nearest, each of the 400 coordinates grows from 0.05 to 1/16.
    update, bounds = np.full(400, 0.05, np.float32), EncodedBounds(clip_norm=1.0, fraction_bits=4)
    naive = np.rint(update.astype(np.float64) * 16).astype(np.int64)
    assert integer_norm_squared(naive) > bounds.norm_bound**2
    scheme = Scheme()
    shares = kernels.split_update(update, bounds, MERSENNE_61.empty(0), seeds_of(scheme), scheme)
    opened = reconstruct(dict(zip((3, 4, 5), shares, strict=True)), scheme, 400)
    assert integer_norm_squared(MERSENNE_61.to_signed(opened)) <= bounds.norm_bound**2


def test_codes_at_the_end_of_the_field(kernels: native.NativeKernels):
    update = np.array([2.0**30, 1.0, 0.0], np.float32)
    bounds = EncodedBounds(clip_norm=2.0**21 - 0.25, fraction_bits=39)
    assert 2**59 < bounds.norm_bound < 2**60
    for scheme in (SCHEMES[0], SCHEMES[1], SCHEMES[6]):
        ours = kernels.split_update(update, bounds, scheme.field.empty(0), seeds_of(scheme), scheme)
        assert same(ours, PLAIN.split_update(update, bounds, scheme.field.empty(0), seeds_of(scheme), scheme))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused(kernels: native.NativeKernels, bad: float):
    update = np.array([1.0, bad], np.float32)
    with pytest.raises(NonFiniteUpdate):
        kernels.encode_clipped(update, EncodedBounds(clip_norm=1.0, fraction_bits=24))
    with pytest.raises(NonFiniteUpdate):
        native.share_update(
            update, EncodedBounds(clip_norm=1.0, fraction_bits=24), MERSENNE_61.empty(0), Scheme(), kernels=kernels
        )
    with pytest.raises(ShapeMismatch):
        kernels.encode_clipped(update.astype(np.float64), EncodedBounds(clip_norm=1.0, fraction_bits=24))


@every_scheme
def test_a_shared_update_opens_as_its_codes_and_the_tail(lib: ctypes.CDLL, scheme: Scheme):
    update = np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32)
    bounds, tail = EncodedBounds(clip_norm=2.0, fraction_bits=30), vector(scheme.field, 3)
    shares = native.share_update(update, bounds, tail, scheme, kernels=native.NativeKernels(lib))
    everyone = shares.expand(scheme, 24)
    held = dict(list(enumerate(everyone, 1))[-scheme.needed :])
    opened = reconstruct(held, scheme, 24, native.NativeKernels(lib))
    assert np.array_equal(scheme.field.to_signed(opened[:21]), encode_clipped(update, bounds).reshape(-1))
    assert np.array_equal(opened[21:], tail)


def test_shares_are_made_of_fresh_seeds_only(lib: ctypes.CDLL):
    kernels, scheme = native.NativeKernels(lib), Scheme()
    update, bounds = np.ones(9, np.float32), EncodedBounds(clip_norm=1.0, fraction_bits=24)
    first, second = (native.share_update(update, bounds, MERSENNE_61.empty(0), scheme, kernels=kernels) for _ in "ab")
    assert len({*first.seeds, *second.seeds}) == 4
    assert not any(map(np.array_equal, first.vectors, second.vectors))
    with pytest.raises(ConfigurationError, match="one comes twice"):
        native.share_update(update, bounds, MERSENNE_61.empty(0), scheme, random=lambda n: b"s" * n, kernels=kernels)
    with pytest.raises(MalformedShare):
        native.share_update(update, bounds, np.array([2**61 - 1], np.uint64), scheme, kernels=kernels)
    assert "vectors" not in repr(first)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[1], SCHEMES[6]], ids=str)
def test_shares_are_sealed_from_where_they_were_made(kernels: native.NativeKernels, scheme: Scheme):
    layout = SecureLayout(scheme, 40)
    secret = vector(scheme.field, layout.length)
    ours, theirs = kernels.split_seeded(secret, seeds_of(scheme), scheme), vectors_of(secret, scheme)
    before = [share.copy() for share in ours]
    encoded = encode_shares(SeededShares(tuple(seeds_of(scheme)), tuple(ours)), layout)
    assert list(map(bytes, encoded)) == list(
        map(bytes, encode_shares(SeededShares(tuple(seeds_of(scheme)), tuple(theirs)), layout))
    )
    assert same(ours, before)
    for share, plaintext in zip(ours, encoded[scheme.threshold - 1 :], strict=True):
        assert np.shares_memory(share, np.frombuffer(plaintext, np.uint8))
    # What only looks like such a vector is copied.
    for other in (ours[0][::-1], ours[0][1:], ours[0].copy(), np.append(secret[:1], ours[0], axis=0)[1:][::-1][::-1]):
        assert with_room(other) is None or np.array_equal(with_room(other)[8:], other.reshape(-1).view(np.uint8))


# --- words that are no elements ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[1], SCHEMES[4], SCHEMES[6], SCHEMES[9]], ids=str)
def test_a_word_that_is_no_element_is_left_out_in_order(
    kernels: native.NativeKernels, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
):
    """Such a word comes once in 2^61, so a stream that has one is planted under both implementations."""
    rejected = 300

    def planted(seed: bytes) -> object:
        state = {"position": 0}

        def fill(buffer: memoryview) -> None:
            words = np.arange(buffer.nbytes // 8, dtype=np.uint64) + np.uint64(state["position"])
            words[:] = words * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed[0])
            limbs, start = scheme.field.limbs, state["position"]
            at = rejected * limbs - start
            if seed[0] == 2 and 0 <= at < words.size:
                words[at : at + limbs] = np.uint64(2**64 - 1)
            state["position"] += words.size
            buffer[:] = words.view(np.uint8).data

        return fill

    monkeypatch.setattr(native, "key_stream", planted)
    monkeypatch.setattr(client_sdk.protocol.field, "key_stream", planted)
    size = 700 * scheme.packing
    secret = vector(scheme.field, size)
    theirs = NUMPY_KERNELS.split_seeded(secret, seeds_of(scheme), scheme)
    assert same(kernels.split_seeded(secret, seeds_of(scheme), scheme), theirs)
    expanded = scheme.field.empty(700)
    kernels.expand_into(bytes([2]) * 32, expanded, scheme.field)
    assert np.array_equal(expanded, scheme.field.expand(bytes([2]) * 32, 700))
    update, bounds = np.linspace(-1, 1, size, dtype=np.float32), EncodedBounds(clip_norm=1.0, fraction_bits=24)
    assert same(
        kernels.split_update(update, bounds, secret[:3], seeds_of(scheme), scheme),
        PLAIN.split_update(update, bounds, secret[:3], seeds_of(scheme), scheme),
    )


# --- the C ABI ---------------------------------------------------------------------------------------------------


def test_wrong_calls_are_refused_by_status(lib: ctypes.CDLL):
    ones, out = np.ones(600, np.uint64), np.empty(600, np.uint64)
    codes = np.zeros(600, np.int64)
    one = addresses_of([ones])
    for field in (-1, 2):
        assert lib.pfs_lift(field, address_of(codes), 4, address_of(out)) == INVALID_ARGUMENT
        assert lib.pfs_lower(field, address_of(ones), 4, address_of(codes)) == INVALID_ARGUMENT
        assert lib.pfs_mask(field, address_of(ones), 4, address_of(out)) == INVALID_ARGUMENT
        assert lib.pfs_split(field, 1, address_of(ones), 1, one, 1, one, 4) == INVALID_ARGUMENT
        assert lib.pfs_interpolate(field, 1, one, address_of(ones), 4, address_of(out)) == INVALID_ARGUMENT
        assert lib.pfs_accumulate(field, address_of(ones), 4, address_of(ones), address_of(out)) == INVALID_ARGUMENT
    for packing, num_words in ((0, 1), (1, 0), (200, 200), (2**64 - 1, 2), (1, 256)):
        assert lib.pfs_split(0, packing, address_of(ones), num_words, one, 1, one, 4) == INVALID_ARGUMENT
    assert lib.pfs_use_variant(b"quantum") == INVALID_ARGUMENT


@pytest.mark.parametrize("field", [0, 1])
@pytest.mark.parametrize("count", [1, 2**48 + 1, 2**64 - 1])
def test_null_misaligned_and_impossible_vectors_are_refused(lib: ctypes.CDLL, field: int, count: int):
    """``make sanitize`` looks for what they would have led to."""
    words, codes, norm = np.ones(8, np.uint64), np.zeros(8, np.int64), np.zeros(3, np.uint64)
    good, n = address_of(words), ctypes.c_uint64(count)
    two = ctypes.c_void_p * 2
    for bad in [None, good + 4] if count == 1 else [good]:
        assert lib.pfs_encode(bad, n, 1.0, 1.0, None if count == 1 else address_of(codes), address_of(norm)) != OK
        assert lib.pfs_lift(field, bad, n, good) == INVALID_ARGUMENT
        assert lib.pfs_lift(field, address_of(codes), n, bad) == INVALID_ARGUMENT
        assert lib.pfs_lower(field, bad, n, address_of(codes)) == INVALID_ARGUMENT
        assert lib.pfs_mask(field, bad, n, good) == INVALID_ARGUMENT
        assert lib.pfs_split(field, 1, bad, 2, two(good, good), 2, two(good, good), n) == INVALID_ARGUMENT
        assert lib.pfs_split(field, 1, good, 2, two(good, bad), 2, two(good, good), n) == INVALID_ARGUMENT
        assert lib.pfs_split(field, 1, good, 2, two(good, good), 2, two(good, bad), n) == INVALID_ARGUMENT
        assert lib.pfs_interpolate(field, 2, two(good, bad), good, n, good) == INVALID_ARGUMENT
        assert lib.pfs_accumulate(field, bad, n, good, good) == INVALID_ARGUMENT
    assert lib.pfs_interpolate(field, ctypes.c_uint64(2**63), two(good, good), good, 1, good) == INVALID_ARGUMENT
    assert lib.pfs_accumulate(field, good, 1, None, good) == INVALID_ARGUMENT
    assert lib.pfs_use_variant(None) == INVALID_ARGUMENT
    assert lib.pfs_mask(field, None, 0, None) == OK


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
@pytest.mark.parametrize("at", [0, 511, 512, 599])
def test_what_is_not_canonical_is_refused_wherever_it_is(kernels: native.NativeKernels, field: Field, at: int):
    code = FIELDS.index(field)
    good, out = vector(field, 600), field.empty(600)
    weight = field.from_ints([7])
    p = field.modulus
    for element in (p, p + 1, 2 ** (64 * field.limbs) - 1, 2 ** (64 * field.limbs - 1)):
        bad = good.copy()
        bad.reshape(600, -1)[at] = np.frombuffer(element.to_bytes(field.element_bytes, "little"), np.uint64)
        with pytest.raises(MalformedShare):
            kernels.weighted_accumulate(out, bad, 3, field)
        with pytest.raises(MalformedShare):
            kernels.interpolate([good, bad], lagrange_weights((1, 2), 0), field)
        lib = kernels._lib
        worst = bad.reshape(600, -1)[at].copy()
        assert lib.pfs_accumulate(code, address_of(good), 600, address_of(worst), address_of(out)) == NOT_CANONICAL
        assert (
            lib.pfs_interpolate(code, 1, addresses_of([good]), address_of(worst), 4, address_of(out)) == NOT_CANONICAL
        )
        assert lib.pfs_mask(code, address_of(bad), 600, address_of(out)) == (REJECTED if element & p == p else OK)
    assert kernels._lib.pfs_accumulate(code, address_of(good), 600, address_of(weight), address_of(good)) == OK


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**63])
def test_a_value_that_has_no_code_is_refused(kernels: native.NativeKernels, bad: float):
    values, norm, codes = np.ones(600, np.float32), np.zeros(3, np.uint64), np.empty(600, np.int64)
    values[599] = bad
    pointers = address_of(codes), address_of(norm)
    assert kernels._lib.pfs_encode(address_of(values), 600, 1.0, 1.0, *pointers) == OUT_OF_RANGE


def test_the_norm_of_codes_has_192_bits(kernels: native.NativeKernels):
    values, norm = np.full(1000, 2.0**31, np.float32), np.full(3, 2**64 - 1, np.uint64)
    norm[2] = 5
    codes = np.empty(1000, np.int64)
    assert kernels._lib.pfs_encode(address_of(values), 1000, 1.0, 2.0**31, address_of(codes), address_of(norm)) == OK
    assert int.from_bytes(norm.tobytes(), "little") == (6 << 128) - 1 + 1000 * 2**124


# --- where it cannot run -----------------------------------------------------------------------------------------


def test_without_a_compiler_numpy_splits_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("POCKETFED_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING, "pocketfed.sharing"):
        chosen = native.load_kernels.__wrapped__()
    assert isinstance(chosen, native.PlainKernels)
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert "numpy" in record.getMessage()
    assert "no C++17 compiler" in record.getMessage()
    update, bounds = np.ones(5, np.float32), EncodedBounds(clip_norm=1.0, fraction_bits=24)
    shares = native.share_update(update, bounds, MERSENNE_61.empty(0), Scheme(), kernels=chosen)
    opened = reconstruct(dict(enumerate(shares.expand(Scheme(), 5), 1)), Scheme(), 5)
    assert np.array_equal(MERSENNE_61.to_signed(opened), chosen.encode_clipped(update, bounds))


def test_with_one_the_native_kernels_are_chosen(lib: ctypes.CDLL):
    chosen = native.load_kernels()
    assert isinstance(chosen, native.NativeKernels)
    assert chosen.variant in {"avx512", "avx2", "portable"}
    secret = vector(MERSENNE_61, 50)
    assert len(share_seeded(secret, Scheme(), kernels=chosen).vectors) == 3


def test_a_file_that_is_another_library_is_refused_with_a_remedy(tmp_path: Path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"library")
    with pytest.raises(RuntimeUnavailable, match="delete the file"):
        load_library(broken)
