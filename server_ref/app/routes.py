"""What anybody may read: the task, its history, health and metrics."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Response

from server_ref.coordinator import Coordinator
from server_ref.metrics import CONTENT_TYPE


def public_router(coordinator: Coordinator) -> APIRouter:
    """What anybody may read: the task, its history, health and metrics."""
    router = APIRouter()

    @router.get("/v1/task", tags=["status"], summary="The task and where it stands")
    async def task() -> dict[str, object]:
        return await asyncio.to_thread(coordinator.describe)

    @router.get("/v1/rounds", tags=["status"], summary="Committed rounds, oldest first")
    async def rounds(
        since: Annotated[int, Query(ge=0, le=2**53, description="first round to list")] = 0,
    ) -> list[dict[str, object]]:
        return await asyncio.to_thread(coordinator.history, since)

    @router.get("/health", tags=["operation"], summary="The process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready", tags=["operation"], summary="The process can serve: its database answers")
    async def ready() -> Response:
        is_ready = await asyncio.to_thread(coordinator.is_ready)
        return Response(
            '{"status":"ready"}' if is_ready else '{"status":"unavailable"}',
            status_code=200 if is_ready else 503,
            media_type="application/json",
        )

    @router.get("/metrics", tags=["operation"], summary="Prometheus metrics")
    async def metrics() -> Response:
        await asyncio.to_thread(coordinator.refresh_metrics)
        return Response(coordinator.metrics.render(), media_type=CONTENT_TYPE)

    return router
