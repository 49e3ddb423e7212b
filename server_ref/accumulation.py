"""The open buffer's running sum: a cache of the durable accepted set, folded as reports arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from server_ref.aggregation.exact import AccumulatorPlan, ExactAccumulator
from server_ref.rounds import AssignmentRecord

_READ_AHEAD = 16
"""Reports held at once while a buffer is rebuilt from disk; memory stays O(model)."""


class BufferSum:
    """Exact weighted sum of the reports folded so far. The order of folding does not change a bit of it.

    Args:
        size: Number of parameters.
        plan: Bounds of the exact sum.
        load: Reads a report's update back from its blob.
    """

    def __init__(
        self, size: int, plan: AccumulatorPlan, load: Callable[[AssignmentRecord], npt.NDArray[np.float32]]
    ) -> None:
        self._size = size
        self._plan = plan
        self._load = load
        self.reset()

    def reset(self) -> None:
        """Forget everything; the durable set rebuilds it."""
        self._sum = ExactAccumulator(self._size, self._plan)
        self._folded: set[int] = set()

    def fold(self, record: AssignmentRecord, update: npt.NDArray[np.float32]) -> None:
        """Add one accepted report; a no-op if it is in already."""
        if record.number not in self._folded:
            self._sum.add(update, record.weight)
            self._folded.add(record.number)

    def mean(self, counted: Sequence[AssignmentRecord]) -> npt.NDArray[np.float64]:
        """Weighted mean over exactly these reports; what is not folded yet is read back.

        Returns:
            float64[d], the correctly rounded sum over the total weight.
        """
        wanted = {r.number for r in counted}
        if not self._folded <= wanted:
            self.reset()
        missing = [r for r in counted if r.number not in self._folded]
        for start in range(0, len(missing), _READ_AHEAD):
            part = missing[start : start + _READ_AHEAD]
            self._sum.add_many([self._load(r) for r in part], [r.weight for r in part])
            self._folded.update(r.number for r in part)
        return self._sum.result()
