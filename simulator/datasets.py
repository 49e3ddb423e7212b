"""The data sets a fleet can be trained on, with fixed train, validation and test splits.

The validation split is held out of the training data and goes to the server, which scores every new model on it.
The test split is read once, after the last round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.folders import cache_folder
from simulator.errors import DatasetUnavailable, MalformedDataset
from simulator.fetch import FASHION_MNIST, is_current
from simulator.idx import read_idx_gz
from simulator.languages import DATASET as MANPAGES
from simulator.languages import SIDES, Corpus, read_corpus

# Fixes which examples are held out. Not an option: figures of different runs stay comparable.
_SPLIT_SEED = 20_240_917

_POOLED_NORM = 10 / 3

CONTEXT: Final = 16
"""Bytes that an example of text shows before the one to be told."""


@dataclass(frozen=True)
class Split:
    """Examples and their labels.

    Attributes:
        x: float32[n, *feature_shape], read-only; of pictures values in [0, 1], of texts byte values.
        y: int64[n], values in 0 .. num_classes - 1, read-only.
        groups: int64[n], to which group each example belongs (of texts: their language); None where there are none.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """One data set in three disjoint splits.

    Attributes:
        name: Name, as given on the command line.
        train: Examples that are dealt out to the devices.
        validation: Examples that the operator keeps, for scoring each round's model.
        test: Examples for the one final figure.
        feature_shape: Shape of one example.
        num_classes: Number of labels.
        sha256: Hash of all splits' bytes, in order: what was trained on, to the bit.
        group_names: What ``Split.groups`` counts; empty where there are none.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    feature_shape: tuple[int, ...]
    num_classes: int
    sha256: str
    group_names: tuple[str, ...] = ()


def _dataset(
    name: str, splits: tuple[Split, Split, Split], num_classes: int, group_names: tuple[str, ...] = ()
) -> Dataset:
    digest = hashlib.sha256()
    for split in splits:
        for array in (split.x, split.y, *(() if split.groups is None else (split.groups,))):
            array.flags.writeable = False
            digest.update(array.data)
    train, validation, test = splits
    return Dataset(name, train, validation, test, train.x.shape[1:], num_classes, digest.hexdigest(), group_names)


def _take(x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Split:
    return Split(np.ascontiguousarray(x[rows]), np.ascontiguousarray(y[rows]))


def digits() -> Dataset:
    """scikit-learn's bundled digits: 1797 images of 8 x 8 pixels, 10 classes; 20 % test, 10 % validation."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (seconds to import, and only this data set needs it)

    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    y = bunch.target.astype(np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(y))
    test, validation, train = np.split(order, [len(y) // 5, len(y) // 5 + len(y) // 10])
    return _dataset("digits", (_take(x, y, train), _take(x, y, validation), _take(x, y, test)), 10)


def fashion_mnist(folder: Path | None = None) -> Dataset:
    """Fashion-MNIST: 28 x 28 grey images, 10 classes; 55,000 train, 5,000 validation, the official 10,000 test.

    Args:
        folder: Where the four idx files lie; the cache by default.

    Raises:
        DatasetUnavailable: Not fetched yet; the message names the command.
        MalformedDataset: A file is damaged.

    Source:
        Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning".
    """
    folder = folder or cache_folder("data") / FASHION_MNIST.dataset
    if not is_current(FASHION_MNIST, folder):
        raise DatasetUnavailable(
            f"fashion-mnist is not (or not completely) in {folder}; fetch it once: pocketfed data fashion-mnist"
        )
    x, y = _images_and_labels(folder, "train")
    test_x, test_y = _images_and_labels(folder, "t10k")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(y))
    validation, train = np.split(order, [5000])
    return _dataset("fashion-mnist", (_take(x, y, train), _take(x, y, validation), Split(test_x, test_y)), 10)


def fashion_mnist_14() -> Dataset:
    """Fashion-MNIST for linear models under differential privacy: 14 x 14, centred, all images of one length.

    Pixels are averaged in twos; of each image its mean is subtracted, then it is scaled to an L2 norm of 10/3. All of
    that looks at one image at a time, so that it says nothing about others. Gradients of a linear model then have about
    the same norm for all images, which a clip norm wastes least of; and a bias, which is a feature of value 1, has
    little of it.

    Raises:
        DatasetUnavailable, MalformedDataset: See ``fashion_mnist``.
    """
    full = fashion_mnist()
    splits = (full.train, full.validation, full.test)
    train, validation, test = (Split(_pooled(s.x), s.y) for s in splits)
    return _dataset("fashion-mnist-14", (train, validation, test), full.num_classes)


def _pooled(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    n, channels, height, width = x.shape
    pooled = x.reshape(n, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5), dtype=np.float64)
    pooled -= pooled.mean(axis=(1, 2, 3), keepdims=True)
    norms = np.sqrt(np.square(pooled).sum(axis=(1, 2, 3), keepdims=True))
    # A blank image stays blank.
    scaled: npt.NDArray[np.float32] = (pooled * (_POOLED_NORM / np.maximum(norms, 1e-12))).astype(np.float32)
    return scaled


def _images_and_labels(folder: Path, prefix: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    images = read_idx_gz(folder / f"{prefix}-images-idx3-ubyte.gz", dims=3)
    labels = read_idx_gz(folder / f"{prefix}-labels-idx1-ubyte.gz", dims=1)
    if len(images) != len(labels):
        raise MalformedDataset(f"{folder}: {len(images)} {prefix} images, but {len(labels)} labels")
    x = images[:, None].astype(np.float32)
    x /= 255
    return x, labels.astype(np.int64)


def manpages(folder: Path | None = None) -> Dataset:
    """Manual pages in several languages: which byte of the UTF-8 text comes next, after the 16 before it.

    Raises:
        DatasetUnavailable: Not made yet; the message names the command.
        MalformedDataset: A file is damaged.
    """
    return text_dataset(MANPAGES, read_corpus(folder or cache_folder("data") / MANPAGES))


def text_dataset(name: str, corpus: Corpus) -> Dataset:
    """A corpus as examples of the next byte: characters of every script, and none that is unknown.

    Examples of a page follow one another and share no byte, so that what a device holds out says nothing of what it
    learned from. All languages have as many of each split as the one that has fewest.

    Args:
        name: Of the data set.
        corpus: At least one language, with an example or more on each side.

    Returns:
        Examples float32[n, 16] of byte values, labels int64[n] in 0 .. 255, and languages as groups.

    Raises:
        MalformedDataset: A side of a language has no page as long as an example.
    """
    splits = []
    for side in SIDES:
        windows = [_windows(texts[side]) for texts in corpus.texts.values()]
        count = min((len(w) for w in windows), default=0)
        if not count:
            raise MalformedDataset(f"{name}: a language has no text for {side}")
        everything = np.concatenate([w[:count] for w in windows])
        splits.append(
            Split(
                np.ascontiguousarray(everything[:, :CONTEXT], np.float32),
                np.ascontiguousarray(everything[:, CONTEXT], np.int64),
                np.repeat(np.arange(len(windows)), count),
            )
        )
    train, validation, test = splits
    return _dataset(name, (train, validation, test), 256, corpus.languages)


def _windows(pages: Sequence[str]) -> npt.NDArray[np.uint8]:
    """uint8[n, CONTEXT + 1]: pieces of the pages' UTF-8 bytes, one after another; what is left at a page's end goes."""
    size = CONTEXT + 1
    pieces = []
    for page in pages:
        text = np.frombuffer(page.encode(), np.uint8)
        pieces.append(text[: len(text) // size * size].reshape(-1, size))
    return np.concatenate(pieces) if pieces else np.empty((0, size), np.uint8)


DATASETS: Mapping[str, Callable[[], Dataset]] = MappingProxyType(
    {"digits": digits, "fashion-mnist": fashion_mnist, "fashion-mnist-14": fashion_mnist_14, MANPAGES: manpages}
)


def load_dataset(name: str) -> Dataset:
    """Load a data set by name.

    Raises:
        ConfigurationError: No such data set.
        DatasetUnavailable: It has to be fetched first.
    """
    if name not in DATASETS:
        raise ConfigurationError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]()
