"""Ctrl-C as a wish: the first one lets the run end in order, the second one ends it now."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_on_interrupt(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal raises ``KeyboardInterrupt``.

    Outside the main thread, where Python delivers no signals, the event is just an event.

    Args:
        say: Is told that the run is stopping.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("stopping: running sessions finish first, then the report is written (again to quit at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
