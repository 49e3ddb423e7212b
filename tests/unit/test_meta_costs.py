"""What meta-learning costs in operations, counted on the functions that are exported, and on the tape of autograd.

Times are in ``tests/benchmarks/bench_personalization.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from client_sdk.protocol.program import Role
from mobile_export import EagerProgram
from mobile_export.checks import parameter_table
from simulator.personalization.operations import operations_of
from tests.bundles import META_FEATURE_SHAPE, META_INNER_STEPS, meta_bundle, meta_model, tiny_model

K, B = 5, 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return meta_bundle(tmp_path_factory.mktemp("costs") / "bundle")


def exported(role, model=None, *, shape=META_FEATURE_SHAPE, steps=K, batch=B):
    model = model or meta_model()
    return operations_of(role, model, parameter_table(model), shape, inner_steps=steps, batch_size=batch)


@pytest.mark.parametrize("model", [meta_model(), tiny_model("mlp"), tiny_model("cnn")], ids=["meta", "mlp", "cnn"])
def test_reptile_is_at_least_twice_cheaper_than_second_order_maml(model):
    """Same K = 5, B = 8 and 8 query examples."""
    count = {role: exported(role, model, shape=model.feature_shape) for role in (Role.MAML, Role.FOMAML, Role.REPTILE)}
    assert count[Role.MAML] >= 2 * count[Role.REPTILE]
    # First-order MAML is the same K steps, and one more gradient.
    assert count[Role.FOMAML] * K == count[Role.REPTILE] * (K + 1)


@pytest.mark.parametrize("role", [Role.ADAPT, Role.REPTILE, Role.MAML, Role.FOMAML, Role.PER_FEDAVG])
def test_the_tape_counts_as_much(role, bundle):
    """An oracle that shares no code with what is exported: had a gradient been left out, it would count more."""
    manifest = bundle.manifest
    [spec] = (m for m in manifest.methods if m.role is role)
    values = {"w": bundle.initial_weights(), "y": 1, "x": 0.5, "mask": 1}
    inputs = [
        np.ascontiguousarray(np.broadcast_to(values.get(t.name.split("_")[-1], 0.1), t.shape), t.dtype)
        for t in spec.inputs
    ]
    with FlopCounterMode(display=False) as counter:
        EagerProgram(meta_model(), manifest).run(spec.name, *inputs)
    taped = counter.get_total_flops()
    assert exported(role, steps=META_INNER_STEPS) == taped


def test_more_steps_cost_in_proportion():
    assert exported(Role.REPTILE, steps=4) == 2 * exported(Role.REPTILE, steps=2)
    assert exported(Role.REPTILE, batch=16) == 2 * exported(Role.REPTILE, batch=8)
