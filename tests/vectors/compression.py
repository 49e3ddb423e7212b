"""Golden vectors of compressed updates: the public randomness, payloads, and payloads that are refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.compression.streams import WordStream, support

SEED = 9007199254740991

_MIXED = [0.5, -2.0, 0.0, 1e-45, -3.4028235e38, 1.0, -0.25, 7.5, 2.0, -0.0, 1e-3, -1.0, 0.125]
_TIES = [1.0, -1.0, 1.0, 0.5, -1.0, 1.0]
_RAMP = [(-1) ** i * (i * i % 97) / 64 for i in range(70)]
_ZEROS = [0.0] * 9

_GOOD: dict[str, tuple[str, list[float]]] = {
    "float32 as it is": ("none", [1.5, -2.0, 0.0]),
    "the largest one": ("topk:0.001", _MIXED),
    "the largest third": ("topk:0.34", _MIXED),
    "ties go to the lowest index": ("topk:0.5", _TIES),
    "all of them: no coordinates on the wire": ("topk:1", _MIXED),
    "of zeros the lowest": ("topk:0.5", _ZEROS),
    "many values: excess over the smallest": ("topk:0.5", _RAMP),
    "8-bit values, to the nearest": ("topk:0.5,bits=8", _RAMP),
    "8-bit values, stochastic": ("topk:0.5,bits=8,feedback=off", _RAMP),
    "a public tenth": ("randomk:0.1", _RAMP),
    "a public nine tenths": ("randomk:0.9", _RAMP),
    "a public third of the rotated update": ("randomk:0.3,rotate", _RAMP),
    "a threshold": ("threshold:0.5", _RAMP),
    "a threshold that nothing reaches": ("threshold:0.5", _ZEROS),
    "a threshold that float32 does not hold": ("threshold:0.1", [float(np.float32(0.1)), 0.09999999, -0.2]),
    "a sketch": ("sketch:0.4,rows=3", _RAMP),
    "a sketch of given columns that keeps the largest": ("sketch,rows=1,columns=20,recover=0.1", _RAMP),
    "8 bits": ("quantize:8", _RAMP),
    "4 bits in blocks": ("quantize:4,block=16", _RAMP),
    "4 bits, rotated": ("quantize:4,rotate", _RAMP),
    "1 bit, stochastic": ("quantize:1,block=32", _RAMP),
    "1 bit, the mean magnitude": ("quantize:1,block=32,feedback=on", _RAMP),
    "no values": ("topk:0.1", []),
}


def _hex(values: np.ndarray) -> str:
    return values.astype("<f4").tobytes().hex()


def _good(name: str, line: str, values: list[float], rounding_seed: int) -> dict[str, Any]:
    update = np.array(values, np.float32)
    codec = Codec(CompressionSpec.parse(line), len(update))
    payload = codec.encode(update, SEED, rounding_seed=rounding_seed)
    return {
        "name": name,
        "compression": line,
        "size": len(update),
        "seed": SEED,
        "rounding_seed": rounding_seed,
        "update": _hex(update),
        "payload": payload.hex(),
        "decoded": _hex(codec.decode(payload, SEED)),
    }


def _bad() -> dict[str, tuple[str, int, bytes, str]]:
    """Name -> specification, size, payload, error."""
    one = b"\x3f\x80\x00\x00"[::-1]
    scale = struct.pack("<f", 2.0)
    values = bytes([0]) + (0x3F800000 | 0x3F900000 << 31).to_bytes(8, "little") + b"\x00"
    malformed, truncated = "malformed-encoding", "truncated-encoding"
    return {
        "no bytes": ("topk:0.5", 4, b"", truncated),
        "float32 cut short": ("none", 2, one, truncated),
        "float32 too long": ("none", 1, one + b"\x00", "oversized-body"),
        "float32 NaN": ("none", 1, b"\x00\x00\xc0\x7f", "non-finite-update"),
        # Two of four: parameter 0, two unary zeros (bits 1 1), plain magnitudes of 31 bits, two signs.
        "cut in the values": ("topk:0.5", 4, bytes([0, 3, 0]) + bytes(7), truncated),
        "a byte too many": ("threshold:1", 4, bytes(5), malformed),
        "infinity": (
            "topk:0.5",
            4,
            bytes([0, 3, 0]) + (0x7F800000 | 0x3F800000 << 31).to_bytes(8, "little") + b"\x00",
            "non-finite-update",
        ),
        "a gap beyond the end": ("topk:0.5", 4, bytes([0, 0b11000]) + values, malformed),
        "gaps that add up to a coordinate outside": ("topk:0.5", 4, bytes([0, 0b10010]) + values, malformed),
        # Coordinates 2 and 3 instead of 0 and 1; then a bitmap without a 1.
        "zeros that are not the lowest": ("topk:0.5", 4, bytes([0, 0b1100, 0x80, 0]), malformed),
        "a parameter of 200": ("topk:0.5", 4, bytes([200, 3]) + bytes(9), malformed),
        "a parameter that is not the best": ("topk:0.5", 4, bytes([1, 0, 3]) + values, malformed),
        "a bit beyond the end": ("topk:0.5", 4, bytes([0, 0b111]) + values, malformed),
        "an unknown code of magnitudes": ("randomk:0.5", 4, bytes([0x60]) + bytes(8), malformed),
        "a Rice parameter where nothing is Rice-coded": ("randomk:0.5", 4, bytes([1]) + bytes(8) + b"\x00", malformed),
        "zeros that could be shorter": ("randomk:0.5", 8, bytes([0]) + bytes(16), malformed),
        "a declared count beyond the update": ("threshold:1", 4, (5).to_bytes(4, "little") + bytes(9), malformed),
        "a bomb: a count that the payload cannot hold": (
            "threshold:1",
            2**31 - 1,
            (2**31 - 1).to_bytes(4, "little"),
            truncated,
        ),
        "a value below the threshold": (
            "threshold:1",
            3,
            (1).to_bytes(4, "little") + bytes([0, 1, 0]) + 0x3F7FFFFF.to_bytes(4, "little") + b"\x00",
            malformed,
        ),
        "a scale that is NaN": ("quantize:1", 3, b"\x00\x00\xc0\x7f\x00", "non-finite-update"),
        "a scale that is negative": ("quantize:1", 3, b"\x00\x00\x00\xc0\x00", malformed),
        "signs under a scale of 0": ("quantize:1", 3, bytes(4) + b"\x01", malformed),
        "a sign beyond the end": ("quantize:1", 3, scale + b"\x08", malformed),
        "a scale that no value reaches": ("quantize:8", 1, scale + bytes([0, 126, 0]), malformed),
        "a scale of 0 with a value": ("quantize:8", 1, bytes(4) + bytes([0, 127, 0]), malformed),
        "a sign for a zero": ("quantize:8", 2, scale + bytes([0, 0x7F, 0x00]) + b"\x02", malformed),
    }


def compression() -> dict[str, Any]:
    """Compressed updates."""
    good = [_good(name, line, values, i) for i, (name, (line, values)) in enumerate(_GOOD.items())]
    return {
        "description": "Payloads of compressed updates (client_sdk.protocol.compression). update, decoded: float32, "
        "little-endian; error: slug of the problem that refuses a bad payload. words: the first 64-bit words of each "
        "purpose's public stream; supports: coordinates of random-k.",
        "words": [
            {"purpose": purpose, "seed": seed, "words": [f"{word:016x}" for word in WordStream(purpose, seed).words(5)]}
            for purpose in ("support", "rotation", "sketch", "rounding")
            for seed in (0, SEED)
        ],
        "supports": [
            {"seed": seed, "size": size, "count": count, "coordinates": support(seed, size, count).tolist()}
            for seed, size, count in [(0, 10, 3), (1, 10, 9), (SEED, 1000, 12), (7, 2**20, 5), (3, 1, 1)]
        ],
        "good": good,
        "bad": [
            {"name": name, "compression": line, "size": size, "seed": SEED, "payload": data.hex(), "error": error}
            for name, (line, size, data, error) in _bad().items()
        ],
    }
