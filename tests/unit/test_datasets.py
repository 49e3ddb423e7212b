"""Data sets come in disjoint, fixed splits with values in range."""

import gzip

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError
from simulator import datasets
from simulator.datasets import digits, fashion_mnist, load_dataset
from simulator.errors import DatasetUnavailable, MalformedDataset


def rows(split):
    return {x.tobytes() + bytes([y]) for x, y in zip(split.x, split.y, strict=True)}


def test_digits_is_split_into_disjoint_parts_that_cover_it():
    d = digits()
    parts = [rows(s) for s in (d.train, d.validation, d.test)]
    assert len(d.train) + len(d.validation) + len(d.test) == 1797
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)), "no example is in two splits"


def test_digits_is_float32_in_0_to_1_with_labels_of_ten_classes():
    d = digits()
    assert d.train.x.dtype == np.float32
    assert d.train.y.dtype == np.int64
    assert d.train.x.min() == 0
    assert d.train.x.max() == 1
    assert d.feature_shape == (1, 8, 8)
    assert set(d.train.y) == set(range(d.num_classes))


def test_splits_are_fixed_and_known_by_their_hash():
    assert digits().sha256 == digits().sha256 == "587ccaebfa12d280092ce9b3229d2cd55213c9c6b4a6f7754f4220643af047dc"


def test_examples_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        digits().train.x[0] = 0


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match="'mnist'; there are digits, fashion-mnist"):
        load_dataset("mnist")


def test_fashion_mnist_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(DatasetUnavailable, match="pocketfed data fashion-mnist"):
        fashion_mnist(tmp_path)


@pytest.fixture
def small_fashion_mnist(tmp_path, monkeypatch):
    """The four files in miniature, accepted in place of the pinned ones."""
    monkeypatch.setattr(datasets, "is_current", lambda _package, _folder: True)
    rng = np.random.default_rng(0)

    def write(prefix, images, labels):
        for name, array in ((f"{prefix}-images-idx3-ubyte.gz", images), (f"{prefix}-labels-idx1-ubyte.gz", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / name).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))

    write("train", rng.integers(0, 256, (5010, 4, 4)), rng.integers(0, 10, 5010))
    write("t10k", rng.integers(0, 256, (7, 4, 4)), rng.integers(0, 10, 7))
    return tmp_path, write


def test_fashion_mnist_holds_5000_of_its_training_images_out(small_fashion_mnist):
    folder, _ = small_fashion_mnist
    d = fashion_mnist(folder)
    assert (len(d.train), len(d.validation), len(d.test)) == (10, 5000, 7)
    assert d.feature_shape == (1, 4, 4)
    assert 0 <= d.train.x.min() <= d.train.x.max() <= 1


def test_images_without_their_labels_are_refused(small_fashion_mnist):
    folder, write = small_fashion_mnist
    write("t10k", np.zeros((7, 4, 4)), np.zeros(6))
    with pytest.raises(MalformedDataset, match="7 t10k images, but 6 labels"):
        fashion_mnist(folder)
