"""The idx format of the MNIST family: a strict reader for unsigned bytes, plain or gzip-compressed.

Layout: two zero bytes, the type code (8 = unsigned byte), the number of dimensions, one big-endian uint32 a
dimension, the data in C order. Anything that is shorter, longer, or typed otherwise is refused.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from simulator.errors import MalformedDataset

_UBYTE = 8
# Beyond the largest file of the family (60,000 x 28 x 28), far below what would hurt: a bound against gzip bombs.
MAX_BYTES = 2**28


def parse_idx(data: bytes, *, dims: int, name: str = "data") -> npt.NDArray[np.uint8]:
    """Parse an uncompressed idx file of unsigned bytes.

    Args:
        data: The whole file.
        dims: Number of dimensions that the file must have (1 for labels, 3 for images).
        name: What to call the file in errors.

    Returns:
        Read-only uint8 view into ``data``, in the file's shape.

    Raises:
        MalformedDataset: Wrong magic, type or number of dimensions, or a length other than the declared one.

    Source:
        The format's description on the MNIST database page (LeCun, Cortes, Burges).
    """
    header = 4 + 4 * dims
    if len(data) < header:
        raise MalformedDataset(f"{name}: {len(data)} bytes cannot hold an idx header of {header}")
    if data[:4] != bytes([0, 0, _UBYTE, dims]):
        raise MalformedDataset(
            f"{name}: magic {data[:4].hex()}, expected 0000{_UBYTE:02x}{dims:02x} "
            f"(idx, unsigned bytes, {dims} dimension{'s' * (dims > 1)})"
        )
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    expected = math.prod(shape)
    if len(data) - header != expected:
        raise MalformedDataset(f"{name}: shape {shape} declares {expected} bytes, {len(data) - header} are there")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_idx_gz(path: Path, *, dims: int) -> npt.NDArray[np.uint8]:
    """Read a gzip-compressed idx file of unsigned bytes.

    Raises:
        MalformedDataset: Not gzip, truncated, unreasonably large, or not what ``parse_idx`` accepts.
    """
    try:
        with gzip.open(path) as f:
            data = f.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise MalformedDataset(f"{path}: not a complete gzip file ({e})") from e
    if len(data) > MAX_BYTES:
        raise MalformedDataset(f"{path}: more than {MAX_BYTES} bytes after decompression")
    return parse_idx(data, dims=dims, name=str(path))
