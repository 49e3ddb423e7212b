"""What an export starts from: a checked model, its methods traced to graphs, and the key that identifies it all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import astuple, dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

import client_sdk.protocol.frames
import client_sdk.protocol.program
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.program import WITH_INNER_STEPS, ParameterSpec, Role
from client_sdk.protocol.shamir import Scheme
from mobile_export.checks import parameter_table
from mobile_export.decompositions import DecompositionTable
from mobile_export.errors import UnsupportedModel
from mobile_export.int8 import INPUT_NAMES as INT8_INPUT_NAMES
from mobile_export.int8 import OUTPUT_NAMES as INT8_OUTPUT_NAMES
from mobile_export.int8 import Int8Body, quantise
from mobile_export.meta_methods import META_INPUT_NAMES, META_OUTPUT_NAMES, MetaMethods
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


_INPUT_NAMES = {**INPUT_NAMES, **META_INPUT_NAMES}
_OUTPUT_NAMES = {**OUTPUT_NAMES, **META_OUTPUT_NAMES}

MAX_INNER_STEPS = 100
"""What a plan can ask for (``MetaPlan.inner_steps``)."""


@dataclass(frozen=True)
class MethodKind:
    """What a method of the model is made for.

    Attributes:
        role: What it does.
        batch_size: Examples of each of its batches.
        inner_steps: K, where it takes K steps.
    """

    role: Role
    batch_size: int
    inner_steps: int | None = None

    @property
    def name(self) -> str:
        """``{role}_b{batch_size}``, or ``{role}_k{inner_steps}_b{batch_size}``."""
        steps = "" if self.inner_steps is None else f"_k{self.inner_steps}"
        return f"{self.role.value}{steps}_b{self.batch_size}"


@dataclass(frozen=True)
class TracedMethod:
    """One method as a flat graph of ATen operators, the example inputs it was traced on, and its tensors' names."""

    kind: MethodKind
    graph: torch.fx.GraphModule
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    head: tuple[str, ...] | None = None
    body_sha256: str | None = None


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
                    "methods": {n: [*astuple(m.kind), m.head] for n, m in self.methods.items()},
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
    inner_steps: Sequence[int] = (),
    example_batch: tuple[Tensor, Tensor] | None,
    feature_shape: tuple[int, ...] | None,
    num_classes: int | None,
    model_name: str | None,
    constants: Mapping[str, int | float],
    decompositions: DecompositionTable,
    share: Scheme | None = None,
    int8: Int8Body | None = None,
    traced: Callable[[str], None],
) -> Blueprint:
    """Check a model and its options (those of ``export_program``), and trace every method.

    ``traced`` is called with the name of each method once it is traced.

    Raises:
        UnsupportedModel: The model or the loss cannot be exported.
        ConfigurationError: Options that do not fit together.
    """
    kinds = method_kinds(batch_sizes, inner_steps)
    _check_constants(constants, {*(kind.name for kind in kinds), SHARE_METHOD})
    parameters = parameter_table(model)
    shape = _feature_shape(model, example_batch, feature_shape)
    plain = Methods(model, loss, parameters)
    meta = MetaMethods(plain)
    classes = _num_classes(model, shape, num_classes)
    methods: dict[str, TracedMethod] = {}
    quantised = _int8_methods(model, parameters, shape, int8, [k for k in kinds if k.role is Role.INFER_INT8])
    for kind in kinds:
        if kind in quantised:
            methods[kind.name] = quantised[kind]
            traced(kind.name)
            continue
        role, inputs = kind.role, _example_inputs(kind, parameters, shape)
        function = (meta if role in META_INPUT_NAMES else plain).function(role)
        graph = trace(function, inputs, decompositions)
        methods[kind.name] = TracedMethod(kind, graph, inputs, _INPUT_NAMES[role], _OUTPUT_NAMES[role])
        traced(kind.name)
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


def _int8_methods(
    model: nn.Module,
    parameters: tuple[ParameterSpec, ...],
    shape: tuple[int, ...],
    body: Int8Body | None,
    kinds: Sequence[MethodKind],
) -> dict[MethodKind, TracedMethod]:
    if (body is None) != (not kinds):
        raise ConfigurationError("int8= says what is quantised, and batch sizes of infer_int8 for what: give both")
    found = {} if body is None else quantise(model, parameters, shape, body, [kind.batch_size for kind in kinds])
    traced = {kind: found[kind.batch_size] for kind in kinds}
    return {
        kind: TracedMethod(kind, m.graph, m.inputs, INT8_INPUT_NAMES, INT8_OUTPUT_NAMES, m.head, m.body_sha256)
        for kind, m in traced.items()
    }


def _share_method(scheme: Scheme, size: int, decompositions: DecompositionTable) -> TracedMethod:
    check_share(scheme, size)
    inputs = example_inputs(scheme, size)
    graph = trace(share_function(scheme), inputs, decompositions)
    return TracedMethod(MethodKind(Role.SHARE, 1), graph, inputs, share_inputs(scheme), share_outputs(scheme))


def method_kinds(batch_sizes: Mapping[Role, Sequence[int]], inner_steps: Sequence[int] = ()) -> list[MethodKind]:
    """The methods of a program that run the model: roles in their own order, steps and batch sizes ascending.

    Args:
        batch_sizes: Of each role.
        inner_steps: Numbers of steps of the roles that take several in one call: each with each of their batch sizes.

    Raises:
        ConfigurationError: No method at all, a batch size below 1, steps that no method takes or that are not 1 .. 100,
            or a role without the steps that it needs.
    """
    if Role.SHARE in batch_sizes:
        raise ConfigurationError("the share method has no batch size: ask for it with share=, a Scheme")
    stepping = [role for role in batch_sizes if role in WITH_INNER_STEPS]
    if stepping and not inner_steps:
        raise ConfigurationError(
            f"{', '.join(sorted(stepping))} take several steps in one call: say how many, as in inner_steps=(5,) "
            "or --inner-steps 5"
        )
    if inner_steps and not stepping:
        raise ConfigurationError(
            f"inner_steps are for the roles {', '.join(sorted(WITH_INNER_STEPS))}: give one of them a batch size"
        )
    if inner_steps and not (min(inner_steps) >= 1 and max(inner_steps) <= MAX_INNER_STEPS):
        raise ConfigurationError(f"inner steps must be 1 .. {MAX_INNER_STEPS}, not {list(inner_steps)}")
    kinds = [
        MethodKind(role, batch_size, steps)
        for role in Role
        for steps in (sorted(set(inner_steps)) if role in WITH_INNER_STEPS else (None,))
        for batch_size in sorted(set(batch_sizes.get(role, ())))
    ]
    if not kinds:
        raise ConfigurationError("name at least one batch size for one of the roles grad, train, evaluate, infer")
    if min(kind.batch_size for kind in kinds) < 1:
        raise ConfigurationError(f"batch sizes must be at least 1: {dict(batch_sizes)}")
    return kinds


def _check_constants(constants: Mapping[str, int | float], methods: Set[str]) -> None:
    for name, value in constants.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in methods:
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
    kind: MethodKind, parameters: tuple[ParameterSpec, ...], shape: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Zeros, and masks of ones, of the inputs' shapes and dtypes."""
    batch = (kind.batch_size,)
    inner = batch if kind.inner_steps is None else (kind.inner_steps, *batch)
    values = {
        "w": torch.zeros(parameters[-1].offset + parameters[-1].num_elements),
        "lr": torch.zeros(1),
        "meta_lr": torch.zeros(1),
        "rates": torch.zeros(len(parameters)),
    }
    for prefix, leading in (("", batch), ("inner_", inner), ("hessian_", batch)):
        values[f"{prefix}x"] = torch.zeros(*leading, *shape)
        values[f"{prefix}y"] = torch.zeros(leading, dtype=torch.int64)
        values[f"{prefix}mask"] = torch.ones(leading)
    return tuple(values[name] for name in _INPUT_NAMES[kind.role])


def _graph_content(module: torch.fx.GraphModule) -> list[bytes]:
    """The graph's text, and the values of the tensors that it refers to."""
    parts = [str(module.graph).encode()]
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = torch.as_tensor(attrgetter(node.target)(module)).detach().contiguous()
            parts += [f"{tensor.dtype}{list(tensor.shape)}".encode(), tensor.numpy().tobytes()]
    return parts


def _exporter_source() -> bytes:
    """The sources of this package and of what it writes files with: another exporter, another key."""
    files = [Path(str(m.__file__)) for m in (client_sdk.protocol.frames, client_sdk.protocol.program)]
    files += sorted(f for f in Path(__file__).parent.glob("*.py") if f.name not in _NO_PART_OF_AN_EXPORT)
    return b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)
