"""Training that can be watched and stopped: a ``Program`` around a ``Program``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from client_sdk.errors import Interrupted
from client_sdk.protocol.program import Manifest, Program, Role

_LOSS_OUTPUT = 1  # of both training roles; see the table in ``protocol.program``

Progress = Callable[[int, float], None]


class WatchedProgram:
    """Runs another program; between two calls it looks whether to go on, and after each it reports progress.

    A wrapper, so that the trainer's arithmetic knows nothing of it: an interrupted training has changed nothing.
    """

    def __init__(
        self, program: Program, *, should_stop: Callable[[], bool] | None = None, progress: Progress | None = None
    ) -> None:
        """Watch a program.

        Args:
            program: What runs.
            should_stop: Asked before each call.
            progress: Told, after each training call, how many examples it took and their mean loss.
        """
        self._program = program
        self._should_stop = should_stop
        self._progress = progress
        self._training = {m.name for m in program.manifest.methods if m.role in {Role.GRAD, Role.TRAIN}}

    @property
    def manifest(self) -> Manifest:
        """The program's own."""
        return self._program.manifest

    def run(self, method: str, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run one method of the program.

        Raises:
            Interrupted: ``should_stop`` said so; the method did not run.
        """
        if self._should_stop is not None and self._should_stop():
            raise Interrupted("training was interrupted")
        outputs = self._program.run(method, *inputs)
        if self._progress is not None and method in self._training:
            examples = int(inputs[-1].sum())  # the mask comes last
            self._progress(examples, float(outputs[_LOSS_OUTPUT][0]) / max(examples, 1))
        return outputs

    def close(self) -> None:
        """Nothing: the program belongs to whoever opened it."""
