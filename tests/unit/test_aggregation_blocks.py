"""Folding over blocks: all or nothing whatever the interleaving, also after a fork; imports stay light."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server_ref.aggregation import blocks
from server_ref.aggregation.blocks import fold_all_or_nothing

ROOT = Path(__file__).resolve().parents[2]
MANY = 10**6


class Recorder:
    """A kernel over integers: counts each block's folds, refuses the blocks it is told to."""

    def __init__(self, num_blocks: int, refused: frozenset[int] = frozenset()) -> None:
        self.state = [0] * num_blocks
        self.refused = refused
        self.threads: set[int] = set()

    def __call__(self, sign: int, first: int, last: int) -> int:
        self.threads.add(threading.get_ident())
        for block in range(first, last):
            if block in self.refused:
                return block
            self.state[block] += sign
        return last


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("num_blocks", [0, 1, 7, 500])
@pytest.mark.parametrize("elements", [1, MANY])
def test_every_block_is_folded_once(monkeypatch, threads, num_blocks, elements):
    monkeypatch.setattr(blocks, "THREADS", threads)
    kernel = Recorder(num_blocks)
    assert fold_all_or_nothing(kernel, num_blocks, elements=elements)
    assert kernel.state == [1] * num_blocks


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("refused", [{0}, {6}, {250}, {499}, {3, 250, 498}])
@pytest.mark.parametrize("elements", [1, MANY])
def test_one_refused_block_takes_everything_out_again(monkeypatch, threads, refused, elements):
    monkeypatch.setattr(blocks, "THREADS", threads)
    kernel = Recorder(500, frozenset(refused))
    assert not fold_all_or_nothing(kernel, 500, elements=elements)
    assert kernel.state == [0] * 500


def test_little_work_stays_on_the_calling_thread():
    kernel = Recorder(500)
    assert fold_all_or_nothing(kernel, 500, elements=10)
    assert kernel.threads == {threading.get_ident()}


def test_an_error_in_a_helper_thread_is_not_lost(monkeypatch):
    monkeypatch.setattr(blocks, "THREADS", 2)
    started = threading.Event()

    def kernel(_sign: int, _first: int, last: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            raise RuntimeError("broken kernel")
        started.wait()
        return last

    with pytest.raises(RuntimeError, match="broken kernel"):
        fold_all_or_nothing(kernel, 500, elements=MANY)


def run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_forked_process_folds_with_threads_of_its_own():
    output = run("""
import os
import numpy as np
from server_ref import AccumulatorPlan, ExactAccumulator
from server_ref.aggregation import blocks

blocks.THREADS = 2
def total():
    plan = AccumulatorPlan.for_bounds(max_abs=1.0, max_weight=1, max_count=9, resolution=1e-8)
    accumulator = ExactAccumulator(300_000, plan)
    accumulator.add_many(np.full((9, 300_000), 0.1, np.float32), [1] * 9)
    return accumulator.to_bytes()

parent = total()
child = os.fork()
if child == 0:
    os._exit(0 if total() == parent else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert output == "0"


def test_the_package_and_its_plans_load_no_compiler():
    assert (
        run("""
import sys
import server_ref, server_ref.aggregation
server_ref.AccumulatorPlan.for_bounds(max_abs=1.0, max_weight=1, max_count=9, resolution=1e-8)
print("numba" in sys.modules)
""")
        == "False"
    )


def test_warming_up_compiles_and_every_public_name_exists():
    assert (
        run("""
import sys
import server_ref, server_ref.aggregation
server_ref.warm_up()
assert "server_ref.aggregation.kernels" in sys.modules
for package in (server_ref, server_ref.aggregation):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        getattr(package, name)
    try:
        package.nothing
    except AttributeError as e:
        assert "nothing" in str(e)
    else:
        raise AssertionError
print("done")
""")
        == "done"
    )
