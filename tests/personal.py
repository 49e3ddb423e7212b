"""Personal models of the toy program, and a toy program that serves them."""

from __future__ import annotations

from typing import Any

import numpy as np

from client_sdk.personal_model import PersonalModel, weights_hash
from client_sdk.personalization import Judgement, PersonalizationConfig, PersonalRecord
from client_sdk.protocol.program import Float32Array, Manifest, MethodSpec, Role, TensorSpec
from tests.devices import BATCH, CLASSES, FEATURES, NUM_PARAMETERS, PROGRAM_BYTES, ToyProgram, make_manifest


def make_personal(seed: int = 0, manifest: Manifest | None = None, **changes: Any) -> PersonalModel:
    """Some weights of the toy program that were adapted."""
    of = manifest or make_manifest()
    rng = np.random.default_rng(seed)
    of_all, own = rng.normal(size=(2, of.num_parameters)).astype(np.float32)
    facts: dict[str, Any] = {
        "program_sha256": of.program_sha256,
        "parameter_table_sha256": of.parameter_table_sha256,
        "model_version": seed,
        "global_sha256": weights_hash(of_all),
        "data_sha256": "d" * 64,
        "config": PersonalizationConfig(inner_steps=3, personal_layers=("bias",)),
        "adapted": True,
        "steps": 3,
        "support_examples": 8,
        "query_examples": 2,
        "of_global": Judgement(examples=2, correct=1, loss=0.7),
        "of_personal": Judgement(examples=2, correct=2, loss=0.1),
    }
    return PersonalModel(own, of_all, PersonalRecord(**(facts | changes)))


def bits(model: PersonalModel | None) -> bytes | None:
    """All of a personal model, to the bit."""
    if model is None:
        return None
    return model.weights.tobytes() + model.global_weights.tobytes() + model.record.model_dump_json().encode()


def serving_manifest(program: bytes = PROGRAM_BYTES) -> Manifest:
    """The toy program's, with ``infer`` for one example and for four."""
    of = make_manifest(program)
    infer = tuple(
        MethodSpec(
            name=f"infer_b{size}",
            role=Role.INFER,
            batch_size=size,
            inputs=(
                TensorSpec(name="w", dtype="float32", shape=(NUM_PARAMETERS,)),
                TensorSpec(name="x", dtype="float32", shape=(size, FEATURES)),
            ),
            outputs=(TensorSpec(name="logits", dtype="float32", shape=(size, CLASSES)),),
            planned_memory_bytes=0,
        )
        for size in (1, BATCH)
    )
    return make_manifest(program, methods=of.methods + infer)


class ServingProgram(ToyProgram):
    """Softmax regression that trains and answers."""

    def __init__(self, manifest: Manifest | None = None) -> None:
        super().__init__(manifest or serving_manifest())

    def run(self, method: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        if not method.startswith("infer"):
            return super().run(method, *inputs)
        self.manifest.named(method).check_inputs(inputs)
        w, x = inputs
        return (toy_logits(w, x),)


def toy_logits(w: Float32Array, x: Float32Array) -> Float32Array:
    """What the toy program answers."""
    split = CLASSES * FEATURES
    logits: Float32Array = (x @ w[:split].reshape(CLASSES, FEATURES).T + w[split:]).astype(np.float32)
    return logits


def labelled(n: int, seed: int = 0, classes: int = CLASSES) -> tuple[Float32Array, np.ndarray]:
    """Examples whose labels can be learned: which corner of the plane they are near."""
    rng = np.random.default_rng(seed)
    corners = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    y = np.arange(n) % classes
    return (corners[y] + 0.6 * rng.normal(size=(n, FEATURES))).astype(np.float32), y
