"""Personal models of the toy program, and a program that serves them."""

from __future__ import annotations

from typing import Any

import numpy as np

from client_sdk.personal_model import PersonalModel, weights_hash
from client_sdk.personalization import Judgement, PersonalizationConfig, PersonalRecord
from client_sdk.protocol.program import Manifest
from tests.devices import make_manifest


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
