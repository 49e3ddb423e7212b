"""The one place where an error becomes HTTP: problem+json with a stable type [RFC 9457]."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from client_sdk.protocol.errors import PROBLEM_PREFIX, PocketfedError, ProtocolError, UploadOffsetMismatch
from client_sdk.protocol.messages import Problem, RetryWindow

_log = logging.getLogger("pocketfed.http")
MEDIA_TYPE = "application/problem+json"


def problem_of(error: Exception, default_retry: tuple[float, float]) -> Problem:
    """Describe an error; what was not raised on purpose is told without its details."""
    if isinstance(error, ProtocolError):
        window = error.retry_after_s or (default_retry if error.retryable else None)
        retry = None if window is None else RetryWindow(min_s=window[0], max_s=window[1])
        return Problem(
            type=error.type_uri,
            title=error.title,
            status=error.http_status,
            detail=error.detail,
            retry=retry,
            offset=error.offset if isinstance(error, UploadOffsetMismatch) else None,
        )
    if isinstance(error, HTTPException):
        slug = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "http-error")
        return Problem(type=PROBLEM_PREFIX + slug, title=str(error.detail), status=error.status_code)
    if isinstance(error, PocketfedError):
        return Problem(type=PROBLEM_PREFIX + "server-error", title="The server failed.", status=500, detail=str(error))
    return Problem(type=PROBLEM_PREFIX + "server-error", title="The server failed.", status=500)


def problem_response(error: Exception, default_retry: tuple[float, float] = (2.0, 10.0)) -> Response:
    """The HTTP answer that states an error."""
    problem = problem_of(error, default_retry)
    if problem.status >= 500 and not isinstance(error, ProtocolError):
        _log.error("a request failed unexpectedly", exc_info=error)
    headers = {}
    if problem.retry is not None:
        headers["retry-after"] = str(math.ceil(problem.retry.min_s))
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, status_code=problem.status, media_type=MEDIA_TYPE, headers=headers)


def install(app: FastAPI) -> None:
    """Route every error of the app through ``problem_response``."""

    async def handle(_request: Request, error: Exception) -> Response:
        return problem_response(error)

    app.add_exception_handler(PocketfedError, handle)
    app.add_exception_handler(HTTPException, handle)
    app.add_exception_handler(Exception, handle)
