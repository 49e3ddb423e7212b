"""Aggregation: pure functions and values. Names are loaded on first use, because the kernels' compiler is heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server_ref.aggregation.accumulator import Accumulator
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
        PrivateAggregate,
        Update,
        Visibility,
    )
    from server_ref.aggregation.compressed import CompressedGradientAggregator
    from server_ref.aggregation.detectors import IntegratedAttackDetector
    from server_ref.aggregation.exact import ExactAccumulator
    from server_ref.aggregation.fixed import Int64Accumulator
    from server_ref.aggregation.pipeline import Pipeline
    from server_ref.aggregation.plan import AccumulatorPlan
    from server_ref.aggregation.presets import ByzantineRobustAggregator, GradientAggregator
    from server_ref.aggregation.reduce import BaselineMean, ExactMean
    from server_ref.aggregation.release import ExternalNoise, NoNoise, require_sensitivity
    from server_ref.aggregation.robust import RuleOptions
    from server_ref.aggregation.robust_reduce import RobustRule
    from server_ref.aggregation.scaffold import Scaffold
    from server_ref.aggregation.sensitivity_calibrator import SensitivityCalibrator
    from server_ref.aggregation.server_optim import Adagrad, Adam, Sgd, Yogi
    from server_ref.aggregation.server_state import ServerState
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
    "Adjacency",
    "Aggregate",
    "AggregatedUpdate",
    "AsyncGradientAggregator",
    "BaselineMean",
    "BufferedSchedule",
    "ByzantineRobustAggregator",
    "ClipGlobal",
    "ClipLayers",
    "CompressedGradientAggregator",
    "DecodeCompressed",
    "DecodeDense",
    "EncodedUpdate",
    "ExactAccumulator",
    "ExactMean",
    "ExternalNoise",
    "Facts",
    "GradientAggregator",
    "Int64Accumulator",
    "IntegratedAttackDetector",
    "NoClip",
    "NoNoise",
    "Pipeline",
    "PrivateAggregate",
    "RobustRule",
    "RuleOptions",
    "Scaffold",
    "SensitivityCalibrator",
    "ServerState",
    "Sgd",
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
    "require_sensitivity",
    "warm_up",
]

_MODULES = {
    "accumulator": ("Accumulator",),
    "admission": ("ClipGlobal", "ClipLayers", "DecodeCompressed", "DecodeDense", "NoClip", "ValidateFacts"),
    "asynchronous": ("AsyncGradientAggregator",),
    "batch": ("Adjacency", "Aggregate", "EncodedUpdate", "Facts", "PrivateAggregate", "Update", "Visibility"),
    "compressed": ("CompressedGradientAggregator",),
    "detectors": ("IntegratedAttackDetector",),
    "exact": ("ExactAccumulator",),
    "fixed": ("Int64Accumulator",),
    "pipeline": ("Pipeline",),
    "plan": ("AccumulatorPlan",),
    "presets": ("ByzantineRobustAggregator", "GradientAggregator"),
    "reduce": ("BaselineMean", "ExactMean"),
    "release": ("ExternalNoise", "NoNoise", "require_sensitivity"),
    "robust": ("RuleOptions",),
    "robust_reduce": ("RobustRule",),
    "scaffold": ("Scaffold",),
    "sensitivity_calibrator": ("SensitivityCalibrator",),
    "server_optim": ("Adagrad", "Adam", "Sgd", "Yogi"),
    "server_state": ("ServerState",),
    "staleness": ("BufferedSchedule", "StalenessPolicy", "SynchronousSchedule"),
    "stages": ("Slot",),
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
