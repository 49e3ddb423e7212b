"""From a full buffer to what a round leaves behind. Reads the state, changes nothing."""

from __future__ import annotations

import logging
from typing import Any

from client_sdk.protocol.errors import PocketfedError
from server_ref.buffer import OpenBuffer
from server_ref.durable import DurableState, RoundOutcome
from server_ref.rounds import Closing
from server_ref.task import Task

_log = logging.getLogger("pocketfed.coordinator")


def close_buffer(task: Task, state: DurableState, buffer: OpenBuffer, closing: Closing) -> RoundOutcome:
    """Reduce, release and apply a buffer.

    A buffer that cannot be aggregated or applied leaves the model as it is: its reports are spent either way, the old
    weights live on, and the round's record says why.
    """
    ages = [closing.round_id - r.model_version for r in closing.counted]
    optimizer = state.optimizer
    measurements: dict[str, Any] = {}
    try:
        aggregate = buffer.reduce(closing.counted, closing.round_id)
        measurements.update(aggregate.measurements)
        optimizer = task.pipeline.apply(optimizer, aggregate, staleness=ages, round_id=closing.round_id)
    except PocketfedError as e:
        _log.error("round %d leaves the model unchanged: %s", closing.round_id, e)
        measurements["unchanged"] = type(e).__name__
    return RoundOutcome(optimizer, measurements)
