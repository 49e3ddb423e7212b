"""``export_program``: a model and a loss in, a verified bundle out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE, ParameterSpec, Role
from mobile_export.bundle import ProgramBundle, replacing_folder
from mobile_export.checks import flat_weights, parameter_table
from mobile_export.decompositions import decomposition_table
from mobile_export.manifest import build_manifest, method_name
from mobile_export.methods import INPUT_NAMES, Loss, Methods, cross_entropy
from mobile_export.toolchain import emit, lower, trace

DEFAULT_BATCH_SIZES: Mapping[Role, tuple[int, ...]] = {
    Role.GRAD: (8, 32),
    Role.TRAIN: (8, 32),
    Role.EVALUATE: (256,),
    Role.INFER: (1, 32),
}


def example_inputs(role: Role, batch_size: int, num_parameters: int, feature_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    values = {
        "w": torch.zeros(num_parameters),
        "lr": torch.zeros(1),
        "x": torch.zeros(batch_size, *feature_shape),
        "y": torch.zeros(batch_size, dtype=torch.int64),
        "mask": torch.ones(batch_size),
    }
    return tuple(values[n] for n in INPUT_NAMES[role])


def export_program(model, feature_shape, num_classes, out_dir, batch_sizes=DEFAULT_BATCH_SIZES, model_name="", constants={}):
    parameters = parameter_table(model)
    d = flat_weights(model).numel()
    methods = Methods(model, cross_entropy, parameters)
    roles = {method_name(r, b): (r, b) for r in Role for b in batch_sizes.get(r, ())}
    programs = {}
    for name, (role, b) in roles.items():
        args = example_inputs(role, b, d, feature_shape)
        programs[name] = lower(trace(methods.function(role), args), args, decomposition_table())
    program = emit(programs, constants)
    weights = encode_frame({n: p.detach().numpy() for n, p in model.named_parameters()})
    manifest = build_manifest(
        program=program, weights_file=weights, roles=roles, parameters=parameters, model_name=model_name,
        feature_shape=feature_shape, num_classes=num_classes, content_key="", constants=constants)
    with replacing_folder(Path(out_dir)) as d:
        (d / PROGRAM_FILE).write_bytes(program)
        (d / MANIFEST_FILE).write_text(manifest.to_json())
        (d / WEIGHTS_FILE).write_bytes(weights)
    return ProgramBundle(Path(out_dir), manifest)
