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
        self._folded: dict[int, AssignmentRecord] = {}

    def fold(self, record: AssignmentRecord, update: npt.NDArray[np.float32]) -> None:
        """Add one accepted report; a no-op if it is in already."""
        if record.number not in self._folded:
            self._sum.add(update, record.weight)
            self._folded[record.number] = record

    def mean(self, counted: Sequence[AssignmentRecord]) -> npt.NDArray[np.float64]:
        """Weighted mean over exactly these reports.

        What is not folded yet is read back; what was folded and does not count after all (over-selection in virtual
        time) is taken out again, which is exact.

        Returns:
            float64[d], the correctly rounded sum over the total weight.
        """
        wanted = {r.number: r for r in counted}
        extra = [r for number, r in self._folded.items() if number not in wanted]
        if len(extra) > len(wanted):
            self.reset()
        elif extra:
            taken_out = ExactAccumulator(self._size, self._plan)
            self._add(taken_out, extra)
            self._sum.subtract(taken_out)
        self._add(self._sum, [r for number, r in wanted.items() if number not in self._folded])
        self._folded = wanted
        return self._sum.result()

    def _add(self, total: ExactAccumulator, records: Sequence[AssignmentRecord]) -> None:
        for start in range(0, len(records), _READ_AHEAD):
            part = records[start : start + _READ_AHEAD]
            total.add_many([self._load(r) for r in part], [r.weight for r in part])
