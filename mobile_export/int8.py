"""Personalised int8 inference: a body that is frozen in int8 at export, and a float head whose weights are an input.

One program serves every device's own head. The body is quantised statically: weights of each layer by channel,
activations by tensor, in ranges that the calibration examples span. All batch sizes have the same scales, so that an
example's logits do not depend on the batch that it comes in, but for rounding in the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, ParameterSpec, body_hash
from mobile_export.checks import flat_weights
from mobile_export.errors import UnsupportedModel
from mobile_export.int8_toolchain import convert, export, prepare

INPUT_NAMES: Final = ("head", "x")
OUTPUT_NAMES: Final = ("logits",)

MIN_EXAMPLES: Final = 20
HELD_OUT_EVERY: Final = 5
"""Every so many calibration examples one is kept from calibration, to judge it by."""

_CALIBRATION_BATCH = 256
_MODEL = "model"


@dataclass(frozen=True, eq=False)
class Int8Body:
    """What is quantised, and with which examples.

    Attributes:
        head: Layers that stay float and whose weights are an input: each the name of a parameter, or of a module with
            all its parameters. They must be the model's last. All others are frozen in int8.
        examples: Calibration examples, float32 ``[n, *feature_shape]``, n >= 20: a sample of what devices will ask
            about, public, because what they are shows in the program's scales. A fifth of them only judges.
    """

    head: tuple[str, ...]
    examples: Float32Array

    @property
    def calibration(self) -> Float32Array:
        """The examples whose ranges become the scales."""
        return np.delete(self.examples, np.s_[::HELD_OUT_EVERY], axis=0)

    @property
    def held_out(self) -> Float32Array:
        """The examples that calibration does not see."""
        return self.examples[::HELD_OUT_EVERY]


@dataclass(frozen=True)
class Int8Method:
    """One quantised method, before it is lowered.

    Attributes:
        graph: ``(head[h], x[B, ...]) -> (logits,)`` with the roundings of int8 written out: what the program must
            compute, and what eager PyTorch can.
        inputs: Zeros of the inputs' shapes.
        head: Names of the head's parameters, in table order.
        body_sha256: ``body_hash`` of the float body.
    """

    graph: fx.GraphModule
    inputs: tuple[Tensor, Tensor]
    head: tuple[str, ...]
    body_sha256: str


class _Served(nn.Module):
    """A model whose head is an input."""

    def __init__(self, model: nn.Module, head: Sequence[ParameterSpec]) -> None:
        super().__init__()
        self.model = model
        self._head = tuple(head)

    def forward(self, head: Tensor, x: Tensor) -> tuple[Tensor]:
        pieces = torch.split(head, [p.num_elements for p in self._head])
        own = {p.name: piece.reshape(p.shape) for p, piece in zip(self._head, pieces, strict=True)}
        return (functional_call(self.model, own, (x,)),)


def quantise(
    model: nn.Module,
    parameters: tuple[ParameterSpec, ...],
    feature_shape: tuple[int, ...],
    body: Int8Body,
    batch_sizes: Sequence[int],
) -> dict[int, Int8Method]:
    """Calibrate once, and write a quantised method for each batch size.

    Args:
        model: Its present parameters become the body; it is not changed.
        parameters: Its parameter table.
        feature_shape: Shape of one example.
        body: What to quantise.
        batch_sizes: At least one.

    Raises:
        UnsupportedModel: The model cannot be traced, or has nothing that can be quantised.
        ConfigurationError: Examples or a head that do not fit the model.
    """
    _check_examples(body.examples, feature_shape)
    layers = SharedLayers.of(parameters, body.head)
    whole = flat_weights(model).numpy()
    head = torch.from_numpy(layers.personal_of(whole))
    served = _Served(model, [p for p in parameters if p.name in layers.personal])
    calibrated = _calibrated(served, head, body.calibration)
    state, hashed = calibrated.state_dict(), body_hash(layers.gather(whole))
    methods = {}
    for batch_size in batch_sizes:
        inputs = (torch.zeros_like(head), torch.zeros(batch_size, *feature_shape))
        prepared = _prepared(served, inputs)
        try:
            prepared.load_state_dict(state)
        except RuntimeError as e:
            raise UnsupportedModel(
                "", f"the model computes otherwise in batches of {batch_size}: {str(e).partition(chr(10))[0]}"
            ) from e
        graph = convert(prepared)
        if not any(node.op == "get_attr" and _tensor(graph, node).dtype is torch.int8 for node in graph.graph.nodes):
            raise UnsupportedModel("", f"no layer before the head {', '.join(body.head)} can be quantised")
        methods[batch_size] = Int8Method(graph, inputs, layers.personal, hashed)
    return methods


def _check_examples(examples: Float32Array, feature_shape: tuple[int, ...]) -> None:
    if examples.dtype != np.float32 or examples.shape[1:] != feature_shape or len(examples) < MIN_EXAMPLES:
        raise ConfigurationError(
            f"calibration takes float32 examples of shape {[f'n >= {MIN_EXAMPLES}', *feature_shape]}, not "
            f"{examples.dtype} {list(examples.shape)}"
        )
    if not np.isfinite(examples).all():
        raise ConfigurationError("the calibration examples hold NaN or infinite values")


@torch.no_grad()
def _calibrated(served: _Served, head: Tensor, examples: Float32Array) -> fx.GraphModule:
    """The method with the ranges of what flows through it."""
    size = min(len(examples), _CALIBRATION_BATCH)
    prepared = _prepared(served, (head, torch.from_numpy(examples[:size])))
    # The last batch reaches back, where they do not come out even: no example is left out.
    for start in [*range(0, len(examples) - size, size), len(examples) - size]:
        prepared(head, torch.from_numpy(examples[start : start + size]))
    return prepared


def _prepared(served: _Served, inputs: tuple[Tensor, Tensor]) -> fx.GraphModule:
    """The method with an observer at each place that will be rounded: all before the head."""
    module = export(served, inputs)
    behind = _reached(module.graph, INPUT_NAMES[0])
    _check_last(module.graph, behind)
    return prepare(module, lambda node: node.name not in behind)


def _reached(graph: fx.Graph, name: str) -> frozenset[str]:
    """Names of an input and of all that is computed from it."""
    found = {name}
    for node in graph.nodes:
        if any(source.name in found for source in node.all_input_nodes):
            found.add(node.name)
    return frozenset(found)


def _check_last(graph: fx.Graph, behind: frozenset[str]) -> None:
    """Refuse a head that frozen layers follow: they would stay float, and bring their weights along in float."""
    before = _reached(graph, INPUT_NAMES[1])
    frozen = {
        str(source.target).removeprefix(f"{_MODEL}.")
        for node in graph.nodes
        if node.name in behind
        for constant in node.all_input_nodes
        if constant.name not in behind and constant.name not in before
        for source in _ancestors(constant)
        if source.op == "get_attr"
    }
    if frozen:
        raise ConfigurationError(
            f"{', '.join(sorted(frozen))} come after the head, or together with it, and would stay float: name them too"
        )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, unseen = {node}, [node]
    while unseen:
        sources = [source for source in unseen.pop().all_input_nodes if source not in found]
        found.update(sources)
        unseen += sources
    return found


def _tensor(module: nn.Module, node: fx.Node) -> Tensor:
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return torch.as_tensor(value)
