"""Turn a PyTorch model into a bundle that a phone can train: one functional multi-method ExecuTorch program.

Names resolve on first use (PEP 562), so that importing the package, or one of its light modules, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobile_export.bundle import ProgramBundle
    from mobile_export.eager import EagerProgram
    from mobile_export.errors import ParityError, UnsupportedModel
    from mobile_export.export import ExportProgress, export_program
    from mobile_export.int8 import Int8Body
    from mobile_export.models import REFERENCE_MODELS, build_model
    from mobile_export.parity import ParityReport, check_parity

_HOME = {
    "REFERENCE_MODELS": "models",
    "EagerProgram": "eager",
    "ExportProgress": "export",
    "Int8Body": "int8",
    "ParityError": "errors",
    "ParityReport": "parity",
    "ProgramBundle": "bundle",
    "UnsupportedModel": "errors",
    "build_model": "models",
    "check_parity": "parity",
    "export_program": "export",
}

__all__ = [
    "REFERENCE_MODELS",
    "EagerProgram",
    "ExportProgress",
    "Int8Body",
    "ParityError",
    "ParityReport",
    "ProgramBundle",
    "UnsupportedModel",
    "build_model",
    "check_parity",
    "export_program",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name of the package
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
