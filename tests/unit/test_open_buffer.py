"""The server's open buffer: a cache of the accepted set, also where a report cannot be read at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from client_sdk.protocol.errors import StorageUnavailable
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import EncodedUpdate, ExactMean, Facts, Pipeline, RobustRule, Sgd
from server_ref.assignments import AssignmentRecord
from server_ref.buffer import OpenBuffer

FACTS = Facts(size=3, kind=UpdateKind.DELTA, capacity=100, max_weight=1, max_abs=10.0)
NUMBERS = range(60)
RECORDS = [AssignmentRecord(n, f"{n:032x}", f"{n:032x}", 0, 0, 1, 0.0, 1.0) for n in NUMBERS]


class Disk:
    """Reads updates back; every n-th read fails."""

    def __init__(self, pipeline: Pipeline, fails_every: int | None = None) -> None:
        rng = np.random.default_rng(1)
        vectors = rng.uniform(-10, 10, (len(NUMBERS), 3)).astype(np.float32)
        self.updates = [pipeline.open(EncodedUpdate(n, vectors[n])) for n in NUMBERS]
        self._fails_every = fails_every
        self._reads = itertools.count(1)

    def load(self, record: AssignmentRecord):
        if self._fails_every is not None and next(self._reads) % self._fails_every == 0:
            raise StorageUnavailable("not now")
        return self.updates[record.number]


@pytest.mark.parametrize("reduce", [ExactMean(), RobustRule("median", 1)])
def test_a_report_that_cannot_be_read_at_once_changes_no_bit_of_what_comes_out(reduce):
    pipeline = Pipeline.build(reduce, Sgd(), facts=FACTS)
    # 30 were folded as they came; 20 of them do not count after all, and 30 others do.
    early, counted = RECORDS[:30], RECORDS[:10] + RECORDS[30:]
    whole = OpenBuffer(lambda: pipeline, Disk(pipeline).load).reduce(counted, 0).values
    # More reads than a part has succeed in a row, so that each attempt gets on.
    disk = Disk(pipeline, fails_every=19)
    buffer = OpenBuffer(lambda: pipeline, disk.load)
    for record in early:
        buffer.fold(record, disk.updates[record.number], 0)
    attempts = 0
    while True:
        attempts += 1
        assert attempts < 20
        try:
            found = buffer.reduce(counted, 0).values
        except StorageUnavailable:
            continue
        break
    assert attempts > 1, "a read failed"
    assert found.tobytes() == whole.tobytes()
