"""The file of a device's examples: each way it can be wrong is told by name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from client_sdk.data import as_examples, load_examples
from client_sdk.errors import InvalidDataFile

X, Y = np.ones((4, 2, 3), np.float32), np.arange(4)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_examples_are_read_as_they_were_saved(tmp_path: Path):
    x, y = load_examples(saved(tmp_path / "d.npz", x=X, y=Y, more=np.zeros(1)))
    assert np.array_equal(x, X)
    assert np.array_equal(y, Y)
    assert (x.dtype, y.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"holds \['x'\]; it must hold x and y"),
        ({}, "no named arrays"),
        ({"x": X.astype(np.float64), "y": Y}, "float32"),
        ({"x": X.astype(np.uint8), "y": Y}, "float32"),
        ({"x": X, "y": Y.astype(np.int32)}, "int64"),
        ({"x": X, "y": Y.astype(np.float32)}, "int64"),
        ({"x": X, "y": Y[:3]}, "shape"),
        ({"x": X, "y": Y[:, None]}, "shape"),
        ({"x": np.ones(4, np.float32), "y": Y}, "shape"),
        ({"x": X[:0], "y": Y[:0]}, "no examples"),
        ({"x": np.where(X > 0, np.nan, X).astype(np.float32), "y": Y}, "NaN"),
        ({"x": X * np.float32(np.inf), "y": Y}, "NaN or infinite"),
        ({"x": np.array([object()] * 4), "y": Y}, "plain arrays"),
    ],
)
def test_contents_that_cannot_be_trained_on(tmp_path: Path, arrays: dict, message: str):
    path = saved(tmp_path / "d.npz", **arrays)
    with pytest.raises(InvalidDataFile, match=message) as caught:
        load_examples(path)
    assert str(path) in str(caught.value)


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, X)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04broken", pickle.dumps({"x": 1}), npy_bytes()], ids=lambda c: repr(c[:6])
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes):
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(InvalidDataFile, match=r"d\.npz"):
        load_examples(path)


def test_a_truncated_file_is_refused_at_any_length(tmp_path: Path):
    path = saved(tmp_path / "d.npz", x=X, y=Y)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidDataFile):
            load_examples(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InvalidDataFile, match="nowhere"):
        load_examples(tmp_path / "nowhere.npz")


def test_arrays_of_the_right_kind_are_not_copied():
    x, y = as_examples((X, Y))
    assert x is X
    assert y is Y
