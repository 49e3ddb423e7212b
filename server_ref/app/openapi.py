"""The OpenAPI entries of the device routes, written by hand because those routes read raw bodies."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.messages import (
    REPORT_TENSOR,
    AbandonRequest,
    Assigned,
    Assignment,
    CheckInReply,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    F32Encoding,
    ModelReply,
    Problem,
    ReportFacts,
    ReportReply,
    UploadReply,
    UploadRequest,
)
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from server_ref.uploads import MAX_CHUNK_BYTES

_REF = "#/components/schemas/{model}"
_ID = "0123456789abcdef0123456789abcdef"
_HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_SIGNATURE_HEADERS: dict[str, Any] = {
    "content-digest": {"description": "Of the reply's body (RFC 9530)", "schema": {"type": "string"}},
    "signature-input": {
        "description": 'reply=("@status" "content-digest" "signature";req;key="sig1");keyid="SERVER KEY";alg="ed25519"',
        "schema": {"type": "string"},
    },
    "signature": {"description": "reply=:BASE64:", "schema": {"type": "string"}},
}
_SIGNED: list[dict[str, list[str]]] = [{"deviceSignature": []}]

_ASSIGNMENT = Assignment(
    assignment_id=_ID,
    assignment_number=17,
    task_id=_ID,
    round_id=3,
    model_version=3,
    model_sha256=_HASH,
    program_sha256=_HASH,
    manifest_sha256=_HASH,
    parameter_table_sha256=_HASH,
    kind=UpdateKind.DELTA,
    encoding=F32Encoding(max_abs=1024.0),
    weight=20,
    plan=TrainingPlan(),
    shuffle_seed=4503599627370495,
    lease_s=600.0,
    max_report_bytes=269104,
)
_EXAMPLES: dict[type, dict[str, Any]] = {
    EnrolRequest: EnrolRequest(public_key=_HASH).model_dump(mode="json"),
    EnrolReply: {"device_id": _ID, "server_key": _HASH},
    CheckInRequest: CheckInRequest(num_samples=20).model_dump(mode="json", exclude_none=True),
    CheckInReply: CheckInReply(reply=Assigned(assignment=_ASSIGNMENT)).model_dump(mode="json"),
    ModelReply: ModelReply(
        task_id=_ID,
        model_version=3,
        model_sha256=_HASH,
        program_sha256=_HASH,
        manifest_sha256=_HASH,
        parameter_table_sha256=_HASH,
        plan=TrainingPlan(algorithm="maml", learning_rate=0.01, batch_size=8, meta=MetaPlan()),
    ).model_dump(mode="json"),
    AbandonRequest: {"reason": "interrupted"},
    UploadRequest: {"assignment_id": _ID, "num_bytes": 12000480, "sha256": _HASH},
    UploadReply: {"offset": 1048576, "max_chunk_bytes": MAX_CHUNK_BYTES},
    ReportReply: {"status": "accepted", "report_id": _ID, "assignment_id": _ID},
    Problem: {
        "type": "urn:pocketfed:problem:stale-report",
        "title": "The assignment's round is over.",
        "status": 409,
        "detail": f"assignment {_ID} is superseded",
    },
}


def _content(model: type, media_type: str = "application/json") -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": _REF.format(model=model.__name__)}, "example": _EXAMPLES[model]}}


def _operation(
    summary: str,
    *,
    request: type | None = None,
    reply: type | None = None,
    signed: bool = True,
    parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": ["devices"],
        "summary": summary,
        "responses": {
            "200": {"description": "Done", "content": _content(reply)} if reply else {"description": "Done"},
            "default": {"description": "Refused", "content": _content(Problem, "application/problem+json")},
        },
        "parameters": parameters or [],
    }
    if request is not None:
        operation["requestBody"] = {"required": True, "content": _content(request)}
    if signed:
        operation["security"] = _SIGNED
        for response in operation["responses"].values():
            response["headers"] = _SIGNATURE_HEADERS
    return operation


def _path_parameter(name: str, pattern: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": pattern}}


_REPORT_ID = _path_parameter("report_id", "^[0-9a-f]{32}$")


def _upload_paths() -> dict[str, Any]:
    """A report in chunks."""
    chunk = _operation(
        "Send a report's bytes from an offset on",
        reply=UploadReply,
        parameters=[_REPORT_ID, _path_parameter("offset", "^[0-9]{1,18}$")],
    )
    chunk["requestBody"] = {
        "required": True,
        "description": f"At most {MAX_CHUNK_BYTES} bytes of the frame. Content-Length is required.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
    announce = _operation(
        "Announce a report that comes in chunks, or ask where it stands",
        request=UploadRequest,
        reply=UploadReply,
        parameters=[_REPORT_ID],
    )
    complete = _operation(
        "Deliver a report that came in chunks; repeating it is harmless",
        request=UploadRequest,
        reply=ReportReply,
        parameters=[_REPORT_ID],
    )
    return {
        "/v1/reports/{report_id}/upload": {"post": announce},
        "/v1/reports/{report_id}/upload/{offset}": {"put": chunk},
        "/v1/reports/{report_id}/complete": {"post": complete},
    }


def _device_paths() -> dict[str, Any]:
    report = _operation(
        "Upload a report; repeating it with the same id is harmless",
        reply=ReportReply,
        parameters=[_REPORT_ID],
    )
    report["requestBody"] = {
        "required": True,
        "description": (
            f"A canonical safetensors frame with one float32[d] tensor named `{REPORT_TENSOR}` and the ReportFacts "
            f"schema as its metadata. An empty frame has {len(encode_frame({}))} bytes. Content-Length is required."
        ),
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary", "x-metadata-schema": _REF.format(model="ReportFacts")}
            }
        },
    }
    abandon = _operation(
        "Give an assignment back",
        request=AbandonRequest,
        parameters=[_path_parameter("assignment_id", "^[0-9a-f]{32}$")],
    )
    abandon["responses"]["204"] = abandon["responses"].pop("200")
    blob = _operation(
        "Download a model, program or manifest by content hash",
        signed=False,
        parameters=[
            _path_parameter("sha256", "^[0-9a-f]{64}$"),
            {"name": "range", "in": "header", "schema": {"type": "string"}, "example": "bytes=65536-"},
        ],
    )
    blob["responses"]["200"]["content"] = {"application/octet-stream": {"schema": {"type": "string"}}}
    blob["responses"]["206"] = {"description": "The requested range"}
    blob["responses"]["304"] = {"description": "If-None-Match named this hash"}
    return {
        "/v1/devices": {"post": _operation("Enrol a device by its public key", request=EnrolRequest, reply=EnrolReply)},
        "/v1/check-ins": {
            "post": _operation(
                "Offer to work: an assignment, a wait, or the end", request=CheckInRequest, reply=CheckInReply
            )
        },
        "/v1/model": {"get": _operation("The newest model, without being given work", reply=ModelReply)},
        "/v1/assignments/{assignment_id}/abandon": {"post": abandon},
        "/v1/blobs/{sha256}": {"get": blob},
        "/v1/reports/{report_id}": {"put": report},
        **_upload_paths(),
    }


def install(app: FastAPI) -> None:
    """Make ``app.openapi()`` describe the device routes beside the generated ones."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            models = [(m, "validation") for m in (*_EXAMPLES, ReportFacts)]
            _, schemas = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]  # list is invariant
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas["$defs"])
            components["securitySchemes"] = {
                "deviceSignature": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "signature",
                    "description": "HTTP Message Signature (RFC 9421), Ed25519, over @method, @path, content-digest; "
                    "the reply is signed too, over @status, content-digest and the request's signature",
                }
            }
            document["paths"] = {**_device_paths(), **document["paths"]}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]  # the documented way to extend the schema
