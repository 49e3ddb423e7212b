"""Options of ``pocketfed export`` for int8: which layers stay float, the calibration examples, trained weights."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ProtocolError
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.program import Float32Array

if TYPE_CHECKING:
    from torch import nn

    from mobile_export.int8 import Int8Body


def add_int8_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights``, ``--int8-head`` and ``--calibration``."""
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="start from these weights, such as a trained model's: safetensors with the model's parameters",
    )
    parser.add_argument(
        "--int8-head",
        nargs="+",
        default=(),
        metavar="LAYER",
        help="last layers that stay float, and each device's own, where all before them is frozen in int8; needs "
        "--calibration and --batch-sizes infer_int8=N (default: no int8)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="at least 20 public examples, x in an .npz file, whose ranges become the scales of int8",
    )


def int8_body(head: tuple[str, ...], calibration: Path | None) -> Int8Body | None:
    """What ``--int8-head`` and ``--calibration`` ask for; None for neither.

    Raises:
        ConfigurationError: One without the other, or a file without examples.
    """
    from mobile_export.int8 import Int8Body  # noqa: PLC0415 - torch; not for --help

    if bool(head) != (calibration is not None):
        raise ConfigurationError("int8 needs both: --int8-head for what stays float, --calibration for the scales")
    return None if calibration is None else Int8Body(head, read_examples(calibration))


def read_examples(path: Path) -> Float32Array:
    """The array ``x`` of an ``.npz`` file.

    Raises:
        ConfigurationError: Not such a file.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return np.ascontiguousarray(archive["x"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise ConfigurationError(f"{path} is not an .npz file with an array x of examples: {e}") from e


def load_weights(model: nn.Module, path: Path) -> None:
    """Replace a model's parameters by those of a file.

    Raises:
        ConfigurationError: It cannot be read, or holds other parameters than the model's.
    """
    import torch  # noqa: PLC0415 - not for --help

    try:
        tensors = decode_frame(path.read_bytes()).tensors
    except (OSError, ProtocolError) as e:
        raise ConfigurationError(f"{path} is not a readable file of weights: {e}") from e
    parameters = dict(model.named_parameters())
    found = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
    expected = {name: ("float32", tuple(p.shape)) for name, p in parameters.items()}
    if found != expected:
        raise ConfigurationError(f"{path} holds {found}, the model's parameters are {expected}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(tensors[name]))
