"""What a device shares arrives: every length and scheme, opened again to the same codes; nothing malformed does."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol import messages as m
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError, MalformedShare, ShapeMismatch
from client_sdk.protocol.field import FIELDS, MERSENNE_61
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.secure import (
    SecureLayout,
    decode_share,
    encode_shares,
    share_tensors,
    shared_codec,
    shared_size,
    split_secure_report,
)
from client_sdk.protocol.shamir import Scheme, reconstruct, share_seeded
from client_sdk.protocol.updates import UpdateKind
from tests.vectors.generate import HYBRID_KEYS, PLAN


@st.composite
def layouts(draw: st.DrawFn) -> SecureLayout:
    threshold, packing = draw(st.integers(2, 4)), draw(st.sampled_from([1, 2]))
    num_shares = draw(st.integers(threshold + packing - 1, 7))
    scheme = Scheme(threshold, num_shares, draw(st.sampled_from(FIELDS)), packing)
    return SecureLayout(scheme, draw(st.integers(0, 40)), draw(st.booleans()), draw(st.sampled_from(SealingSuite)))


CODES = st.integers(-(2**60) + 1, 2**60 - 1)


def drawn(data: st.DataObject, layout: SecureLayout) -> np.ndarray:
    size = layout.num_values
    return np.array(data.draw(st.lists(CODES, min_size=size, max_size=size)), np.int64)


def plaintexts(layout: SecureLayout, codes: np.ndarray, seed: bytes = bytes(32)) -> list[bytes]:
    return [bytes(each) for each in encode_shares(share_seeded(layout.secret(codes, seed), layout.scheme), layout)]


@given(layouts(), st.data())
@settings(max_examples=60)
def test_shares_have_the_stated_lengths_and_open_to_what_was_shared(layout: SecureLayout, data: st.DataObject):
    codes, scheme = drawn(data, layout), layout.scheme
    secret = layout.secret(codes, b"m" * 32)
    encoded = encode_shares(share_seeded(secret, scheme), layout)
    assert [len(each) for each in encoded] == [layout.plaintext_bytes(index) for index in scheme.indices]
    shares = {index: decode_share(each, layout, index) for index, each in zip(scheme.indices, encoded, strict=True)}
    assert all(len(share) == layout.share_length for share in shares.values())
    some = data.draw(st.permutations(list(scheme.indices)))[: scheme.needed]
    opened = reconstruct({index: shares[index] for index in some}, scheme, layout.length)
    assert np.array_equal(opened, secret)
    assert np.array_equal(scheme.field.to_signed(layout.values(opened)), codes)


@given(layouts(), st.data())
@settings(max_examples=40)
def test_the_last_element_of_every_share_belongs_to_the_mask_alone(layout: SecureLayout, data: st.DataObject):
    """So that what is compared over it says nothing of a device: all its secrets are random, none is a coordinate."""
    codes, scheme = drawn(data, layout), layout.scheme
    one, other = (layout.secret(codes, seed * 32) for seed in (b"1", b"2"))
    same = np.all((one == other).reshape(layout.length, -1), axis=1)
    in_last_element = np.arange(layout.length) // scheme.packing == layout.share_length - 1
    assert np.array_equal(same, ~in_last_element)
    # Equal masks of two packed coordinates would cancel in a difference of what is compared.
    masks = scheme.field.to_ints(np.concatenate([one[-scheme.packing :], other[-scheme.packing :]]))
    assert len(set(masks)) == 2 * scheme.packing
    assert layout.num_values <= layout.length - scheme.packing < layout.num_values + scheme.packing


def test_a_mask_is_no_small_number():
    """It covers a sum over the whole field, so it is uniform there."""
    layout = SecureLayout(Scheme(), 0)
    masks = [
        MERSENNE_61.to_ints(layout.secret(np.zeros(0, np.int64), seed.to_bytes(32, "big")))[-1] for seed in range(400)
    ]
    # Of 400 uniform ones, 50 are expected in each eighth; a binomial leaves 20..90 about once in 10^6 runs.
    assert all(20 < sum(mask >> 58 == eighth for mask in masks) < 90 for eighth in range(8))


def test_shares_of_another_secret_are_not_encoded():
    layout, longer = SecureLayout(Scheme(), 3), SecureLayout(Scheme(), 4)
    fewer = SecureLayout(Scheme(2, 5), 3)
    for other in (longer, fewer):
        shares = share_seeded(other.secret(np.zeros(other.num_values, np.int64), bytes(32)), other.scheme)
        with pytest.raises(ShapeMismatch, match="not shares of"):
            encode_shares(shares, layout)


@given(layouts())
def test_another_number_of_codes_is_refused(layout: SecureLayout):
    with pytest.raises(ShapeMismatch, match="codes are shared"):
        layout.secret(np.zeros(layout.num_values + 1, np.int64), bytes(32))


# --- what an aggregator refuses ----------------------------------------------------------------------------------


@given(layouts(), st.data())
@settings(max_examples=60)
def test_no_share_of_another_form_is_taken(layout: SecureLayout, data: st.DataObject):
    scheme = layout.scheme
    index = data.draw(st.sampled_from(list(scheme.indices)))
    whole = plaintexts(layout, np.zeros(layout.num_values, np.int64))[index - 1]
    other_kind = bytes([data.draw(st.integers(0, 255).filter(lambda kind: kind != whole[0]))])
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (b"", whole[:cut], whole + b"\0", other_kind + whole[1:]):
        with pytest.raises(MalformedShare):
            decode_share(wrong, layout, index)


@given(layouts(), st.data())
@settings(max_examples=40)
def test_no_element_beyond_the_field_is_taken(layout: SecureLayout, data: st.DataObject):
    scheme = layout.scheme
    index = data.draw(st.integers(scheme.threshold, scheme.num_shares))
    whole = bytearray(plaintexts(layout, np.zeros(layout.num_values, np.int64))[index - 1])
    step, modulus = scheme.field.element_bytes, scheme.field.modulus
    start = 1 + step * data.draw(st.integers(0, layout.share_length - 1))
    for wrong in (modulus, modulus + 1, 2 ** (8 * step) - 1):
        whole[start : start + step] = wrong.to_bytes(step, "little")
        with pytest.raises(MalformedShare, match="modulus"):
            decode_share(bytes(whole), layout, index)
    whole[start : start + step] = (modulus - 1).to_bytes(step, "little")
    assert decode_share(bytes(whole), layout, index).shape[0] == layout.share_length


def test_a_seed_is_not_taken_for_a_share_of_the_same_length():
    """Four elements are as long as a seed: the kind tells them apart, and it is fixed for each aggregator."""
    layout = SecureLayout(Scheme(), 3)
    encoded = plaintexts(layout, np.array([1, -2, 3]))
    assert {len(each) for each in encoded} == {33}
    for index, other in itertools.product(layout.scheme.indices, repeat=2):
        fits = (index <= layout.num_seeds) == (other <= layout.num_seeds)
        if fits:
            decode_share(encoded[other - 1], layout, index)
        else:
            with pytest.raises(MalformedShare, match="begins with"):
                decode_share(encoded[other - 1], layout, index)


@pytest.mark.parametrize("index", [-1, 0, 6, 2**40])
def test_there_is_no_share_beyond_the_scheme(index: int):
    layout = SecureLayout(Scheme(), 3)
    with pytest.raises(MalformedShare, match="there is no share"):
        decode_share(bytes(33), layout, index)


# --- the frame ---------------------------------------------------------------------------------------------------

LARGEST_FACTS = m.ReportFacts(
    report_id="f" * 32,
    assignment_id="f" * 32,
    model_version="9" * 18,
    parameter_table_sha256="f" * 64,
    kind=UpdateKind.GRADIENT,
    encoding="i64-shares",
    algorithm="scaffold",
    compression="\\" * 128,
    compression_seed="9" * 16,
    steps="9" * 12,
    train_loss="withheld",
).model_dump(mode="json")


def sealed(layout: SecureLayout) -> list[bytes]:
    return [bytes([index]) * layout.ciphertext_bytes(index) for index in layout.scheme.indices]


@given(layouts())
def test_a_report_splits_into_its_shares_and_is_no_longer_than_stated(layout: SecureLayout):
    data = encode_frame(share_tensors(sealed(layout)), LARGEST_FACTS)
    frame = decode_frame(data)
    assert [bytes(each) for each in split_secure_report(frame, layout)] == sealed(layout)
    assert len(frame.payload) == layout.payload_bytes
    assert len(data) <= layout.max_frame_bytes


def test_the_header_of_the_largest_report_fits():
    layout = SecureLayout(Scheme(2, 255), 2**31 - 1)
    entries = {f"share-{i}": {"dtype": "U8", "shape": [10**11], "data_offsets": [10**13] * 2} for i in range(1, 256)}
    header = json.dumps({"__metadata__": LARGEST_FACTS} | entries, separators=(",", ":"))
    assert len(header) <= layout.max_header_bytes


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {},
        lambda t: dict(list(t.items())[:-1]),
        lambda t: dict(list(t.items())[::-1]),
        lambda t: t | {"share-6": t["share-5"]},
        lambda t: t | {"update": np.zeros(3, np.float32)},
        lambda t: {"share-0": t["share-1"]} | t,
        lambda t: t | {"share-1": t["share-1"][:-1]},
        lambda t: t | {"share-5": np.append(t["share-5"], np.uint8(0))},
        lambda t: t | {"share-3": t["share-1"]},
        lambda t: t | {"share-2": t["share-2"].reshape(1, -1)},
        lambda t: t | {"share-1": t["share-1"].astype(np.float32)},
        lambda t: t | {"share-1": np.zeros(0, np.uint8)},
    ],
)
def test_a_report_of_any_other_form_is_refused(change: Any):
    layout = SecureLayout(Scheme(), 30)
    tensors = share_tensors(sealed(layout))
    split_secure_report(decode_frame(encode_frame(tensors)), layout)
    with pytest.raises(MalformedShare):
        split_secure_report(decode_frame(encode_frame(change(tensors))), layout)


# --- plans -------------------------------------------------------------------------------------------------------


def test_a_plan_gives_its_layout():
    layout = SecureLayout.of(PLAN, 10)
    assert layout == SecureLayout(Scheme(3, 5, MERSENNE_61, 1), 10)
    hybrid = m.SecurePlan(
        field="m127",
        threshold=2,
        packing=2,
        fraction_bits=3,
        clip_norm=1.0,
        indicator_norm=1.0,
        suite=SealingSuite.MLKEM768_X25519,
        aggregator_keys=tuple(key.public.hex for key in HYBRID_KEYS),
    )
    layout = SecureLayout.of(hybrid, 10)
    assert (layout.num_values, layout.length, layout.share_length) == (11, 14, 7)
    assert [layout.ciphertext_bytes(i) for i in (1, 2, 3)] == [33 + 1136, 113 + 1136, 113 + 1136]


@pytest.mark.parametrize(
    ("packing", "field", "per_coordinate"), [(1, "m61", 24), (2, "m61", 12), (1, "m127", 48), (2, "m127", 24)]
)
def test_an_upload_takes_the_stated_bytes_a_coordinate(packing: int, field: str, per_coordinate: int):
    """Three of five shares are vectors; two are seeds whatever the update's length."""
    plan = PLAN.model_copy(update={"packing": packing, "field": field})
    short, long = (SecureLayout.of(plan, size).payload_bytes for size in (1000, 101_000))
    assert (long - short) / 100_000 == per_coordinate
    assert SecureLayout.of(plan, 0).payload_bytes == 5 * (1 + 48) + 2 * 32 + 3 * (16 if field == "m127" else 8)


@given(st.sampled_from(["randomk:0.1", "randomk:0.5,rotate", "sketch:0.2,rows=3"]), st.integers(1, 300))
def test_compression_shares_what_its_codec_picks(line: str, size: int):
    codec = shared_codec(line, size)
    assert codec == Codec(CompressionSpec.parse(line), size)
    assert shared_size(line, size) == codec.num_values
    assert shared_size(None, size) == size
    assert shared_codec(None, size) is None


@pytest.mark.parametrize(
    "line", ["topk:0.1", "threshold:0.1", "quantize:8", "randomk:0.1,bits=8", "randomk:0.1,feedback=on"]
)
def test_compression_that_sees_the_data_or_rounds_otherwise_is_not_shared(line: str):
    with pytest.raises(ConfigurationError, match="cannot be shared"):
        shared_codec(line, 10)
