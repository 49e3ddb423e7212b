"""Golden vectors of fields and shares, made with plain integers: the package is only asked whether it agrees.

Elements are written as their canonical bytes, in hex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from tests import sharing_oracle as oracle

SEEDS = [bytes([16 * i + j for j in range(16)]) * 2 for i in range(6)]
M61, M127 = oracle.modulus("m61"), oracle.modulus("m127")

_CODES = {"m61": [0, 1, -1, 2**32, -(2**59), 2**60 - 1, 1 - 2**60], "m127": [0, 1, -1, 2**60, 2**62, -(2**62)]}
_EDGES = {
    "m61": [0, 1, M61 - 1, 2**60 - 1, 2**60],
    "m127": [0, M127 - 1, 2**64 - 1, 2**64, 2**126],
}
_SCHEMES = [
    ("two of three", "m61", 2, 3, 1),
    ("three of five", "m61", 3, 5, 1),
    ("three of five, two coordinates in an element", "m61", 3, 5, 2),
    ("three of five, a larger field", "m127", 3, 5, 1),
    ("three of five, a larger field, two coordinates in an element", "m127", 3, 5, 2),
    ("four of seven", "m61", 4, 7, 1),
    ("all of four", "m61", 4, 4, 1),
]


def _hex(field: str, values: Sequence[int]) -> str:
    width = oracle.element_bytes(field)
    return b"".join((value % oracle.modulus(field)).to_bytes(width, "little") for value in values).hex()


def _expansion(field: str, seed: bytes, size: int) -> dict[str, Any]:
    return {"field": field, "seed": seed.hex(), "elements": _hex(field, oracle.expand(field, seed, size))}


def _stream(name: str, field: str, words: Sequence[int]) -> dict[str, Any]:
    data = b"".join(word.to_bytes(oracle.element_bytes(field), "little") for word in words)
    kept = sum(word & oracle.modulus(field) != oracle.modulus(field) for word in words)
    elements = list(islice(oracle.elements(field, iter(data)), kept))
    return {"name": name, "field": field, "stream": data.hex(), "elements": _hex(field, elements)}


def _split(name: str, field: str, threshold: int, num_shares: int, packing: int) -> dict[str, Any]:
    secret = _EDGES[field]
    seeds = SEEDS[: threshold - 1]
    drawn = [oracle.expand(field, seed, -(-len(secret) // packing)) for seed in seeds]
    shares = oracle.split(field, secret, drawn, num_shares, packing)
    return {
        "name": name,
        "field": field,
        "threshold": threshold,
        "num_shares": num_shares,
        "packing": packing,
        "size": len(secret),
        "secret": _hex(field, secret),
        "seeds": [seed.hex() for seed in seeds],
        "shares": [_hex(field, share) for share in shares],
    }


def _sum(name: str, field: str, packing: int, weights: Sequence[int], opened_by: Sequence[int]) -> dict[str, Any]:
    """A weighted sum of updates' shares, of three of five, and what it opens."""
    codes = [[(i + 2) * 10**9 + j, -(j + 1) * 10**6, (-1) ** i * 7] for i, j in enumerate(range(len(weights)))]
    p, totals = oracle.modulus(field), [[0] * -(-3 // packing) for _ in range(5)]
    for i, (weight, update) in enumerate(zip(weights, codes, strict=True)):
        drawn = [oracle.expand(field, bytes([i, k]) * 16, -(-3 // packing)) for k in (1, 2)]
        shares = oracle.split(field, [code % p for code in update], drawn, 5, packing)
        totals = [
            [(t + weight * x) % p for t, x in zip(*each, strict=True)] for each in zip(totals, shares, strict=True)
        ]
    return {
        "name": name,
        "field": field,
        "threshold": 3,
        "num_shares": 5,
        "packing": packing,
        "size": 3,
        "shares": {str(index): _hex(field, totals[index - 1]) for index in opened_by},
        "opened": [sum(w * update[j] for w, update in zip(weights, codes, strict=True)) for j in range(3)],
    }


def shares() -> dict[str, Any]:
    """Elements, integers, seeds, splits, sums; and what is refused."""
    good = [_split(*scheme) for scheme in _SCHEMES]
    some = good[1]["shares"]

    def bad(name: str, error: str, changed: Mapping[str, str], size: int = 5) -> dict[str, Any]:
        given = {"1": some[0], "2": some[1], "4": some[3]}
        return {"name": name, "error": error, "size": size, "shares": given | changed}

    return {
        "description": "Vectors of fields and their shares (client_sdk.protocol.field, shamir). Elements are 8 (m61) "
        "or 16 (m127) bytes, little-endian. expansions: seed to elements. streams: a key stream's bytes to elements, "
        "where words are left out. integers: codes to elements and back. good: a secret, the seeds of its first "
        "shares, all shares. sums: what shares of weighted sums open. bad: of three of five of m61, shares that do not "
        "open, and the problem's slug. bad_codes: integers that are not shared. bad_elements: that are no integers.",
        "expansions": [
            _expansion(field, SEEDS[i], size) for field in oracle.BITS for i, size in ((0, 5), (5, 3), (1, 0))
        ],
        "streams": [
            _stream("what lies above the bits is masked", "m61", [2**64 - 2, 1 << 61 | 5, 2**61]),
            _stream("the modulus is left out", "m61", [7, M61, 8, M61, M61, 9]),
            _stream("the modulus, masked, is left out", "m61", [2**64 - 1, 3]),
            _stream("what lies above the bits is masked", "m127", [2**128 - 2, 1 << 127 | 5, 2**127]),
            _stream("the modulus is left out", "m127", [M127, 2**64 - 1, 2**128 - 1, (2**63 - 1) << 64]),
        ],
        "integers": [
            {"field": field, "codes": codes, "elements": _hex(field, codes)} for field, codes in _CODES.items()
        ],
        "good": good,
        "sums": [
            _sum("three consecutive shares", "m61", 1, [1, 1, 1], [1, 2, 3]),
            _sum("any three, weighted", "m61", 1, [3, 256 * 1000, 1], [1, 4, 5]),
            _sum("more than are needed", "m61", 1, [1, 2], [2, 3, 4, 5]),
            _sum("packed", "m61", 2, [5, 1, 1000], [1, 2, 4, 5]),
            _sum("a larger field", "m127", 1, [1, 2**29], [2, 3, 5]),
            _sum("a larger field, packed", "m127", 2, [1, 2], [1, 3, 4, 5]),
        ],
        "bad": [
            bad("a share 0", "malformed-share", {"0": some[0]}),
            bad("a share 6 of five", "malformed-share", {"6": some[0]}),
            bad("the modulus", "malformed-share", {"2": _hex("m61", [1, 2, 3, 4]) + "ffffffffffffff1f"}),
            bad("more than 61 bits", "malformed-share", {"2": _hex("m61", [1, 2, 3, 4]) + "0000000000000020"}),
            bad("an element too few", "shape-mismatch", {"4": some[3][:-16]}),
            bad("an element too many", "shape-mismatch", {"4": some[3] + "00" * 8}),
            bad("half an element", "shape-mismatch", {"4": some[3][:-8]}),
            bad("nothing", "shape-mismatch", {"4": ""}),
            bad("of another secret's length", "shape-mismatch", {}, size=6),
        ],
        "bad_codes": [
            {"field": "m61", "codes": [2**60], "error": "update-out-of-range"},
            {"field": "m61", "codes": [0, -(2**60)], "error": "update-out-of-range"},
            {"field": "m61", "codes": [-(2**63)], "error": "update-out-of-range"},
            {"field": "m127", "codes": [2**62 + 1], "error": "update-out-of-range"},
        ],
        "bad_elements": [
            {"field": "m127", "elements": _hex("m127", [2**62 + 1]), "error": "update-out-of-range"},
            {"field": "m127", "elements": _hex("m127", [-(2**62) - 1]), "error": "update-out-of-range"},
            {"field": "m127", "elements": _hex("m127", [2**126]), "error": "update-out-of-range"},
        ],
    }


def shares_checked() -> dict[str, Any]:
    """Shares that fit together, and shares that do not."""
    cases = []

    def case(
        name: str, given: Sequence[int], wrong: Mapping[int, int], bad: Sequence[int] | None, *, n: int = 5
    ) -> None:
        """``wrong``: what is added to the first element of a share. ``bad``: what is located; None where nothing is."""
        drawn = [oracle.expand("m61", seed, 3) for seed in SEEDS[:2]]
        split = oracle.split("m61", [1, 2, M61 - 3], drawn, n, 1)
        vectors = {x: [(split[x - 1][0] + wrong.get(x, 0)) % M61, *split[x - 1][1:]] for x in given}
        cases.append(
            {
                "name": name,
                "field": "m61",
                "threshold": 3,
                "num_shares": n,
                "packing": 1,
                "shares": {str(x): _hex("m61", vector) for x, vector in vectors.items()},
                "consistent": not wrong,
                "bad": None if bad is None else list(bad),
                "ambiguous": bad is None,
            }
        )

    case("five fit", [1, 2, 3, 4, 5], {}, [])
    case("four fit", [1, 2, 4, 5], {}, [])
    case("one of five is wrong", [1, 2, 3, 4, 5], {3: 1}, [3])
    case("one of five is wrong by a multiple of its index", [1, 2, 3, 4, 5], {5: M61 - 5}, [5])
    case("one of four is wrong, and nobody knows which", [1, 2, 3, 5], {1: 9}, None)
    case("two of five are wrong, and nobody knows which", [1, 2, 3, 4, 5], {1: 9, 4: 1234567}, None)
    case("two of seven are wrong", [1, 2, 3, 4, 5, 6, 7], {2: 9, 7: 2**60}, [2, 7], n=7)
    # (x - 1)(x - 2), added to shares 4 and 5, fits shares 1 and 2: share 3 is framed.
    case("two of five collude, and a third is taken for the wrong one", [1, 2, 3, 4, 5], {4: 6, 5: 12}, [3])
    return {
        "description": "Shares of one vector, of which some are wrong (client_sdk.protocol.share_checks). consistent: "
        "whether all lie on one polynomial. bad: the wrong ones that are located, if no more are wrong than half of "
        "those beyond what is needed; null where it is ambiguous.",
        "good": [each for each in cases if each["consistent"]],
        "bad": [each for each in cases if not each["consistent"]],
    }
