"""Write the golden vectors: ``python -m tests.vectors.generate``.

Each file is an object with ``description``, ``good`` and ``bad``. A host in another language passes when it decodes
every good vector to the stated content, re-encodes it to the same bytes, and refuses every bad one with the stated
error. The vectors change only with the protocol's version: ``tests/unit/test_vectors.py`` compares what this module
makes with what is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.messages import (
    CONTROL_TENSOR,
    REPORT_TENSOR,
    AbandonRequest,
    Assigned,
    Assignment,
    CheckInReply,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    F32Encoding,
    Finished,
    I64SharesEncoding,
    Message,
    ModelReply,
    Problem,
    ReportFacts,
    ReportReply,
    RetryWindow,
    SecurePlan,
    VirtualTiming,
    Wait,
)
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.signing import device_id_of, sign_reply, sign_request
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from tests.vectors.compression import compression
from tests.vectors.sealing import HASH, HYBRID_KEYS, ID, OTHER_ID, SEALING_KEYS, sealing, sealing_shares
from tests.vectors.shares import shares, shares_checked

FOLDER = Path(__file__).parent

FACTS = ReportFacts(
    report_id=ID,
    assignment_id=OTHER_ID,
    model_version="12",
    parameter_table_sha256=HASH,
    kind=UpdateKind.DELTA,
    encoding="f32",
    algorithm="fedavg",
    compression="none",
    compression_seed="0",
    steps="6",
    train_loss="0.4375",
)
ASSIGNMENT = Assignment(
    assignment_id=OTHER_ID,
    assignment_number=41,
    task_id=ID,
    round_id=12,
    model_version=12,
    model_sha256=HASH,
    program_sha256=HASH[::-1],
    manifest_sha256="a" * 64,
    parameter_table_sha256="b" * 64,
    kind=UpdateKind.DELTA,
    encoding=F32Encoding(max_abs=1048576.0),
    weight=20,
    plan=TrainingPlan(local_epochs=2, batch_size=32, learning_rate=0.125, prox_mu=0.0, shuffle=True, max_steps=None),
    shuffle_seed=9007199254740991,
    lease_s=600.0,
    max_report_bytes=65536,
)
SCAFFOLD = ASSIGNMENT.model_copy(
    update={
        "plan": TrainingPlan(batch_size=32, learning_rate=0.5, shuffle=False, max_steps=7, algorithm="scaffold"),
        "control_sha256": "c" * 64,
    }
)
COMPRESSED = ASSIGNMENT.model_copy(
    update={
        "plan": TrainingPlan(
            local_epochs=5,
            batch_size=32,
            learning_rate=0.125,
            prox_mu=0.5,
            max_steps=100,
            algorithm="fednova",
            adaptive=True,
        ),
        "compression": "topk:0.5",
        "compression_seed": 9007199254740991,
    }
)
COMPRESSED_FACTS = FACTS.model_copy(
    update={"algorithm": "fednova", "compression": "topk:0.5", "compression_seed": "9007199254740991"}
)

PLAN = SecurePlan(
    fraction_bits=24,
    clip_norm=1.5,
    noise="aggregators",
    max_participations=3,
    aggregator_keys=tuple(key.public.hex for key in SEALING_KEYS),
)
SECURE = ASSIGNMENT.model_copy(update={"encoding": I64SharesEncoding(), "secure": PLAN, "withhold_metrics": True})
DEVICE_NOISE = SECURE.model_copy(
    update={
        "secure": SecurePlan(
            field="m127",
            threshold=2,
            packing=2,
            fraction_bits=20,
            clip_norm=0.3,
            noise="devices",
            noise_variance="123456789012345678901234567890/11",
            indicator_norm=0.25,
            indicator_variance="5/2",
            suite=SealingSuite.MLKEM768_X25519,
            aggregator_keys=tuple(key.public.hex for key in HYBRID_KEYS),
        ),
        "compression": "randomk:0.1",
        "compression_seed": 5,
    }
)
SECURE_FACTS = FACTS.model_copy(update={"encoding": "i64-shares", "train_loss": "withheld"})


def _changed(message: BaseModel, **changes: Any) -> dict[str, Any]:
    return message.model_dump(mode="json") | changes


def _compressed(update: np.ndarray) -> np.ndarray:
    codec = Codec(CompressionSpec.parse(COMPRESSED_FACTS.compression), len(update))
    return np.frombuffer(codec.encode(update, COMPRESSED.compression_seed), np.uint8)


def _tensors(tensors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    # Bits, not decimals: a decimal would test the other language's parser.
    return [
        {"name": name, "dtype": array.dtype.str.lstrip("<|"), "shape": list(array.shape), "data": array.tobytes().hex()}
        for name, array in tensors.items()
    ]


def _raw(header: str, payload: bytes = b"") -> bytes:
    raw = header.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


def frames() -> dict[str, Any]:
    """Frames: bytes, and what is in them."""
    f32 = np.array([1.0, -2.5, np.float32(1e-45), np.float32(3.4028235e38)], np.float32)
    contents: dict[str, tuple[dict[str, np.ndarray], dict[str, str]]] = {
        "empty": ({}, {}),
        "a report": ({REPORT_TENSOR: f32}, FACTS.model_dump(mode="json")),
        "a compressed report": (
            {REPORT_TENSOR: _compressed(np.array([0.0, -2.5, 0.125, 1e-9], np.float32))},
            COMPRESSED_FACTS.model_dump(mode="json"),
        ),
        "a control variate": ({CONTROL_TENSOR: f32[:2]}, {}),
        "a model of two parameters": (
            {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3, np.float32)},
            {},
        ),
        "a scalar, nothing, and every dtype": (
            {
                "scalar": np.array(0.5, np.float32),
                "nothing": np.zeros((0, 3), np.float32),
                "f64": np.array([np.pi]),
                "i64": np.array([-(2**63), 2**63 - 1]),
                "u8": np.array([0, 255], np.uint8),
            },
            {},
        ),
        "special floats keep their bits": (
            {"x": np.frombuffer(bytes.fromhex("0000c07f0000c0ff0000807f00000080"), np.float32)},
            {},
        ),
        "escapes and order": ({'é"\\\n': f32[:1], "a": f32[1:2]}, {"z": "1", "a": "\u20ac\U0001f600"}),
    }
    good = [
        {"name": name, "hex": encode_frame(t, m).hex(), "tensors": _tensors(t), "metadata": m}
        for name, (t, m) in contents.items()
    ]
    whole = encode_frame({"w": np.ones(1, np.float32)})
    entry = '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    bad = {
        "no bytes": (b"", "truncated-frame"),
        "cut in the header's length": (whole[:7], "truncated-frame"),
        "cut in the header": (whole[:20], "truncated-frame"),
        "cut in the data": (whole[:-1], "truncated-frame"),
        "a byte too many": (whole + b"\x00", "malformed-frame"),
        "header length 2^64 - 1": (b"\xff" * 8 + b"{}", "oversized-body"),
        "declares 10 GB": (
            _raw('{"w":{"dtype":"F32","shape":[50000,50000],"data_offsets":[0,10000000000]}}', bytes(4)),
            "oversized-body",
        ),
        "duplicate key": (_raw(entry[:-1] + "," + entry[1:], bytes(4)), "malformed-frame"),
        "space in the header": (_raw(entry.replace(":", ": ", 1), bytes(4)), "malformed-frame"),
        "shape of floats": (_raw(entry.replace("[1]", "[1.0]"), bytes(4)), "malformed-frame"),
        "shape of booleans": (_raw(entry.replace("[1]", "[true]"), bytes(4)), "malformed-frame"),
        "negative shape": (_raw(entry.replace("[1]", "[-1]"), bytes(4)), "malformed-frame"),
        "unknown dtype": (_raw(entry.replace("F32", "BF16"), bytes(4)), "malformed-frame"),
        "wrong offsets": (_raw(entry.replace("[0,4]", "[4,8]"), bytes(8)), "malformed-frame"),
        "keys out of order": (
            _raw('{"w":{"shape":[1],"dtype":"F32","data_offsets":[0,4]}}', bytes(4)),
            "malformed-frame",
        ),
        "unescaped name": (_raw(entry.replace("w", "é"), bytes(4)), "malformed-frame"),
        "half a surrogate pair": (_raw(entry.replace('"w"', '"\\ud800"'), bytes(4)), "malformed-frame"),
        "metadata out of order": (_raw('{"__metadata__":{"b":"1","a":"1"}}'), "malformed-frame"),
        "header is a list": (_raw("[]"), "malformed-frame"),
        "header is not JSON": (_raw("{"), "malformed-frame"),
        "not padded": (
            (len(entry) + 1).to_bytes(8, "little") + entry.encode() + b" " + bytes(4),
            "malformed-frame",
        ),
    }
    return {
        "description": "Binary frames (client_sdk.protocol.frames). hex: the frame; data: a tensor's little-endian "
        "bytes; error: slug of the problem that refuses a bad frame.",
        "good": good,
        "bad": [{"name": name, "hex": data.hex(), "error": error} for name, (data, error) in bad.items()],
    }


NONCE = "f0e1d2c3b4a5968778695a4b3c2d1e0f"


def signatures() -> dict[str, Any]:
    """Signed requests of one device, and what a server signs in answer."""
    private = bytes(range(32))
    key = Ed25519PrivateKey.from_private_bytes(private)
    public = key.public_key().public_bytes_raw()
    device = device_id_of(public)
    requests = {
        "a check-in": ("POST", "/v1/check-ins", b'{"protocol_version":1,"num_samples":20,"virtual":null}'),
        "an upload": ("PUT", f"/v1/reports/{ID}", encode_frame({REPORT_TENSOR: np.ones(2, np.float32)})),
        "no body": ("GET", "/v1/task", b""),
        "an escaped path": ("POST", "/fl%20x/v1/devices", b"{}"),
    }
    good = [
        {
            "name": name,
            "method": method,
            "path": path,
            "body": body.hex(),
            "nonce": NONCE,
            "headers": sign_request(key, device, method, path, body, nonce=NONCE),
        }
        for name, (method, path, body) in requests.items()
    ]
    first = good[0]
    headers: dict[str, str] = sign_request(key, device, *requests["a check-in"], nonce=NONCE)
    changes: dict[str, dict[str, Any]] = {
        "another body": {"body": b"{}".hex(), "error": "body-altered"},
        "another method": {"method": "PUT"},
        "another path": {"path": "/v1/devices"},
        "another device": {
            "headers": headers | {"signature-input": headers["signature-input"].replace(device, OTHER_ID)}
        },
        "no signature": {"headers": {k: v for k, v in headers.items() if k != "signature"}},
        "no digest": {"headers": {k: v for k, v in headers.items() if k != "content-digest"}},
        "a signature of zeros": {"headers": headers | {"signature": "sig1=:" + "A" * 86 + "==:"}},
        "a signature that is not base64": {"headers": headers | {"signature": "sig1=:***:"}},
        "another nonce": {"headers": headers | {"signature-input": headers["signature-input"].replace(NONCE, ID)}},
        "no nonce": {
            "headers": headers | {"signature-input": headers["signature-input"].replace(f';nonce="{NONCE}"', "")}
        },
        "a line break in the profile": {"headers": headers | {"signature-input": headers["signature-input"] + "\n"}},
    }
    return {
        "description": "Signatures (client_sdk.protocol.signing): HTTP Message Signatures with Ed25519. Of requests, "
        "over method, path and content digest; of replies, over status, content digest and the request's signature. "
        "Ed25519 is deterministic: signing a good request, or a good reply, gives these very headers. signer: whose "
        "reply it is.",
        "private_key": private.hex(),
        "public_key": public.hex(),
        "device_id": device,
        "good": good,
        "bad": [first | {"name": name, "error": "authentication-failed"} | change for name, change in changes.items()],
        "replies": _replies({vector["name"]: vector["headers"]["signature"] for vector in good}),
    }


def _replies(requests: dict[str, str]) -> dict[str, Any]:
    """Signed replies of one server to these requests, by their signatures."""
    private = bytes(range(32, 64))
    key = Ed25519PrivateKey.from_private_bytes(private)
    public = key.public_key().public_bytes_raw().hex()
    finished = CheckInReply(reply=Finished(model_version=40)).model_dump_json().encode()
    stale = Problem(type="urn:pocketfed:problem:stale-report", title="The assignment's round is over.", status=409)
    contents = {
        "a check-in is answered": ("a check-in", 200, finished),
        "a report is refused": ("an upload", 409, stale.model_dump_json(exclude_none=True).encode()),
        "no body": ("an escaped path", 204, b""),
    }
    good = [
        {
            "name": name,
            "request_signature": requests[request],
            "status": status,
            "body": body.hex(),
            "headers": sign_reply(key, public, requests[request], status, body),
            "signer": public,
        }
        for name, (request, status, body) in contents.items()
    ]
    first = good[0]
    headers: dict[str, str] = sign_reply(key, public, requests["a check-in"], 200, finished)
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(range(64, 96)))
    named_wrongly = sign_reply(stranger, public, requests["a check-in"], 200, finished)
    changes: dict[str, dict[str, Any]] = {
        "another request": {"request_signature": requests["an upload"]},
        "another status": {"status": 201},
        "another body": {"body": b"{}".hex()},
        "another key than the one that is named": {"headers": named_wrongly},
        "the key id is no key": {
            "headers": headers | {"signature-input": headers["signature-input"].replace(public, "f" * 64)}
        },
        "no signature": {"headers": {k: v for k, v in headers.items() if k != "signature"}},
        "no digest": {"headers": {k: v for k, v in headers.items() if k != "content-digest"}},
        "under a request's label": {"headers": headers | {"signature": headers["signature"].replace("reply", "sig1")}},
        "without the request": {
            "headers": headers
            | {"signature-input": headers["signature-input"].replace(' "signature";req;key="sig1"', "")}
        },
    }
    return {
        "private_key": private.hex(),
        "public_key": public,
        "good": good,
        "bad": [first | {"name": name} | change for name, change in changes.items()],
    }


LATEST = ModelReply(
    task_id=ID,
    model_version=3,
    model_sha256=HASH,
    program_sha256=HASH,
    manifest_sha256=HASH,
    parameter_table_sha256=HASH,
    plan=TrainingPlan(algorithm="maml", batch_size=8, learning_rate=0.5, meta=MetaPlan(query_fraction=0.25)),
)


def messages() -> dict[str, Any]:
    """Control messages: their JSON as this implementation writes it."""
    good: list[Message] = [
        EnrolRequest(public_key=HASH, tier=DeviceTier.LOW_END),
        EnrolReply(device_id=ID, server_key=HASH),
        CheckInRequest(num_samples=20),
        CheckInRequest(num_samples=1, virtual=VirtualTiming(now_s=12.5, duration_s=None)),
        CheckInReply(reply=Assigned(assignment=ASSIGNMENT)),
        CheckInReply(reply=Assigned(assignment=SCAFFOLD)),
        CheckInReply(reply=Assigned(assignment=COMPRESSED)),
        CheckInReply(reply=Assigned(assignment=ASSIGNMENT.model_copy(update={"withhold_metrics": True}))),
        CheckInReply(reply=Assigned(assignment=SECURE)),
        CheckInReply(reply=Assigned(assignment=DEVICE_NOISE)),
        CheckInReply(reply=Wait(reason="round-full", retry=RetryWindow(min_s=1.0, max_s=5.0))),
        CheckInReply(reply=Finished(model_version=40)),
        LATEST,
        ReportReply(report_id=ID, assignment_id=OTHER_ID),
        FACTS,
        COMPRESSED_FACTS,
        SECURE_FACTS,
        AbandonRequest(reason="no-memory"),
        AbandonRequest(reason="privacy"),
        Problem(
            type="urn:pocketfed:problem:server-busy",
            title="The server is busy.",
            status=503,
            detail="come back later",
            retry=RetryWindow(min_s=2.0, max_s=10.0),
        ),
    ]
    bad = [
        ("EnrolRequest", {"public_key": HASH.upper()}, "hex is lower case"),
        ("EnrolRequest", {"public_key": HASH, "protocol_version": 2}, "another protocol version"),
        ("EnrolRequest", {"public_key": HASH, "tier": "laptop"}, "unknown tier"),
        ("CheckInRequest", {"num_samples": 0}, "below the minimum"),
        ("CheckInRequest", {"num_samples": "20"}, "a string is no number"),
        ("CheckInRequest", {"num_samples": True}, "a boolean is no number"),
        ("CheckInRequest", {"num_samples": 20, "name": "x"}, "unknown field"),
        ("CheckInReply", {"reply": {"status": "maybe"}}, "unknown answer"),
        ("CheckInReply", {"reply": {"status": "assigned"}}, "no assignment"),
        ("Assignment", _changed(ASSIGNMENT, control_sha256=HASH), "a control, but not scaffold"),
        ("Assignment", _changed(SCAFFOLD, control_sha256=None), "scaffold without a control"),
        (
            "Assignment",
            _changed(ASSIGNMENT, plan=_changed(SCAFFOLD.plan, prox_mu=0.5)),
            "scaffold with a proximal term",
        ),
        ("Assignment", _changed(SCAFFOLD, compression="topk:0.5"), "scaffold's update is not compressed"),
        ("Assignment", _changed(ASSIGNMENT, plan=_changed(COMPRESSED.plan, learning_rate=2.0)), "a proximal step of 1"),
        ("Assignment", _changed(ASSIGNMENT, compression_seed=2**53), "more than a double can hold"),
        ("Assignment", _changed(SECURE, secure=None), "shares without a plan"),
        ("Assignment", _changed(SECURE, encoding={"name": "f32", "max_abs": 1.0}), "a plan without shares"),
        ("Assignment", _changed(SECURE, encoding={"name": "i64-shares", "max_abs": 1.0}), "a bound that shares lack"),
        (
            "Assignment",
            _changed(SCAFFOLD, encoding={"name": "i64-shares"}, secure=PLAN.model_dump(mode="json")),
            "scaffold's two vectors are not shared",
        ),
        ("SecurePlan", _changed(PLAN, field="m31"), "unknown field"),
        ("SecurePlan", _changed(PLAN, threshold=1), "one share would be the update"),
        ("SecurePlan", _changed(PLAN, threshold=6), "more than there are shares"),
        ("SecurePlan", _changed(PLAN, threshold=5, packing=2), "packed shares need one more"),
        ("SecurePlan", _changed(PLAN, clip_norm=0), "nothing is left of an update"),
        ("SecurePlan", _changed(PLAN, clip_norm=1e-9), "below the grid's step"),
        ("SecurePlan", _changed(PLAN, fraction_bits=41), "finer than float32"),
        ("SecurePlan", _changed(PLAN, noise="devices"), "noise without its variance"),
        ("SecurePlan", _changed(PLAN, noise_variance="9"), "a variance that no device needs"),
        ("SecurePlan", _changed(PLAN, noise="devices", noise_variance="18/4"), "not in lowest terms"),
        ("SecurePlan", _changed(PLAN, noise="devices", noise_variance="4/1"), "a whole number has no denominator"),
        ("SecurePlan", _changed(PLAN, noise="devices", noise_variance="0"), "no noise at all"),
        ("SecurePlan", _changed(PLAN, noise="devices", noise_variance=4), "a variance is a string"),
        ("SecurePlan", _changed(PLAN, noise="devices", noise_variance="4", indicator_norm=1), "a bare indicator"),
        ("SecurePlan", _changed(PLAN, indicator_norm=1, indicator_variance="4"), "the aggregators' noise, not ours"),
        ("SecurePlan", _changed(PLAN, max_participations=0), "nobody would take part"),
        ("SecurePlan", _changed(PLAN, max_participations=2**31), "more often than an aggregator counts"),
        ("SecurePlan", _changed(PLAN, suite="mlkem768-x25519"), "keys of another suite"),
        ("SecurePlan", _changed(PLAN, suite="rsa"), "unknown suite"),
        ("SecurePlan", _changed(PLAN, aggregator_keys=[*PLAN.aggregator_keys[:4], "00"]), "a key cut short"),
        (
            "SecurePlan",
            _changed(PLAN, aggregator_keys=[*PLAN.aggregator_keys[:4], PLAN.aggregator_keys[0]]),
            "one party with two shares",
        ),
        (
            "SecurePlan",
            _changed(PLAN, aggregator_keys=[*PLAN.aggregator_keys[:4], PLAN.aggregator_keys[4].upper()]),
            "a key's other spelling",
        ),
        ("ReportFacts", _changed(SECURE_FACTS, encoding="i64"), "unknown encoding"),
        ("ReportFacts", _changed(SECURE_FACTS, train_loss="private"), "neither a number nor withheld"),
        ("RetryWindow", {"min_s": 2, "max_s": 1}, "ends before it begins"),
        ("ReportFacts", _changed(FACTS, model_version=12), "facts are strings"),
        ("ReportFacts", _changed(FACTS, train_loss="nan"), "not a finite number"),
        ("ReportFacts", _changed(FACTS, steps="0"), "nobody trains in no steps"),
        ("ReportFacts", _changed(FACTS, algorithm="fedprox"), "that is fedavg with a proximal term"),
        ("ReportFacts", _changed(FACTS, compression=""), "no compression is called none"),
        ("AbandonRequest", {"reason": "bored"}, "unknown reason"),
        ("ModelReply", _changed(LATEST, model_sha256="../../model"), "a blob's name is a hash"),
        ("ModelReply", _changed(LATEST, model_version=-1), "the first version is 0"),
        ("ModelReply", _changed(LATEST, plan=_changed(LATEST.plan, algorithm="fedavg")), "meta settings of fedavg"),
        ("ModelReply", _changed(LATEST, plan=_changed(LATEST.plan, meta=None)), "maml without its settings"),
        ("ModelReply", _changed(LATEST, plan=_changed(LATEST.plan, personal=["out"])), "maml keeps no layer back"),
        ("ModelReply", _changed(LATEST, url="http://127.0.0.1"), "unknown field"),
    ]
    return {
        "description": "Control messages (client_sdk.protocol.messages). A good one is accepted and written back with "
        "the same fields; a bad one is refused with the problem malformed-message.",
        "good": [{"type": type(x).__name__, "json": x.model_dump(mode="json")} for x in good],
        "bad": [{"type": name, "json": content, "why": why} for name, content, why in bad],
    }


GENERATORS = {
    "frames.json": frames,
    "signatures.json": signatures,
    "messages.json": messages,
    "compression.json": compression,
    "sealing.json": sealing,
    "sealing_shares.json": sealing_shares,
    "shares.json": shares,
    "shares_checked.json": shares_checked,
}


def text_of(name: str) -> str:
    """The content of one vector file."""
    return json.dumps(GENERATORS[name](), indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    for each in GENERATORS:
        (FOLDER / each).write_text(text_of(each))
