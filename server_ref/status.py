"""What the server tells anybody who asks: the task, where it stands, and its rounds."""

from __future__ import annotations

import json
from typing import Any

from server_ref.durable import DurableState
from server_ref.store import database
from server_ref.task import Task


def describe(state: DurableState, *, embedded: bool | None = None) -> dict[str, Any]:
    """The task and where it stands.

    Args:
        state: Of the server.
        embedded: Whether the task's aggregators are all in this process; None where that is not known.
    """
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
        "privacy": privacy_of(task),
        "secure": secrecy_of(task, embedded=embedded),
    }


def privacy_of(task: Task) -> dict[str, Any] | None:
    """What a task claims of everything that it releases, and what it has spent; None where nobody adds noise."""
    if task.privacy is None or task.keeper is None:
        return None
    budget = task.privacy.budget
    return {
        "noise": task.settings.privacy.noise,
        "epsilon": budget.epsilon,
        "spent": task.keeper.ledger.spent().epsilon,
        "delta": budget.delta,
        "adjacency": budget.adjacency.value,
        "noise_multiplier": task.privacy.noise_multiplier,
        "participations": budget.participations,
        "buckets": task.settings.privacy.buckets,
        "honest_devices": task.settings.privacy.honest_devices,
    }


def secrecy_of(task: Task, *, embedded: bool | None) -> dict[str, Any] | None:
    """How a task's updates are shared; None where this server sees them.

    Args:
        task: The task.
        embedded: Whether all aggregators are in this process, which then keeps nothing from its operator.
    """
    if task.sharing is None:
        return None
    pinned = task.sharing.pinned
    return {
        "threshold": pinned.threshold,
        "num_aggregators": pinned.num_aggregators,
        "field": pinned.field,
        "packing": pinned.packing,
        "suite": task.sharing.suite.value,
        "checks": pinned.checking.value,
        "minimum_cohort": pinned.min_cohort,
        "embedded": embedded,
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
