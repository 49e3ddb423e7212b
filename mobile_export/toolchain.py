"""ExecuTorch's exporter, loaded late and quietly, behind the three calls that this package needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from client_sdk.protocol.errors import MissingOperator
from mobile_export.checks import check_graph
from mobile_export.decompositions import DecompositionTable
from mobile_export.errors import UnsupportedModel

# What the third parties say about themselves at import and during every export; nothing a user could act on.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "executorch", "root")


def versions() -> dict[str, str]:
    """Installed releases of the two packages that an export depends on."""
    return {"executorch": importlib.metadata.version("executorch"), "torch": torch.__version__}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the toolchain's own deprecations and log lines; warnings from anywhere else pass."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def trace(function: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> torch.fx.GraphModule:
    """Trace a method, gradients included, to a flat graph of ATen operators.

    ``torch.export`` cannot see through ``torch.func.grad``; ``make_fx`` can. Fake tensors make a branch on data an
    error, where real ones would silently bake one side of it into the program.

    Raises:
        UnsupportedModel: The model branches on data, or draws random numbers.
    """
    try:
        # make_fx counts the parameters of a bound method wrongly (self included); a lambda has none of its own.
        module = make_fx(lambda *a: function(*a), tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as e:
        raise UnsupportedModel(
            "", f"the model branches on the values of a tensor ({e}); use torch.where instead"
        ) from e
    check_graph(module.graph)
    return module


def lower(module: torch.fx.GraphModule, args: tuple[torch.Tensor, ...], table: DecompositionTable) -> Any:  # noqa: ANN401 - torch.export.ExportedProgram after a pass that is typed as returning Any
    """Export a traced method and rewrite it with the decomposition table."""
    with _quiet():
        return torch.export.export(module, args).run_decompositions(dict(table))


def emit(programs: Mapping[str, Any], constants: Mapping[str, int | float]) -> bytes:
    """Serialise exported methods as one multi-method ExecuTorch program.

    Inputs are left out of the memory plan: the runtime reads them where the caller has them, which saves a copy of
    the weights.

    Raises:
        MissingOperator: An operator has no out-variant and so no kernel.
    """
    with _quiet():
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
        from executorch.exir.passes import MemoryPlanningPass

        edge = to_edge(
            dict(programs),
            constant_methods=dict(constants) or None,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        try:
            program = edge.to_executorch(
                ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
            )
        except RuntimeError as e:
            missing = re.search(r"Missing out variants: \{(.*)\}", str(e))
            if missing is None:
                raise
            raise MissingOperator(f"ExecuTorch has no kernel for {missing[1]}; write the model without it") from e
        return bytes(program.buffer)


def read_plans(program: bytes) -> Sequence[Any]:
    """The execution plans inside a serialised program, one for each method: schema objects of ExecuTorch."""
    with _quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        return list(deserialize_pte_binary(program).program.execution_plan)
