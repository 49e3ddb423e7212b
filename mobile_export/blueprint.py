"""What an export starts from: a checked model, its methods traced to graphs, and the key that identifies it all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import client_sdk.protocol.frames
import client_sdk.protocol.program
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.program import ParameterSpec, Role
from client_sdk.protocol.shamir import Scheme
from mobile_export.checks import parameter_table
from mobile_export.decompositions import DecompositionTable
from mobile_export.errors import UnsupportedModel
from mobile_export.methods import INPUT_NAMES, OUTPUT_NAMES, Loss, Methods
from mobile_export.sharing import (
    SHARE_METHOD,
    check_share,
    example_inputs,
    share_function,
    share_inputs,
    share_outputs,
)
from mobile_export.toolchain import trace, versions

# The command line, the names to import, and models: what matters of a model is in its graphs.
_NO_PART_OF_AN_EXPORT = ("__init__.py", "cli.py", "models.py")


@dataclass(frozen=True)
class TracedMethod:
    """One method as a flat graph of ATen operators, the example inputs it was traced on, and its tensors' names."""

    role: Role
    batch_size: int
    graph: torch.fx.GraphModule
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


@dataclass(frozen=True)
class Blueprint:
    """Everything that determines a program, but for the toolchain's own options.

    Attributes:
        model_name: Name to show.
        feature_shape: Shape of one example.
        num_classes: Number of logits.
        parameters: The parameter table.
        constants: Numbers to ship.
        weights_file: Contents of ``weights.safetensors``: the model's present parameters.
        methods: Method name -> traced method.
    """

    model_name: str
    feature_shape: tuple[int, ...]
    num_classes: int
    parameters: tuple[ParameterSpec, ...]
    constants: Mapping[str, int | float]
    weights_file: bytes
    methods: Mapping[str, TracedMethod]

    def content_key(self) -> str:
        """SHA-256 (hex) over the traced graphs with their constants, the weights, the options, and all versions.

        Hashing the graphs rather than the model's source catches what sources do not show: closures, globals,
        attributes, the code of helpers in other files.
        """
        digest = hashlib.sha256()
        for part in (
            json.dumps(
                {
                    "versions": versions(),
                    "model_name": self.model_name,
                    "feature_shape": self.feature_shape,
                    "num_classes": self.num_classes,
                    "constants": dict(self.constants),
                    "methods": {n: [m.role, m.batch_size] for n, m in self.methods.items()},
                },
                sort_keys=True,
            ).encode(),
            _exporter_source(),
            self.weights_file,
            *(part for method in self.methods.values() for part in _graph_content(method.graph)),
        ):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()


def draw_blueprint(
    model: nn.Module,
    loss: Loss,
    *,
    batch_sizes: Mapping[Role, Sequence[int]],
    example_batch: tuple[Tensor, Tensor] | None,
    feature_shape: tuple[int, ...] | None,
    num_classes: int | None,
    model_name: str | None,
    constants: Mapping[str, int | float],
    decompositions: DecompositionTable,
    share: Scheme | None = None,
    traced: Callable[[str], None],
) -> Blueprint:
    """Check a model and its options (those of ``export_program``), and trace every method.

    ``traced`` is called with the name of each method once it is traced.

    Raises:
        UnsupportedModel: The model or the loss cannot be exported.
        ConfigurationError: Options that do not fit together.
    """
    roles = method_roles(batch_sizes)
    _check_constants(constants, {**roles, SHARE_METHOD: None})
    parameters = parameter_table(model)
    shape = _feature_shape(model, example_batch, feature_shape)
    functions = Methods(model, loss, parameters)
    classes = _num_classes(model, shape, num_classes)
    methods: dict[str, TracedMethod] = {}
    for name, (role, batch_size) in roles.items():
        inputs = _example_inputs(role, batch_size, parameters, shape)
        graph = trace(functions.function(role), inputs, decompositions)
        methods[name] = TracedMethod(role, batch_size, graph, inputs, INPUT_NAMES[role], OUTPUT_NAMES[role])
        traced(name)
    if share is not None:
        methods[SHARE_METHOD] = _share_method(
            share, parameters[-1].offset + parameters[-1].num_elements, decompositions
        )
        traced(SHARE_METHOD)
    return Blueprint(
        model_name=model_name or type(model).__name__,
        feature_shape=shape,
        num_classes=classes,
        parameters=parameters,
        constants=constants,
        weights_file=encode_frame({n: p.detach().numpy() for n, p in model.named_parameters()}),
        methods=methods,
    )


def _share_method(scheme: Scheme, size: int, decompositions: DecompositionTable) -> TracedMethod:
    check_share(scheme, size)
    inputs = example_inputs(scheme, size)
    graph = trace(share_function(scheme), inputs, decompositions)
    return TracedMethod(Role.SHARE, 1, graph, inputs, share_inputs(scheme), share_outputs(scheme))


def method_roles(batch_sizes: Mapping[Role, Sequence[int]]) -> dict[str, tuple[Role, int]]:
    """Method name (``{role}_b{batch_size}``) -> role and batch size, roles in their own order, sizes ascending.

    Raises:
        ConfigurationError: No method at all, or a batch size below 1.
    """
    if Role.SHARE in batch_sizes:
        raise ConfigurationError("the share method has no batch size: ask for it with share=, a Scheme")
    roles = {f"{role.value}_b{b}": (role, b) for role in Role for b in sorted(set(batch_sizes.get(role, ())))}
    if not roles:
        raise ConfigurationError("name at least one batch size for one of the roles grad, train, evaluate, infer")
    if min(b for _, b in roles.values()) < 1:
        raise ConfigurationError(f"batch sizes must be at least 1: {dict(batch_sizes)}")
    return roles


def _check_constants(constants: Mapping[str, int | float], roles: Mapping[str, object]) -> None:
    for name, value in constants.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in roles:
            raise ConfigurationError(
                f"a constant cannot be called {name!r}: use letters, digits and _, and no method's name"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"the constant {name!r} must be an int or a float, not {type(value).__name__}")


def _feature_shape(
    model: nn.Module, example_batch: tuple[Tensor, Tensor] | None, explicit: tuple[int, ...] | None
) -> tuple[int, ...]:
    if example_batch is not None:
        x, y = example_batch
        if x.dtype is not torch.float32 or y.dtype is not torch.int64 or x.ndim < 2 or y.shape != x.shape[:1]:
            raise ConfigurationError(
                f"the example batch must be x float32 [B, ...] and y int64 [B]; got {x.dtype} {list(x.shape)} and "
                f"{y.dtype} {list(y.shape)}"
            )
        if explicit is not None and tuple(explicit) != tuple(x.shape[1:]):
            raise ConfigurationError(f"feature_shape {explicit} contradicts the example batch {list(x.shape)}")
        return tuple(x.shape[1:])
    shape = explicit if explicit is not None else getattr(model, "feature_shape", None)
    if not isinstance(shape, tuple) or not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ConfigurationError(
            f"the shape of one example is needed as positive ints, got {shape!r}: pass example_batch or feature_shape"
        )
    return shape


def _num_classes(model: nn.Module, shape: tuple[int, ...], expected: int | None) -> int:
    """Number of logits, learnt by running the model once on zeros."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(torch.zeros(1, *shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as e:
        raise UnsupportedModel("", f"the model fails on an input of shape {[1, *shape]}: {e}") from e
    found = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    if re.fullmatch(r"torch\.float32 \[1, [1-9]\d*\]", found) is None:
        raise UnsupportedModel("", f"the model must return logits, float32 [B, C]; for B = 1 it returns {found}")
    classes = int(logits.shape[1])
    if expected not in {None, classes}:
        raise ConfigurationError(f"the model returns {classes} logits, but num_classes is {expected}")
    return classes


def _example_inputs(
    role: Role, batch_size: int, parameters: tuple[ParameterSpec, ...], shape: tuple[int, ...]
) -> tuple[Tensor, ...]:
    values = {
        "w": torch.zeros(parameters[-1].offset + parameters[-1].num_elements),
        "lr": torch.zeros(1),
        "x": torch.zeros(batch_size, *shape),
        "y": torch.zeros(batch_size, dtype=torch.int64),
        "mask": torch.ones(batch_size),
    }
    return tuple(values[name] for name in INPUT_NAMES[role])


def _graph_content(module: torch.fx.GraphModule) -> list[bytes]:
    """The graph's text, and the values of the tensors that it refers to."""
    parts = [str(module.graph).encode()]
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = torch.as_tensor(getattr(module, node.target)).detach().contiguous()
            parts += [f"{tensor.dtype}{list(tensor.shape)}".encode(), tensor.numpy().tobytes()]
    return parts


def _exporter_source() -> bytes:
    """The sources of this package and of what it writes files with: another exporter, another key."""
    files = [Path(str(m.__file__)) for m in (client_sdk.protocol.frames, client_sdk.protocol.program)]
    files += sorted(f for f in Path(__file__).parent.glob("*.py") if f.name not in _NO_PART_OF_AN_EXPORT)
    return b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)
