"""A whole study: its cells in worker processes, each finished one kept, until all are done or Ctrl-C comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection

from simulator.errors import WorkerLost
from simulator.interrupt import stop_on_interrupt
from simulator.robustness.cell import CellResult, run_cell
from simulator.robustness.config import Cell
from simulator.robustness.folder import StudyFolder

_POLL_S = 0.2
# Of torch, numpy's BLAS and numba.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

Tell = Callable[[CellResult, int, int, float | None], None]
"""Told of a finished cell: the cell, how many are done, of how many, and the seconds that the rest may take."""


def run_study(
    folder: StudyFolder, cells: Sequence[Cell], *, workers: int, tell: Tell, say: Callable[[str], None]
) -> bool:
    """Run the cells that are not done yet.

    Args:
        folder: Has what is done, and keeps what gets done.
        cells: All cells that are wanted.
        workers: Processes; the results do not depend on it.
        tell: See ``Tell``.
        say: Is told that Ctrl-C was heard.

    Returns:
        True if all are done, False if a signal came first: cells under way are finished and kept.

    Raises:
        PocketfedError: Whatever ended a cell; what was finished before is kept.
    """
    todo = [cell for cell in cells if cell.key not in folder.done]
    if not todo:
        return True
    with stop_on_interrupt(say) as stop, _one_thread_each(), _pool(min(workers, len(todo))) as pool:
        first_at = 0.0
        for count, result in enumerate(_finished(pool, folder, todo, workers, stop)):
            folder.record(result)
            left = len(todo) - count - 1
            # Before the first cell is done the workers have to start, which says nothing about the others.
            if count == 0:
                first_at = time.monotonic()
            tell(result, len(cells) - left, len(cells), (time.monotonic() - first_at) / count * left if count else None)
    return all(cell.key in folder.done for cell in cells)


def _finished(
    pool: ProcessPoolExecutor, folder: StudyFolder, todo: Sequence[Cell], workers: int, stop: threading.Event
) -> Iterator[CellResult]:
    """Results as they come; no cell is begun once ``stop`` is set."""
    waiting = iter(todo)
    running: set[Future[CellResult]] = set()
    while True:
        # A worker that has to wait for its next cell is idle, so each has one in hand.
        while not stop.is_set() and len(running) < 2 * workers:
            cell = next(waiting, None)
            if cell is None:
                break
            running.add(pool.submit(run_cell, folder.settings, cell))
        if stop.is_set():
            running = {future for future in running if not future.cancel()}
        if not running:
            return
        done, running = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                yield future.result()
            except BrokenProcessPool as e:
                raise WorkerLost(
                    "a worker process ended unexpectedly (out of memory?); finished cells are kept: give the same "
                    "command again to go on, with fewer --workers"
                ) from e


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Workers started meanwhile have one thread each: there are as many as cores, and their bits must not depend on it.

    By environment, because the libraries read it when they are loaded, which is before a worker's first own line.
    """
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: torch's threads do not survive a fork.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker)


def _begin_worker() -> None:
    """In each worker: deaf to Ctrl-C, and gone when the parent is."""
    # The terminal sends it to all processes; it is the parent's to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
