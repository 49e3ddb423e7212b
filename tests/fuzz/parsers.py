"""The parsers that read what others wrote: a corpus for each, and the errors that it may end in.

The corpora are the wire vectors, good and bad, so that a case begins where a format has its corners.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from client_sdk.checkpoint_content import Checkpoint, CheckpointBinding
from client_sdk.checkpoint_file import CheckpointKey, pack, unpack
from client_sdk.errors import CheckpointError
from client_sdk.memory import RESIDUAL, DeviceMemory
from client_sdk.protocol import messages, sealing
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError, PocketfedError, ProtocolError
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from client_sdk.protocol.program import Manifest, ParameterSpec, Role, parameter_table_hash
from client_sdk.protocol.sealing import SealingKey, SealingPublicKey, SealingSuite
from client_sdk.protocol.secure import SecureLayout, decode_share, split_secure_report
from client_sdk.protocol.shamir import Scheme
from client_sdk.protocol.signing import reply_signer, verify_request
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training_state import TrainingState

VECTORS = Path(__file__).resolve().parents[1] / "vectors"


@dataclass(frozen=True)
class Parser:
    """One way in.

    Attributes:
        name: To choose it by.
        corpus: Inputs to damage.
        parse: Reads bytes, and checks what it can of the result.
        refusals: The typed errors that say no.
        peak_bytes: What one input of the corpus's size may make it allocate, at most.
    """

    name: str
    corpus: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = (ProtocolError,)
    peak_bytes: int = 4 * 2**20


def vectors(name: str) -> dict[str, Any]:
    """One file of the wire vectors."""
    content: dict[str, Any] = json.loads((VECTORS / name).read_text())
    return content


def _frame(data: bytes) -> None:
    frame = decode_frame(data, FrameLimits(max_bytes=2**20))
    # Whatever is accepted is the one encoding of its content.
    assert encode_frame(frame.tensors, frame.metadata) == data


def _message(model: type[messages.Message]) -> Callable[[bytes], None]:
    def parse(data: bytes) -> None:
        message = model.model_validate_json(data)
        if model is not messages.Problem:  # which keeps, and nobody reads, fields that it does not know
            assert model.model_validate_json(message.model_dump_json()) == message

    return parse


def _messages() -> list[Parser]:
    corpora: dict[str, list[bytes]] = {}
    content = vectors("messages.json")
    for vector in (*content["good"], *content["bad"]):
        corpora.setdefault(vector["type"], []).append(json.dumps(vector["json"]).encode())
    return [
        Parser(f"message:{name}", tuple(corpus), _message(getattr(messages, name)), (ValidationError,))
        for name, corpus in corpora.items()
    ]


def _manifest_corpus() -> bytes:
    table = (ParameterSpec(name="w", shape=(3, 2), offset=0), ParameterSpec(name="b", shape=(3,), offset=6))
    tensors = [{"name": "w", "dtype": "float32", "shape": [9]}, {"name": "x", "dtype": "float32", "shape": [4, 2]}]
    method = {"name": "infer_b4", "role": Role.INFER, "batch_size": 4, "inputs": tensors, "outputs": tensors[:1]}
    return json.dumps(
        {
            "model_name": "m",
            "program_sha256": "0" * 64,
            "program_bytes": 1,
            "initial_weights_sha256": "1" * 64,
            "executorch_version": "1.5.1",
            "torch_version": "2.13.0",
            "content_key": "k",
            "operators": ["aten::add.out"],
            "parameters": [p.model_dump() for p in table],
            "parameter_table_sha256": parameter_table_hash(table),
            "feature_shape": [2],
            "num_classes": 3,
            "methods": [method | {"planned_memory_bytes": 5}],
        }
    ).encode()


def _compression() -> list[Parser]:
    content = vectors("compression.json")
    found: dict[tuple[str, int, int], list[bytes]] = {}
    for vector in (*content["good"], *content["bad"]):
        key = vector["compression"], vector["size"], vector["seed"]
        found.setdefault(key, []).append(bytes.fromhex(vector["payload"]))

    def decoder(line: str, size: int, seed: int) -> Callable[[bytes], object]:
        codec = Codec(CompressionSpec.parse(line), size)
        # The size is the receiver's own; where it is huge, the dense result would be all that is measured.
        return lambda data: codec.decode(data, seed) if size < 2**20 else codec.decode_sparse(data, seed)

    payloads = [
        Parser(f"payload:{line}/{size}/{seed}", tuple(corpus), decoder(line, size, seed))
        for (line, size, seed), corpus in found.items()
    ]
    lines = tuple({line.encode() for line, _, _ in found})

    def parse_line(data: bytes) -> None:
        spec = CompressionSpec.parse(data.decode("latin-1"))
        assert CompressionSpec.parse(str(spec)) == spec

    return [*payloads, Parser("compression line", lines, parse_line, (ConfigurationError,))]


def _shares() -> list[Parser]:
    layout = SecureLayout(Scheme(), 5)
    seeded, vector = (bytes(layout.plaintext_bytes(index)) for index in (1, 5))
    frame = encode_frame(_share_tensors(layout))
    content = vectors("sealing.json")
    vector_of = {v["suite"]: v for v in content["good"]}
    openers = []
    for suite, sealed in vector_of.items():
        key, info = SealingKey(SealingSuite(suite), bytes.fromhex(sealed["private_key"])), bytes.fromhex(sealed["info"])
        corpus = tuple(
            bytes.fromhex(v["ciphertext"]) for v in (*content["good"], *content["bad"]) if v["suite"] == suite
        )
        openers.append(Parser(f"sealed:{suite}", corpus, lambda data, k=key, i=info: sealing.open(data, k, i)))
    return [
        *openers,
        Parser("share:seed", (seeded,), lambda data: decode_share(data, layout, 1)),
        Parser("share:vector", (vector, b"\x01" + vector[1:]), lambda data: decode_share(data, layout, 5)),
        Parser("secure report", (frame,), lambda data: split_secure_report(decode_frame(data), layout)),
        Parser(
            "sealing key",
            tuple(v["public_key"].encode() for v in vector_of.values()),
            lambda data: SealingPublicKey.from_hex(SealingSuite.X25519, data.decode("latin-1")),
            (PocketfedError,),
        ),
    ]


def _share_tensors(layout: SecureLayout) -> dict[str, Any]:
    return {f"share-{i}": np.zeros(layout.ciphertext_bytes(i), np.uint8) for i in layout.scheme.indices}


def _signatures() -> list[Parser]:
    content = vectors("signatures.json")
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["public_key"]))
    requests = [json.dumps(v).encode() for v in (*content["good"], *content["bad"])]
    replies = [json.dumps(v).encode() for v in (*content["replies"]["good"], *content["replies"]["bad"])]

    def texts(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
        """The vector, where it is still one: a header is a text, whatever is in it."""
        try:
            vector = json.loads(data)
            headers = {str(k): str(v) for k, v in vector["headers"].items()}
            bytes.fromhex(vector["body"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise NotACase from e
        return vector, headers

    def request(data: bytes) -> None:
        vector, headers = texts(data)
        method, path = str(vector.get("method")), str(vector.get("path"))
        verify_request(key, headers, method, path, bytes.fromhex(vector["body"]))

    def reply(data: bytes) -> None:
        vector, headers = texts(data)
        status, asked = vector.get("status"), vector.get("request_signature")
        if type(status) is not int or not isinstance(asked, str) or not asked.isascii():
            raise NotACase  # both are the device's own
        reply_signer(headers, asked, status, bytes.fromhex(vector["body"]))

    refusals = (ProtocolError, NotACase)
    return [Parser("request", tuple(requests), request, refusals), Parser("reply", tuple(replies), reply, refusals)]


def _checkpoints() -> list[Parser]:
    binding = CheckpointBinding(
        assignment_id="a" * 32,
        task_id="b" * 32,
        model_version=3,
        model_sha256="1" * 64,
        program_sha256="2" * 64,
        parameter_table_sha256="3" * 64,
        plan=TrainingPlan(local_epochs=2, batch_size=4, learning_rate=0.1),
        shuffle_seed=7,
        data_sha256="4" * 64,
    )
    vector = np.linspace(-1, 1, 9, dtype=np.float32)
    state = TrainingState(
        vector,
        accumulator=vector,
        accumulated_loss=0.5,
        slices_done=1,
        epoch=1,
        position=2,
        steps=5,
        loss_sum=2.5,
        seen=8,
        first_epoch_loss=1.5,
        last_epoch_loss=math.nan,
    )
    memory = DeviceMemory("b" * 32, "c" * 32, {RESIDUAL: vector})
    key, most = CheckpointKey(bytes(32)), 2**20
    contents = tuple(Checkpoint(binding, state, each).to_bytes() for each in (memory, None))
    plain, encrypted = (tuple(b"".join(pack(c, 4, k, bytes)) for c in contents) for k in (None, key))

    def content(data: bytes) -> None:
        checkpoint = Checkpoint.from_bytes(data, most)
        assert Checkpoint.from_bytes(checkpoint.to_bytes(), most).to_bytes() == checkpoint.to_bytes()

    return [
        Parser("checkpoint:content", contents, content, (CheckpointError,)),
        Parser("checkpoint:plain", plain, lambda data: content(unpack(data, None, most).payload), (CheckpointError,)),
        Parser(
            "checkpoint:encrypted",
            (*encrypted, plain[0]),
            lambda data: content(unpack(data, key, most).payload),
            (CheckpointError,),
        ),
    ]


class NotACase(Exception):
    """The damage hit what holds the input together, and nothing was parsed."""


def all_parsers() -> list[Parser]:
    """Every parser, in a fixed order."""
    frames = vectors("frames.json")
    corpus = tuple(bytes.fromhex(v["hex"]) for v in (*frames["good"], *frames["bad"]))
    return [
        Parser("frame", corpus, _frame),
        *_messages(),
        Parser("manifest", (_manifest_corpus(),), Manifest.from_json, (PocketfedError,)),
        *_compression(),
        *_shares(),
        *_signatures(),
        *_checkpoints(),
    ]
