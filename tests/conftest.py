"""Fixtures that more than one suite needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# No test judges the wall clock: on a busy machine any example may be slow.
settings.register_profile("pocketfed", deadline=None)
settings.load_profile("pocketfed")

# In a process of its own, because the export toolchain's import is heavy and warns; the exporter's cache makes the
# second time cheap.
_EXPORT = """
import sys
from ast import literal_eval
from client_sdk.protocol.program import Role
from mobile_export import build_model, export_program

out_dir, name, feature_shape, num_classes, steps = sys.argv[1], *map(literal_eval, sys.argv[2:])
export_program(
    build_model(name, feature_shape, num_classes, seed=0),
    out_dir=out_dir,
    batch_sizes={Role.GRAD: steps, Role.TRAIN: steps, Role.EVALUATE: (8,), Role.INFER: (8,)},
    feature_shape=feature_shape,
    num_classes=num_classes,
)
"""


def _export(folder: Path, *what: object) -> Path:
    subprocess.run([sys.executable, "-c", _EXPORT, str(folder), *map(repr, what)], check=True)
    return folder


@pytest.fixture(scope="session")
def softmax_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real exported program, small enough to run thousands of times: softmax regression, 6 features, 3 classes.

    ``grad`` and ``train`` in batches of 4 and 8, ``evaluate`` and ``infer`` in batches of 8.
    """
    return _export(tmp_path_factory.mktemp("softmax") / "bundle", "softmax", (6,), 3, (4, 8))


@pytest.fixture(scope="session")
def cnn_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference CNN on 8x8 images, 10 classes; every method in batches of 8."""
    return _export(tmp_path_factory.mktemp("cnn") / "bundle", "cnn", (8, 8), 10, (8,))
