"""The idx reader takes exactly the files of the MNIST family, and says what is wrong with any other."""

import gzip

import numpy as np
import pytest

from simulator.errors import MalformedDataset
from simulator.idx import parse_idx, read_idx_gz


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_reads_what_was_written():
    assert np.array_equal(parse_idx(idx(IMAGES), dims=3), IMAGES)


def test_reads_an_empty_file_of_no_examples():
    assert parse_idx(idx(np.zeros((0, 28, 28), np.uint8)), dims=3).shape == (0, 28, 28)


@pytest.mark.parametrize("cut", [0, 3, 4, 15, 16, 39])
def test_refuses_every_truncation(cut):
    with pytest.raises(MalformedDataset, match="bytes"):
        parse_idx(idx(IMAGES)[:cut], dims=3)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, 1), (1, 1), (2, 0x0D), (3, 1)],
    ids=["first byte", "second byte", "float type code", "one dimension"],
)
def test_refuses_another_magic_and_names_the_expected_one(position, value):
    data = bytearray(idx(IMAGES))
    data[position] = value
    with pytest.raises(MalformedDataset, match="expected 00000803"):
        parse_idx(bytes(data), dims=3)


def test_refuses_bytes_after_the_data():
    with pytest.raises(MalformedDataset, match="declares 24 bytes, 25 are there"):
        parse_idx(idx(IMAGES) + b"x", dims=3)


def test_refuses_a_shape_that_declares_more_than_any_memory():
    data = bytes([0, 0, 8, 3]) + b"\xff" * 12
    with pytest.raises(MalformedDataset, match="declares"):
        parse_idx(data, dims=3)


def test_reads_a_gzip_file(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(IMAGES)))
    assert np.array_equal(read_idx_gz(path, dims=3), IMAGES)


@pytest.mark.parametrize("kept", [0, 5, 20, -4], ids=["nothing", "half a header", "half the data", "no checksum"])
def test_a_truncated_gzip_file_is_named(tmp_path, kept):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (4, 28, 28))))[:kept])
    with pytest.raises(MalformedDataset, match=r"images\.gz"):
        read_idx_gz(path, dims=3)


def test_a_file_that_is_not_gzip_is_named(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(idx(IMAGES))
    with pytest.raises(MalformedDataset, match="not a complete gzip file"):
        read_idx_gz(path, dims=3)


def test_a_gzip_bomb_is_refused_without_being_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("simulator.idx.MAX_BYTES", 1000)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes(1001)))
    with pytest.raises(MalformedDataset, match="more than 1000 bytes"):
        read_idx_gz(path, dims=3)
