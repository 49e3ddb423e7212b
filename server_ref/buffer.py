"""The open buffer: a cache of the durable accepted set, filled as reports arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server_ref.aggregation.batch import Aggregate, Update
from server_ref.aggregation.pipeline import Pipeline
from server_ref.assignments import AssignmentRecord

_READ_AHEAD = 16
"""Reports held at once while a buffer is rebuilt from disk; a mean's memory stays O(model)."""


class OpenBuffer:
    """The updates folded so far. The order of folding does not change a bit of what comes out.

    Args:
        pipeline: What a fold is, and what age does to an update, until the buffer is reset.
        load: Reads a report's update back from its blob.
    """

    def __init__(self, pipeline: Callable[[], Pipeline], load: Callable[[AssignmentRecord], Update]) -> None:
        self._current = pipeline
        self._load = load
        self.reset()

    def reset(self) -> None:
        """Forget everything; the durable set rebuilds it."""
        self._pipeline = self._current()
        self._fold = self._pipeline.start()
        self._folded: dict[int, AssignmentRecord] = {}

    def fold(self, record: AssignmentRecord, update: Update, version: int) -> None:
        """Add one accepted report; a no-op if it is in already.

        Args:
            record: Its assignment.
            update: What the pipeline opened.
            version: The present model version, which the buffer will change.
        """
        if record.number not in self._folded:
            self._fold.add([self._aged(record, update, version)])
            self._folded[record.number] = record

    def reduce(self, counted: Sequence[AssignmentRecord], version: int) -> Aggregate:
        """The aggregate of exactly these reports.

        What is not folded yet is read back; what was folded and does not count after all (over-selection in virtual
        time) is taken out again, which is exact. If a report cannot be read, what was done until then stays known, and
        the next call goes on from there.
        """
        wanted = {r.number: r for r in counted}
        extra = [r for number, r in self._folded.items() if number not in wanted]
        if len(extra) > len(wanted):
            self.reset()
        else:
            for part in _parts(extra):
                self._fold.discard([self._aged(r, self._load(r), version) for r in part])
                for r in part:
                    del self._folded[r.number]
        for part in _parts([r for number, r in wanted.items() if number not in self._folded]):
            self._fold.add([self._aged(r, self._load(r), version) for r in part])
            self._folded.update((r.number, r) for r in part)
        return self._pipeline.finish(self._fold)

    def _aged(self, record: AssignmentRecord, update: Update, version: int) -> Update:
        return self._pipeline.age(update, version - record.model_version, version)


def _parts(records: Sequence[AssignmentRecord]) -> list[Sequence[AssignmentRecord]]:
    return [records[start : start + _READ_AHEAD] for start in range(0, len(records), _READ_AHEAD)]
