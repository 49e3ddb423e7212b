"""The binary frame: one encoding per content, strict decoding, and the safetensors library as a witness."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.errors import MalformedFrame, OversizedBody, ProtocolError, TruncatedFrame
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame

DTYPES = ["<f4", "<f8", "<i8", "u1"]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
TENSORS = st.dictionaries(NAMES, ARRAYS, max_size=5)
METADATA = st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=4)

SAMPLE = encode_frame({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.arange(2)}, {"b": "2", "a": "1"})
HEADER_BYTES = int.from_bytes(SAMPLE[:8], "little")


def raw_frame(header: bytes | str, payload: bytes = b"", *, pad: bool = True) -> bytes:
    """A frame with any header; padded like a real one."""
    raw = header.encode() if isinstance(header, str) else header
    if pad:
        raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


def entry(name: str = "w", dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    return json.dumps(
        {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}},
        separators=(",", ":"),
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- what is well formed ---


@given(tensors=TENSORS, metadata=METADATA)
def test_decoding_gives_back_what_was_encoded(tensors: dict[str, np.ndarray], metadata: dict[str, str]):
    data = encode_frame(tensors, metadata)
    frame = decode_frame(data)
    assert list(frame.tensors) == list(tensors)
    assert all(same_bits(frame.tensors[name], tensors[name]) for name in tensors)
    assert frame.metadata == metadata
    assert bytes(frame.payload) == b"".join(t.tobytes() for t in tensors.values())
    assert encode_frame(frame.tensors, frame.metadata) == data, "one encoding per content"


@given(tensors=TENSORS, metadata=METADATA)
def test_the_safetensors_library_reads_our_frames(tensors: dict[str, np.ndarray], metadata: dict[str, str]):
    found = safetensors.numpy.load(encode_frame(tensors, metadata))
    assert set(found) == set(tensors)
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


@given(
    tensors=st.dictionaries(
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=10).filter(lambda n: n != "__metadata__"),
        hnp.arrays("<f4", hnp.array_shapes(min_dims=0, max_dims=3, max_side=3)),
        max_size=4,
    ),
    metadata=st.none() | st.just({"format": "np"}),
)
def test_we_read_what_the_safetensors_library_writes(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None):
    data = safetensors.numpy.save(tensors, metadata)
    frame = decode_frame(data)
    assert set(frame.tensors) == set(tensors)
    assert all(same_bits(frame.tensors[name], tensors[name]) for name in tensors)
    assert frame.metadata == (metadata or {})
    assert encode_frame(frame.tensors, metadata) == data, "and would have written the same bytes"


def test_tensors_are_read_only_views_of_the_input():
    data = bytearray(SAMPLE)
    frame = decode_frame(data)
    w = frame.tensors["w"]
    assert not w.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        w[0, 0] = 1
    data[8 + HEADER_BYTES : 8 + HEADER_BYTES + 4] = np.float32(7).tobytes()
    assert w[0, 0] == 7, "nothing was copied"


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2] / 2,
    ],
    ids=["big-endian", "fortran", "strided"],
)
def test_memory_layout_does_not_reach_the_bytes(array: np.ndarray):
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert encode_frame({"w": array}) == encode_frame({"w": plain})


def test_the_order_of_metadata_does_not_matter_and_that_of_tensors_does():
    one, two = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert encode_frame({"a": one}, {"x": "1", "y": "2"}) == encode_frame({"a": one}, {"y": "2", "x": "1"})
    assert encode_frame({"a": one, "b": two}) != encode_frame({"b": two, "a": one})


def test_the_payload_of_a_model_is_its_flat_vector_and_is_aligned():
    frame = decode_frame(encode_frame({"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}))
    assert np.frombuffer(frame.payload, np.float32).tolist() == [1] * 6 + [0] * 3
    for size in range(40):
        data = encode_frame({"w" * size: np.zeros(1, np.float32)})
        assert (len(data) - 4) % 8 == 0


@pytest.mark.parametrize("dtype", ["f2", "i4", "u4", "?", "c8", "S3", "O", "M8[s]"])
def test_other_dtypes_are_not_framed(dtype: str):
    with pytest.raises(MalformedFrame, match="cannot be framed"):
        encode_frame({"w": np.zeros(2, dtype)})


def test_reserved_and_impossible_names_are_not_framed():
    with pytest.raises(MalformedFrame):
        encode_frame({"__metadata__": np.zeros(1)})
    for broken in ({"\ud800": np.zeros(1)}, {}):
        with pytest.raises(MalformedFrame, match="Unicode"):
            encode_frame(broken, {"\udfff": "x"})
    with pytest.raises(MalformedFrame, match="Unicode"):
        encode_frame({}, {"x": "\ud800"})


# --- what is not ---


def test_a_frame_cut_at_any_byte_is_truncated():
    for length in range(len(SAMPLE)):
        with pytest.raises(TruncatedFrame):
            decode_frame(SAMPLE[:length])


@pytest.mark.parametrize("extra", [b"\x00", b" " * 8, b"{}", SAMPLE])
def test_nothing_may_follow_the_last_tensor(extra: bytes):
    with pytest.raises(MalformedFrame, match="follow the last tensor"):
        decode_frame(SAMPLE + extra)


def test_any_changed_header_byte_is_noticed_or_changes_the_content():
    original = decode_frame(SAMPLE)
    for at in range(8, 8 + HEADER_BYTES):
        for value in {SAMPLE[at] ^ 1, SAMPLE[at] ^ 32, ord(" "), ord("9"), 0, 255} - {SAMPLE[at]}:
            data = bytearray(SAMPLE)
            data[at] = value
            try:
                frame = decode_frame(data)
            except ProtocolError:
                continue
            assert encode_frame(frame.tensors, frame.metadata) == data
            changed = list(frame.tensors) != list(original.tensors) or frame.metadata != original.metadata
            assert changed or [t.dtype for t in frame.tensors.values()] != [t.dtype for t in original.tensors.values()]


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_noise_is_refused_with_a_typed_error(data: bytes):
    try:
        frame = decode_frame(data)
    except ProtocolError:
        return
    assert encode_frame(frame.tensors, frame.metadata) == data


@settings(max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3),
        max_leaves=10,
    )
)
def test_any_json_as_header_is_refused_with_a_typed_error(header: object):
    data = raw_frame(json.dumps(header, separators=(",", ":")))
    try:
        frame = decode_frame(data)
    except ProtocolError:
        return
    assert encode_frame(frame.tensors, frame.metadata) == data


LONG = "9" * 5000
BAD_HEADERS = {
    "duplicate key": '{"w":' + entry()[5:-1] + "," + entry()[1:],
    "duplicate metadata": '{"__metadata__":{"a":"1","a":"1"}}',
    "empty metadata": '{"__metadata__":{}}',
    "metadata last": entry()[:-1] + ',"__metadata__":{"a":"1"}}',
    "metadata out of order": '{"__metadata__":{"b":"1","a":"1"},' + entry()[1:],
    "metadata of numbers": '{"__metadata__":{"a":1},' + entry()[1:],
    "metadata is a list": '{"__metadata__":[],' + entry()[1:],
    "metadata is null": '{"__metadata__":null,' + entry()[1:],
    "a space after the colon": entry().replace(":", ": ", 1),
    "a newline": entry().replace("{", "{\n", 1),
    "leading space": " " + entry(),
    "escaped letter": entry().replace('"w"', '"\\u0077"'),
    "raw unicode": entry("é").replace("\\u00e9", "é"),
    "upper-case escape": entry("é").replace("\\u00e9", "\\u00E9"),
    "half a surrogate pair": entry().replace('"w"', '"\\ud800"'),
    "float shape": entry(shape=[1.0]),
    "exponent": entry().replace("[1]", "[1e0]"),
    "minus zero": entry(shape=[0], offsets=[0, 0]).replace("[0,0]", "[-0,0]"),
    "true for one": entry(shape=[True]),
    "negative side": entry(shape=[-1]),
    "shape is a number": entry(shape=1),
    "shape is a string": entry(shape="1"),
    "shape is null": entry(shape=None),
    "nested shape": entry(shape=[[1]]),
    "too many axes": entry(shape=[1] * 9),
    "a side of 5000 digits": entry().replace("[1]", f"[{LONG}]"),
    "NaN": entry().replace("[1]", "[NaN]"),
    "unknown dtype": entry(dtype="F16"),
    "lower-case dtype": entry(dtype="f32"),
    "dtype is a list": entry().replace('"F32"', '["F32"]'),
    "offsets of another tensor": entry(offsets=[4, 8]),
    "offsets too short": entry(offsets=[0]),
    "offsets overlap": '{"a":' + entry()[5:-1] + ',"b":' + entry()[5:],
    "missing key": '{"w":{"dtype":"F32","shape":[1]}}',
    "extra key": entry()[:-2] + ',"x":1}}',
    "keys in another order": '{"w":{"shape":[1],"dtype":"F32","data_offsets":[0,4]}}',
    "entry is a list": '{"w":[]}',
    "entry is null": '{"w":null}',
    "a list": "[]",
    "a string": '"w"',
    "null": "null",
    "empty": "",
    "two objects": entry() + "{}",
    "not closed": entry()[:-1],
    "BOM": b"\xef\xbb\xbf" + entry().encode(),
    "UTF-16": entry().encode("utf-16"),
    "NUL": entry().encode() + b"\x00",
    "comment": entry() + "//",
    "nested 100,000 deep": "[" * 100_000,
    "objects nested 100,000 deep": '{"a":' * 100_000,
}


@pytest.mark.parametrize("name", list(BAD_HEADERS))
def test_a_header_that_is_not_the_canonical_one_is_malformed(name: str):
    payload = bytes(8) if name == "offsets overlap" else b"" if "zero" in name else bytes(4)
    if name in {"duplicate metadata", "empty metadata", "empty", "a list", "a string", "null"} or name.startswith(
        "nested"
    ):
        payload = b""
    with pytest.raises(MalformedFrame):
        decode_frame(raw_frame(BAD_HEADERS[name], payload))


def test_the_good_form_of_those_headers_is_accepted():
    assert decode_frame(raw_frame(entry(), bytes(4))).tensors["w"].tolist() == [0]


@pytest.mark.parametrize("padding", [b"", b" ", b" " * 16, b"\n" * 8, b"\t" * 8])
def test_the_header_is_padded_in_one_way(padding: bytes):
    raw = entry().encode()
    if len(raw + padding) % 8 == 0 and set(padding) <= {32} and len(padding) < 8:
        padding += b" " * 8
    with pytest.raises(MalformedFrame):
        decode_frame(raw_frame(raw + padding, bytes(4), pad=False))


# --- limits ---


def test_a_frame_that_declares_ten_gigabytes_costs_nothing():
    side = 50_000
    data = raw_frame(entry(shape=[side, side], offsets=[0, 4 * side * side]), bytes(4))
    with pytest.raises(OversizedBody, match="declares 10000000000 bytes"):
        decode_frame(data)


@pytest.mark.parametrize("declared", [2**20 + 1, 2**32, 2**63, 2**64 - 1])
def test_an_absurd_header_length_costs_nothing(declared: int):
    with pytest.raises(OversizedBody, match="header declares"):
        decode_frame(declared.to_bytes(8, "little") + b"{}")


def test_sides_whose_product_overflows_64_bits_are_refused():
    data = raw_frame(entry(shape=[2**31] * 8, offsets=[0, 4]), bytes(4))
    with pytest.raises(OversizedBody):
        decode_frame(data)


def test_a_product_of_zero_hides_no_absurd_side():
    with pytest.raises(MalformedFrame, match="impossible shape"):
        decode_frame(raw_frame(entry(shape=[0, 2**31 + 1], offsets=[0, 0])))


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        (FrameLimits(max_bytes=len(SAMPLE)), True),
        (FrameLimits(max_bytes=len(SAMPLE) - 1), False),
        (FrameLimits(max_header_bytes=HEADER_BYTES), True),
        (FrameLimits(max_header_bytes=HEADER_BYTES - 1), False),
        (FrameLimits(max_tensors=2), True),
        (FrameLimits(max_tensors=1), False),
        (FrameLimits(max_name_chars=1), True),
        (FrameLimits(max_name_chars=0), False),
    ],
)
def test_each_limit_is_exact(limits: FrameLimits, fits: bool):
    if fits:
        assert len(decode_frame(SAMPLE, limits).tensors) == 2
    else:
        with pytest.raises(OversizedBody):
            decode_frame(SAMPLE, limits)


def test_the_library_of_the_format_agrees_about_plain_damage():
    for bad in (SAMPLE[:-1], SAMPLE + b"x", b"", raw_frame("[]"), raw_frame(entry(offsets=[4, 8]), bytes(8))):
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load(bad)
