"""What the server tells anybody who asks: the task, where it stands, and its rounds."""

from __future__ import annotations

import json
from typing import Any

from server_ref.durable import DurableState
from server_ref.store import database


def describe(state: DurableState) -> dict[str, Any]:
    """The task and where it stands."""
    engine, model, task = state.engine, state.model, state.task
    return {
        "task_id": task.task_id,
        "model_name": task.manifest.model_name,
        "model_version": model.version,
        "model_sha256": model.sha256,
        "manifest_sha256": task.manifest_sha256,
        "program_sha256": task.manifest.program_sha256,
        "rounds": engine.policy.rounds,
        "round_id": engine.version,
        "finished": engine.finished,
        "halted": state.halted,
        "buffer_size": engine.policy.buffer_size,
        "concurrency": engine.policy.concurrency,
        "virtual_clock": engine.virtual_time,
        "compression": task.compression,
        "dense_report_bytes": 4 * task.pipeline.entry.size,
        "pipeline": {slot.value: stage.title for slot, stage in task.pipeline.stages.items()},
    }


def history(state: DurableState, since: int) -> list[dict[str, Any]]:
    """Committed rounds from ``since`` on, each with the model it made."""
    with state.db.connect() as connection:
        return [
            {
                "round_id": committed.round_id,
                "model_version": model.version,
                "model_sha256": model.sha256,
                "reports": committed.reports,
                "discarded": committed.superseded,
                "total_weight": committed.total_weight,
                "bytes_up": committed.bytes_up,
                "train_loss": committed.train_loss,
                "opened_at_s": committed.opened_at,
                "closed_at_s": committed.closed_at,
                "validation_accuracy": model.validation_accuracy,
                "validation_loss": model.validation_loss,
                "measurements": json.loads(committed.measurements_json or "{}"),
            }
            for committed, model in database.load_history(connection, since)
        ]
