"""The third parties' quantisation, loaded late and quietly: torchao's export-mode flow and the XNNPACK backend.

What is quantised runs in XNNPACK, which is part of ExecuTorch's libraries and of its bindings for phones; its kernels
take int8 weights as constants only, by channel, which is why a device's own weights stay float.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from mobile_export.errors import UnsupportedModel
from mobile_export.toolchain import edge_config, load_exir, quiet

_XNNPACK = "executorch.backends.xnnpack"
_PT2E = "torchao.quantization.pt2e.quantize_pt2e"


def export(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> fx.GraphModule:
    """Trace a module of fixed shapes to a graph of ATen operators with layers whole; inputs are named as in forward.

    Raises:
        UnsupportedModel: The model branches on data, or cannot be traced.
    """
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, strict=False).module(check_guards=False)
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode, RuntimeError) as e:
        raise UnsupportedModel("", f"the model cannot be traced: {str(e).partition(chr(10))[0]}") from e


def prepare(module: fx.GraphModule, quantised: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """Put observers where static int8 quantisation will round; calling the result with examples calibrates it.

    Args:
        module: As ``export`` gives it.
        quantised: Whether an operator may be quantised.
    """
    with quiet():
        quantizer = importlib.import_module(f"{_XNNPACK}.quantizer.xnnpack_quantizer")
        scheme = quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
        chosen = quantizer.XNNPACKQuantizer().set_global(scheme)
        chosen.set_filter_function(quantised)
        # Batch normalisation is refused before, and slow to look for. A layer and its ReLU go first, because the layer
        # alone would have its negative values rounded finely too.
        patterns = [pattern for pattern in chosen.SUPPORTED_PATTERNS if "bn" not in pattern.name]
        chosen.SUPPORTED_PATTERNS = sorted(patterns, key=lambda pattern: not pattern.name.endswith("_relu"))
        prepared: fx.GraphModule = importlib.import_module(_PT2E).prepare_pt2e(module, chosen)
        return prepared


def convert(prepared: fx.GraphModule) -> fx.GraphModule:
    """Replace observers by the roundings that they measured, and weights by their int8 values."""
    with quiet():
        converted: fx.GraphModule = importlib.import_module(_PT2E).convert_pt2e(prepared)
        return converted


def lower_int8(module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> Any:  # noqa: ANN401 - an untyped library's program
    """Turn a converted method into ExecuTorch's edge dialect, with the int8 part as one call of XNNPACK."""
    with quiet():
        partitioner = importlib.import_module(f"{_XNNPACK}.partition.xnnpack_partitioner").XnnpackPartitioner()
        program = torch.export.export(module, inputs)
        lowered = load_exir().to_edge_transform_and_lower(
            program, partitioner=[partitioner], compile_config=edge_config()
        )
        return lowered.exported_program()
