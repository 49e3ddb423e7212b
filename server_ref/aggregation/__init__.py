"""Aggregation: pure functions and values. Names are loaded on first use, because the kernels' compiler is heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server_ref.aggregation.accounting import (
        DistributedRelease,
        GaussianRelease,
        LedgerKeeper,
        PrivacyBudget,
        PrivacyLedger,
        PrivacySpent,
    )
    from server_ref.aggregation.accumulator import Accumulator
    from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm, split_noise
    from server_ref.aggregation.admission import (
        ClipGlobal,
        ClipLayers,
        DecodeCompressed,
        DecodeDense,
        NoClip,
        ValidateFacts,
    )
    from server_ref.aggregation.asynchronous import AsyncGradientAggregator
    from server_ref.aggregation.batch import (
        Adjacency,
        Aggregate,
        EncodedUpdate,
        Facts,
        IntegerSum,
        PrivateAggregate,
        Update,
        Visibility,
    )
    from server_ref.aggregation.calibration import NoiseSchedule, ScheduleShape, calibrate
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
    from server_ref.aggregation.noise import CentralNoise
    from server_ref.aggregation.personalized import PersonalizedFederatedAggregator
    from server_ref.aggregation.pipeline import Pipeline
    from server_ref.aggregation.plan import AccumulatorPlan
    from server_ref.aggregation.presets import ByzantineRobustAggregator, GradientAggregator
    from server_ref.aggregation.private_preset import DPGradientAggregator
    from server_ref.aggregation.reduce import BaselineMean, ExactMean
    from server_ref.aggregation.release import ExternalNoise, NoNoise, require_sensitivity
    from server_ref.aggregation.renyi import RenyiPrivacyAccountant
    from server_ref.aggregation.robust import RuleOptions
    from server_ref.aggregation.robust_reduce import RobustRule
    from server_ref.aggregation.scaffold import Scaffold
    from server_ref.aggregation.secure_preset import SecureAggregator
    from server_ref.aggregation.sensitivity_calibrator import SensitivityCalibrator
    from server_ref.aggregation.server_optim import Adagrad, Adam, Sgd, Yogi
    from server_ref.aggregation.server_state import ServerState
    from server_ref.aggregation.shared_sum import SharedSum
    from server_ref.aggregation.stages import Slot
    from server_ref.aggregation.staleness import BufferedSchedule, StalenessPolicy, SynchronousSchedule
    from server_ref.aggregation.summation import Summation
    from server_ref.aggregation.tensors import AggregatedUpdate, TensorLayout, apply_update
    from server_ref.aggregation.warm import warm_up

__all__ = [
    "Accumulator",
    "AccumulatorPlan",
    "Adagrad",
    "Adam",
    "AdaptiveClipNorm",
    "Adjacency",
    "Aggregate",
    "AggregatedUpdate",
    "AsyncConfig",
    "AsyncGradientAggregator",
    "BaselineMean",
    "BufferedSchedule",
    "ByzantineRobustAggregator",
    "CentralNoise",
    "ClipGlobal",
    "ClipLayers",
    "CompressedGradientAggregator",
    "CompressionConfig",
    "DPGradientAggregator",
    "DecodeCompressed",
    "DecodeDense",
    "DistributedRelease",
    "EncodedUpdate",
    "ExactAccumulator",
    "ExactMean",
    "ExternalNoise",
    "Facts",
    "FederatedConfig",
    "GaussianRelease",
    "GradientAggregator",
    "Int64Accumulator",
    "IntegerSum",
    "IntegratedAttackDetector",
    "IntegratedFederatedAggregator",
    "LedgerKeeper",
    "NoClip",
    "NoNoise",
    "NoiseSchedule",
    "PersonalizedFederatedAggregator",
    "Pipeline",
    "PrivacyBudget",
    "PrivacyBudgetExhausted",
    "PrivacyConfig",
    "PrivacyLedger",
    "PrivacySpent",
    "PrivateAggregate",
    "RenyiPrivacyAccountant",
    "RobustRule",
    "RuleOptions",
    "Scaffold",
    "ScheduleShape",
    "SecureAggregator",
    "SecurityConfig",
    "SensitivityCalibrator",
    "ServerState",
    "Sgd",
    "SharedSum",
    "Slot",
    "StalenessPolicy",
    "Summation",
    "SynchronousSchedule",
    "TensorLayout",
    "Update",
    "ValidateFacts",
    "Visibility",
    "Yogi",
    "apply_update",
    "calibrate",
    "require_sensitivity",
    "split_noise",
    "warm_up",
]

_MODULES = {
    "accounting": (
        "DistributedRelease",
        "GaussianRelease",
        "LedgerKeeper",
        "PrivacyBudget",
        "PrivacyLedger",
        "PrivacySpent",
    ),
    "accumulator": ("Accumulator",),
    "adaptive_clipping": ("AdaptiveClipNorm", "split_noise"),
    "admission": ("ClipGlobal", "ClipLayers", "DecodeCompressed", "DecodeDense", "NoClip", "ValidateFacts"),
    "asynchronous": ("AsyncGradientAggregator",),
    "batch": (
        "Adjacency",
        "Aggregate",
        "EncodedUpdate",
        "Facts",
        "IntegerSum",
        "PrivateAggregate",
        "Update",
        "Visibility",
    ),
    "calibration": ("NoiseSchedule", "ScheduleShape", "calibrate"),
    "compressed": ("CompressedGradientAggregator",),
    "detectors": ("IntegratedAttackDetector",),
    "errors": ("PrivacyBudgetExhausted",),
    "exact": ("ExactAccumulator",),
    "fixed": ("Int64Accumulator",),
    "integrated": ("IntegratedFederatedAggregator",),
    "integrated_config": ("AsyncConfig", "CompressionConfig", "FederatedConfig", "PrivacyConfig", "SecurityConfig"),
    "noise": ("CentralNoise",),
    "personalized": ("PersonalizedFederatedAggregator",),
    "pipeline": ("Pipeline",),
    "plan": ("AccumulatorPlan",),
    "presets": ("ByzantineRobustAggregator", "GradientAggregator"),
    "private_preset": ("DPGradientAggregator",),
    "reduce": ("BaselineMean", "ExactMean"),
    "release": ("ExternalNoise", "NoNoise", "require_sensitivity"),
    "renyi": ("RenyiPrivacyAccountant",),
    "robust": ("RuleOptions",),
    "robust_reduce": ("RobustRule",),
    "scaffold": ("Scaffold",),
    "sensitivity_calibrator": ("SensitivityCalibrator",),
    "secure_preset": ("SecureAggregator",),
    "server_optim": ("Adagrad", "Adam", "Sgd", "Yogi"),
    "server_state": ("ServerState",),
    "shared_sum": ("SharedSum",),
    "stages": ("Slot",),
    "staleness": ("BufferedSchedule", "StalenessPolicy", "SynchronousSchedule"),
    "summation": ("Summation",),
    "tensors": ("AggregatedUpdate", "TensorLayout", "apply_update"),
    "warm": ("warm_up",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
