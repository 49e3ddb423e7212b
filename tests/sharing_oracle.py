"""Fields, shares and their expansion a second time: plain Python integers, as docs/protocol.md has it.

Slow and obvious on purpose. Nothing here uses the package under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BITS = {"m61": 61, "m127": 127}


def modulus(field: str) -> int:
    return 2 ** BITS[field] - 1


def element_bytes(field: str) -> int:
    return {"m61": 8, "m127": 16}[field]


def key_stream(seed: bytes) -> Iterator[int]:
    """The bytes of AES-256-CTR from counter 0: encrypted counters, big-endian."""
    aes = Cipher(algorithms.AES256(seed), modes.ECB()).encryptor()  # noqa: S305 - of counters
    counter = 0
    while True:
        yield from aes.update(counter.to_bytes(16, "big"))
        counter += 1


def elements(field: str, stream: Iterator[int]) -> Iterator[int]:
    """A stream's words, masked, without those that are not below p."""
    while True:
        word = int.from_bytes(bytes(next(stream) for _ in range(element_bytes(field))), "little")
        word &= 2 ** BITS[field] - 1
        if word < modulus(field):
            yield word


def expand(field: str, seed: bytes, size: int) -> list[int]:
    words = elements(field, key_stream(seed))
    return [next(words) for _ in range(size)]


def interpolate(points: Mapping[int, int], at: int, p: int) -> int:
    """Value of the polynomial of least degree through these points."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * (at - other) * pow(x - other, -1, p) % p
        total += term
    return total % p


def split(
    field: str, secret: Sequence[int], drawn: Sequence[Sequence[int]], num_shares: int, packing: int
) -> list[list[int]]:
    """All shares of a secret whose first shares were drawn: element j has coordinate ``k j + i`` at the point -i."""
    p, shares = modulus(field), []
    padded = [*secret, *[0] * (-len(secret) % packing)]
    for x in range(1, num_shares + 1):
        share = []
        for j in range(len(padded) // packing):
            known = {-i: padded[packing * j + i] for i in range(packing)}
            known |= {1 + i: vector[j] for i, vector in enumerate(drawn)}
            share.append(interpolate(known, x, p))
        shares.append(share)
    return shares


def counted_bytes(seed: bytes) -> Callable[[int], bytes]:
    """A source of bytes that a test can repeat: for tests only."""
    stream = key_stream(seed.ljust(32, b"\0"))
    return lambda count: bytes(next(stream) for _ in range(count))
