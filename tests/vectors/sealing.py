"""The vectors of sealing and of secure reports.

Ciphertexts are random, so the library cannot make a vector twice. What is committed is made by ``hpke_seal`` here. It
follows the text of RFC 9180 with the sender's key of the moment as an argument: an oracle that shares no code with what
it checks. For the hybrid it cannot play the sender (the lattice's randomness is not for the caller), so there one
ciphertext is kept, and ``hpke_open`` is the oracle.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from client_sdk.protocol.field import MERSENNE_61, MERSENNE_127, SEED_BYTES
from client_sdk.protocol.sealing import SealingKey, SealingSuite, SharingTerms
from client_sdk.protocol.secure import SecureLayout, encode_shares
from client_sdk.protocol.shamir import Scheme, share_seeded

ID, OTHER_ID, DEVICE_ID = "00112233445566778899aabbccddeeff", "f" * 32, "d" * 32
HASH = "0123456789abcdef" * 4
SEALING_KEYS = tuple(SealingKey(SealingSuite.X25519, bytes([index] * 32)) for index in range(1, 6))
HYBRID_KEYS = tuple(SealingKey(SealingSuite.MLKEM768_X25519, bytes([index] * 96)) for index in range(1, 4))
EPHEMERAL = bytes(range(32))
MASK_SEED = b"m" * 32

TERMS = SharingTerms(field="m61", threshold=3, num_aggregators=5, packing=1, fraction_bits=24, clip_norm=1.5)
SHARE = {
    "task_id": ID,
    "assignment_id": OTHER_ID,
    "device_id": DEVICE_ID,
    "aggregator_index": 1,
    "model_version": 12,
    "parameter_table_sha256": HASH,
    "terms": TERMS,
}
ALL_TERMS = SharingTerms(
    field="m127",
    threshold=2,
    num_aggregators=3,
    packing=2,
    fraction_bits=20,
    clip_norm=0.3,
    indicator_norm=0.25,
    noise_variance="123456789012345678901234567890/11",
    indicator_variance="5/2",
    max_participations=3,
)
NOISE = {
    "task_id": ID,
    "round_id": 12,
    "run": 2,
    "contributors": (1, 2, 4),
    "set_sha256": HASH,
    "sender": 2,
    "receiver": 1,
}
HYBRID_CIPHERTEXT = base64.b64decode(
    "yIfrTATZjDnI/JSdOENTyyksg/HdNTnh0EG/vFfLiDbtZ5yPva2YsrBwM3hiex3y9/KwWcCnLBGomFlMhlM+lb9joTT8nd+6Q8zUBXEDMX6fGH16"
    "HCQ0NzMWgAGoG8R7YB2fw3ztfUglOOHz4p2zqoQNmv4T5b3s2498sOVESvx7KoxPKcJ7Za56KXDik0IyDKGrHfmorKN7aHeZZuTLntPJvgRwI5oD"
    "fWRAzu0HSbdnkxk5TuZKEjey1EURZjm8jMaemz5ouHxkrrVyQERB0ZBurjjQTngxcZllf+i851bU5XBv60zfTQIvSBTFHbuAduZKuziLfdUm1u+a"
    "3DXyKykACCi2gUC8zd2hy4QYNnwSGWFDt6iQc2ZmihzAq4ek9RbXR8zwX55kNrNdCtNHsD68mpUWkW+GIoCEficUiEY/YPmApj2cCbRDm9FEnDLk"
    "FTM0haKV/7cwLoZA+yhQxfGaCPWeulImG8SIhKJrZut1OcLHSD4og8q0HbaVZv4uNnnocc4umVHQhaNES4C0i4FVdZDyc7fLtyDv+jlTQiLUmCgl"
    "K3cBCeQUPfoGknWS1E6i0xou3UdaIeNJvVO0DPi+/YkeICr5E4AVKmdE1Zd/QtquFOhYaRXs8ddffrsE+87djq3LFeW6fEGuX1a8QPKD0IIhG56s"
    "XyBC8/5+38XpNCOh47XzEXTS/yntnUzUFWQ9BaABM09hv0lJT/cydljssRUHJytVJ1XbTJB28NH2mnq3cjJWV1Az9OObI1311++qN/RXFOq83dmJ"
    "IWTHU0ymJA58Kwff7SbINM1e0Te6y8mrWMxCmt0O1m9Itzov/plM0YYhzI/9X7BaHMUnjHRWsYvwSZSsclsfkgdH2XUhGtCk9EUVxWH8ukWuHKFG"
    "sbJJYmE8nO7NMibu3fcG50S/SfKOm99N1EGfYYlwa8zZzee3PshJo9NjBHXXfrPuAg+vNQ5kN0o1zDo6URSK1W01b6q6kDKm+mwEKqSlCD85vvj2"
    "2rexHUsLgptmqDmu/wF8Vim98E951Mtv5q9SlWF1MPZ2WUIqQx5U/hXi9fbzYwoehm6Cy2if+af6693pL0dx0gBlFcG8brURRrJAde76Z8TjitRY"
    "j5jV6Mfld6ZrgWiSETcBWjTj71H1mktAjZmsVuXeXoQYvpRkhMM3b+2l67kHLaBjdVG3zlRuiOw1Odw0vuLKUZkpTmsHlOfHgVTKMPt+Ff6xJeom"
    "EivoSmqtUbtBWV3oHKu57NptPJ1RUPbWg/q/+EomdGfFyJ+46NPtIFSLFbXOgJ/3KfE1Y8OmbZBFSN5zUsueFUgpGOIK0aqsODF3g7HbRGCiMJhf"
    "blZPCFisND2d0mQZzrUr7vH/ewmbpNflI8f/NfX4UJqDgqNkIFsUC3UBE7ZctrrQR71ffGCXEeMq6UGCLyCOx27QbB0i2OUDGSjMDF3k7JDVr/M5"
    "HPXRiXUkRM7cmjOpL8QkWugS3guzPySlMbADT5bn2d3Mi7MrbLrtLGAAmGqdgYbR/FleUBV3nrMLks0="
)


# --- the oracle: RFC 9180, base mode, HKDF-SHA256, AES-256-GCM -------------------------------------------------------


def _extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.new(salt, b"HPKE-v1" + suite + label + ikm, hashlib.sha256).digest()


def _expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    # At most 32 bytes are ever asked for: one block of HKDF-Expand.
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.new(prk, labelled + b"\x01", hashlib.sha256).digest()[:length]


def _aead(kem_id: int, shared_secret: bytes, info: bytes) -> tuple[AESGCM, bytes]:
    """Section 5.1: the key schedule of mode 0; the cipher and the nonce of the first message."""
    suite = b"HPKE" + kem_id.to_bytes(2, "big") + b"\x00\x01\x00\x02"
    context = b"\x00" + _extract(suite, b"", b"psk_id_hash", b"") + _extract(suite, b"", b"info_hash", info)
    secret = _extract(suite, shared_secret, b"secret", b"")
    return AESGCM(_expand(suite, secret, b"key", context, 32)), _expand(suite, secret, b"base_nonce", context, 12)


def _curve_secret(exchanged: bytes, encapsulated: bytes, public: bytes) -> bytes:
    """Section 4.1: DHKEM(X25519, HKDF-SHA256), KEM 0x0020."""
    suite = b"KEM\x00\x20"
    prk = _extract(suite, b"", b"eae_prk", exchanged)
    return _expand(suite, prk, b"shared_secret", encapsulated + public, 32)


def hpke_seal(plaintext: bytes, public: bytes, info: bytes, ephemeral: bytes) -> bytes:
    """Seal to an X25519 key with a given key of the moment."""
    sender = X25519PrivateKey.from_private_bytes(ephemeral)
    encapsulated = sender.public_key().public_bytes_raw()
    exchanged = sender.exchange(X25519PublicKey.from_public_bytes(public))
    cipher, nonce = _aead(0x0020, _curve_secret(exchanged, encapsulated, public), info)
    return encapsulated + cipher.encrypt(nonce, plaintext, b"")


def hpke_open(ciphertext: bytes, suite: SealingSuite, private: bytes, info: bytes) -> bytes:
    """Open with either suite; the hybrid is X-Wing, KEM 0x647a."""
    curve = X25519PrivateKey.from_private_bytes(private[-32:])
    public = curve.public_key().public_bytes_raw()
    if suite is SealingSuite.X25519:
        encapsulated, sealed = ciphertext[:32], ciphertext[32:]
        exchanged = curve.exchange(X25519PublicKey.from_public_bytes(encapsulated))
        cipher, nonce = _aead(0x0020, _curve_secret(exchanged, encapsulated, public), info)
    else:
        lattice_part, curve_part, sealed = ciphertext[:1088], ciphertext[1088:1120], ciphertext[1120:]
        lattice_secret = MLKEM768PrivateKey.from_seed_bytes(private[:64]).decapsulate(lattice_part)
        exchanged = curve.exchange(X25519PublicKey.from_public_bytes(curve_part))
        combined = lattice_secret + exchanged + curve_part + public + rb"\.//^" + b"\\"
        cipher, nonce = _aead(0x647A, hashlib.sha3_256(combined).digest(), info)
    return cipher.decrypt(nonce, sealed, b"")


# --- the oracle: what a ciphertext is bound to, as docs/protocol.md has it ------------------------------------------


def _written(value: Any) -> bytes:
    match value:
        case None:
            return b""
        case str():
            return value.encode()
        case float():
            return struct.pack("<d", value)
        case int():
            return struct.pack("<Q", value)
        case tuple():
            return b"".join(map(_written, value))
        case _:
            return _fields(*asdict(value).values())


def _fields(*values: Any) -> bytes:
    encoded = [_written(value) for value in values]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def share_info(**context: Any) -> bytes:
    """Of a share; in the order of ``SHARE`` and of the terms."""
    return _fields("pocketfed share v1", *(context[name] for name in SHARE))


def noise_info(**context: Any) -> bytes:
    """Of noise; in the order of ``NOISE``."""
    return _fields("pocketfed noise v1", *(context[name] for name in NOISE))


# --- sealing.json --------------------------------------------------------------------------------------------------


def _json(context: dict[str, Any]) -> dict[str, Any]:
    return {
        name: asdict(value) if isinstance(value, SharingTerms) else list(value) if isinstance(value, tuple) else value
        for name, value in context.items()
    }


def sealing() -> dict[str, Any]:
    """Contexts and their encodings; ciphertexts, and what is in them."""
    shares = {
        "a share": SHARE,
        "a share with the device's own noise": SHARE | {"aggregator_index": 3, "terms": ALL_TERMS},
        "an indicator without noise": SHARE | {"terms": replace(TERMS, indicator_norm=2.0)},
        "a device that takes part once": SHARE | {"terms": replace(TERMS, max_participations=1)},
    }
    noises = {"noise": NOISE, "noise of everybody": NOISE | {"contributors": (1, 2, 3, 4, 5), "run": 0}}
    infos = [
        {"name": name, "kind": "share", "context": _json(context), "info": share_info(**context).hex()}
        for name, context in shares.items()
    ] + [
        {"name": name, "kind": "noise", "context": _json(context), "info": noise_info(**context).hex()}
        for name, context in noises.items()
    ]
    key, hybrid = SEALING_KEYS[0], HYBRID_KEYS[0]
    share, noise = share_info(**SHARE), noise_info(**NOISE)
    curve, lattice = SealingSuite.X25519, SealingSuite.MLKEM768_X25519
    whole = hpke_seal(b"a share", key.public.raw, share, EPHEMERAL)
    contents = {
        "a share": (key, share, b"a share", whole),
        "nothing": (key, share, b"", hpke_seal(b"", key.public.raw, share, EPHEMERAL)),
        "noise": (key, noise, b"noise", hpke_seal(b"noise", key.public.raw, noise, EPHEMERAL)),
        "more than one block": (
            key,
            share,
            bytes(range(99)),
            hpke_seal(bytes(range(99)), key.public.raw, share, EPHEMERAL),
        ),
        "to a hybrid key": (hybrid, noise, b"to aggregator 1", HYBRID_CIPHERTEXT),
    }
    good = [
        {
            "name": name,
            "suite": to.suite.value,
            "private_key": to.private_bytes().hex(),
            "public_key": to.public.hex,
            "info": info.hex(),
            "plaintext": plaintext.hex(),
            "ciphertext": ciphertext.hex(),
        }
        for name, (to, info, plaintext, ciphertext) in contents.items()
    ]
    # The clamped bit of a private key and the unused one of a public key are no way around anything.
    high_bit = whole[:31] + bytes([whole[31] ^ 0x80]) + whole[32:]
    bad = {
        "no bytes": (curve, key, share, b""),
        "only a key": (curve, key, share, whole[:32]),
        "a byte short": (curve, key, share, whole[:-1]),
        "a byte too many": (curve, key, share, whole + b"\x00"),
        "a flipped bit in the key": (curve, key, share, bytes([whole[0] ^ 1]) + whole[1:]),
        "the unused bit of the key": (curve, key, share, high_bit),
        "a flipped bit in the middle": (curve, key, share, whole[:34] + bytes([whole[34] ^ 4]) + whole[35:]),
        "a flipped bit in the tag": (curve, key, share, whole[:-1] + bytes([whole[-1] ^ 0x80])),
        "a key of low order": (curve, key, share, bytes(32) + whole[32:]),
        "another aggregator's key": (curve, SEALING_KEYS[1], share, whole),
        "no context": (curve, key, b"", whole),
        "another aggregator's index": (curve, key, share_info(**SHARE | {"aggregator_index": 2}), whole),
        "another assignment": (curve, key, share_info(**SHARE | {"assignment_id": ID}), whole),
        "another device": (curve, key, share_info(**SHARE | {"device_id": ID}), whole),
        "another task": (curve, key, share_info(**SHARE | {"task_id": OTHER_ID}), whole),
        "another model": (curve, key, share_info(**SHARE | {"model_version": 13}), whole),
        "another parameter table": (curve, key, share_info(**SHARE | {"parameter_table_sha256": "a" * 64}), whole),
        "another clip norm": (curve, key, share_info(**SHARE | {"terms": replace(TERMS, clip_norm=15.0)}), whole),
        "a lower threshold": (curve, key, share_info(**SHARE | {"terms": replace(TERMS, threshold=2)}), whole),
        "more participations": (
            curve,
            key,
            share_info(**SHARE | {"terms": replace(TERMS, max_participations=9)}),
            whole,
        ),
        "noise for a share": (curve, key, noise, whole),
        "hybrid: a flipped bit in the lattice's part": (
            lattice,
            hybrid,
            noise,
            bytes([HYBRID_CIPHERTEXT[0] ^ 1]) + HYBRID_CIPHERTEXT[1:],
        ),
        "hybrid: a flipped bit in the curve's part": (
            lattice,
            hybrid,
            noise,
            HYBRID_CIPHERTEXT[:1090] + bytes([HYBRID_CIPHERTEXT[1090] ^ 1]) + HYBRID_CIPHERTEXT[1091:],
        ),
        "hybrid: another key": (lattice, HYBRID_KEYS[1], noise, HYBRID_CIPHERTEXT),
        "hybrid: the curve's half of a key": (curve, key, noise, HYBRID_CIPHERTEXT),
    }
    return {
        "description": "Sealing (client_sdk.protocol.sealing): HPKE, RFC 9180, base mode, HKDF-SHA256, AES-256-GCM; "
        "x25519 is KEM 0x0020, mlkem768-x25519 is X-Wing, KEM 0x647a. infos: a context and its encoding. good: opens "
        "to the plaintext. bad: is refused with sealing-failed, whatever is wrong. sender_key: the private key of the "
        "moment that the good ciphertexts of x25519 were made with.",
        "sender_key": EPHEMERAL.hex(),
        "infos": infos,
        "good": good,
        "bad": [
            {
                "name": name,
                "suite": suite.value,
                "private_key": to.private_bytes().hex(),
                "info": info.hex(),
                "ciphertext": ciphertext.hex(),
                "error": "sealing-failed",
            }
            for name, (suite, to, info, ciphertext) in bad.items()
        ],
    }


# --- sealing_shares.json -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    layout: SecureLayout
    codes: list[int]


def _cases() -> dict[str, _Case]:
    three, two = Scheme(2, 3), Scheme(2, 3, MERSENNE_127, 2)
    return {
        "an update of three": _Case(SecureLayout(Scheme(), 3), [1, -1, 2**60 - 1]),
        "with an indicator": _Case(SecureLayout(three, 2, indicator=True), [-(2**60) + 1, 7, -1]),
        "packed, filled up with a zero": _Case(SecureLayout(Scheme(3, 5, MERSENNE_61, 2), 3), [5, -6, 7]),
        "packed, two limbs, sealed to hybrid keys": _Case(
            SecureLayout(two, 3, indicator=True, suite=SealingSuite.MLKEM768_X25519), [2**40, -(2**40), 0, 1]
        ),
        "nothing but a mask": _Case(SecureLayout(three, 0), []),
    }


def _seeds(layout: SecureLayout) -> list[bytes]:
    return [bytes([index] * SEED_BYTES) for index in range(1, layout.scheme.threshold)]


def sealing_shares() -> dict[str, Any]:
    """What is in the shares of an update before they are sealed, and how long all is."""
    good = []
    for name, case in _cases().items():
        layout, scheme = case.layout, case.layout.scheme
        seeds = iter(_seeds(layout))
        secret = layout.secret(np.array(case.codes, np.int64), MASK_SEED)
        encoded = encode_shares(share_seeded(secret, scheme, lambda _, seeds=seeds: next(seeds)), layout)
        good.append(
            {
                "name": name,
                "layout": _layout(layout),
                "codes": case.codes,
                "mask_seed": MASK_SEED.hex(),
                "seeds": [seed.hex() for seed in _seeds(layout)],
                "secret": [str(value) for value in scheme.field.to_ints(secret)],
                "shares": [each.hex() for each in encoded],
                "ciphertext_bytes": [layout.ciphertext_bytes(index) for index in scheme.indices],
            }
        )
    whole = [bytes.fromhex(share) for share in good[0]["shares"]]
    p = 2**61 - 1
    bad = {
        "no bytes": (1, b""),
        "only a kind": (5, b"\x01"),
        "a seed cut short": (1, whole[0][:-1]),
        "a seed and a byte": (1, whole[0] + b"\x00"),
        "a seed where elements are expected": (4, whole[0]),
        "elements where a seed is expected": (2, whole[3]),
        "an unknown kind": (1, b"\x02" + whole[0][1:]),
        "an element short": (5, whole[4][:-8]),
        "an element too many": (5, whole[4] + bytes(8)),
        "the modulus": (5, whole[4][:-8] + p.to_bytes(8, "little")),
        "one more than the modulus": (3, b"\x01" + (p + 1).to_bytes(8, "little") + whole[2][9:]),
        "all ones": (3, b"\x01" + b"\xff" * 32),
        "index 0": (0, whole[0]),
        "an index beyond the last": (6, whole[4]),
    }
    return {
        "description": "Shares of a secure report before they are sealed (client_sdk.protocol.secure). good: the "
        "secret is the codes, then zeros up to a whole share, then a mask expanded from mask_seed; shares 1 to t - 1 "
        "are the kind 0 and a seed, the others the kind 1 and the elements of that share of the secret. bad: of the "
        "first good layout; refused by the aggregator of that index.",
        "good": good,
        "bad": [
            {"name": name, "index": index, "share": data.hex(), "error": "malformed-share"}
            for name, (index, data) in bad.items()
        ],
    }


def _layout(layout: SecureLayout) -> dict[str, Any]:
    scheme = layout.scheme
    return {
        "field": scheme.field.name,
        "threshold": scheme.threshold,
        "num_shares": scheme.num_shares,
        "packing": scheme.packing,
        "size": layout.size,
        "indicator": layout.indicator,
        "suite": layout.suite.value,
    }
