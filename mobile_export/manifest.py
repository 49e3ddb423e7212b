"""The manifest of a program, read from the serialised program itself: never from what the exporter meant to write."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from client_sdk.protocol.errors import ManifestError
from client_sdk.protocol.program import (
    Manifest,
    MethodSpec,
    TensorSpec,
    parameter_table_hash,
)
from mobile_export.blueprint import Blueprint
from mobile_export.toolchain import read_plans, versions

_DTYPES = {
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "INT": "int32",
    "LONG": "int64",
    "BOOL": "bool",
    "BYTE": "uint8",
    "CHAR": "int8",
}


@dataclass(frozen=True)
class PlannedMethod:
    """What a serialised program says about one of its methods.

    Attributes:
        name: Method name.
        operators: Operators it calls, as ``namespace::name.overload``, sorted.
        planned_memory_bytes: Sum of the buffers that the memory plan reserves for one call; inputs and constants
            are not part of it, outputs are.
        inputs: (dtype, shape) of each input.
        outputs: (dtype, shape) of each output.
    """

    name: str
    operators: tuple[str, ...]
    planned_memory_bytes: int
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]


def read_methods(program: bytes) -> tuple[PlannedMethod, ...]:
    """Read every method's plan from a serialised program (constant methods included)."""
    return tuple(
        PlannedMethod(
            name=plan.name,
            operators=tuple(sorted({f"{o.name}.{o.overload}" if o.overload else o.name for o in plan.operators})),
            # Entry 0 stands for constant memory, which is not planned.
            planned_memory_bytes=sum(plan.non_const_buffer_sizes[1:]),
            inputs=_signature(plan, plan.inputs),
            outputs=_signature(plan, plan.outputs),
        )
        for plan in read_plans(program)
    )


def _signature(plan: Any, indices: list[int]) -> tuple[tuple[str, tuple[int, ...]], ...]:  # noqa: ANN401 - untyped schema
    values = [plan.values[i].val for i in indices]
    return tuple((_DTYPES[v.scalar_type.name], tuple(v.sizes)) if hasattr(v, "sizes") else ("", ()) for v in values)


def build_manifest(program: bytes, blueprint: Blueprint, content_key: str) -> Manifest:
    """Describe a serialised program.

    Args:
        program: Contents of ``program.pte``.
        blueprint: What it was made from.
        content_key: Key of the export cache.

    Raises:
        ManifestError: The program's own signature is not that of its methods' roles.
    """
    planned = {m.name: m for m in read_methods(program)}
    methods: list[MethodSpec] = []
    for name, traced in blueprint.methods.items():
        role, plan = traced.kind.role, planned[name]
        if len(plan.inputs) != len(traced.input_names) or len(plan.outputs) != len(traced.output_names):
            raise ManifestError(
                f"{name} takes {len(plan.inputs)} inputs and gives {len(plan.outputs)} outputs; a {role.value} method "
                f"takes {list(traced.input_names)} and gives {list(traced.output_names)}"
            )
        methods.append(
            MethodSpec(
                name=name,
                role=role,
                batch_size=traced.kind.batch_size,
                inner_steps=traced.kind.inner_steps,
                inputs=_specs(traced.input_names, plan.inputs),
                head=traced.head,
                body_sha256=traced.body_sha256,
                outputs=_specs(traced.output_names, plan.outputs),
                planned_memory_bytes=plan.planned_memory_bytes,
            )
        )
    return Manifest(
        model_name=blueprint.model_name,
        program_sha256=hashlib.sha256(program).hexdigest(),
        program_bytes=len(program),
        initial_weights_sha256=hashlib.sha256(blueprint.weights_file).hexdigest(),
        executorch_version=versions()["executorch"],
        torch_version=versions()["torch"],
        content_key=content_key,
        operators=tuple(sorted({o for m in planned.values() for o in m.operators})),
        parameters=blueprint.parameters,
        parameter_table_sha256=parameter_table_hash(blueprint.parameters),
        feature_shape=blueprint.feature_shape,
        num_classes=blueprint.num_classes,
        methods=tuple(methods),
        constants=dict(blueprint.constants),
    )


def _specs(names: tuple[str, ...], values: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape})
        for name, (dtype, shape) in zip(names, values, strict=True)
    )
