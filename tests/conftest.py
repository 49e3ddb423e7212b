"""Fixtures that more than one suite needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_EXPORT = """
import sys
from client_sdk.protocol.program import Role
from mobile_export import build_model, export_program

export_program(
    build_model("softmax", (6,), 3, seed=0),
    out_dir=sys.argv[1],
    batch_sizes={Role.GRAD: (4, 8), Role.TRAIN: (4, 8), Role.EVALUATE: (8,), Role.INFER: (8,)},
    feature_shape=(6,),
    num_classes=3,
)
"""


@pytest.fixture(scope="session")
def softmax_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real exported program, small enough to run thousands of times: softmax regression, 6 features, 3 classes.

    ``grad`` and ``train`` in batches of 4 and 8, ``evaluate`` and ``infer`` in batches of 8. Exported in a process of
    its own, because the export toolchain's import is heavy and warns; the exporter's cache makes the second time cheap.
    """
    folder = tmp_path_factory.mktemp("softmax") / "bundle"
    subprocess.run([sys.executable, "-c", _EXPORT, str(folder)], check=True)
    return folder
