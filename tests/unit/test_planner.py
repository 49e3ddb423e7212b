"""What a device decides to train within its memory, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.footprint import BASELINE_BYTES, MIB, MemoryEstimate, MemoryItem, estimate_memory
from client_sdk.memory_budget import MemoryBudget, PeakSince, device_memory_mib, peak_resident_bytes, resident_bytes
from client_sdk.planner import MEMORY_FRACTION, LocalWork, optimal_batch_size, plan_work
from client_sdk.protocol.errors import ConfigurationError, ManifestError, MemoryBudgetExceeded, UnknownMethod
from client_sdk.protocol.messages import SecurePlan
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.program import (
    MAX_METHODS,
    Manifest,
    MethodSpec,
    ParameterSpec,
    Role,
    TensorSpec,
    parameter_table_hash,
)
from client_sdk.protocol.training import TrainingPlan
from tests.vectors.sealing import SEALING_KEYS

PLAN = TrainingPlan(local_epochs=5, batch_size=64, learning_rate=0.1)
ADAPTIVE = PLAN.model_copy(update={"adaptive": True})
BASE = BASELINE_BYTES["native"]


def method(role: Role, batch_size: int, planned: int, d: int) -> MethodSpec:
    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="int64" if name == "y" else "float32", shape=shape)

    return MethodSpec(
        name=f"{role}_b{batch_size}",
        role=role,
        batch_size=batch_size,
        inputs=(tensor("w", d), tensor("x", batch_size, 10), tensor("y", batch_size), tensor("mask", batch_size)),
        outputs=(tensor("out", d),),
        planned_memory_bytes=planned,
    )


def manifest(
    train: tuple[int, ...] = (8, 32, 64), grad: tuple[int, ...] = (4, 8, 16), *, d: int = 1000, per_sample: int = MIB
) -> Manifest:
    """A program whose methods plan ``per_sample`` bytes for each example of their batch."""
    parameters = (ParameterSpec(name="w", shape=(d,), offset=0),)
    return Manifest(
        model_name="invented",
        program_sha256="0" * 64,
        program_bytes=100_000,
        initial_weights_sha256="0" * 64,
        executorch_version="1.5.1",
        torch_version="2.13.0",
        content_key="key",
        operators=(),
        parameters=parameters,
        parameter_table_sha256=parameter_table_hash(parameters),
        feature_shape=(10,),
        num_classes=3,
        methods=(
            *(method(Role.TRAIN, size, size * per_sample, d) for size in train),
            *(method(Role.GRAD, size, size * per_sample, d) for size in grad),
        ),
    )


def phone(memory_mib: int, tier: str = "mid_range") -> DeviceProfile:
    return DeviceProfile("phone", DeviceTier(tier), available_memory_mb=memory_mib)


def work(program: Manifest, plan: TrainingPlan, added_mib: float, **options: object) -> LocalWork:
    """What is trained where training may add so many MiB."""
    return plan_work(program, phone(2048), plan, num_samples=10, budget_bytes=BASE + int(added_mib * MIB), **options)


@pytest.mark.parametrize(("added_mib", "batch"), [(65, 64), (63, 32), (33, 32), (31, 16), (9, 8), (7.5, 4), (5, 4)])
def test_an_adaptive_batch_is_the_largest_exported_one_that_fits(added_mib: float, batch: int):
    assert work(manifest(), ADAPTIVE, added_mib).plan.batch_size == batch


def test_an_adaptive_batch_is_never_larger_than_planned():
    found = work(manifest(), ADAPTIVE.model_copy(update={"batch_size": 40}), 1000)
    assert (found.plan.batch_size, found.slice_size, found.accumulation_steps) == (32, None, 1)


@pytest.mark.parametrize(("tier", "epochs"), [("high_end", 5), ("mid_range", 3), ("low_end", 1)])
def test_adaptive_epochs_follow_the_tier_and_not_the_memory(tier: str, epochs: int):
    for memory in (1024, 8192):
        found = plan_work(manifest(), phone(memory, tier), ADAPTIVE, num_samples=10)
        assert found.local_epochs == found.plan.local_epochs == epochs
        assert not found.plan.adaptive


@pytest.mark.parametrize(
    ("added_mib", "slice_size", "calls"), [(65, None, 1), (63, 16, 4), (15, 8, 8), (7.9, 4, 16), (4.5, 4, 16)]
)
def test_without_adaptive_the_batch_is_kept_and_its_slices_shrink(added_mib: float, slice_size: int | None, calls: int):
    found = work(manifest(), PLAN, added_mib)
    assert (found.plan, found.slice_size, found.accumulation_steps) == (PLAN, slice_size, calls)


def test_slices_divide_the_batch():
    """6 and 10 are exported, too, but 64 is no multiple of them."""
    program = manifest(train=(), grad=(2, 6, 10, 16))
    assert work(program, PLAN, 17).slice_size == 16
    assert work(program, PLAN, 15).slice_size == 2


@pytest.mark.parametrize(
    ("plan", "remedy"),
    [
        (ADAPTIVE, "export invented with smaller batches"),
        (PLAN, "make the plan adaptive: its smallest batch is then 4"),
    ],
)
def test_a_refusal_says_what_the_least_takes_and_what_would_fit(plan: TrainingPlan, remedy: str):
    with pytest.raises(MemoryBudgetExceeded) as caught:
        work(manifest(), plan, 3)
    text = str(caught.value)
    assert f"does not fit into {(BASE + 3 * MIB) / MIB:.1f} MiB" in text
    assert "4.0 planned memory of grad_b4" in text
    assert remedy in text


def test_examples_that_the_app_holds_are_not_held_against_the_budget():
    """57 GiB of them, mapped or not, on a phone of 2 GiB; only the order that they come in is training's."""
    few = plan_work(manifest(d=10), phone(2048), PLAN, num_samples=10)
    many = plan_work(manifest(d=10), phone(2048), PLAN, num_samples=10_000_000)
    assert (many.plan, many.slice_size) == (few.plan, few.slice_size)
    assert many.estimate.total_bytes - few.estimate.total_bytes == 16 * (10_000_000 - 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_samples": 10**9},
            "the same for all batches, first of all 15258.8 MiB of order of the examples: allow that",
        ),
        ({"d": 20_000_000}, "the same for all batches, first of all 228.9 MiB of weights: allow that much"),
        (
            {"per_sample": 40 * MIB},
            "planned memory of grad_b4, 80.0 process, 0.3 program. Allow that much, or export invented with smaller",
        ),
        ({"baseline_bytes": 120 * MIB}, "The process alone takes all of it"),
    ],
)
def test_a_refusal_names_what_dominates(options: dict, message: str):
    made = {name: options.pop(name) for name in ("d", "per_sample") if name in options}
    options = {"num_samples": 10, "budget_bytes": 100 * MIB} | options
    with pytest.raises(MemoryBudgetExceeded) as caught:
        plan_work(manifest(**made), phone(2048), ADAPTIVE, **options)
    assert message in str(caught.value)
    assert ("smaller batches" in str(caught.value)) is ("Allow" in message), "no advice that does not help"


def test_methods_of_a_manifest_are_counted_once():
    """Choosing among n methods looks at each a few times, not n times."""
    looked = 0

    class Counted(tuple[MethodSpec, ...]):
        __slots__ = ()

        def __iter__(self) -> Iterator[MethodSpec]:
            nonlocal looked
            for each in super().__iter__():
                looked += 1
                yield each

    program = manifest(train=(), grad=(1,))
    methods = Counted(method(Role.GRAD, size, 1000 * MIB, 1000) for size in range(1, 1001))
    program = program.model_copy(update={"methods": methods})  # more than a manifest may have
    for plan in (ADAPTIVE.model_copy(update={"batch_size": 1000}), PLAN.model_copy(update={"batch_size": 1000})):
        with pytest.raises(MemoryBudgetExceeded):
            work(program, plan, 1)
    assert looked <= 20 * len(methods)


def test_a_manifest_without_end_is_refused():
    program = manifest(train=(), grad=tuple(range(1, MAX_METHODS + 1)))
    assert Manifest.from_json(program.to_json()) == program
    for name, more in [
        ("methods", [program.methods[0].model_dump(mode="json") | {"name": str(n)} for n in range(MAX_METHODS + 1)]),
        ("operators", ["aten::add.out"] * 5000),
        ("parameters", [{"name": "p", "shape": [1], "offset": n} for n in range(70_000)]),
    ]:
        with pytest.raises(ManifestError, match=rf"{name}\n.*at most \d+ items"):
            Manifest.from_json(json.dumps(program.model_dump(mode="json") | {name: more}))


@given(
    added_mib=st.floats(1, 200),
    adaptive=st.booleans(),
    batch_size=st.sampled_from([4, 8, 16, 24, 32, 64]),
    d=st.sampled_from([10, 1_000_000]),
    algorithm=st.sampled_from(["fedavg", "scaffold", "fednova"]),
    compression=st.sampled_from([None, "topk:0.1", "quantize:8"]),
)
def test_what_is_chosen_fits_and_what_is_refused_does_not(
    added_mib: float, adaptive: bool, batch_size: int, d: int, algorithm: str, compression: str | None
):
    program = manifest(d=d)
    plan = TrainingPlan(batch_size=batch_size, algorithm=algorithm, adaptive=adaptive)
    try:
        found = work(program, plan, added_mib, compression=compression)
    except MemoryBudgetExceeded:
        found = None
    else:
        assert found.estimate.total_bytes <= found.budget_bytes
        assert found.plan.batch_size == (found.slice_size or found.plan.batch_size) * found.accumulation_steps
    # All ways there are to train this plan, tried one by one; a fused step is the only way that its batch is tried.
    fitting = []
    for m in program.methods:
        size, fused = m.batch_size, m.role is Role.TRAIN
        if adaptive:
            tried = size <= batch_size and (fused or size not in program.batch_sizes(Role.TRAIN))
        else:
            tried = size == batch_size if fused else batch_size % size == 0
        estimate = estimate_memory(program, m, plan, num_samples=10, baseline_bytes=BASE, compression=compression)
        if tried and estimate.total_bytes <= BASE + int(added_mib * MIB):
            fitting.append(size)
    assert (found is None) == (not fitting)
    if found is not None:
        chosen = found.plan.batch_size if adaptive else found.slice_size or batch_size
        assert chosen == max(fitting)


@given(st.integers(128, 16384), st.integers(128, 16384))
def test_more_memory_never_means_smaller_batches(a: int, b: int):
    less, more = sorted((a, b))
    program = manifest(grad=(1, 4, 8, 16))
    assert optimal_batch_size(program, phone(less), num_samples=10) <= optimal_batch_size(
        program, phone(more), num_samples=10
    )


def test_the_budget_is_the_process_and_a_fraction_of_the_phone():
    found = plan_work(manifest(), phone(2048), PLAN, num_samples=10)
    assert found.budget_bytes == BASE + int(MEMORY_FRACTION * 2048 * MIB)
    assert plan_work(
        manifest(), phone(2048), PLAN, num_samples=10, memory_fraction=0.5, baseline_bytes=5
    ).budget_bytes == (5 + 1024 * MIB)


def test_every_item_is_named_and_the_total_is_their_sum():
    found = work(manifest(), PLAN, 1000)
    names = [item.name for item in found.estimate.items]
    assert names[0] == "process"
    assert "planned memory of train_b64" in names
    assert found.estimate.total_bytes == sum(item.num_bytes for item in found.estimate.items)
    assert str(found.estimate).startswith(f"{found.estimate.total_bytes / MIB:.1f} MiB: 80.0 process, 64.0 planned")


def bytes_of(program: Manifest, plan: TrainingPlan, **options: object) -> int:
    options = {"num_samples": 10, "baseline_bytes": 0} | options
    return estimate_memory(program, program.methods[0], plan, **options).total_bytes


def test_what_costs_memory_is_counted():
    program, d = manifest(d=100_000), 100_000
    plain = bytes_of(program, PLAN)
    # Orders of two epochs; the examples themselves are the host's.
    assert bytes_of(program, PLAN, num_samples=1010) - plain == 2 * 8 * 1000
    assert bytes_of(program, PLAN.model_copy(update={"prox_mu": 0.1})) - plain == 4 * d
    assert bytes_of(program, PLAN.model_copy(update={"algorithm": "scaffold"})) - plain >= 6 * 4 * d
    assert bytes_of(program, PLAN, compression="topk:0.1") - plain >= 4 * 4 * d
    keys = tuple(key.public.hex for key in SEALING_KEYS)
    secure = SecurePlan(fraction_bits=24, clip_norm=1.0, aggregator_keys=keys)
    # Three full shares of 8 bytes, in the report and while it is made.
    assert bytes_of(program, PLAN, secure=secure) - plain >= 3 * 3 * 8 * d


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory_fraction": 0.0}, "fraction"),
        ({"memory_fraction": 1.1}, "fraction"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_nonsense_is_refused(options: dict, error: str):
    with pytest.raises(ConfigurationError, match=error):
        plan_work(manifest(), phone(2048), PLAN, **({"num_samples": 1} | options))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_batch_that_no_method_makes_is_unknown(adaptive: bool):
    plan = TrainingPlan(batch_size=3, adaptive=adaptive)
    with pytest.raises(UnknownMethod, match="batch size 3"):
        plan_work(manifest(), phone(8192), plan, num_samples=10)


# --- the budget that a process is held to ---


def test_a_budget_refuses_an_estimate_with_its_items():
    estimate = MemoryEstimate((MemoryItem("process", 80 * MIB), MemoryItem("weights", 41 * MIB)))
    MemoryBudget(121 * MIB).require(estimate)
    with pytest.raises(MemoryBudgetExceeded, match=r"120\.0 MiB.*121\.0 MiB: 80\.0 process, 41\.0 weights"):
        MemoryBudget(120 * MIB).require(estimate)


def test_a_budget_is_exceeded_by_more_than_the_limit():
    held = 100
    budget = MemoryBudget(100, measure=lambda: held)
    budget.check()
    held = 101
    with pytest.raises(MemoryBudgetExceeded, match="budget"):
        budget.check()
    with pytest.raises(ConfigurationError):
        MemoryBudget(0)


def test_it_measures_this_process():
    before = resident_bytes()
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * (len(block) // 4096)  # touched, page by page
    assert resident_bytes() >= before + 60 * MIB
    peak = peak_resident_bytes()
    assert peak >= before + 60 * MIB
    del block
    # The kernel counts each processor's pages in batches, so a peak is exact to some hundred KiB.
    assert peak_resident_bytes() >= peak - MIB, "a peak does not fall"
    assert resident_bytes() < peak - 32 * MIB
    MemoryBudget(10**12).check()
    MemoryBudget(peak - 16 * MIB).check()  # that the process was larger before is not the training's doing
    budget = MemoryBudget(peak - 16 * MIB)
    block = bytearray(peak - resident_bytes() + 32 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    with pytest.raises(MemoryBudgetExceeded):
        budget.check()
    del block
    with pytest.raises(MemoryBudgetExceeded):
        budget.check()  # a budget that was exceeded stays so


def test_what_was_held_before_the_budget_began_does_not_count():
    peak, resident = 300, 50
    held = PeakSince(peak=lambda: peak, resident=lambda: resident)
    assert held() == 50
    resident = 250
    assert held() == 250, "below the old peak, what is held counts"
    peak, resident = 310, 60
    assert held() == 310, "a new peak counts, also once it is over"


@pytest.mark.parametrize("text", [None, "", "VmHWM:\n", "VmHWM: many kB\n", "VmHWM: 5 pages\n", "\xff\n"])
def test_where_the_system_says_nothing_usable_the_peak_is_getrusages(text: str | None, tmp_path: Path):
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text, "latin-1")
    assert peak_resident_bytes(status) >= MIB
    assert resident_bytes(status) == peak_resident_bytes(status)


def test_a_status_file_is_read_in_kib(tmp_path: Path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert (peak_resident_bytes(status), resident_bytes(status)) == (2 * MIB, MIB)


@pytest.mark.parametrize(
    ("text", "mib"), [("67108864\n", 64), ("1\n", 1), ("max\n", None), ("", None), ("9" * 30, None)]
)
def test_a_container_s_limit_is_the_device_s_memory(text: str, mib: int | None, tmp_path: Path):
    limit = tmp_path / "memory.max"
    limit.write_text(text)
    whole = device_memory_mib(tmp_path / "missing")
    assert whole > 64
    assert device_memory_mib(limit) == (mib or whole)
