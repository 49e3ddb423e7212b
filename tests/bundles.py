"""Tiny exported programs for tests, built once per machine: the export cache holds them, safely under pytest-xdist.

All have 3 classes and one batch size per role: ``grad`` 4, ``train`` 4, ``evaluate`` 8, ``infer`` 4.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from client_sdk.protocol.program import Role
from mobile_export import Int8Body, ProgramBundle, build_model, export_program

# pytest-xdist uses the cores already; torch's threads would wait for one another.
torch.set_num_threads(1)

BATCH_SIZES = {Role.GRAD: (4,), Role.TRAIN: (4,), Role.EVALUATE: (8,), Role.INFER: (4,)}
NUM_CLASSES = 3
FEATURE_SHAPES = {"softmax": (12,), "mlp": (12,), "cnn": (8, 8)}
HIDDEN = {"softmax": None, "mlp": (8,), "cnn": (8,)}


def tiny_model(name: str, seed: int = 0):
    """The module that a tiny bundle was exported from."""
    return build_model(name, FEATURE_SHAPES[name], NUM_CLASSES, seed, hidden=HIDDEN[name])


def tiny_bundle(name: str, folder: Path) -> ProgramBundle:
    """Export a tiny reference model into ``folder``, or copy it from the cache.

    ``softmax`` has 12 features and 39 parameters, ``mlp`` is 12-8-3 with 131, ``cnn`` takes 8x8 images and has 1,795.
    """
    return export_program(tiny_model(name), out_dir=folder, batch_sizes=BATCH_SIZES, model_name=f"tiny-{name}")


META_BATCH_SIZES = dict.fromkeys(
    (
        Role.GRAD,
        Role.TRAIN,
        Role.EVALUATE,
        Role.INFER,
        Role.ADAPT,
        Role.REPTILE,
        Role.MAML,
        Role.FOMAML,
        Role.PER_FEDAVG,
    ),
    (8,),
)
META_INNER_STEPS = 3
META_FEATURE_SHAPE = (8, 8)
META_CLASSES = 10


def meta_model(seed: int = 0):
    """The module that ``meta_bundle`` was exported from: a 64-8-10 perceptron, 610 parameters, for 8x8 digits."""
    return build_model("mlp", META_FEATURE_SHAPE, META_CLASSES, seed, hidden=(8,))


def meta_bundle(folder: Path) -> ProgramBundle:
    """Export ``meta_model`` into ``folder``, or copy it from the cache: all methods, B = 8, K = 3."""
    return export_program(
        meta_model(),
        out_dir=folder,
        batch_sizes=META_BATCH_SIZES,
        inner_steps=(META_INNER_STEPS,),
        model_name="meta-mlp",
    )


def int8_body(name: str) -> Int8Body:
    """The last layer of a tiny model as the head, and forty examples."""
    examples = np.random.default_rng(0).random((40, *FEATURE_SHAPES[name]), np.float32)
    return Int8Body(("head.output" if name == "cnn" else "output",), examples)


def int8_bundle(name: str, folder: Path, *, body: Int8Body | None = None) -> ProgramBundle:
    """A tiny model that is served in float and in int8, in batches of 4; the perceptron also in batches of 1."""
    sizes = (1, 4) if name == "mlp" else (4,)
    return export_program(
        tiny_model(name),
        out_dir=folder,
        batch_sizes={Role.INFER: sizes, Role.INFER_INT8: sizes},
        int8=body or int8_body(name),
        model_name=f"tiny-{name}",
    )
