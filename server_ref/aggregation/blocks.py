"""Running a kernel over blocks of columns on several threads: all or nothing, or part by part."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

THREADS = min(4, os.cpu_count() or 1)
"""Beyond a few threads the memory is the limit."""

_PARALLEL_FROM = 2**18
"""Elements below which waking a thread costs more than it saves."""

_TASKS_PER_THREAD = 4
"""More tasks than threads: a thread that the machine holds up leaves its share to the others."""

Kernel = Callable[[int, int, int], int]
"""``kernel(sign, first, last)`` folds the blocks ``first <= b < last`` (sign 1) or takes them out again (sign -1).

It returns ``last``, or the first block that it refuses; that block and the ones after it are left as they were.
"""


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="pocketfed-fold")


# Threads do not survive a fork, and an executor does not notice.
os.register_at_fork(after_in_child=_helpers.cache_clear)


def fold_all_or_nothing(kernel: Kernel, num_blocks: int, *, elements: int) -> bool:
    """Fold all blocks, or none.

    A refused block stops the fold, and what the other blocks received is taken out again by folding it with the
    opposite sign: additions are exact, so this restores their very bits. Looking at all values first would cost every
    accepted report one more pass over its data.

    Args:
        kernel: See ``Kernel``; called from several threads for disjoint blocks.
        num_blocks: Blocks in all.
        elements: Values to be read, to decide whether threads are worth it.

    Returns:
        Whether the blocks were folded.
    """
    threads = THREADS if elements >= _PARALLEL_FROM else 1
    step = max(1, -(-num_blocks // (threads * _TASKS_PER_THREAD))) if threads > 1 else max(1, num_blocks)
    starts = iter(range(0, num_blocks, step))
    folded: list[tuple[int, int]] = []
    refused: list[int] = []

    def work() -> None:
        for first in starts:
            last = min(first + step, num_blocks)
            end = kernel(1, first, last)
            folded.append((first, end))
            if end < last:
                refused.append(end)
            if refused:
                return

    _on_threads(work, threads)
    if refused:
        for first, end in folded:
            kernel(-1, first, end)
    return not refused


def run_parts(work: Callable[[int], object], num_parts: int, *, elements: int) -> None:
    """Call ``work(part)`` once for each ``0 <= part < num_parts``, from several threads in no particular order.

    Args:
        work: Must release the GIL for threads to be of use, and write where no other part does.
        num_parts: How often. It must not depend on the number of threads if the outcome is not to.
        elements: Values to be read, to decide whether threads are worth it.
    """
    parts = iter(range(num_parts))

    def take() -> None:
        for part in parts:
            work(part)

    _on_threads(take, min(num_parts, THREADS if elements >= _PARALLEL_FROM else 1))


def _on_threads(work: Callable[[], None], threads: int) -> None:
    """Run ``work`` on the calling thread and on helpers; returns, or raises what one raised, when all are done."""
    others = [_helpers().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        started = [other for other in others if not other.cancel()]
        wait(started)
    for other in started:
        other.result()
