"""The third parties' export pipeline, loaded late and quietly, behind the few calls that this package needs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from client_sdk.protocol.errors import MissingOperator
from mobile_export.checks import check_graph
from mobile_export.decompositions import DecompositionTable
from mobile_export.errors import UnsupportedModel
from mobile_export.simplify import simplify

# They log about themselves at import and during every export; nothing that a user could act on.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")

# Operators that torch would take apart although ExecuTorch has a kernel for the whole; only `simplify` makes them.
_KEPT = (torch.ops.aten.linear.default,)


def versions() -> dict[str, str]:
    """Installed releases of the two packages that an export depends on."""
    return {"executorch": importlib.metadata.version("executorch"), "torch": torch.__version__}


def trace(
    function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], table: DecompositionTable
) -> torch.fx.GraphModule:
    """Trace a method, gradients included, to a flat graph of ATen operators.

    ``torch.export`` cannot see through ``torch.func.grad``; ``make_fx`` can. Fake tensors make a branch on data an
    error, where real ones would silently bake one side of it into the program. The rewrites of ``table`` apply here
    and not later: they may lay tensors out otherwise than the operators they replace, and views depend on it.

    Raises:
        UnsupportedModel: The model branches on data, draws random numbers, or leaves torch (``.numpy()``).
    """

    def method(*arguments: torch.Tensor) -> Any:  # noqa: ANN401 - make_fx takes any structure of tensors
        # make_fx would count `self` of a bound method as one more input.
        return function(*arguments)

    try:
        module = make_fx(method, decomposition_table=dict(table), tracing_mode="fake", _allow_non_fake_inputs=True)(
            *inputs
        )
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as e:
        raise UnsupportedModel(
            "", f"the model or the loss branches on the values of a tensor ({_first_line(e)}); use torch.where"
        ) from e
    except RuntimeError as e:
        raise UnsupportedModel("", f"the model or the loss cannot be traced: {_first_line(e)}") from e
    check_graph(module.graph)
    simplify(module)
    return module


def _first_line(error: Exception) -> str:
    """Torch's messages go on for pages of advice on its own settings."""
    return str(error).partition("\n")[0]


def lower(module: torch.fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> Any:  # noqa: ANN401 - an untyped library's program
    """Turn a traced method into core ATen operators, and these into ExecuTorch's edge dialect."""
    exir = load_exir()
    table = torch.export.default_decompositions()
    for operator in _KEPT:
        table.pop(operator, None)  # type: ignore[no-untyped-call] # torch
    with quiet():
        program = torch.export.export(module, inputs).run_decompositions(table)
        return exir.to_edge(program, compile_config=edge_config()).exported_program()


def emit(methods: Mapping[str, Any], constants: Mapping[str, int | float]) -> bytes:
    """Serialise lowered methods as one multi-method ExecuTorch program.

    Inputs are left out of the memory plan: the runtime reads them where the caller has them, which saves a copy of
    the weights.

    Raises:
        MissingOperator: An operator has no out-variant and so no kernel.
    """
    exir = load_exir()
    planning = importlib.import_module("executorch.exir.passes").MemoryPlanningPass(alloc_graph_input=False)
    with quiet():
        manager = exir.EdgeProgramManager(dict(methods), dict(constants) or None, edge_config())
        try:
            program = manager.to_executorch(exir.ExecutorchBackendConfig(memory_planning_pass=planning))
        except RuntimeError as e:
            missing = re.search(r"Missing out variants: \{(.*)\}", str(e))
            if missing is None:
                raise
            raise MissingOperator(f"ExecuTorch has no kernel for {missing[1]}; write the model without it") from e
        return bytes(program.buffer)


def read_plans(program: bytes) -> Sequence[Any]:
    """The execution plans inside a serialised program, one for each method: schema objects of ExecuTorch."""
    load_exir()
    with quiet():
        reader = importlib.import_module("executorch.exir._serialize._program")
        return list(reader.deserialize_pte_binary(program).program.execution_plan)


@functools.cache
def load_exir() -> Any:  # noqa: ANN401 - an untyped library
    """``executorch.exir``."""
    with quiet():
        return importlib.import_module("executorch.exir")


def edge_config() -> Any:  # noqa: ANN401 - an untyped library's options
    """Options of the edge dialect, the same for all methods of a program."""
    # The verifier knows core ATen only; what the runtime can really run is checked by opening the program.
    return load_exir().EdgeCompileConfig(_check_ir_validity=False, preserve_ops=list(_KEPT))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the toolchain says about itself. No code of ours or of the user's runs in here."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # A convolution without a gradient for its input; the plan is right.
        warnings.filterwarnings("ignore", message=r"Function .*'s \w+ kwarg value is None")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
