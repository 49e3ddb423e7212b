"""The tables of docs/compression.md are what the code does."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import pytest

from client_sdk.protocol.compression import Codec, CompressionMethod, CompressionSpec

PAGE = Path(__file__).resolve().parents[2] / "docs/compression.md"
SIZE, COUNT = 10_000_000, 100_000


def rows(header: str) -> list[list[str]]:
    """Cells of the table with this header."""
    lines = PAGE.read_text().splitlines()
    body = lines[lines.index(header) + 2 :]
    table = body[: next(i for i, line in enumerate([*body, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.fixture(scope="module")
def update() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(SIZE, dtype=np.float32)


def test_methods_are_linear_and_feed_back_as_the_page_says():
    found = rows("| line | what is sent | linear | feedback by default |")
    methods = set()
    for line, _, linear, feedback in found:
        spec = CompressionSpec.parse(line.split("`")[1])
        assert spec.is_linear == (linear == "yes")
        assert spec.error_feedback == (feedback == "yes")
        methods.add(spec.method)
    assert methods == set(CompressionMethod)


def test_sizes_are_those_of_the_page_and_below_the_bars(update: np.ndarray):
    """440 kB losslessly and 200 kB with quantised values, for 100,000 of 10,000,000."""
    found = {wire: int(size.replace(",", "")) for wire, size, _ in rows("| wire | bytes | bytes a value |")}
    lines = [wire.strip("`") for wire in found if wire.startswith("`")]
    assert len(lines) == 4
    for line in lines:
        made = len(Codec(CompressionSpec.parse(line), SIZE).encode(update, 1))
        # Another release of numpy may draw other normal values.
        assert math.isclose(made, found[f"`{line}`"], rel_tol=0.01)
        assert made <= (440_000 if "bits" not in line else 200_000)
    for _, size, each in rows("| wire | bytes | bytes a value |"):
        assert f"{int(size.replace(',', '')) / COUNT:.2f}" == each


def test_the_peers_sizes_are_those_of_the_page(update: np.ndarray):
    found = {wire: int(size.replace(",", "")) for wire, size, _ in rows("| wire | bytes | bytes a value |")}
    sparse = Codec(CompressionSpec.parse("topk:0.01"), SIZE)
    chosen = sparse.decode_sparse(sparse.encode(update, 1), 1)
    indices, values = chosen.indices.astype(np.uint32), chosen.values
    assert len(values) == COUNT
    gaps = np.diff(indices, prepend=np.uint32(0)).astype(np.uint16)
    peers = {
        "index 32 bits, value 32 bits": len(indices.tobytes() + values.tobytes()),
        "the same through zlib": len(zlib.compress(indices.tobytes() + values.tobytes())),
        "16-bit gaps and values, each through zlib": len(zlib.compress(gaps.tobytes()))
        + len(zlib.compress(values.tobytes())),
    }
    for wire, size in peers.items():
        assert math.isclose(size, found[wire], rel_tol=0.02)  # nor is every zlib the same
