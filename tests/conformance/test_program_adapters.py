"""What every ``Program`` promises, held against each way to run one: native shim, official bindings, eager PyTorch."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.native.adapter import NativeProgram
from client_sdk.protocol.errors import ProgramExecutionError, ProgramInputError, UnknownMethod
from client_sdk.protocol.program import MethodSpec, Program, Role
from client_sdk.pybindings import PybindingsProgram
from client_sdk.runtime import load_program, read_manifest
from mobile_export import EagerProgram, build_model

Opener = Callable[[], Program]
RUNTIMES = ("native", "pybindings")


@pytest.fixture(params=RUNTIMES)
def open_program(request: pytest.FixtureRequest, softmax_bundle: Path) -> Opener:
    """Opens the program in a runtime: what owns memory and can be closed."""
    return lambda: load_program(softmax_bundle, request.param)


@pytest.fixture(params=[*RUNTIMES, "eager"])
def program(request: pytest.FixtureRequest, softmax_bundle: Path) -> Iterator[Program]:
    """Anything that computes what the program computes."""
    if request.param == "eager":
        yield EagerProgram(build_model("softmax", (6,), 3, seed=0), read_manifest(softmax_bundle))
    else:
        opened = load_program(softmax_bundle, request.param)
        yield opened
        opened.close()


def example(spec: MethodSpec, num_classes: int, seed: int) -> tuple[np.ndarray, ...]:
    """Random inputs of a method's signature, with about a third of the examples masked (never the first)."""
    rng = np.random.default_rng(seed)
    arrays = []
    for t in spec.inputs:
        match t.name:
            case "y":
                a = rng.integers(0, num_classes, t.shape)
            case "mask":
                a = (rng.random(t.shape) > 1 / 3).astype(np.float32)
                a[0] = 1
            case "lr":
                a = np.full(t.shape, 0.1)
            case _:
                a = rng.normal(size=t.shape)
        arrays.append(a.astype(t.dtype))
    return tuple(arrays)


def assert_same_bits(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


def test_it_is_a_program(program: Program):
    assert isinstance(program, Program)


def test_each_method_returns_what_the_manifest_says(program: Program):
    for spec in program.manifest.methods:
        outputs = program.run(spec.name, *example(spec, program.manifest.num_classes, 0))
        assert [(a.dtype, a.shape) for a in outputs] == [(t.dtype, t.shape) for t in spec.outputs]
        assert all(np.isfinite(a).all() for a in outputs)


def test_a_method_gives_the_same_bits_whatever_ran_before_it(program: Program):
    methods, classes = program.manifest.methods, program.manifest.num_classes
    first = {m.name: program.run(m.name, *example(m, classes, 1)) for m in methods}
    for seed, spec in enumerate(reversed(methods), start=2):
        program.run(spec.name, *example(spec, classes, seed))  # leaves other values in the reused memory
    for spec in methods:
        assert_same_bits(program.run(spec.name, *example(spec, classes, 1)), first[spec.name])


def test_outputs_belong_to_the_caller(program: Program):
    spec = program.manifest.method(Role.GRAD)
    inputs = example(spec, program.manifest.num_classes, 3)
    first = program.run(spec.name, *inputs)
    kept = tuple(a.copy() for a in first)
    for a in first:
        a.fill(-1)  # writable, and not the runtime's memory
    second = program.run(spec.name, *inputs)
    assert_same_bits(second, kept)
    program.run(spec.name, *example(spec, program.manifest.num_classes, 4))
    assert_same_bits(second, kept)


def test_outputs_outlive_the_program(open_program: Opener):
    program = open_program()
    spec = program.manifest.method(Role.TRAIN)
    outputs = program.run(spec.name, *example(spec, 3, 5))
    kept = tuple(a.copy() for a in outputs)
    program.close()
    del program
    gc.collect()
    assert_same_bits(outputs, kept)


def test_inputs_are_not_changed_and_may_be_read_only(program: Program):
    for spec in program.manifest.methods:
        inputs = example(spec, program.manifest.num_classes, 6)
        before = tuple(a.copy() for a in inputs)
        for a in inputs:
            a.flags.writeable = False
        program.run(spec.name, *inputs)
        assert_same_bits(inputs, before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda *four: four[:3], "takes 4 inputs, got 3"),
        (lambda w, x, y, m: (w, x, y, m, m), "takes 4 inputs, got 5"),
        (lambda w, x, y, m: (w.astype(np.float64), x, y, m), "'w' must be float32"),
        (lambda w, x, y, m: (w, x, y.astype(np.int32), m), "'y' must be int64"),
        (lambda w, x, y, m: (w[:-1], x, y, m), "'w' must be float32"),
        (lambda w, x, y, m: (w, x[:-1], y, m), "'x' must be float32"),
        (lambda w, x, y, m: (w, np.asfortranarray(x), y, m), "'x' must be C-contiguous"),
        (lambda w, x, y, m: (w, x, y, m[:, None]), "'mask' must be float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_named(program: Program, spoil: Callable, message: str):
    spec = program.manifest.method(Role.GRAD)
    inputs = example(spec, program.manifest.num_classes, 7)
    with pytest.raises(ProgramInputError, match=message):
        program.run(spec.name, *spoil(*inputs))
    program.run(spec.name, *inputs)  # a refusal leaves the program usable


def test_an_unknown_method_is_refused(program: Program):
    with pytest.raises(UnknownMethod, match="train_b99"):
        program.run("train_b99")


def test_a_closed_program_says_so(open_program: Opener):
    program = open_program()
    spec = program.manifest.method(Role.INFER)
    inputs = example(spec, 3, 8)
    program.run(spec.name, *inputs)
    program.close()
    program.close()
    with pytest.raises(ProgramExecutionError, match="closed"):
        program.run(spec.name, *inputs)


@pytest.mark.parametrize("label", [3, -1, 2**31, -(2**31) - 1, 2**62, -(2**63)])
def test_a_label_out_of_range_is_an_error_and_the_program_goes_on(open_program: Opener, label: int):
    program = open_program()
    spec = program.manifest.method(Role.TRAIN)
    good = example(spec, 3, 20)
    expected = program.run(spec.name, *good)
    bad = tuple(a.copy() for a in good)
    bad[[t.name for t in spec.inputs].index("y")][0] = label
    with pytest.raises(ProgramExecutionError, match="failed"):
        program.run(spec.name, *bad)
    assert_same_bits(program.run(spec.name, *good), expected)
    program.close()


def test_floats_of_any_bits_are_computed_with_and_leave_nothing_behind(program: Program):
    rng = np.random.default_rng(21)
    for spec in program.manifest.methods:
        good = example(spec, program.manifest.num_classes, 21)
        expected = program.run(spec.name, *good)
        for _ in range(20):
            wild = tuple(
                a if a.dtype == np.int64 else np.frombuffer(rng.bytes(a.nbytes), a.dtype).reshape(a.shape) for a in good
            )
            outputs = program.run(spec.name, *wild)
            assert [a.shape for a in outputs] == [t.shape for t in spec.outputs]
        assert_same_bits(program.run(spec.name, *good), expected)


def test_a_program_goes_from_thread_to_thread(open_program: Opener):
    program = open_program()
    spec = program.manifest.method(Role.TRAIN)
    inputs = example(spec, 3, 22)
    expected = program.run(spec.name, *inputs)
    for _ in range(5):
        with ThreadPoolExecutor(1) as pool:  # a new thread each time
            assert_same_bits(pool.submit(program.run, spec.name, *inputs).result(), expected)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(program.close).result()
    with pytest.raises(ProgramExecutionError, match="closed"):
        program.run(spec.name, *inputs)


def test_closing_under_running_calls_lets_them_end_and_refuses_the_next(open_program: Opener):
    program = open_program()
    spec = program.manifest.method(Role.TRAIN)
    inputs = example(spec, 3, 23)
    expected = [a.tobytes() for a in program.run(spec.name, *inputs)]
    running = threading.Barrier(3)

    def work() -> list[list[bytes]]:
        results = [[a.tobytes() for a in program.run(spec.name, *inputs)]]
        running.wait()
        while True:
            try:
                results.append([a.tobytes() for a in program.run(spec.name, *inputs)])
            except ProgramExecutionError:
                return results

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(work) for _ in range(2)]
        running.wait()
        program.close()
        program.close()
        for worker in workers:
            assert all(result == expected for result in worker.result())


def test_grad_is_a_sum_over_the_unmasked_examples(program: Program):
    spec = program.manifest.method(Role.GRAD)
    w, x, y, mask = example(spec, program.manifest.num_classes, 9)
    grad, loss, count = program.run(spec.name, w, x, y, mask)
    singles = [
        program.run(spec.name, w, x, y, np.eye(spec.batch_size, dtype=np.float32)[i]) for i in np.flatnonzero(mask)
    ]
    np.testing.assert_allclose(grad, sum(s[0] for s in singles), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, sum(s[1] for s in singles), rtol=1e-5)
    assert count == sum(s[2] for s in singles) == mask.sum()


def test_the_fused_step_is_a_step_along_the_mean_gradient(program: Program):
    for batch in program.manifest.batch_sizes(Role.TRAIN):
        train, grad = program.manifest.method(Role.TRAIN, batch), program.manifest.method(Role.GRAD, batch)
        w, lr, x, y, mask = example(train, program.manifest.num_classes, 10)
        new, train_loss = program.run(train.name, w, lr, x, y, mask)
        grad_sum, grad_loss, count = program.run(grad.name, w, x, y, mask)
        np.testing.assert_allclose(new, w - lr * grad_sum / count, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(train_loss, grad_loss, rtol=1e-6)


def test_evaluate_counts_what_infer_gets_right(program: Program):
    spec = program.manifest.method(Role.EVALUATE)
    w, x, y, mask = example(spec, program.manifest.num_classes, 11)
    _, correct, count = program.run(spec.name, w, x, y, mask)
    (logits,) = program.run(program.manifest.method(Role.INFER, spec.batch_size).name, w, x)
    assert correct == ((logits.argmax(axis=1) == y) * mask).sum()
    assert count == mask.sum()


def test_two_programs_run_in_two_threads(open_program: Opener):
    spec = open_program().manifest.method(Role.TRAIN)
    w, lr, x, y, mask = example(spec, 3, 12)
    barrier = threading.Barrier(2)
    results: list[bytes] = []

    def work() -> None:
        program, weights = open_program(), w
        barrier.wait()
        for _ in range(200):
            weights, _ = program.run(spec.name, weights, lr, x, y, mask)
        results.append(weights.tobytes())
        program.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    work_alone = open_program()
    weights = w
    for _ in range(200):
        weights, _ = work_alone.run(spec.name, weights, lr, x, y, mask)
    assert results == [weights.tobytes()] * 2


def test_threads_that_share_one_program_take_turns(open_program: Opener):
    program = open_program()
    specs = [program.manifest.method(Role.TRAIN), program.manifest.method(Role.EVALUATE)]
    inputs = {s.name: example(s, 3, 13) for s in specs}
    expected = {s.name: [a.tobytes() for a in program.run(s.name, *inputs[s.name])] for s in specs}
    wrong: list[str] = []

    def work(name: str) -> None:
        answers = [[a.tobytes() for a in program.run(name, *inputs[name])] for _ in range(200)]
        wrong.extend(name for answer in answers if answer != expected[name])

    threads = [threading.Thread(target=work, args=(s.name,)) for s in specs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (n, ctypes.c_size_t)
        for n in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")
    )


def allocated_bytes() -> int:
    """What the C allocator has handed out and not got back (glibc), heap and mapped blocks."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def test_memory_stays_flat_over_a_thousand_runs(open_program: Opener):
    program = open_program()
    spec = program.manifest.method(Role.TRAIN)
    inputs = example(spec, program.manifest.num_classes, 14)
    for _ in range(100):
        program.run(spec.name, *inputs)
    gc.collect()
    before = allocated_bytes()
    for _ in range(1000):
        program.run(spec.name, *inputs)
    gc.collect()
    assert allocated_bytes() - before < 16 * 1000  # one leaked tensor header per run would be over


def test_memory_stays_flat_over_a_thousand_refusals(open_program: Opener):
    program = open_program()
    spec = program.manifest.method(Role.TRAIN)
    good = example(spec, 3, 24)
    bad = tuple(np.full_like(a, 99) if a.dtype == np.int64 else a for a in good)

    def refuse() -> None:
        with pytest.raises(ProgramExecutionError):
            program.run(spec.name, *bad)
        with pytest.raises(ProgramInputError):
            program.run(spec.name, *good[1:])

    for _ in range(100):
        refuse()
    gc.collect()
    before = allocated_bytes()
    for _ in range(1000):
        refuse()
    gc.collect()
    assert allocated_bytes() - before < 16 * 1000


def test_opening_and_closing_gives_memory_back(open_program: Opener):
    def cycle() -> None:
        program = open_program()
        spec = program.manifest.method(Role.TRAIN)
        program.run(spec.name, *example(spec, 3, 15))
        program.close()

    for _ in range(5):
        cycle()
    gc.collect()
    before = allocated_bytes()
    for _ in range(20):
        cycle()
    gc.collect()
    per_cycle = (allocated_bytes() - before) / 20
    assert per_cycle < 4096  # the program alone is 14 times that


@pytest.fixture(scope="module", params=["softmax_bundle", "cnn_bundle"])
def both_runtimes(request: pytest.FixtureRequest) -> Iterator[tuple[Program, Program]]:
    """One program, opened by each runtime."""
    bundle = request.getfixturevalue(request.param)
    native, bindings = load_program(bundle, "native"), load_program(bundle, "pybindings")
    yield native, bindings
    native.close()
    bindings.close()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_both_runtimes_give_the_same_bits(both_runtimes: tuple[Program, Program], seed: int, data: st.DataObject):
    native, bindings = both_runtimes
    spec = data.draw(st.sampled_from(native.manifest.methods))
    inputs = example(spec, native.manifest.num_classes, seed)
    assert_same_bits(native.run(spec.name, *inputs), bindings.run(spec.name, *inputs))


def test_both_runtimes_have_the_operators_of_the_program(softmax_bundle: Path):
    needed = set(load_program(softmax_bundle, "native").manifest.operators)
    assert needed <= NativeProgram.operators()
    assert needed <= PybindingsProgram.operators()
