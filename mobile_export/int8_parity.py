"""The gate for int8 methods, whose logits are not those of the float model, and must be near them all the same.

Two questions, both asked of the program itself, with several heads. Does it compute what the quantised graph computes
in eager PyTorch? That finds a backend that goes wrong: a scale, a layout, a weight, a head that is not the input's.
And is it near the float model, in its logits and in its answers, on examples that calibration saw and on those that it
did not? That finds a quantisation that is wrong, or that was given the wrong examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.func import functional_call

from client_sdk.protocol.errors import ProgramExecutionError
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, MethodSpec, Program
from mobile_export.errors import ParityError
from mobile_export.int8 import Int8Body
from mobile_export.parity import Int8Parity, relative_error

ROUNDING_TOLERANCE: Final = 0.01
"""Relative error against the quantised graph: where a value lies halfway between two steps of the grid, XNNPACK and
PyTorch may round it to different sides."""

FLOAT_TOLERANCE: Final = 0.1
"""Relative error of the logits against the float model, on calibration examples and on those held out."""

MIN_AGREEMENT: Final = 0.9
"""Fraction of examples, over all heads, that get the float model's answer."""

_MAX_EXAMPLES = 128
_HEADS = 3

Array = npt.NDArray[Any]


def check_int8(
    program: Program, method: MethodSpec, graph: fx.GraphModule, model: nn.Module, body: Int8Body
) -> Int8Parity:
    """Run an int8 method on examples with several heads: the model's own, ones near it, and a random one.

    Args:
        program: The exported program.
        method: Its method.
        graph: The quantised graph that the method was lowered from.
        model: The float model.
        body: What was quantised.

    Raises:
        ParityError: It differs by more than this module's limits, or fails to run.
    """
    gate = _Int8Gate(program, method, graph, model)
    seen, unseen = body.calibration[:_MAX_EXAMPLES], body.held_out[:_MAX_EXAMPLES]
    for head in gate.heads():
        for examples in (seen, unseen):
            gate.compare(head, examples, to_float=True)
        # Beyond the calibrated range there is no saying how far int8 is off, but it must saturate as it should.
        gate.compare(head, -2 * seen, to_float=False)
    result = gate.result(len(seen) + len(unseen))
    for name, error, allowed in (
        ("logits against the quantised graph", result.rounding_error, ROUNDING_TOLERANCE),
        ("logits against the float model", result.float_error, FLOAT_TOLERANCE),
    ):
        if not error <= allowed:
            raise ParityError(method.name, name, error, allowed, ())
    if result.agreement < MIN_AGREEMENT:
        raise ParityError(
            method.name,
            "logits",
            1 - result.agreement,
            1 - MIN_AGREEMENT,
            (),
            failure=f"only {result.agreement:.1%} of the examples get the float model's answer; "
            f"{MIN_AGREEMENT:.0%} must",
        )
    return result


@dataclass
class _Worst:
    rounding: float = 0.0
    floating: float = 0.0
    agreed: int = 0
    compared: int = 0


class _Int8Gate:
    """State of one check."""

    def __init__(self, program: Program, method: MethodSpec, graph: fx.GraphModule, model: nn.Module) -> None:
        self._program = program
        self._method = method
        self._graph = graph
        self._model = model
        self._layers = SharedLayers(program.manifest.parameters, method.head or ())
        self._weights = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
        self._rng = np.random.default_rng(0)
        self._worst = _Worst()

    def heads(self) -> Iterator[Float32Array]:
        """The model's own head; that one with noise; and random ones of its size."""
        own = self._layers.personal_of(self._weights)
        scale = float(np.sqrt(np.mean(np.square(own)))) or 1.0
        yield own
        for share in np.linspace(0.5, 1.0, _HEADS - 1):
            noise = scale * self._rng.standard_normal(own.shape)
            yield ((1 - share) * own + share * noise).astype(np.float32)

    def compare(self, head: Float32Array, examples: Float32Array, *, to_float: bool) -> None:
        """Run examples in batches, the last one filled up, and keep the worst."""
        size = self._method.batch_size
        rows = np.arange(-(-len(examples) // size) * size) % len(examples)
        actual, reference = [], []
        for start in range(0, len(rows), size):
            batch = np.ascontiguousarray(examples[rows[start : start + size]])
            try:
                actual += list(self._program.run(self._method.name, head, batch))
            except ProgramExecutionError as e:
                raise ParityError(
                    self._method.name, "", np.inf, ROUNDING_TOLERANCE, ("XNNPACK",), failure=str(e)
                ) from e
            reference.append(_logits(self._graph, head, batch))
        found, expected = (np.concatenate(parts)[: len(examples)] for parts in (actual, reference))
        worst = self._worst
        worst.rounding = max(worst.rounding, relative_error(found, expected))
        if to_float:
            exact = self._float_logits(head, examples)
            worst.floating = max(worst.floating, relative_error(found, exact))
            worst.agreed += int((found.argmax(axis=1) == exact.argmax(axis=1)).sum())
            worst.compared += len(exact)

    def result(self, examples: int) -> Int8Parity:
        return Int8Parity(
            method=self._method.name,
            rounding_error=self._worst.rounding,
            float_error=self._worst.floating,
            agreement=self._worst.agreed / self._worst.compared,
            examples=examples,
        )

    @torch.no_grad()
    def _float_logits(self, head: Float32Array, examples: Float32Array) -> Array:
        w = torch.from_numpy(self._layers.with_personal(self._weights, head))
        table = self._program.manifest.parameters
        values = {p.name: w[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in table}
        logits: Array = functional_call(self._model, values, (torch.from_numpy(examples),)).numpy()
        return logits


@torch.no_grad()
def _logits(graph: fx.GraphModule, head: Float32Array, x: Float32Array) -> Array:
    logits: Array = graph(torch.from_numpy(head), torch.from_numpy(x))[0].numpy()
    return logits
