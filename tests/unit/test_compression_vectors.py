"""Replays the golden vectors of compressed updates, with the implementation and with the plain-Python one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.compression.streams import WordStream, support
from client_sdk.protocol.errors import ProtocolError
from tests import compression_oracle as oracle
from tests.vectors.generate import FOLDER

VECTORS = json.loads((FOLDER / "compression.json").read_text())


def name(vector: dict[str, Any]) -> str:
    return vector["name"]


def floats(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)


def codec(vector: dict[str, Any]) -> Codec:
    return Codec(CompressionSpec.parse(vector["compression"]), vector["size"])


@pytest.mark.parametrize("vector", VECTORS["good"], ids=name)
def test_a_good_payload_decodes_to_its_update_and_is_made_again(vector: dict[str, Any]):
    payload = bytes.fromhex(vector["payload"])
    decoded = codec(vector).decode(payload, vector["seed"])
    assert decoded.tobytes() == floats(vector["decoded"]).tobytes()
    update = floats(vector["update"])
    assert codec(vector).encode(update, vector["seed"], rounding_seed=vector["rounding_seed"]) == payload


@pytest.mark.parametrize("vector", VECTORS["good"], ids=name)
def test_the_plain_implementation_makes_the_same_payload(vector: dict[str, Any]):
    spec = CompressionSpec.parse(vector["compression"])
    made = oracle.encode(spec, floats(vector["update"]).tolist(), vector["seed"], vector["rounding_seed"])
    assert made.hex() == vector["payload"]


@pytest.mark.parametrize("vector", VECTORS["bad"], ids=name)
def test_a_bad_payload_is_refused_with_its_error(vector: dict[str, Any]):
    with pytest.raises(ProtocolError) as caught:
        codec(vector).decode(bytes.fromhex(vector["payload"]), vector["seed"])
    assert caught.value.slug == vector["error"]


@pytest.mark.parametrize("vector", VECTORS["words"], ids=lambda v: f"{v['purpose']}-{v['seed']}")
def test_the_public_words_never_change(vector: dict[str, Any]):
    expected = [int(word, 16) for word in vector["words"]]
    assert WordStream(vector["purpose"], vector["seed"]).words(5).tolist() == expected
    assert list(itertools.islice(oracle.words(vector["purpose"], vector["seed"]), 5)) == expected


@pytest.mark.parametrize("vector", VECTORS["supports"], ids=lambda v: f"{v['count']}-of-{v['size']}")
def test_the_public_supports_never_change(vector: dict[str, Any]):
    arguments = vector["seed"], vector["size"], vector["count"]
    assert support(*arguments).tolist() == oracle.support(*arguments) == vector["coordinates"]
