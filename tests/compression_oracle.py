"""The wire format of compressed updates a second time: bit by bit, in plain Python, as docs/compression.md has it.

Slow and obvious on purpose. Numbers are Python's; a float32 is a Python float that ``f32`` has rounded. Nothing here
uses the package under test but the specification's fields.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator

from client_sdk.protocol.compression import CompressionMethod, CompressionSpec

M64 = 2**64 - 1


def f32(x: float) -> float:
    """Rounded to float32, ties to even."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def f32_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


# --- public randomness ---------------------------------------------------------------------------------------


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 of Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (2011)."""
    x = [counter >> 64 * i & M64 for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [p1 >> 64 ^ x[1] ^ k0, p1 & M64, p0 >> 64 ^ x[3] ^ k1, p0 & M64]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & M64, (k1 + 0xBB67AE8584CAA73B) & M64
    return x


def words(purpose: str, seed: int, context: bytes = b"") -> Iterator[int]:
    digest = hashlib.sha256(b"pocketfed/" + purpose.encode() + b"\0" + seed.to_bytes(8, "little") + context).digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    counter = 1
    while True:
        yield from philox_block(counter, key)
        counter += 1


def halves(purpose: str, seed: int, context: bytes) -> Iterator[int]:
    for word in words(purpose, seed, context):
        yield word & 0xFFFFFFFF
        yield word >> 32


def support(seed: int, size: int, count: int) -> list[int]:
    few = min(count, size - count)
    drawn: set[int] = set()
    stream = words("support", seed)
    while len(drawn) < few:
        drawn.add(next(stream) * size >> 64)
    return sorted(drawn if few == count else set(range(size)) - drawn)


# --- bits ----------------------------------------------------------------------------------------------------


def octets(bits: list[int]) -> bytes:
    """Lowest bit of each byte first, filled up with 0."""
    bits = bits + [0] * (-len(bits) % 8)
    return bytes(sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))


def fields(values: list[int], width: int) -> bytes:
    return octets([value >> i & 1 for value in values for i in range(width)])


def unary(values: list[int]) -> bytes:
    return octets([bit for value in values for bit in [0] * value + [1]])


def rice(values: list[int]) -> tuple[int, bytes]:
    """The parameter of the fewest bits, and the codes."""
    best = min(range(32), key=lambda r: sum(r + 1 + (v >> r) for v in values))
    return best, fields([v & (1 << best) - 1 for v in values], best) + unary([v >> best for v in values])


# --- sections ------------------------------------------------------------------------------------------------


def indices_section(indices: list[int], size: int) -> bytes:
    if len(indices) in {0, size}:
        return b""
    parameter, codes = rice([b - a - 1 for a, b in zip([-1, *indices], indices, strict=False)])
    return bytes([parameter]) + codes


def signed_section(magnitudes: list[int], negative: list[bool], width: int) -> bytes:
    if not magnitudes:
        return b""
    base_bytes = -(-width // 8)
    candidates = []
    for apart in (0, 1):
        written = [m for m in magnitudes if m] if apart else magnitudes
        front = octets([int(m != 0) for m in magnitudes]) if apart else b""
        candidates.append(bytes([apart << 7]) + front + fields(written, width))
        if not written:
            continue
        for kind, base in ((1, min(written)), (2, max(written))):
            parameter, codes = rice([abs(m - base) for m in written])
            head = bytes([apart << 7 | kind << 5 | parameter])
            candidates.append(head + front + base.to_bytes(base_bytes, "little") + codes)
    if all(magnitudes):
        candidates = candidates[:3]
    signs = octets([int(n) for m, n in zip(magnitudes, negative, strict=True) if m])
    return min(candidates, key=len) + signs


def float_section(values: list[float]) -> bytes:
    bits = [f32_bits(v) for v in values]
    return signed_section([b & 0x7FFFFFFF for b in bits], [b >> 31 == 1 for b in bits], 31)


def mean_magnitude(part: list[float], block: int) -> float:
    """Summed by halves, up to the power of two that holds a whole block (the last one may be shorter)."""
    terms = [abs(v) for v in part] + [0.0] * ((1 << (block - 1).bit_length()) - len(part))
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    return f32(terms[0] / len(part))


def quantised_section(values: list[float], spec: CompressionSpec, seed: int, rounding_seed: int) -> bytes:
    levels = {8: 127, 4: 7, 1: 1}[spec.value_bits]
    content = hashlib.sha256(b"".join(struct.pack("<f", v) for v in values)).digest()
    stream = halves("rounding", seed, rounding_seed.to_bytes(8, "little") + content)
    noise = None if spec.error_feedback else (half / 2**32 for half in stream)
    scales, numbers, negative = b"", [], []
    block = min(spec.block, max(1, len(values)))
    for at in range(0, len(values), block):
        part = values[at : at + block]
        mean = spec.value_bits == 1 and noise is None
        scale = mean_magnitude(part, block) if mean else max(abs(v) for v in part)
        scales += struct.pack("<f", scale)
        for v in part:
            exact = abs(v) * levels / (scale or 1.0)
            if spec.value_bits == 1:
                down = v < 0 if noise is None else (v / (scale or 1.0) + 1) / 2 + next(noise) < 1
                negative.append(bool(scale) and down)
            else:
                numbers.append(round(exact) if noise is None else math.floor(exact + next(noise)))
                negative.append(v < 0)
    if spec.value_bits == 1:
        return scales + octets([int(n) for n in negative])
    return scales + signed_section(numbers, negative, spec.value_bits - 1)


# --- linear maps ---------------------------------------------------------------------------------------------


def rotation_parts(size: int, seed: int) -> tuple[int, list[tuple[int, list[int]]]]:
    """The block, and (start, signs) of each block in the order in which they are transformed."""
    block = 1
    while block < 4096 and block * 4 <= size:
        block *= 4
    starts = list(range(0, size - block + 1, block))
    if size % block:
        starts.append(size - block)
    stream = (word >> i & 1 for word in words("rotation", seed) for i in range(64))
    return block, [(start, [next(stream) for _ in range(block)]) for start in starts]


def hadamard(block: list[float]) -> list[float]:
    """Columns of the square matrix, then its rows, then the scale; each sum rounded to float32."""
    side = math.isqrt(len(block))

    def steps(line: list[float]) -> list[float]:
        h = 1
        while h < side:
            for i in range(side):
                if not i & h:
                    line[i], line[i + h] = f32(line[i] + line[i + h]), f32(line[i] - line[i + h])
            h *= 2
        return line

    columns = [steps(block[column::side]) for column in range(side)]
    rows = [steps([columns[column][row] for column in range(side)]) for row in range(side)]
    return [f32(value / side) for row in rows for value in row]


def rotate(values: list[float], seed: int) -> list[float]:
    block, parts = rotation_parts(len(values), seed)
    values = list(values)
    for start, signs in parts:
        signed = [-v if s else v for v, s in zip(values[start : start + block], signs, strict=True)]
        values[start : start + block] = hadamard(signed)
    return values


def sketch(values: list[float], seed: int, rows: int, columns: int) -> list[float]:
    stream = words("sketch", seed)
    table = []
    for _ in range(rows):
        multiplier, offset = next(stream), next(stream)
        row = [0.0] * columns
        for i, v in enumerate(values):
            mixed = (multiplier * i + offset) & M64
            row[(mixed >> 31 & 0xFFFFFFFF) * columns >> 32] += -v if mixed >> 63 else v
        table += [f32(v) for v in row]
    return table


# --- payloads ------------------------------------------------------------------------------------------------


def share(size: int, ratio: float) -> int:
    return min(size, max(1, int(size * ratio)))


def encode(spec: CompressionSpec, values: list[float], seed: int, rounding_seed: int = 0) -> bytes:
    """The payload of an update of finite float32 values."""
    size, front = len(values), b""
    if spec.rotation:
        values = rotate(values, seed)
    match spec.method:
        case CompressionMethod.TOPK:
            # sorted() is stable: of equal magnitudes the lowest index comes first.
            chosen = sorted(sorted(range(size), key=lambda i: -abs(values[i]))[: share(size, spec.ratio)])
            front = indices_section(chosen, size)
        case CompressionMethod.THRESHOLD:
            chosen = [i for i, v in enumerate(values) if abs(v) >= spec.threshold]
            front = len(chosen).to_bytes(4, "little") + indices_section(chosen, size)
        case CompressionMethod.RANDOMK:
            chosen = support(seed, size, share(size, spec.ratio))
        case CompressionMethod.COUNT_SKETCH:
            columns = spec.columns or max(1, int(size * spec.ratio) // spec.rows)
            values = sketch(values, seed, spec.rows, columns)
            chosen = list(range(len(values)))
        case _:
            chosen = list(range(size))
    sent = [values[i] for i in chosen]
    if spec.value_bits != 32:
        return front + quantised_section(sent, spec, seed, rounding_seed)
    if spec.method is CompressionMethod.NONE:
        return b"".join(struct.pack("<f", v) for v in sent)
    return front + float_section(sent)
