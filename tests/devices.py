"""A device's world without a network: an assignment, a program in numpy, and a server that tests may corrupt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from client_sdk.errors import BlobHashMismatch, InvalidReply
from client_sdk.protocol.errors import UnknownAssignment, UnknownBlob, UnknownDevice
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import (
    CONTROL_TENSOR,
    REPORT_TENSOR,
    AbandonRequest,
    Assigned,
    Assignment,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    F32Encoding,
    Finished,
    ModelReply,
    ReportFacts,
    ReportReply,
    RetryWindow,
    Wait,
)
from client_sdk.protocol.program import (
    Manifest,
    MethodSpec,
    ParameterSpec,
    Role,
    TensorSpec,
    parameter_table_hash,
)
from client_sdk.protocol.signing import device_id_of
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from client_sdk.transport import TransferCounters

FEATURES, CLASSES, BATCH = 2, 3, 4
PARAMETERS = (
    ParameterSpec(name="weight", shape=(CLASSES, FEATURES), offset=0),
    ParameterSpec(name="bias", shape=(CLASSES,), offset=CLASSES * FEATURES),
)
NUM_PARAMETERS = CLASSES * FEATURES + CLASSES
PROGRAM_BYTES = b"stands for program.pte"
SERVER_KEY = "5" * 64
"""What a toy server says of its key; in memory nothing is signed."""


def sha(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _f32(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def make_manifest(program: bytes = PROGRAM_BYTES, **changes: Any) -> Manifest:
    """Manifest of the toy program."""
    batch = (
        _f32("x", BATCH, FEATURES),
        TensorSpec(name="y", dtype="int64", shape=(BATCH,)),
        _f32("mask", BATCH),
    )
    w, loss = _f32("w", NUM_PARAMETERS), _f32("loss_sum", 1)
    grad = MethodSpec(
        name=f"grad_b{BATCH}",
        role=Role.GRAD,
        batch_size=BATCH,
        inputs=(w, *batch),
        outputs=(_f32("grad_sum", NUM_PARAMETERS), loss, _f32("count", 1)),
        planned_memory_bytes=0,
    )
    train = MethodSpec(
        name=f"train_b{BATCH}",
        role=Role.TRAIN,
        batch_size=BATCH,
        inputs=(w, _f32("lr", 1), *batch),
        outputs=(w, loss),
        planned_memory_bytes=0,
    )
    facts: dict[str, Any] = {
        "model_name": "toy",
        "program_sha256": sha(program),
        "program_bytes": len(program),
        "initial_weights_sha256": "0" * 64,
        "executorch_version": "1.5.1",
        "torch_version": "2.13.0",
        "content_key": "toy",
        "operators": (),
        "parameters": PARAMETERS,
        "parameter_table_sha256": parameter_table_hash(PARAMETERS),
        "feature_shape": (FEATURES,),
        "num_classes": CLASSES,
        "methods": (grad, train),
    }
    return Manifest(**(facts | changes))


class ToyProgram:
    """Softmax regression in numpy behind the ``Program`` protocol; ``before_run`` may raise or look."""

    def __init__(self, manifest: Manifest | None = None, before_run: Callable[[], None] = lambda: None) -> None:
        self.manifest = manifest or make_manifest()
        self.before_run = before_run
        self.runs = 0

    def run(self, method: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        self.manifest.named(method).check_inputs(inputs)
        self.before_run()
        self.runs += 1
        w, *rate, x, y, mask = inputs
        split = CLASSES * FEATURES
        z = x @ w[:split].reshape(CLASSES, FEATURES).T + w[split:]
        z = z - z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        error = (np.exp(log_p) - np.eye(CLASSES)[y]) * mask[:, None]
        grad = np.concatenate([(error.T @ x).ravel(), error.sum(axis=0)]).astype(np.float32)
        loss = np.array([-(log_p[np.arange(len(y)), y] * mask).sum()], np.float32)
        if method.startswith("train"):
            return (w - rate[0] * grad / np.float32(mask.sum())).astype(np.float32), loss
        return grad, loss, np.array([mask.sum()], np.float32)

    def close(self) -> None:
        """Nothing to close."""


def make_model(seed: int = 0) -> bytes:
    """A model frame for the toy program."""
    w = np.random.default_rng(seed).normal(0, 0.1, NUM_PARAMETERS).astype(np.float32)
    return encode_frame({p.name: w[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in PARAMETERS})


def make_data(n: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Toy examples."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, FEATURES)).astype(np.float32), rng.integers(0, CLASSES, n)


def make_assignment(number: int = 0, **changes: Any) -> Assignment:
    """A valid assignment; ``number`` makes its id."""
    facts: dict[str, Any] = {
        "assignment_id": f"{number:032x}",
        "assignment_number": number,
        "task_id": "f" * 32,
        "round_id": 0,
        "model_version": 0,
        "model_sha256": "a" * 64,
        "program_sha256": "b" * 64,
        "manifest_sha256": "c" * 64,
        "parameter_table_sha256": "d" * 64,
        "kind": UpdateKind.DELTA,
        "encoding": F32Encoding(max_abs=1e6),
        "weight": 1,
        "plan": TrainingPlan(local_epochs=2, batch_size=BATCH, learning_rate=0.5),
        "shuffle_seed": 1,
        "lease_s": 600.0,
        "max_report_bytes": 1 << 20,
    }
    return Assignment(**(facts | changes))


@dataclass
class ToyServer:
    """The server's side of ``Transport``, in memory, for any number of devices.

    It keeps the protocol: one outstanding assignment per device, one report per assignment, repeated requests get the
    first answer. Tests misuse it through ``blobs``, ``amend`` (changes each new assignment) and ``before`` (called
    with the name of each request; may raise what the device shall see) and ``after`` (the same, once it is done: the
    answer is lost on its way).
    """

    work: int = 1
    blobs: dict[str, bytes] = field(default_factory=dict)
    amend: dict[str, Any] = field(default_factory=dict)
    before: Callable[[str], None] = lambda _: None
    after: Callable[[str], None] = lambda _: None
    enrolled: set[str] = field(default_factory=set)
    outstanding: dict[str, Assignment] = field(default_factory=dict)
    reports: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    abandoned: list[tuple[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    given: int = 0

    def __post_init__(self) -> None:
        self.manifest = make_manifest()
        self.model = make_model()
        self.hand_out(self.manifest.to_json().encode(), PROGRAM_BYTES, self.model)

    def hand_out(self, manifest: bytes, program: bytes, model: bytes) -> None:
        """Make assignments for this bundle."""
        self.manifest, self.model = Manifest.from_json(manifest), model
        self.hashes = {
            "manifest_sha256": sha(manifest),
            "program_sha256": sha(program),
            "model_sha256": sha(model),
            "parameter_table_sha256": self.manifest.parameter_table_sha256,
        }
        self.blobs |= {sha(b): b for b in (manifest, program, model)}

    def next_assignment(self) -> Assignment:
        self.given += 1
        return make_assignment(self.given, **(self.hashes | self.amend))

    def compress(self, line: str, seed: int = 7) -> Self:
        """Ask for compressed updates."""
        self.amend |= {"compression": line, "compression_seed": seed}
        return self

    def scaffold(self, control: np.ndarray) -> Self:
        """Ask for SCAFFOLD with this server's control."""
        frame = encode_frame({CONTROL_TENSOR: control})
        self.blobs[sha(frame)] = frame
        plan = TrainingPlan(local_epochs=2, batch_size=BATCH, learning_rate=0.5, algorithm="scaffold")
        self.amend |= {"plan": plan, "control_sha256": sha(frame)}
        return self

    def keep(self, *layers: str) -> Self:
        """Ask for an update of the other layers alone."""
        plan = TrainingPlan(local_epochs=2, batch_size=BATCH, learning_rate=0.5, personal=layers)
        self.amend |= {"plan": plan}
        return self

    def device(self, device_id: str) -> ToyTransport:
        """The transport of one device."""
        return ToyTransport(self, device_id)

    def updates(self) -> dict[str, np.ndarray]:
        """Assignment id -> accepted update, as it was framed."""
        return {
            ReportFacts.model_validate((f := decode_frame(frame)).metadata).assignment_id: f.tensors[REPORT_TENSOR]
            for _, frame in self.reports.values()
        }


class ToyTransport:
    """One device's ``Transport`` to a ``ToyServer``."""

    def __init__(self, server: ToyServer, device_id: str) -> None:
        self.server = server
        self.device_id = device_id
        self.counters = TransferCounters()

    def _begin(self, name: str, *, enrolled: bool = True) -> None:
        self.server.requests.append(name)
        self.counters.requests += 1
        self.server.before(name)
        if enrolled and self.device_id not in self.server.enrolled:
            raise UnknownDevice

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        self._begin("enrol", enrolled=False)
        assert device_id_of(bytes.fromhex(request.public_key)) == self.device_id
        self.server.enrolled.add(self.device_id)
        self.server.after("enrol")
        return EnrolReply(device_id=self.device_id, server_key=SERVER_KEY)

    def check_in(self, _request: CheckInRequest) -> Assigned | Wait | Finished:
        self._begin("check-in")
        server = self.server
        assignment = server.outstanding.get(self.device_id)
        reply: Assigned | Wait | Finished
        if assignment is None and server.given >= server.work:
            reply = Finished(model_version=server.given)
        else:
            assignment = server.outstanding.setdefault(self.device_id, assignment or server.next_assignment())
            reply = Assigned(assignment=assignment)
        server.after("check-in")
        return reply

    def latest_model(self) -> ModelReply:
        self._begin("latest-model")
        assignment = make_assignment(**(self.server.hashes | self.server.amend))
        facts = assignment.model_dump(include=set(ModelReply.model_fields) - {"plan"})
        self.server.after("latest-model")
        return ModelReply(**facts, plan=assignment.plan)

    def fetch(self, sha256: str, into: bytearray, *, max_bytes: int) -> None:
        self._begin("fetch", enrolled=False)
        if sha256 not in self.server.blobs:
            raise UnknownBlob(sha256)
        if len(self.server.blobs[sha256]) > max_bytes:
            raise InvalidReply(f"blob {sha256} has more than {max_bytes} bytes")
        into[:] = self.server.blobs[sha256]
        self.counters.bytes_down += len(into)
        if sha(into) != sha256:
            into.clear()
            raise BlobHashMismatch(sha256)
        self.server.after("fetch")

    def upload(self, report_id: str, frame: bytes | bytearray | memoryview) -> ReportReply:
        self._begin("upload")
        server = self.server
        facts = ReportFacts.model_validate(decode_frame(frame).metadata)
        assert facts.report_id == report_id
        known = server.reports.get(report_id)
        if known is None:
            held = server.outstanding.get(self.device_id)
            if held is None or held.assignment_id != facts.assignment_id:
                raise UnknownAssignment(facts.assignment_id)
            del server.outstanding[self.device_id]
            server.reports[report_id] = (self.device_id, bytes(frame))
        else:
            assert known == (self.device_id, bytes(frame)), "a repeated report must repeat its bytes"
        self.counters.bytes_up += len(frame)
        server.after("upload")
        return ReportReply(report_id=report_id, assignment_id=facts.assignment_id)

    def abandon(self, assignment_id: str, request: AbandonRequest) -> None:
        self._begin("abandon")
        held = self.server.outstanding.get(self.device_id)
        if held is not None and held.assignment_id == assignment_id:
            del self.server.outstanding[self.device_id]
        self.server.abandoned.append((assignment_id, request.reason))
        self.server.after("abandon")

    def close(self) -> None:
        """Nothing to close."""


WAIT = Wait(reason="round-full", retry=RetryWindow(min_s=5, max_s=10))
