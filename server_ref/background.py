"""Work that nobody waits for: evaluating new models, deleting spent blobs. One thread, in order."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from server_ref.evaluation import Evaluator

_log = logging.getLogger("pocketfed.background")


class Background:
    """A thread with a queue.

    Args:
        evaluator: Scores models; None skips evaluation.
        on_evaluated: Called with (version, accuracy or None if it failed, loss).
        delete_blob: Called with a key.
    """

    def __init__(
        self,
        evaluator: Evaluator | None,
        on_evaluated: Callable[[int, float | None, float], None],
        delete_blob: Callable[[str], None],
    ) -> None:
        self._evaluator = evaluator
        self._on_evaluated = on_evaluated
        self._delete_blob = delete_blob
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="pocketfed-background", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is queued and stop."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def evaluate(self, version: int, weights: npt.NDArray[np.float32]) -> None:
        """Queue the evaluation of a model version."""
        if self._evaluator is not None:
            self._queue.put(lambda: self._evaluate(version, weights))

    def delete(self, key: str) -> None:
        """Queue the deletion of a blob."""
        self._queue.put(lambda: self._delete_blob(key))

    def _evaluate(self, version: int, weights: npt.NDArray[np.float32]) -> None:
        if self._evaluator is None:
            return
        try:
            found = self._evaluator.evaluate(weights)
        except Exception as e:  # noqa: BLE001 - an operator's evaluator must not stop the rounds
            _log.error("model version %d could not be evaluated: %s", version, e)
            self._on_evaluated(version, None, 0.0)
        else:
            self._on_evaluated(version, found.accuracy, found.loss)

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            job()
