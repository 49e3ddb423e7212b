"""What meta-learning and personal layers take of a device's memory, and how it chooses and refuses."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from client_sdk.footprint import BASELINE_BYTES, MIB, estimate_memory
from client_sdk.planner import LocalWork, plan_work
from client_sdk.protocol.errors import ConfigurationError, MemoryBudgetExceeded, UnknownMethod
from client_sdk.protocol.meta_learning import META_ALGORITHMS, ExampleSplit, MetaPlan
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Manifest, MethodSpec, Role
from client_sdk.protocol.training import TrainingPlan
from tests.meta import ALL_METHODS, BODY, D, make_manifest, method

BASE = BASELINE_BYTES["native"]
HEAVY = {Role.MAML: 60, Role.FOMAML: 20, Role.REPTILE: 10, Role.ADAPT: 10, Role.PER_FEDAVG: 30, Role.TRAIN: 6}


def make_plan(algorithm: str, k: int = 3, batch_size: int = 4, **changes: Any) -> TrainingPlan:
    return TrainingPlan(algorithm=algorithm, batch_size=batch_size, meta=MetaPlan(inner_steps=k), **changes)


def heavy(*extra: MethodSpec) -> Manifest:
    """All methods with plans of some MiB each."""
    planned = [
        m.model_copy(update={"planned_memory_bytes": HEAVY.get(m.role, m.batch_size) * MIB})
        for m in (*ALL_METHODS, *extra)
    ]
    return make_manifest(planned)


def work(program: Manifest, plan: TrainingPlan, added_mib: float, num_samples: int = 10) -> LocalWork:
    """What is trained where training may add so many MiB."""
    return plan_work(
        program, DeviceProfile("toy"), plan, num_samples=num_samples, budget_bytes=BASE + int(added_mib * MIB)
    )


@pytest.mark.parametrize(("algorithm", "needed"), [("maml", 60), ("fomaml", 20), ("reptile", 10), ("per-fedavg", 30)])
def test_the_memory_plan_of_the_method_that_is_called_decides(algorithm: str, needed: int):
    found = work(heavy(), make_plan(algorithm), needed + 1)
    assert (found.plan, found.slice_size, found.accumulation_steps) == (make_plan(algorithm), None, 1)
    with pytest.raises(MemoryBudgetExceeded):
        work(make_manifest(m for m in heavy().methods if m.role is not Role.GRAD), make_plan(algorithm), needed - 1)


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_with_less_memory_the_same_is_done_in_slices(algorithm: str):
    program = heavy(method(Role.GRAD, 2), method(Role.GRAD, 3))
    # 3 is exported, too, but 4 is no multiple of it.
    sizes = {added: work(program, make_plan(algorithm), added).slice_size for added in (25, 5, 3)}
    assert sizes == {25: None, 5: 4, 3: 2}
    assert work(program, make_plan(algorithm), 3).accumulation_steps == 2


def test_of_methods_for_more_steps_the_smallest_that_is_enough_counts():
    program = make_manifest(method(Role.MAML, 4, k, planned=k * MIB) for k in (2, 5, 40))
    assert work(program, make_plan("maml", 2), 3)
    assert work(program, make_plan("maml", 3), 6)
    with pytest.raises(MemoryBudgetExceeded, match=r"5\.0 planned memory of maml_k5_b4"):
        work(program, make_plan("maml", 3), 4)


def test_a_fallback_of_two_methods_counts_the_larger_plan_and_the_inputs_of_both():
    program = make_manifest([method(Role.TRAIN, 4, planned=6 * MIB), method(Role.GRAD, 4, planned=2 * MIB)])
    found = work(program, make_plan("fomaml"), 100)
    items = {item.name: item.num_bytes for item in found.estimate.items}
    assert items["planned memory of train_b4"] == 6 * MIB
    assert items["inputs of train_b4"] == items["inputs of grad_b4"] == 4 * (3 * 4 + 8 + 4)


@pytest.mark.parametrize(
    ("algorithm", "batches"), [("maml", 3 + 1), ("fomaml", 3 + 1), ("reptile", 3), ("per-fedavg", 3)]
)
def test_the_inputs_of_all_batches_of_a_call_are_counted(algorithm: str, batches: int):
    found = work(make_manifest(), make_plan(algorithm), 100)
    (inputs,) = [item for item in found.estimate.items if item.name.startswith("inputs")]
    assert inputs.num_bytes == batches * 4 * (3 * 4 + 8 + 4)


def test_finding_out_which_examples_are_equal_takes_no_more_than_is_counted():
    n = 4000
    x, y = np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32), np.arange(n) % 7
    tracemalloc.start()
    ExampleSplit.of(x, y, 0.3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = work(make_manifest(), make_plan("maml"), 1000, n)
    counted = {item.name: item.num_bytes for item in found.estimate.items}
    assert peak <= counted["split of the examples"] + counted["order of the examples"]


@pytest.mark.parametrize(
    ("algorithm", "remedy"),
    [
        ("maml", "smaller batches or fewer inner steps, or train it by fomaml"),
        ("per-fedavg", "with smaller batches"),
        ("fomaml", "smaller grad slices that divide 4"),
        ("reptile", "smaller grad slices that divide 4"),
    ],
)
def test_a_refusal_says_what_would_fit_and_does_not_offer_what_the_plan_cannot_be(algorithm: str, remedy: str):
    with pytest.raises(MemoryBudgetExceeded, match=remedy) as refused:
        work(heavy(), make_plan(algorithm), 1)
    assert "planned memory of" in str(refused.value)
    assert "adaptive" not in str(refused.value)


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_what_the_program_cannot_do_is_said_before_it_is_opened(algorithm: str):
    with pytest.raises(UnknownMethod):
        work(make_manifest(), make_plan(algorithm, batch_size=5), 1000)


def test_personal_layers_are_counted_and_make_the_report_smaller():
    def estimate(*personal: str) -> dict[str, int]:
        plan = TrainingPlan(batch_size=4, personal=personal)
        found = estimate_memory(make_manifest(), ALL_METHODS[1], plan, num_samples=9, baseline_bytes=0)
        return {item.name: item.num_bytes for item in found.items}

    whole, shared = estimate(), estimate("output")
    assert "personal layers" not in whole
    assert shared["personal layers"] >= 3 * 2 * 4 * (D - BODY) + 4 * D
    assert whole["report"] - shared["report"] == whole["update"] - shared["update"] == 4 * (D - BODY)
    with pytest.raises(ConfigurationError, match="no layer 'head'"):
        estimate("head")
