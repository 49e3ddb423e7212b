"""The parts of a payload, each against its definition: bit fields, Rice codes, coordinates, signed numbers."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.compression import bits
from client_sdk.protocol.compression.bits import Reader, pack_fields, pack_unary, read_fields, read_unary
from client_sdk.protocol.compression.indices import max_index_bytes, read_indices, write_indices
from client_sdk.protocol.compression.magnitudes import max_signed_bytes, read_signed, write_signed
from client_sdk.protocol.compression.rice import choose_parameter
from client_sdk.protocol.errors import MalformedEncoding, ProtocolError, TruncatedEncoding
from tests import compression_oracle as oracle

relaxed = settings(deadline=None)

words = st.integers(0, 2**32 - 1) | st.integers(0, 40)


@relaxed
@given(st.lists(words, max_size=80), st.integers(0, 32))
def test_fields_are_packed_as_defined_and_read_back(values, width):
    array = np.array(values, np.uint32)
    packed = pack_fields(array, width)
    assert packed == oracle.fields(values, width)
    reader = Reader(packed)
    assert read_fields(reader, len(values), width).tolist() == [v & ((1 << width) - 1) for v in values]
    reader.finish()


@pytest.mark.parametrize("width", [1, 3, 7, 11, 24, 31])
@pytest.mark.parametrize("whole", [bits._BITWISE_UP_TO, bits._FIELDS_AT_ONCE, 2 * bits._FIELDS_AT_ONCE])
@pytest.mark.parametrize("extra", [-1, 0, 1, 33])
def test_fields_in_every_number_of_pieces(width: int, whole: int, extra: int):
    count = whole + extra
    values = np.random.default_rng(width).integers(0, 1 << width, count, dtype=np.uint32)
    packed = pack_fields(values, width)
    bit_matrix = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[: count * width].reshape(count, -1)
    assert np.array_equal(bit_matrix @ (1 << np.arange(width, dtype=np.int64)), values)
    assert np.array_equal(read_fields(Reader(packed), count, width), values)


@relaxed
@given(st.lists(st.integers(0, 60), max_size=60), st.binary(max_size=3))
def test_unary_numbers_are_packed_as_defined_and_end_where_they_end(values, tail):
    packed = pack_unary(np.array(values, np.uint32))
    assert packed == oracle.unary(values)
    reader = Reader(packed + tail)
    assert read_unary(reader, len(values), 60).tolist() == values
    assert bytes(reader.rest) == tail


def test_unary_numbers_over_several_pieces():
    rng = np.random.default_rng(1)
    values = rng.geometric(0.3, 3 * bits._FIELDS_AT_ONCE + 5).astype(np.uint32)
    values[12_345] = 9_000_000
    packed = pack_unary(values)
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little"))
    assert np.array_equal(np.diff(ones, prepend=-1) - 1, values)
    assert np.array_equal(read_unary(Reader(packed), len(values), 9_000_000), values)


def test_unary_numbers_that_never_end_are_refused():
    with pytest.raises(TruncatedEncoding):
        read_unary(Reader(bytes(100_000)), 1, 2**31)
    with pytest.raises(MalformedEncoding):
        read_unary(Reader(bytes(100_000) + b"\x01"), 1, 799_999)
    assert read_unary(Reader(bytes(100_000) + b"\x01"), 1, 800_000).tolist() == [800_000]


@relaxed
@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 20), min_size=1, max_size=40))
def test_the_parameter_is_the_smallest_of_the_best(values):
    def cost(r: int) -> int:
        return sum(r + 1 + (v >> r) for v in values)

    parameter, unary_sum = choose_parameter(np.array(values, np.uint32))
    assert parameter == min(range(32), key=cost)
    assert unary_sum == sum(v >> parameter for v in values)
    histogram = sorted(Counter(values).items())
    levels, counts = (np.array(column) for column in zip(*histogram, strict=True))
    assert choose_parameter(levels.astype(np.uint32), counts) == (parameter, unary_sum)


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[list[int], int]:
    size = draw(st.integers(1, 200) | st.integers(2**31 - 200, 2**31 - 1))
    return sorted(draw(st.sets(st.integers(0, size - 1), max_size=60))), size


@relaxed
@given(index_sets())
def test_coordinates_are_written_as_defined_within_their_bound_and_read_back(case):
    indices, size = case
    written = write_indices(np.array(indices, np.int64), size)
    assert written == oracle.indices_section(indices, size)
    assert len(written) <= max_index_bytes(len(indices), size)
    reader = Reader(written)
    assert read_indices(reader, len(indices), size).tolist() == indices
    reader.finish()


@pytest.mark.parametrize(("count", "size"), [(1, 5), (3, 6)])
def test_of_all_short_payloads_exactly_the_encodings_of_the_sets_are_read(count: int, size: int):
    """Every string of two bytes, and those of three that hold low bits."""
    sets = [list(s) for s in itertools.combinations(range(size), count)]
    expected = {write_indices(np.array(s, np.int64), size): s for s in sets}
    assert len(expected) == len(sets)
    found = {}
    for payload in (
        *itertools.product(range(256), repeat=2),
        *itertools.product((1, 2), range(1 << 2 * count), range(256)),
    ):
        reader = Reader(bytes(payload))
        try:
            indices = read_indices(reader, count, size).tolist()
            reader.finish()
        except ProtocolError:
            continue
        found[bytes(payload)] = indices
    assert found == expected


@st.composite
def signed_numbers(draw: st.DrawFn) -> tuple[list[int], list[bool], int]:
    width = draw(st.sampled_from([1, 3, 7, 31]))
    top = (1 << width) - 1
    low = draw(st.integers(0, top))
    value = st.integers(low, min(top, low + draw(st.integers(0, 1000)))) | st.sampled_from([0, low, top])
    magnitudes = draw(st.lists(value, max_size=50))
    return magnitudes, draw(st.lists(st.booleans(), min_size=len(magnitudes), max_size=len(magnitudes))), width


@relaxed
@given(signed_numbers())
def test_signed_numbers_are_written_as_defined_within_their_bound_and_read_back(case):
    magnitudes, negative, width = case
    written = write_signed(np.array(magnitudes, np.uint32), np.array(negative, np.bool_), width)
    assert written == oracle.signed_section(magnitudes, negative, width)
    assert len(written) <= max_signed_bytes(len(magnitudes), width)
    reader = Reader(written)
    found, signs = read_signed(reader, len(magnitudes), width)
    reader.finish()
    assert found.tolist() == magnitudes
    assert signs.tolist() == [n and m > 0 for m, n in zip(magnitudes, negative, strict=True)]


@relaxed
@given(st.binary(max_size=24), st.integers(0, 12), st.sampled_from([1, 3, 7, 31]))
def test_what_is_read_of_any_bytes_would_be_written_so(payload, count, width):
    reader = Reader(payload)
    try:
        magnitudes, negative = read_signed(reader, count, width)
    except ProtocolError:
        return
    assert write_signed(magnitudes, negative, width) + bytes(reader.rest) == payload


@pytest.mark.parametrize("width", [3, 7, 31])
def test_each_code_is_the_shortest_somewhere(width: int):
    """Or else a code would be dead weight."""
    rng = np.random.default_rng(0)
    top = (1 << width) - 1
    n = 4000
    spread = rng.geometric(4 / top, n)
    cases = {
        0x00: rng.integers(0, top + 1, n),
        0x20: np.minimum(top, 1 + spread),
        0x40: np.maximum(1, top - spread),
        0x80: rng.integers(0, top + 1, n) * (rng.random(n) < 0.1),
        0xA0: np.minimum(top, top // 2 + spread) * (rng.random(n) < 0.1),
        0xC0: np.maximum(1, top - spread) * (rng.random(n) < 0.1),
    }
    heads = {write_signed(m.astype(np.uint32), np.zeros(n, np.bool_), width)[0] & 0xE0 for m in cases.values()}
    assert heads >= {0x20, 0x40, 0xA0} if width == 3 else heads == set(cases)


def test_padding_bits_are_zero():
    flags = np.array([True, False, True])
    assert bits.read_flags(Reader(bits.pack_flags(flags)), 3).tolist() == flags.tolist()
    with pytest.raises(MalformedEncoding):
        bits.read_flags(Reader(b"\x0d"), 3)


@given(hnp.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 2**31 - 1)))
def test_reading_copies_nothing_that_the_caller_could_change(values):
    payload = bytearray(pack_fields(values, 32))
    found = read_fields(Reader(payload), len(values), 32)
    payload[:] = bytes(len(payload))
    assert np.array_equal(found, values)
