"""What adaptation and meta-gradients cost, counted on the very functions that are exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import ParameterSpec, Role
from client_sdk.protocol.training import TrainingPlan
from mobile_export.meta_methods import META_INPUT_NAMES, MetaMethods
from mobile_export.methods import Methods, cross_entropy


def operations_of(
    role: Role,
    model: nn.Module,
    parameters: tuple[ParameterSpec, ...],
    feature_shape: tuple[int, ...],
    *,
    inner_steps: int,
    batch_size: int,
) -> int:
    """Floating-point operations of one call, as ``FlopCounterMode`` counts them: matrix products and convolutions.

    Args:
        role: One of those that adapt, or learn to be adapted.
        model: What is trained.
        parameters: Its parameter table.
        feature_shape: Of one example.
        inner_steps: K; of ``per_fedavg``, which takes one step a call, without effect.
        batch_size: B. Examples that are masked cost what others do.
    """
    d = sum(p.num_elements for p in parameters)
    outer = () if role is Role.PER_FEDAVG else (inner_steps,)

    def value(name: str) -> Tensor:
        stacked = outer if name.startswith("inner") else ()
        if name.endswith("x"):
            return torch.zeros(*stacked, batch_size, *feature_shape)
        if name.endswith("y"):
            return torch.zeros(*stacked, batch_size, dtype=torch.int64)
        if name.endswith("mask"):
            return torch.ones(*stacked, batch_size)
        sizes = {"w": d, "rates": len(parameters), "lr": 1, "meta_lr": 1}
        return torch.full((sizes[name],), 0.1)

    function = MetaMethods(Methods(model, cross_entropy, parameters)).function(role)
    with FlopCounterMode(display=False) as counter:
        function(*(value(name) for name in META_INPUT_NAMES[role]))
    return int(counter.get_total_flops())


def session_operations(
    plan: TrainingPlan, model: nn.Module, parameters: tuple[ParameterSpec, ...], feature_shape: tuple[int, ...]
) -> int:
    """Of one device's session of meta-learning, however many examples it has.

    Raises:
        ConfigurationError: Another plan, whose cost follows from the examples.
    """
    if plan.meta is None:
        raise ConfigurationError(f"what a session of {plan.algorithm} costs depends on the examples of the device")
    role = Role(plan.algorithm.replace("-", "_"))
    calls = {Role.REPTILE: 1, Role.PER_FEDAVG: plan.meta.inner_steps}.get(role, plan.meta.query_batches)
    one = operations_of(
        role, model, parameters, feature_shape, inner_steps=plan.meta.inner_steps, batch_size=plan.batch_size
    )
    return calls * one
