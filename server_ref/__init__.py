"""The reference server: coordinator, aggregation, durable state.

Names are loaded on first use (PEP 562): importing this package loads neither the web framework nor a compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client_sdk.protocol.errors import DivergenceDetected
    from client_sdk.protocol.updates import UpdateKind, WorkerGradient
    from server_ref.aggregation.accounting import PrivacyLedger
    from server_ref.aggregation.accumulator import Accumulator
    from server_ref.aggregation.asynchronous import AsyncGradientAggregator
    from server_ref.aggregation.compressed import CompressedGradientAggregator
    from server_ref.aggregation.detectors import IntegratedAttackDetector
    from server_ref.aggregation.errors import PrivacyBudgetExhausted
    from server_ref.aggregation.exact import ExactAccumulator
    from server_ref.aggregation.fixed import Int64Accumulator
    from server_ref.aggregation.integrated import IntegratedFederatedAggregator
    from server_ref.aggregation.integrated_config import (
        AsyncConfig,
        CompressionConfig,
        FederatedConfig,
        PrivacyConfig,
        SecurityConfig,
    )
    from server_ref.aggregation.personalized import PersonalizedFederatedAggregator
    from server_ref.aggregation.pipeline import Pipeline
    from server_ref.aggregation.plan import AccumulatorPlan
    from server_ref.aggregation.presets import ByzantineRobustAggregator, GradientAggregator
    from server_ref.aggregation.private_preset import DPGradientAggregator
    from server_ref.aggregation.renyi import RenyiPrivacyAccountant
    from server_ref.aggregation.secure_preset import SecureAggregator
    from server_ref.aggregation.sensitivity_calibrator import SensitivityCalibrator
    from server_ref.aggregation.tensors import AggregatedUpdate, apply_update
    from server_ref.aggregation.warm import warm_up
    from server_ref.selection.device_selector import ServerDeviceSelector

__all__ = [
    "Accumulator",
    "AccumulatorPlan",
    "AggregatedUpdate",
    "AsyncConfig",
    "AsyncGradientAggregator",
    "ByzantineRobustAggregator",
    "CompressedGradientAggregator",
    "CompressionConfig",
    "DPGradientAggregator",
    "DivergenceDetected",
    "ExactAccumulator",
    "FederatedConfig",
    "GradientAggregator",
    "Int64Accumulator",
    "IntegratedAttackDetector",
    "IntegratedFederatedAggregator",
    "PersonalizedFederatedAggregator",
    "Pipeline",
    "PrivacyBudgetExhausted",
    "PrivacyConfig",
    "PrivacyLedger",
    "RenyiPrivacyAccountant",
    "SecureAggregator",
    "SecurityConfig",
    "SensitivityCalibrator",
    "ServerDeviceSelector",
    "UpdateKind",
    "WorkerGradient",
    "apply_update",
    "warm_up",
]

_HOMES = {
    **dict.fromkeys(__all__, "server_ref.aggregation"),
    "DivergenceDetected": "client_sdk.protocol.errors",
    "ServerDeviceSelector": "server_ref.selection",
    "UpdateKind": "client_sdk.protocol.updates",
    "WorkerGradient": "client_sdk.protocol.updates",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
