"""The estimate of a report's making, against what making it allocates."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from client_sdk.footprint import estimate_memory
from client_sdk.native.sharing import PlainKernels
from client_sdk.protocol.compression import CompressionSpec
from client_sdk.protocol.messages import Assignment
from client_sdk.protocol.program import Manifest, MethodSpec, ParameterSpec, Role, parameter_table_hash
from client_sdk.reports import build_report
from tests.vectors.generate import ASSIGNMENT, DEVICE_NOISE, SECURE

SIZE = 100_000
UPDATE = np.random.default_rng(0).normal(size=SIZE).astype(np.float32) * np.float32(1e-3)


def estimated(assignment: Assignment) -> int:
    """Bytes of the item for the report."""
    parameters = (ParameterSpec(name="w", shape=(SIZE,), offset=0),)
    method = MethodSpec(name="train_b1", role=Role.TRAIN, batch_size=1, inputs=(), outputs=(), planned_memory_bytes=0)
    manifest = Manifest(
        model_name="invented",
        program_sha256="0" * 64,
        program_bytes=1,
        initial_weights_sha256="0" * 64,
        executorch_version="1.5.1",
        torch_version="2.13.0",
        content_key="key",
        operators=(),
        parameters=parameters,
        parameter_table_sha256=parameter_table_hash(parameters),
        feature_shape=(1,),
        num_classes=2,
        methods=(method,),
    )
    estimate = estimate_memory(
        manifest,
        method,
        assignment.plan,
        num_samples=1,
        baseline_bytes=0,
        compression=assignment.compression,
        secure=assignment.secure,
    )
    return {item.name: item.num_bytes for item in estimate.items}["report"]


def allocated(assignment: Assignment) -> int:
    """The most that numpy and Python hold while the report is made."""
    spec = CompressionSpec.parse(assignment.compression or "none")
    residual = np.zeros(SIZE, np.float32) if spec.error_feedback and assignment.secure is None else None

    def make() -> None:
        build_report(
            assignment,
            "0" * 32,
            UPDATE,
            device_id="f" * 32,
            steps=1,
            train_loss=0.5,
            residual=residual,
            kernels=PlainKernels(),
        )

    make()  # what is imported and cached once is not the report's
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        make()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


COMPRESSIONS = (
    "topk:0.01",
    "topk:0.5",
    "randomk:0.1",
    "threshold:0.001",
    "sketch:0.05",
    "quantize:8",
    "quantize:4,rotate",
)
CASES = {
    "in the clear": ASSIGNMENT,
    **{c: ASSIGNMENT.model_copy(update={"compression": str(CompressionSpec.parse(c))}) for c in COMPRESSIONS},
    "shares": SECURE,
    "packed shares of the larger field, with the device's noise": DEVICE_NOISE,
    "shares of a tenth": SECURE.model_copy(update={"compression": "randomk:0.1"}),
}


@pytest.mark.parametrize("case", CASES)
def test_making_a_report_takes_at_most_what_is_estimated(case: str):
    assignment = CASES[case].model_copy(update={"max_report_bytes": 10**9})
    slack = 64 * 1024  # the frame's header, and Python's own objects
    taken, most = allocated(assignment), estimated(assignment)
    assert taken <= most + slack
    assert most <= 4 * taken + 6 * 2**20, "an upper bound that says nothing refuses what would fit"
